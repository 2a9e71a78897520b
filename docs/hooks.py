"""Run the tutorial's code when the documentation is built, and show the pictures that it saves."""

import contextlib
import io
import os
import re
import tempfile
from pathlib import Path

import matplotlib
from mkdocs.structure.files import File

PAGE = Path(__file__).parent / "tutorial.md"


def on_files(files, config):
    """Add the pictures to the site."""
    with tempfile.TemporaryDirectory() as folder:
        _run(folder)
        for picture in sorted(Path(folder).glob("*.png")):
            made = File.generated(config, picture.name, content=picture.read_bytes())
            files.append(made)
    return files


def _run(folder):
    """Run the page's code blocks, one after the other, in a folder of their own."""
    matplotlib.use("Agg")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    names, before = {}, os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            for block in blocks:
                exec(compile(block, str(PAGE), "exec"), names)
    finally:
        os.chdir(before)
