"""Data sets of fine-grained classes, as their authors' archives lie on disk.

Each reader returns a table of images, one row each: path, class, split ("train" or "test"), and the
box of the object x0, y0, x1, y1, half-open, in pixels of the photo, turned upright. Nothing is
downloaded.
"""

from protoclf.fine_grained.cars import read_cars
from protoclf.fine_grained.cub import read_cub
from protoclf.fine_grained.dogs import read_dogs

__all__ = ["read_cars", "read_cub", "read_dogs"]
