"""The site builds without a warning; gallery and notebook run; figures are of the rows; quoted messages exist."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from scripts.draw_figures import main
from tests.pages import run
from tests.sources import ROOT, library_modules

DOCS = ROOT / "docs"
EXAMPLES = sorted([*DOCS.glob("gallery/*.py"), *DOCS.glob("notebooks/*.ipynb")])


def cells(notebook: Path) -> list[str]:
    """The sources of its code cells."""
    found = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_examples_run(tmp_path: Path, example: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes", target_is_directory=True)
    script = tmp_path / f"{example.stem}.py"
    script.write_text("\n".join(cells(example)) if example.suffix == ".ipynb" else example.read_text())
    code, said = run(script)
    assert code == 0, said


def test_a_notebook_has_ten_cells_and_no_outputs() -> None:
    assert [len(cells(path)) for path in EXAMPLES if path.suffix == ".ipynb"] == [10]
    assert all('"outputs": []' in path.read_text() for path in EXAMPLES if path.suffix == ".ipynb")


def test_the_gallery_shows_all_of_its_examples() -> None:
    shown = re.findall(r"literalinclude} (.+)", (DOCS / "gallery" / "index.md").read_text())
    assert sorted(shown) == sorted(path.name for path in EXAMPLES if path.suffix == ".py")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Python's, of Sphinx's own code; those of Sphinx are errors by -W
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """All pages, links and docstrings are read; HTML, which has no more rules, is not written."""
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package, reason="needs the extra docs")
    from sphinx.cmd.build import main as build

    assert build(["-q", "-W", "--keep-going", "-b", "dummy", str(DOCS), str(tmp_path)]) == 0


def test_the_figures_are_those_of_the_rows(tmp_path: Path) -> None:
    """Otherwise draw them again: ``python -m scripts.draw_figures``."""
    main(tmp_path)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert drawn == {path.name: path.read_text() for path in (DOCS / "figures").iterdir()}


def messages() -> str:
    """All texts of the library; a value within one is a brace."""
    texts = []
    for path in library_modules().values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr | ast.Constant):
                parts = node.values if isinstance(node, ast.JoinedStr) else [node]
                texts.append("".join(str(part.value) if isinstance(part, ast.Constant) else "{" for part in parts))
    return "\n".join(texts)


def test_troubleshooting_quotes_messages_that_exist() -> None:
    page = (DOCS / "troubleshooting.md").read_text()
    quoted = re.findall(r"^### `(.+)`$", page, re.MULTILINE)
    assert len(quoted) == page.count("\n### ") >= 20
    known = messages()
    assert not [text for text in quoted if text not in known]
