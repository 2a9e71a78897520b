"""Files that are not read again, and those that have to be."""

import os
import time
from pathlib import Path

import pytest

from protoclf import file_digests
from protoclf.file_digests import file_digest, known_digest


@pytest.fixture
def reads(monkeypatch):
    """Which files were read, in order."""
    read, names = Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda path: names.append(path.name) or read(path))
    monkeypatch.setattr(file_digests, "_known", {})
    return names


@pytest.fixture
def all_settled(monkeypatch):
    monkeypatch.setattr(file_digests, "_SETTLED", -(10**9))


def digest_of(path):
    return file_digest(str(path), os.stat(path))


def write(path, data, like=None):
    """Write in place; with the time of the last change that a status says."""
    path.write_bytes(data)
    if like is not None:
        os.utime(path, ns=(like.st_atime_ns, like.st_mtime_ns))


@pytest.mark.skipif(os.name == "nt", reason="all files are read each time")
@pytest.mark.usefixtures("all_settled")
def test_a_file_that_stays_is_read_once(tmp_path, reads):
    write(tmp_path / "a", b"one")
    write(tmp_path / "b", b"one")
    assert known_digest(str(tmp_path / "a")) is None
    assert len({digest_of(tmp_path / name) for name in "abab"}) == 1
    assert known_digest(str(tmp_path / "a")) == digest_of(tmp_path / "b")
    assert reads == ["a", "b"]


@pytest.mark.usefixtures("reads", "all_settled")
@pytest.mark.parametrize("what", ["gone", "a folder", "no name"])
def test_what_is_no_file_any_more_has_no_digest(tmp_path, what):
    file = tmp_path / "a"
    write(file, b"one")
    digest_of(file)
    file.unlink()
    if what == "a folder":
        file.mkdir()
    assert known_digest("a\0b" if what == "no name" else str(file)) is None


@pytest.mark.usefixtures("reads", "all_settled")
@pytest.mark.parametrize("how", ["in place", "by another file", "by a link"])
def test_another_content_of_the_same_size_and_time_is_seen(tmp_path, how):
    file, other = tmp_path / "a", tmp_path / "b"
    write(file, b"one")
    before, status = digest_of(file), os.stat(file)
    time.sleep(0.05)  # longer than the grain of times
    write(file if how == "in place" else other, b"two", like=status)
    if how == "by another file":
        os.replace(other, file)
    if how == "by a link":
        file.unlink()
        file.symlink_to(other)
    assert os.stat(file).st_mtime_ns == status.st_mtime_ns
    assert known_digest(str(file)) is None
    assert digest_of(file) != before


def test_a_file_that_has_just_changed_is_read_again(tmp_path, reads):
    write(tmp_path / "a", b"one")
    status = os.stat(tmp_path / "a")
    first = file_digest(str(tmp_path / "a"), status)
    write(tmp_path / "a", b"two")
    assert file_digest(str(tmp_path / "a"), status) != first  # as if no time had changed
    assert reads == ["a", "a"]


@pytest.mark.usefixtures("all_settled")
@pytest.mark.skipif(os.name == "nt", reason="all files are read each time")
def test_of_too_many_the_first_are_remembered(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(file_digests, "_MOST_KNOWN", 2)
    for name in "abcd":
        write(tmp_path / name, name.encode())
    digests = [digest_of(tmp_path / name) for name in "abcdabcd"]
    assert digests[:4] == digests[4:]
    assert len(file_digests._known) == 2
    assert reads == [*"abcd", *"cd"]
