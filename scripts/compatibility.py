"""Run the tests of loaders and trainers with other releases of the libraries, each set in a fresh environment.

    python -m scripts.compatibility newest here oldest --folder /tmp/environments [--torch 2.13.0]

``newest`` installs what the package index calls the newest, and ``oldest`` the lowest versions that pyproject.toml
allows. ``here`` is the environment that runs this script; that of the suite has the versions of constraints.txt. torch
has one version in those that are made, since an open range may bring gigabytes for GPUs. Each takes some minutes and
2 GB, and is removed afterwards. The tests are those marked ``loads`` and ``compatibility``.

It writes docs/results/compatibility.json and .md, and ``qat/tested_versions.json``: of each library the lowest and the
highest version with which all these tests passed. `qat.export` and `qat.verify` warn outside of it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from packaging.requirements import Requirement
from packaging.version import Version

from qat.compatibility import LIBRARIES, TESTED

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results" / "compatibility.json"
BEGIN = """# Releases that the tests passed with

`scripts/compatibility.py` installs a set of releases into a fresh environment and runs the tests that are marked
`loads` or `compatibility` there. This page and `qat/tested_versions.json` are what it found.

```bash
.venv/bin/python -m scripts.compatibility newest here --folder /tmp/environments
```

Without the lowest releases that pyproject.toml allows (`oldest`): pip found no set of them in ten minutes.
"""


def requirements(column: str, torch: str) -> list[str]:
    """What pip installs for a column: names alone, or the lowest versions of pyproject.toml but for what tests need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    parts: dict[str, list[Requirement]] = {
        name: [Requirement(text) for text in texts]
        for name, texts in {"": project["dependencies"], **project["optional-dependencies"]}.items()
        if name != "benchmark"
    }
    lowest: dict[str, Version] = {}
    for one in (one for part in parts.values() for one in part):
        lowest[one.name] = min(lowest.get(one.name, least(one)), least(one))
    apart = {name for name, part in parts.items() if any(least(one) > lowest[one.name] for one in part)}
    served = {one.name for name, part in parts.items() if name not in ("dev", "report", "digits") for one in part}
    chosen = {"torch": f"torch=={torch}"}
    for one in (one for part in parts.values() for one in part):
        if column == "oldest" and one.name in apart:
            continue
        pin = f"=={lowest[one.name]}" if column == "oldest" and one.name in served else ""
        extras = f"[{','.join(sorted(one.extras))}]" if one.extras else ""
        chosen.setdefault(one.name, f"{one.name}{extras}{pin}")
    return sorted(chosen.values())


def least(requirement: Requirement) -> Version:
    """The lower bound of a requirement; each has one."""
    return min(Version(one.version) for one in requirement.specifier if one.operator == ">=")


def run(column: str, folder: Path, torch: str) -> dict[str, Any]:
    """Install a set of releases, run the tests, and tell what they found."""
    place = folder / column
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    python = sys.executable
    try:
        if column != "here":
            venv.create(place, with_pip=True)
            python, asked = str(place / "bin" / "python"), requirements(column, torch)
            print("pip install", *asked, flush=True)
            subprocess.run([python, "-m", "pip", "install", "--quiet", *asked], check=True)
        command = [python, "-m", "pip", "list", "--format", "json"]
        listed = subprocess.run(command, check=True, capture_output=True, text=True)
        installed = {one["name"].lower(): one["version"] for one in json.loads(listed.stdout)}
        report = place / "report.xml"
        command = [python, "-m", "pytest", "-q", "-n", "0", "-m", "loads or compatibility", "-W", "default", "tests"]
        subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, check=False)
        return {
            "python": sys.version.split()[0],
            "versions": {name: installed[name] for name in LIBRARIES if name in installed},
            **outcome(report),
        }
    finally:
        shutil.rmtree(place, ignore_errors=True)


def outcome(report: Path) -> dict[str, Any]:
    """Counts of a junit report, and of each test that failed, the first line of its error."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = {
        f"{case.get('classname')}::{case.get('name')}": (found.get("message") or "").splitlines()[0][:200]
        for case in cases
        for kind in ("failure", "error")
        if (found := case.find(kind)) is not None
    }
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - len(failed) - skipped, "skipped": skipped, "failed": failed}


def ranges(columns: Mapping[str, Any]) -> dict[str, list[str]]:
    """Of each library the lowest and the highest version of the columns in which all passed."""
    good = [column["versions"] for column in columns.values() if column["passed"] and not column["failed"]]
    found = {
        name: sorted({Version(one[name]).public for one in good if name in one}, key=Version) for name in LIBRARIES
    }
    return {name: [versions[0], versions[-1]] for name, versions in found.items() if versions}


def page(columns: Mapping[str, Any]) -> str:
    """The page of results."""
    rows = [["library", *columns], ["---"] * (1 + len(columns))]
    rows += [["Python", *(column["python"] for column in columns.values())]]
    rows += [
        [name, *(column["versions"].get(name, "not installed") for column in columns.values())] for name in LIBRARIES
    ]
    for key in ("passed", "skipped"):
        rows.append([key, *(str(column[key]) for column in columns.values())])
    rows.append(["failed", *(str(len(column["failed"])) for column in columns.values())])
    lines = ["", *(f"| {' | '.join(row)} |" for row in rows)]
    for name, column in columns.items():
        if column["failed"]:
            lines += ["", f"Failed with the {name}:", ""]
            lines += [f"- `{test}`: {error}" for test, error in column["failed"].items()]
    return BEGIN + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("columns", nargs="+", choices=["newest", "here", "oldest"])
    parser.add_argument("--folder", type=Path, required=True, help="where environments are made, and removed again")
    parser.add_argument("--torch", default="2.13.0", help="the version of torch in all of them")
    options = parser.parse_args()
    columns = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for column in options.columns:
        columns[column] = run(column, options.folder.resolve(), options.torch)
        RESULTS.write_text(json.dumps(columns, indent=1) + "\n", encoding="utf-8")
        RESULTS.with_suffix(".md").write_text(page(columns), encoding="utf-8")
        TESTED.write_text(json.dumps(ranges(columns), indent=1) + "\n", encoding="utf-8")
    print(page(columns))


if __name__ == "__main__":
    main()
