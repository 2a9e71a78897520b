"""Many images at a time, in threads: decode them to the model's input, or check their files."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import TypeVar

import joblib
import numpy as np
import torch
from numpy.typing import ArrayLike

from protoclf.geometry import Preprocessing
from protoclf.image_errors import Failure, ImageError, reading_error
from protoclf.images import Images
from protoclf.picture import open_file, reason_for
from protoclf.progress import with_bar

T = TypeVar("T")

_MAX_THREADS = 8  # by default; beyond that the disk is what limits


def decode(
    images: Images,
    preprocessing: Preprocessing,
    indices: ArrayLike | None = None,
    out: torch.Tensor | None = None,
    show: bool = True,
    failures: list[Failure] | None = None,
) -> tuple[torch.Tensor, np.ndarray]:
    """Return images, or some of them, as the model's input (n, 3, S, S), and their sizes (n, 2).

    Sizes are width and height of the originals, upright. Large JPEGs are decoded at a reduced
    scale, so that pixels may differ by a little from those of ``preprocessing(images.open(i))``;
    the geometry is the same. Pixels are written to `out`, uint8 on the CPU, if it is given.

    Images that cannot be read are black where `failures` takes what is wrong with them. Otherwise
    an ImageError names them, after all were tried.
    """
    subset = images if indices is None else images.take(indices)
    n, side = len(subset), preprocessing.image_size
    if out is None:
        out = torch.empty((n, 3, side, side), dtype=torch.uint8, device="cpu")
    sizes = np.zeros((n, 2), dtype=np.int64)
    view = out.numpy()

    def work(i: int) -> Failure | None:
        try:
            stored = subset.read(i, side)
        except ImageError as error:
            view[i] = 0
            return error.failures[0]
        sizes[i] = stored.size
        view[i] = preprocessing.apply(stored)
        return None

    failed = [failure for failure in in_threads(work, n, "decoding images", show) if failure]
    if failures is not None:
        failures += failed
    elif failed:
        raise reading_error(failed)
    return out, sizes


def check_files(images: Images, show: bool = True) -> None:
    """Check every file quickly, without decoding: it is there, and its header is an image's.

    Errors are those of `decode`. Where X holds pixels there is nothing to check.
    """
    paths = images.paths
    if paths is None:
        return

    def work(i: int) -> Failure | None:
        try:
            open_file(paths[i]).close()
        except MemoryError:
            raise
        except Exception as error:
            return Failure(int(images.positions[i]), paths[i], reason_for(error))
        return None

    failed = [f for f in in_threads(work, len(paths), "checking files", show) if f]
    if failed:
        raise reading_error(failed)


def in_threads(work: Callable[[int], T], n: int, what: str = "", show: bool = False) -> list[T]:
    """Return work(0), ..., work(n - 1), computed in threads, behind a bar where to `show` it."""
    threads = _n_threads()
    size = max(1, min(64, n // (4 * threads)))
    starts = range(0, n, size)

    def chunk(start: int) -> list[T]:
        return [work(i) for i in range(start, min(start + size, n))]

    if threads == 1 or len(starts) < 2:
        return list(with_bar(chain.from_iterable(map(chunk, starts)), what, show, n))
    with ThreadPoolExecutor(min(threads, len(starts))) as pool:  # its own: safe under fork
        return list(with_bar(chain.from_iterable(pool.map(chunk, starts)), what, show, n))


def _n_threads() -> int:
    """No more than there are CPUs or than torch uses: workers must not crowd each other out."""
    # torch's own number is 1 in loader workers, and cut in joblib's
    return max(1, min(joblib.cpu_count(), torch.get_num_threads(), _MAX_THREADS))
