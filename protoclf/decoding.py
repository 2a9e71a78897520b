"""Many images at a time, in threads: decode them to the model's input, or check their files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import joblib
import numpy as np
import torch
from numpy.typing import ArrayLike
from tqdm import tqdm

from protoclf.geometry import Preprocessing
from protoclf.image_errors import Failure, ImageError, reading_error
from protoclf.images import Images
from protoclf.picture import open_file, reason_for

_MAX_THREADS = 8  # by default; beyond that the disk is what limits


def decode(
    images: Images,
    preprocessing: Preprocessing,
    indices: ArrayLike | None = None,
    out: torch.Tensor | None = None,
    progress: bool | None = None,
    failures: list[Failure] | None = None,
) -> tuple[torch.Tensor, np.ndarray]:
    """Decode images to the model's input, in threads.

    Large JPEGs are decoded at a reduced scale, so that pixels may differ by a little from those
    of ``preprocessing(images.open(i))``; the geometry is the same.

    Parameters
    ----------
    images : Images
    preprocessing : Preprocessing
    indices : array-like of n ints or boolean mask, optional
        Which images; all by default.
    out : torch.Tensor of shape (n, 3, S, S), uint8, on the CPU, optional
        Where to write.
    progress : bool, optional
        A progress bar on stderr; by default only where it takes longer than two seconds.
    failures : list of Failure, optional
        Where to put the images that cannot be read, which are then black.

    Returns
    -------
    pixels : torch.Tensor of shape (n, 3, S, S), uint8
    sizes : ndarray of shape (n, 2), int64
        Width and height of the originals, upright, in pixels.

    Raises
    ------
    ImageError
        After all were tried, naming those that cannot be read; not where `failures` takes them.
    """
    subset = images if indices is None else images.take(indices)
    n, side = len(subset), preprocessing.image_size
    pixels = _output(out, (n, 3, side, side))
    sizes = np.zeros((n, 2), dtype=np.int64)
    view = pixels.numpy()

    def work(i: int) -> Failure | None:
        try:
            stored = subset.read(i, side)
        except ImageError as error:
            view[i] = 0
            return error.failures[0]
        sizes[i] = stored.size
        view[i] = preprocessing.apply(stored)
        return None

    failed = _run(work, n, progress, "decoding images")
    if failures is not None:
        failures += failed
    elif failed:
        raise reading_error(failed)
    return pixels, sizes


def check_files(images: Images, progress: bool | None = None) -> None:
    """Check every file quickly, without decoding: it is there, and its header is an image's.

    Parameters and errors are those of `decode`. Where X holds pixels there is nothing to check.
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

    failed = _run(work, len(paths), progress, "checking files")
    if failed:
        raise reading_error(failed)


def _output(out: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor:
    if out is None:
        return torch.empty(shape, dtype=torch.uint8, device="cpu")
    if out.dtype != torch.uint8 or tuple(out.shape) != shape or out.device.type != "cpu":
        raise ValueError(
            f"out must be a uint8 tensor of shape {shape} on the CPU; got {out.dtype} of shape "
            f"{tuple(out.shape)} on {out.device}."
        )
    return out


def _run(
    work: Callable[[int], Failure | None],
    n: int,
    progress: bool | None,
    what: str,
) -> list[Failure]:
    """Call work(0), ..., work(n - 1) in threads; return all failures."""
    failures: list[Failure] = []
    delay = 0 if progress else 2  # seconds
    with tqdm(total=n, desc=what, delay=delay, disable=progress is False, leave=False) as bar:
        for found, done in _chunks(work, n):
            failures += found
            bar.update(done)
    return failures


def _chunks(work: Callable[[int], Failure | None], n: int) -> Iterator[tuple[list[Failure], int]]:
    """Yield (failures, number of images) as chunks are done, in order."""
    threads = _n_threads()
    size = max(1, min(64, n // (4 * threads)))

    def chunk(start: int) -> tuple[list[Failure], int]:
        part = range(start, min(start + size, n))
        return [failure for i in part if (failure := work(i))], len(part)

    starts = range(0, n, size)
    if threads == 1 or len(starts) < 2:
        yield from map(chunk, starts)
        return
    with ThreadPoolExecutor(min(threads, len(starts))) as pool:  # its own: safe under fork
        yield from pool.map(chunk, starts)


def in_threads(work: Callable[[int], None], n: int) -> None:
    """Call work(0), ..., work(n - 1), in as many threads as decode images by default."""
    for _ in _chunks(work, n):
        pass


def _n_threads() -> int:
    """No more than there are CPUs or than torch uses: workers must not crowd each other out."""
    # torch's own number is 1 in loader workers, and cut in joblib's
    return max(1, min(joblib.cpu_count(), torch.get_num_threads(), _MAX_THREADS))
