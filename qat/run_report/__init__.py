"""One HTML page about a run: results, curves, layers, bytes, samples and settings, from what the run left on the disk.

`read_run` gathers, `qat.run_report.figures` draws by matplotlib as SVG, and `qat.run_report.page` writes the page. The
page needs no network and no script. Figures take the colours of the page, so they suit a light and a dark screen and
paper. Nothing is trained or measured here: what no file says is left out.
"""

from __future__ import annotations

from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from qat.errors import ExportError
from qat.files.directory import as_path
from qat.files.whole import explained, whole_file
from qat.run_report.comparison import RunComparison, compare_runs
from qat.run_report.record import MARK, RunRecord, read_run

if TYPE_CHECKING:
    from qat.verification import VerifyReport

__all__ = ["RunComparison", "RunRecord", "compare_runs", "read_run", "write_report"]


def write_report(
    run: str | PathLike[str], output: str | PathLike[str] | None = None, *, verified: VerifyReport | None = None
) -> Path:
    """Write a page about a run, and return its path.

    Args:
        run: the directory of the export, as a recipe or `qat.export` wrote it. A recipe's results and logs beside it
            are shown too.
        output: the file; default ``<run>-report.html``, beside the directory. An older one is replaced.
        verified: what `qat.verify` returned for the directory, to be shown.

    Raises:
        LoadError: the directory is no export, or its files are not what the export wrote.
        ExportError: matplotlib is missing, ``output`` is there and no report, or the file cannot be written.

    >>> import tempfile, qat
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(256, 64))
    >>> _, _ = qat.prepare(model, qat.QuantSpec(weights="int4")), qat.freeze(model)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = qat.export(model, f"{folder}/run")
    ...     write_report(f"{folder}/run").name
    'run-report.html'
    """
    if find_spec("matplotlib") is None:
        raise ExportError("report: needs the package matplotlib, which is missing: pip install 'qat[report]'")
    record = read_run(run)
    directory = record.directory
    path = directory.with_name(f"{directory.name}-report.html") if output is None else as_path(output, ExportError)
    if not path.name:
        raise ExportError(f"output: {str(path)!r} names no file: give its name, as report.html")
    if output is not None:
        _require_replaceable(path)
    from qat.run_report.page import page

    text = page(record, verified)
    with whole_file(path) as made:
        made.write_text(text, encoding="utf-8")
    return path


def _require_replaceable(path: Path) -> None:
    if path.is_dir():
        raise ExportError(f"output: {str(path)!r} is a directory: name a file in it, as {str(path / 'report.html')!r}")
    if path.is_file():
        with explained(path), path.open(encoding="utf-8", errors="replace") as file:
            begins = file.read(1000)
        if MARK not in begins:
            raise ExportError(f"output: {str(path)!r} is there and no report of qat: choose another name, or remove it")
