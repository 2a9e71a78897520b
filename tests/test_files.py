"""Files that are written whole or not at all, and what stands behind them."""

import os

import pytest

from protoclf.files import replaced, with_checksum, without_checksum


def test_errors_name_the_file_that_is_meant(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"folder'$") as caught, replaced(tmp_path / "folder") as file:
        file.write_bytes(b"new")
    assert caught.value.filename == str(tmp_path / "folder")
    with (
        pytest.raises(OSError, match=r"No space left on device: '.*model\.onnx'"),
        replaced(tmp_path / "model.onnx"),
    ):
        raise OSError(28, "No space left on device")
    with pytest.raises(FileNotFoundError, match="elsewhere"), replaced(tmp_path / "model.onnx"):
        (tmp_path / "elsewhere").read_bytes()
    with pytest.raises(OSError, match=r"^no number$"), replaced(tmp_path / "model.onnx"):
        raise OSError("no number")
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("content", [b"", b"some bytes"])
def test_other_bytes_have_another_checksum(content):
    data = bytes(with_checksum(lambda stream: stream.write(content)))
    assert without_checksum(data) == content
    for damaged in (data[:-1], data + b"\0", bytes([data[0] ^ 1]) + data[1:], b""):
        with pytest.raises(ValueError, match="the checksum is that of other bytes"):
            without_checksum(damaged)
