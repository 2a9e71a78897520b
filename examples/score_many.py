"""Any number of images through a saved model, to Parquet files: restartable, in bounded memory.

    python examples/score_many.py MODEL IMAGES OUTPUT                # in this process
    python examples/score_many.py MODEL IMAGES OUTPUT --workers 2    # in two, by Dask
    python examples/score_many.py MODEL IMAGES OUTPUT --scheduler tcp://HOST:8786

MODEL is a folder that `clf.save` wrote. IMAGES is a folder, a text file with a path on each line,
or a CSV file with a column of paths. Each partition of the images gives one file in OUTPUT/sheets,
which is there whole or not at all; images that cannot be read are listed in OUTPUT/failures, with
the reason. The same command again goes on where it was stopped. Needs pyarrow, and for several
workers ``pip install "dask[distributed]"``.
"""

import argparse
import csv
import itertools
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from uuid import uuid4

import joblib
import score_partition
from pyarrow import parquet
from score_partition import Job, Part, digest_of, model_digest, score, written_whole
from tqdm import tqdm

from protoclf.datasets import IMAGE_EXTENSIONS


def main() -> None:
    args = arguments()
    images, n_images = digest_of(map(os.fsencode, image_paths(args)))
    if n_images == 0:
        raise SystemExit(f"{args.images} holds no images.")
    job = job_of(args)
    claim(
        Path(args.output, "job.json"),
        {"model": job.digest, "images": images, "partition": args.partition}
        | {"what": job.what, "classes": job.classes, "top": job.top}
        | ({"working folder": job.root} if any_relative(args) else {}),
    )
    if args.retry:
        for number in partitions(job, "failures"):
            job.file(job.what, number).unlink(missing_ok=True)
    finished = partitions(job, job.what)
    there = sum(min(args.partition, n_images - k * args.partition) for k in finished)
    todo = (part for part in parts(args) if part.number not in finished)
    n, busy, cpu, start = 0, 0.0, 0.0, time.perf_counter()
    with workers(args) as client, tqdm(total=n_images, initial=there, unit=" images") as bar:
        for n_part, seconds, of_processor in results(client, job, todo):
            n, busy, cpu = n + n_part, busy + seconds, cpu + of_processor
            bar.update(n_part)
        n_workers = sum(client.nthreads().values()) if client else 1
    print(f"{n} images in {time.perf_counter() - start:.1f} s, {there} were there already")
    failures = [job.file("failures", number) for number in partitions(job, "failures")]
    if failures:
        n_failed = sum(parquet.read_metadata(file).num_rows for file in failures)
        print(f"{n_failed} cannot be read: see {failures[0].parent}")
    if n:
        estimate(job, n_images, n / busy, cpu / n, n_workers)


def job_of(args: argparse.Namespace) -> Job:
    """Return the job, its folders as seen from anywhere on this file system."""
    threads = args.threads
    if threads is None and args.workers > 1 and args.scheduler is None:
        threads = max(1, joblib.cpu_count() // args.workers)
    return Job(
        model=os.path.abspath(args.model),
        digest=model_digest(args.model),
        backbone=args.backbone,
        root=os.getcwd(),
        output=os.path.abspath(args.output),
        what=args.what,
        classes=args.classes,
        top=args.top,
        threads=threads,
    )


@contextmanager
def workers(args: argparse.Namespace):
    """Give a client of a Dask cluster, or None for this process."""
    if args.workers == 1 and args.scheduler is None:
        yield None
        return
    try:
        from dask.distributed import Client, LocalCluster
    except ImportError as error:
        raise SystemExit('Several workers need Dask: pip install "dask[distributed]"') from error
    where = args.scheduler or LocalCluster(
        n_workers=args.workers, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
    )
    with nullcontext() if args.scheduler else where, Client(where) as client:
        client.upload_file(score_partition.__file__)  # workers that join later get it too
        yield client


def results(client, job: Job, todo: Iterator[Part]) -> Iterator[tuple[int, float, float]]:
    """Score partitions; two for each worker are on their way, however many there are."""
    if client is None:
        yield from (score(job, part) for part in todo)
        return
    from dask.distributed import as_completed

    running = as_completed()
    for part in todo:
        name = f"partition-{part.number}-{uuid4().hex}"  # Dask's errors show it
        running.add(client.submit(score, job, part, key=name))
        if running.count() >= 2 * max(1, sum(client.nthreads().values())):
            yield next(running).result()
    yield from (future.result() for future in running)


def estimate(job: Job, n_images: int, rate: float, cpu: float, n_workers: int) -> None:
    """Print what many images would take.

    `rate` is in images a second for one worker, `cpu` in processor seconds an image.
    """
    files = job.file(job.what, 0).parent.glob("part-*.parquet")
    size = sum(file.stat().st_size for file in files) / n_images  # bytes an image
    print(f"{rate:.1f} images a second for each of {n_workers} worker(s)")
    print(f"{1000 * cpu:.1f} ms of processor time and {size:.0f} bytes an image")
    for words, many in (("a million", 1e6), ("a billion", 1e9)):
        hours, core_hours = many / rate / n_workers / 3600, many * cpu / 3600
        print(
            f"{words} at this rate: {hours:,.1f} hours, {core_hours:,.1f} of processor time, "
            f"{many * size / 1e9:,.1f} GB"
        )


def partitions(job: Job, kind: str) -> set[int]:
    """Return the numbers of the partitions that have a file."""
    files = job.file(kind, 0).parent.glob("part-*.parquet")
    return {int(file.stem.removeprefix("part-")) for file in files}


def parts(args: argparse.Namespace) -> Iterator[Part]:
    """Yield the partitions; only one of them is in memory."""
    paths = image_paths(args)
    for number in itertools.count():
        some = list(itertools.islice(paths, args.partition))
        if not some:
            return
        yield Part(number, number * args.partition, some)


def image_paths(args: argparse.Namespace) -> Iterator[str]:
    """Yield the paths that a folder, a text file or a CSV file holds, in an order that stays."""
    source = Path(args.images)
    if source.is_dir():
        yield from images_below(source)
        return
    with open(source, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        if source.suffix.lower() != ".csv":
            yield from filter(None, (line.rstrip("\r\n") for line in file))
            return
        rows = csv.DictReader(file)
        if args.column not in (rows.fieldnames or ()):
            raise SystemExit(f"{source} has no column {args.column!r} but {rows.fieldnames}.")
        yield from filter(None, (row[args.column] for row in rows))


def any_relative(args: argparse.Namespace) -> bool:
    """Tell whether a path is meant as seen from the working folder."""
    paths = [args.images] if Path(args.images).is_dir() else image_paths(args)
    return any(not os.path.isabs(path) for path in paths)


def images_below(folder: Path) -> Iterator[str]:
    """Yield the images of a folder, at any depth, but for hidden ones."""
    for parent, folders, names in os.walk(folder, onerror=stop):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(IMAGE_EXTENSIONS) and not name.startswith("."):
                yield os.path.join(parent, name)


def stop(error: OSError) -> None:
    """Stop at a folder that cannot be read, which `os.walk` would pass over."""
    raise error


def claim(file: Path, facts: dict) -> None:
    """Write down what a folder is the output of, or stop if it is that of another job."""
    for leftover in file.parent.rglob(".*.parquet.*"):  # of a job that was killed
        leftover.unlink()
    if file.exists():
        known = json.loads(file.read_text())
        other = [name for name, value in facts.items() if known.get(name, ...) != value]
        if other:
            raise SystemExit(
                f"{file} was begun with other {' and '.join(other)}: give another OUTPUT, "
                "or remove this one."
            )
        return
    with written_whole(file) as temporary:
        temporary.write_text(json.dumps(facts, indent=1))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="folder of a saved model")
    parser.add_argument("images", help="folder, text file of paths, or CSV file")
    parser.add_argument("output", help="folder to write to")
    parser.add_argument("--column", default="path", help="of the CSV file")
    parser.add_argument("--what", choices=["sheets", "predictions"], default="sheets")
    parser.add_argument("--classes", choices=["predicted", "top2", "all"], default="predicted")
    parser.add_argument("--top", type=count, help="rows of each class; the others are summed up")
    parser.add_argument("--retry", action="store_true", help="partitions with failures once more")
    parser.add_argument("--partition", type=count, default=10_000, help="images in a file")
    parser.add_argument("--workers", type=count, default=1, help="processes on this machine")
    parser.add_argument("--scheduler", help="address of a Dask scheduler, in place of --workers")
    parser.add_argument("--threads", type=count, help="of torch in each worker; default: its share")
    parser.add_argument("--backbone", help="module.name of what makes a backbone of your own")
    return parser.parse_args()


def count(text: str) -> int:
    """Return a number of things, at least one."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


if __name__ == "__main__":
    main()
