"""What ``import qat`` offers, and what it costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module

import pytest

import qat
from tests.sources import LIBRARY, ROOT


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_no_large_package() -> None:
    large = {"lightning", "pytorch_lightning", "transformers", "diffusers", "optimum", "datasets", "torchmetrics"}
    loaded = run_python("import sys, qat; print(*sorted({name.partition('.')[0] for name in sys.modules}))").split()
    assert not large.intersection(loaded)


def test_import_costs_little_more_than_torch() -> None:
    code = "import time, torch; start = time.perf_counter(); import qat; print(time.perf_counter() - start)"
    # The least of three runs: noise only ever adds.
    assert min(float(run_python(code)) for _ in range(3)) < 0.3


def test_every_public_name_resolves() -> None:
    missing = [name for name in qat.__all__ if not hasattr(qat, name)]
    assert not missing
    assert set(qat.__all__) <= set(dir(qat))


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = qat.no_such_name  # type: ignore[attr-defined]


def test_the_stub_lists_the_public_names() -> None:
    stub = ast.parse((LIBRARY / "__init__.pyi").read_text())
    names: set[str] = set()
    for node in stub.body:
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("qat")):
            found = [alias.asname or alias.name for alias in node.names]
            names.update(import_module(node.module or "").__all__ if found == ["*"] else found)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
    assert names == {name for name in qat.__all__ if not name.startswith("__")}
