"""Which releases of other libraries the tests of loaders and trainers passed with.

``tested_versions.json`` is written by ``scripts/compatibility.py``, which runs these tests in fresh environments.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from packaging.version import InvalidVersion, Version

__all__ = ["LIBRARIES", "TESTED", "outside_tested"]

LIBRARIES = (
    *("torch", "transformers", "diffusers", "optimum-quanto", "compressed-tensors", "gguf", "safetensors"),
    *("lightning", "accelerate", "peft", "trl"),
)
"""Names of the packages whose versions count."""
TESTED = Path(__file__).with_name("tested_versions.json")
"""Of each package the lowest and the highest version that was tested."""


def outside_tested(tested: Mapping[str, Sequence[str]] | None = None) -> tuple[str, ...]:
    """A line for each installed package whose version is outside of the tested range.

    ``tested`` are the lowest and the highest version of each package; default: the library's own. Patches of the
    highest release count as tested, and so do builds such as ``+cpu``.

    >>> outside_tested({"torch": ("0.1", "0.2.3"), "not-installed": ("1", "2")})
    ('torch ... is outside of the tested versions 0.1 to 0.2.3',)
    """
    if tested is None:
        tested = json.loads(TESTED.read_text(encoding="utf-8"))
    found = []
    for package, (low, high) in tested.items():
        try:
            installed = metadata.version(package)
            version = Version(installed)
        except (metadata.PackageNotFoundError, InvalidVersion):
            continue
        if version < Version(low) or version.release[:2] > Version(high).release[:2]:
            versions = low if low == high else f"{low} to {high}"
            found.append(f"{package} {installed} is outside of the tested versions {versions}")
    return tuple(found)
