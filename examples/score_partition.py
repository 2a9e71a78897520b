"""What each worker of `score_many.py` does: one partition of the images, to one Parquet file."""

import functools
import hashlib
import os
import pydoc
import time
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from pyarrow import parquet

from protoclf import ProtoPNetClassifier
from protoclf.image_errors import ImageError
from protoclf.images import Images
from protoclf.model_files import MODEL, TENSORS

CHUNK = 256  # images whose rows are in memory at the same time
FAILURES = pa.schema([("sample", pa.int64()), ("path", pa.string()), ("reason", pa.string())])


class Job(NamedTuple):
    """What a worker has to know."""

    model: str  # folder
    digest: str  # of its files
    backbone: str | None  # "module.name" of what makes a backbone of one's own
    root: str  # folder that paths are relative to
    output: str
    what: str  # "sheets" or "predictions"
    classes: str
    top: int | None
    threads: int | None  # of torch; None leaves them as they are

    def file(self, kind: str, number: int) -> Path:
        """Return the file of a partition; `kind` is `what` or "failures"."""
        return Path(self.output, kind, f"part-{number:07}.parquet")


class Part(NamedTuple):
    """A partition."""

    number: int
    first: int  # position of its first image among all
    paths: list[str]


def score(job: Job, part: Part) -> tuple[int, float, float]:
    """Write what a partition gives; return its number of images, seconds, and processor seconds."""
    clf, schema = model_of(job)
    start, cpu, failed = time.perf_counter(), time.process_time(), []
    with written_whole(job.file(job.what, part.number)) as file:
        with parquet.ParquetWriter(file, schema) as writer:
            for i in range(0, len(part.paths), CHUNK):
                table, bad = scored(clf, job, part.first + i, part.paths[i : i + CHUNK])
                writer.write_table(pa.Table.from_pandas(table, schema, preserve_index=False))
                failed += bad
        write_failures(job.file("failures", part.number), failed)
    return len(part.paths), time.perf_counter() - start, time.process_time() - cpu


@functools.lru_cache(maxsize=1)
def model_of(job: Job) -> tuple[ProtoPNetClassifier, pa.Schema]:
    """Load the model, once in each process, and find out what its tables look like."""
    if model_digest(job.model) != job.digest:
        raise ValueError(f"{job.model} is another model here than where the job was started.")
    if job.threads:
        torch.set_num_threads(job.threads)
    own = job.backbone and pydoc.locate(job.backbone)
    clf = ProtoPNetClassifier.load(job.model, backbone=own() if own else None)
    clf.set_params(on_bad_image="skip")
    side = clf.preprocessing_.image_size
    empty = table_of(clf, job, [np.zeros((side, side, 3), np.uint8)])[:0]
    texts = [name for name in empty if name == "path" or empty[name].dtype.kind in "OU"]
    return clf, pa.Schema.from_pandas(empty.astype(dict.fromkeys(texts, "string")))


def table_of(clf: ProtoPNetClassifier, job: Job, X: list) -> pd.DataFrame:
    """Return sheets or predictions; an image that cannot be read has a row without an answer."""
    if job.what == "sheets":
        return clf.explain(X, classes=job.classes, top=job.top)
    probability = clf.predict_proba(X)  # (n, C)
    columns = {"class": clf.classes_[probability.argmax(1)], "probability": probability.max(1)}
    return pd.DataFrame({"sample": np.arange(len(X)), "path": None, **columns})


def scored(
    clf: ProtoPNetClassifier, job: Job, first: int, paths: list[str]
) -> tuple[pd.DataFrame, list[tuple]]:
    """Return the table of the images that can be read, and (sample, path, reason) of the others."""
    names = np.array([readable(path) for path in paths], dtype=object)
    table = table_of(clf, job, [os.path.join(job.root, name) for name in names])
    answered = table["probability"].notna()
    unread = set(table["sample"][~answered])
    table = table[answered]
    sample = table["sample"].to_numpy(np.int64)
    failed = []
    for i in np.setdiff1d(np.arange(len(paths)), sample):  # a class without weights has no rows
        reason = problem(os.path.join(job.root, paths[i])) or (
            "could be read the second time" if i in unread else None
        )
        failed += [(first + i, names[i], reason)] if reason else []
    return table.assign(sample=first + sample, path=names[sample]), failed


def problem(path: str) -> str | None:
    """Return why an image cannot be read, or None."""
    if path != readable(path):
        return "the name of the file is not UTF-8: give it another"
    try:
        Images([path]).open(0)
    except ImageError as error:
        return readable(error.failures[0].reason)
    return None


def readable(name: str) -> str:
    """Return a file name as text, where its bytes are not UTF-8 too."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def write_failures(file: Path, failed: list[tuple]) -> None:
    """Write the table of failures of a partition, where there are any."""
    if not failed:
        file.unlink(missing_ok=True)  # of an earlier try
        return
    columns = dict(zip(FAILURES.names, zip(*failed, strict=True), strict=True))
    with written_whole(file) as temporary:
        parquet.write_table(pa.table(columns, FAILURES), temporary)


@contextmanager
def written_whole(file: Path):
    """Give a hidden file to write to, which takes its name once all is on the disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{uuid4().hex}")
    yield temporary
    with open(temporary, "rb+") as written:
        os.fsync(written.fileno())
    os.replace(temporary, file)


def digest_of(pieces: Iterable[bytes]) -> tuple[str, int]:
    """Return a digest of byte strings, and their number."""
    digest, n = hashlib.sha256(), 0
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "little") + piece)
        n += 1
    return digest.hexdigest(), n


def model_digest(folder: str) -> str:
    """Return a digest of what a saved model computes with."""
    return digest_of(Path(folder, name).read_bytes() for name in (MODEL, TENSORS))[0]
