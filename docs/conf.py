"""The documentation site: Sphinx reads these pages as Markdown, and the docstrings of the library.

`./scripts/docs` builds it below build/site. The theme brings its fonts and scripts along: pages read well offline.
"""

import json
import re
from pathlib import Path
from typing import Any

project = "qat"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "qat"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
myst_heading_anchors = 4
smartquotes = False  # what is typed is what is shown
default_role = "code"  # docstrings mark code with one backtick, as Markdown does
autodoc_member_order = "bysource"


def as_restructured_text(app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]) -> None:
    """Mask what Napoleon and docutils would take for markup in the lines of a docstring."""
    lines[:] = [re.sub(r"'\*", r"'\\*", line).replace("Example::", "For example::") for line in lines]
    if what == "attribute" and lines:
        lines[0] = lines[0].replace(": ", " – ")  # what stands before a colon would be its type


def with_cells(app: Any, page: str, text: list[str]) -> None:
    """Put the cells of the notebook below its page."""
    if page == "notebook":
        cells = json.loads((Path(app.srcdir) / "notebooks" / "first_model.ipynb").read_text())["cells"]
        for cell in cells[1:]:
            lines = "".join(cell["source"])
            text[0] += f"\n{lines}\n" if cell["cell_type"] == "markdown" else f"\n```python\n{lines}\n```\n"


def setup(app: Any) -> None:
    """Tell Sphinx when to call the functions above; the first one comes before Napoleon."""
    app.connect("autodoc-process-docstring", as_restructured_text, priority=400)
    app.connect("source-read", with_cells)
