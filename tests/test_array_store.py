"""Arrays in a folder, written by several processes, found whole or not at all."""

import os
import stat
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import joblib
import numpy as np
import pytest

from protoclf.array_store import ArrayStore, folder_of

KEY = "00ff" * 8

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


@pytest.mark.parametrize("dtype", [np.float32, np.uint16, np.uint8])
def test_what_is_put_is_got(tmp_path, dtype):
    store = ArrayStore(tmp_path / "deep" / "store")
    assert store.get(KEY) is None
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    store.put(KEY, array)
    again = ArrayStore(tmp_path / "deep" / "store").get(KEY)
    assert again.dtype == dtype
    np.testing.assert_array_equal(again, array)


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"garbage" * 100])
def test_a_damaged_file_counts_as_missing(tmp_path, damage):
    store = ArrayStore(tmp_path)
    store.put(KEY, np.ones(1000))
    (file,) = tmp_path.rglob("*.npy")
    file.write_bytes(damage)
    assert store.get(KEY) is None
    store.put(KEY, np.zeros(3))
    assert store.get(KEY).shape == (3,)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.replace(b"), }", b"),  ", 1),
        lambda data: data.replace(b"<f8", b"<08", 1),
        lambda data: b"??" + data[2:],
        lambda data: data[:128] + bytes(len(data) - 128),  # a power cut
        lambda data: data[:500] + bytes([data[500] ^ 1]) + data[501:],
        lambda data: bytes(len(data)),
    ],
    ids=["header", "type", "first bytes", "zeros behind the header", "one bit", "zeros"],
)
def test_what_is_not_what_was_written_counts_as_missing(tmp_path, damage):
    store = ArrayStore(tmp_path)
    store.put(KEY, np.arange(1000.0))
    store.put_several(KEY, {"a": np.arange(1000.0), "b": np.ones(9)})
    assert set(store.get_several(KEY)) == {"a", "b"}
    files = [*tmp_path.rglob("*.npy"), *tmp_path.rglob("*.npz")]
    assert len(files) == 2
    for file in files:
        file.write_bytes(damage(file.read_bytes()))
    assert store.get(KEY) is None
    assert store.get_several(KEY) is None


def test_a_truncated_file_counts_as_missing(tmp_path):
    store = ArrayStore(tmp_path)
    store.put(KEY, np.ones(1000))
    (file,) = tmp_path.rglob("*.npy")
    file.write_bytes(file.read_bytes()[:-1])
    assert store.get(KEY) is None


def test_pickled_objects_are_not_loaded(tmp_path):
    store = ArrayStore(tmp_path)
    store.put(KEY, np.ones(3))
    (file,) = tmp_path.rglob("*.npy")
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert store.get(KEY) is None


def test_where_nothing_can_be_written_one_warning_says_so(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    store = ArrayStore(tmp_path)
    monkeypatch.setattr(np, "save", full)
    with pytest.warns(UserWarning, match="nothing more is kept .*No space left"):
        store.put(KEY, np.ones(3))
    store.put(KEY, np.ones(3))  # no second warning, which would be an error
    assert store.get(KEY) is None
    assert not [p for p in tmp_path.rglob("*") if stat.S_ISREG(os.stat(p).st_mode)]  # no remains


def test_a_folder_of_another_user_is_one_that_nothing_can_be_written_to(tmp_path, monkeypatch):
    store, look = ArrayStore(tmp_path / "theirs"), os.stat

    def closed(path, *args, **kwargs):
        if str(path).startswith(str(store.folder)):
            raise PermissionError(13, "Permission denied", str(path))
        return look(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", closed)
    monkeypatch.setattr(os, "stat", closed)
    with pytest.warns(UserWarning, match="nothing more is kept .*Permission denied"):
        store.put(KEY, np.ones(3))
    assert store.get(KEY) is None


def test_threads_that_cannot_write_warn_once(tmp_path, monkeypatch):
    together = threading.Barrier(4)

    def full(*_, **__):
        together.wait(timeout=60)
        raise OSError(28, "No space left on device")

    store = ArrayStore(tmp_path)
    monkeypatch.setattr(np, "save", full)
    with ThreadPoolExecutor(4) as pool, pytest.warns(UserWarning, match="nothing more") as caught:
        list(pool.map(lambda i: store.put(f"{i}{KEY}", np.ones(3)), range(4)))
    assert len(caught) == 1


def test_a_file_that_another_process_has_open_is_left_as_it_is(tmp_path, monkeypatch):
    store, replace = ArrayStore(tmp_path), os.replace

    def on_windows(source, target):
        if os.path.exists(target):
            raise PermissionError(13, "Access is denied", source)
        replace(source, target)

    monkeypatch.setattr(os, "replace", on_windows)
    for _ in range(2):  # a warning would be an error
        store.put(KEY, np.ones(3))
    store.put_several(KEY, {"a": np.ones(4)})
    assert store.get(KEY).shape == (3,)
    assert store.get_several(KEY)["a"].shape == (4,)
    assert len([p for p in tmp_path.rglob("*") if p.is_file()]) == 2  # no remains


def write(folder, number):
    store = ArrayStore(folder)
    for round_ in range(20):
        store.put(KEY, np.full(5000, 7.0))
        found = store.get(KEY)
        if found is None or not (found == 7).all():
            return f"{number}: {round_}"
    return None


def test_processes_may_write_at_the_same_time(tmp_path):
    with ProcessPoolExecutor(2) as pool:
        assert list(pool.map(write, [tmp_path] * 4, range(4))) == [None] * 4


def test_folder_of(tmp_path):
    assert folder_of(None) is None
    assert folder_of(str(tmp_path)) == folder_of(tmp_path) == tmp_path / "protoclf-cache"
    assert folder_of(joblib.Memory(tmp_path, verbose=0)) == tmp_path / "protoclf-cache"
    assert folder_of(joblib.Memory(None)) is None
