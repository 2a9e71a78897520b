"""The code blocks of README and docs run as they stand, and so do the docstrings' examples."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import matplotlib
import pytest

import protoclf

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = [m.name for m in pkgutil.walk_packages(protoclf.__path__, "protoclf.")]


def code_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def marked(page):
    fast = page.name in ("README.md", "saving.md", "images.md")
    return pytest.param(page, id=page.name, marks=[] if fast else [pytest.mark.slow])


@pytest.mark.filterwarnings("ignore:.*distinct patches only:UserWarning")
@pytest.mark.parametrize("page", [marked(p) for p in PAGES if code_blocks(p)])
def test_code_blocks_run_in_their_order(page, tmp_path, monkeypatch, capsys):
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in code_blocks(page):
        exec(compile(block, str(page), "exec"), names)
    assert capsys.readouterr().out


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("nav:")[1]
    missing = [p.name for p in (ROOT / "docs").glob("*.md") if p.name not in navigation]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_no_figures_are_left_to_fill_in(page):
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"^[A-Z_]{6,}$|\bTODO\b|\bTBD\b", text, re.M) == []


@pytest.mark.filterwarnings("ignore:.*distinct patches only:UserWarning")
@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_hold(name):
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_readme_names_its_two_commands_for_ci():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^python3 -m venv \.venv .*$", readme, re.M)
    assert len(commands) == 2
    assert "examples/quickstart.py" in commands[0]
    assert "pytest" in commands[1]


def test_the_first_page_of_the_docs_leads_to_all_others():
    pages = {path.name for path in PAGES[1:]} - {"index.md"}
    linked = set(re.findall(r"\]\((\w+\.md)", (ROOT / "docs" / "index.md").read_text()))
    assert linked == pages
