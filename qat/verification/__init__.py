"""`verify`: does a directory give back, through the target's own loader, exactly what was frozen?

Four questions, each answered by checks of their own in the report:

1. *files*, *keys*: is what lies on disk what was written? Hashes against the manifest; then keys, dtypes, packed
   shapes and alignment from the headers, before any loader runs: stock loaders are lenient, and a misaligned file
   can end the process.
2. *load*, *layers*, *tensors*: does the target's own loader (quanto's, or transformers with the plug-in) rebuild every
   layer's codes, scale, shift and dequantized weight, by the digests that freezing left, and every other tensor?
   Is the *metadata* of a GGUF file that of the configuration and the tokenizer, by which no such loader computes?
3. *outputs*: does the reloaded model answer the stored example with the frozen model's numbers? Bit for bit where the
   environment is that of the export; elsewhere sums may round differently, and a stated tolerance holds.
4. *reference layers*, *reference outputs*: with the live model at hand, the same directly, with how much differs.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from qat.adapters import without_peft
from qat.compatibility import outside_tested
from qat.errors import LoadError, StateError, UnjudgedError, VerifyError
from qat.files.directory import as_path
from qat.files.evidence import FrozenRecord, frozen_record
from qat.files.examples import read_example
from qat.files.manifest import Environment, ExampleRecord, Manifest
from qat.hosts import get_target
from qat.hosts.base import Reloaded
from qat.hosts.stock import stock_reload
from qat.hosts.targets import MODULE
from qat.loading import before_loading, fill, skeleton
from qat.tensors import TOLERANCE, meta_names, model_device
from qat.untrusted import read_trusted
from qat.verification.comparison import layer_faults, made_float, reference_faults, tensor_faults, value_faults
from qat.verification.outputs import compute_outputs, output_faults

__all__ = ["Check", "VerifyReport", "verify"]

_SHOWN = 6


@dataclass(frozen=True)
class Check:
    """One question that verification asked, and the answer."""

    name: str
    passed: bool
    detail: str
    asked: bool = True
    """Whether it could be asked at all."""


@dataclass(frozen=True)
class VerifyReport:
    """All checks of one directory; prints as a table."""

    directory: str
    target: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for ``--json``."""
        return {**asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        width = max((len(check.name) for check in self.checks), default=0)
        lines = [f"{self.directory} (target {self.target!r}): {'verified' if self.ok else 'NOT what was frozen'}"]
        for check in self.checks:
            detail = check.detail.replace("\n", "\n" + " " * (width + 12))
            answer = "FAILED" if not check.passed else "ok" if check.asked else "-"
            lines.append(f"  {check.name:{width}}  {answer:6}  {detail}")
        return "\n".join(lines)


def verify(
    directory: str | PathLike[str],
    reference: nn.Module | None = None,
    inputs: Any = None,
    *,
    model: nn.Module | None = None,
    fresh_process: bool = False,
) -> VerifyReport:
    """Check an exported directory against the evidence that freezing left, and against the live model if given.

    Args:
        directory: what `qat.export` wrote.
        reference: the live frozen model, compared directly.
        inputs: example inputs for ``reference``; default the stored ones.
        model: a float model of the exported architecture, for directories without ``config.json``; it is copied.
        fresh_process: check the directory in a process of its own; ``reference`` is compared in this one.

    Raises:
        VerifyError: when a check fails; the message is the report, which is also its attribute ``report``.
        LoadError: when the directory is missing, or its manifest cannot be read.
        UnjudgedError: when there is nothing to build the model from, so that neither a yes nor a no is known.
        StateError: when ``inputs`` come without a reference, or the reference was never frozen.

    >>> import copy, tempfile, qat
    >>> model = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> architecture = copy.deepcopy(model)
    >>> _, _ = qat.prepare(model, qat.QuantSpec(weights="int4")), qat.freeze(model)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = qat.export(model, folder)
    ...     qat.verify(folder, model=architecture).ok
    True
    """
    if inputs is not None and reference is None:
        raise StateError("inputs: are run through the live model too, got none: pass reference=<the frozen model>")
    if fresh_process and model is not None:
        raise StateError("model: cannot be handed to a fresh process; verify in this one (fresh_process=False)")
    if reference is not None:
        reference = without_peft(reference)
        frozen_record(reference)
    path = as_path(directory, LoadError)
    manifest = read_trusted(path)
    checks: list[Check] = []
    if fresh_process:
        checks += _in_fresh_process(path)
    if not fresh_process or (reference is not None and all(check.passed for check in checks)):
        own = tuple(_checks(path, manifest, reference, inputs, model))
        known = {check.name for check in checks}
        checks += [check for check in own if check.name not in known or not check.passed]
    report = VerifyReport(str(directory), manifest.target, tuple(checks))
    if not report.ok:
        failure = VerifyError(str(report))
        failure.report = report
        raise failure
    return report


def _in_fresh_process(directory: Path) -> tuple[Check, ...]:
    # -P and no empty entry of PYTHONPATH: a module in the current folder takes the place of no library's. The folder
    # of this qat comes last: in a checkout it is the current folder too.
    start = f"import sys; sys.path.append({str(Path(__file__).parents[2])!r}); from qat.cli import main; main()"
    command = [sys.executable, "-P", "-c", start, "verify", str(directory), "--json"]
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    try:
        return TypeAdapter(VerifyReport).validate_json(done.stdout).checks
    except ValidationError:
        said = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-30:])
        if done.returncode in (2, 3):  # a mistake of the user's, or what cannot be judged there, told by the process
            raise (LoadError, UnjudgedError)[done.returncode - 2](said.removeprefix("error: ")) from None
        ended = f"was ended by signal {-done.returncode}" if done.returncode < 0 else f"ended with {done.returncode}"
        raise VerifyError(f"the verifying process for {str(directory)!r} {ended}:\n{said}") from None


def _checks(
    directory: Path, manifest: Manifest, reference: nn.Module | None, inputs: Any, model: nn.Module | None
) -> Iterator[Check]:
    record, format = manifest.frozen, get_target(manifest.target).format
    filled = model if get_target(manifest.target).host is MODULE else None  # which other loaders build themselves
    for name, faults, good in before_loading(directory, manifest, filled, hashes=True):
        yield _check(name, faults, good)
        if faults:
            return  # a loader could answer with garbage, or end the process
    try:
        loaded, loader = _reload(directory, manifest, model)
    except UnjudgedError:
        raise
    except Exception as error:  # a stock loader can fail in any way
        yield Check("load", False, f"the target's own loader failed: {type(error).__name__}: {error}")
        return
    faults = [f"{name} is on the meta device: it was never loaded" for name in meta_names(loaded)]
    yield _check("load", faults, loader)
    if faults:
        return
    floats = made_float(loaded, record, format) if get_target(manifest.target).host.keeps_packed else record
    held = _filled(directory, manifest, model) if floats.layers else loaded
    try:
        contents = tuple(_contents(loaded, held, floats, directory, manifest))
    except Exception as error:  # a configuration may have made layers that the loader's own arithmetic cannot compute
        yield Check("layers", False, f"what was loaded cannot be compared: {type(error).__name__}: {error}")
        return
    yield from contents
    if reference is not None:  # before any forward: a loader may turn codes into floats then
        faults = list(reference_faults(loaded, held, reference, record, format, codes_only=manifest.float_grid))
        yield _check("reference layers", faults, f"{len(record.layers)} layers and all else equal the live ones")
    if manifest.example is not None:
        yield _stored_outputs(loaded, directory, manifest, manifest.example)
    if reference is not None:
        yield from _reference_outputs(loaded, reference, directory, manifest, inputs)


def _contents(
    loaded: nn.Module, held: nn.Module, floats: FrozenRecord, directory: Path, manifest: Manifest
) -> Iterator[Check]:
    """What a reloaded model holds; of ``floats``, layers that the loader made float, ``held`` has the codes."""
    record, target = manifest.frozen, get_target(manifest.target)
    packed = {name: layer for name, layer in record.layers.items() if name not in floats.layers}
    faults = layer_faults(loaded, replace(record, layers=packed), target.format, codes_only=manifest.float_grid)
    if floats.layers:
        faults += layer_faults(held, record, target.format, codes_only=manifest.float_grid)
    faults += [] if record.layers else ["no layer is quantized: freeze and export the model that qat.prepare was given"]
    what = "codes" if manifest.float_grid else "codes, scale, shift and dequantized weight"
    yield _check("layers", faults, f"{len(record.layers)} layers: {what} equal those of freezing")
    if floats.layers:
        faults = value_faults(loaded, floats)
        yield _check("values", faults, f"{len(floats.layers)} float layers of that loader hold the trained values")
    faults, count = tensor_faults(loaded, manifest, record, target.format)
    yield _check("tensors", faults, f"{count} other tensors equal those exported")
    if untested := outside_tested():
        yield Check("versions", True, "\n".join(untested), asked=False)
    if (wrong := target.host.container.metadata_faults(held, directory, manifest)) is not None:
        yield _check("metadata", wrong, "every field is that of config.json and the tokenizer")


def _reload(directory: Path, manifest: Manifest, model: nn.Module | None) -> Reloaded:
    """Load by the target's own loader; by ours for a format that has no other."""
    reloaded = stock_reload(directory, manifest, model)
    if reloaded is not None:
        return reloaded
    return Reloaded(_filled(directory, manifest, model), "qat.load, the only loader of this target")


def _filled(directory: Path, manifest: Manifest, model: nn.Module | None) -> nn.Module:
    """What our own loader makes of the files."""
    loaded = skeleton(directory, manifest) if model is None else copy.deepcopy(model)
    fill(loaded, directory, manifest, torch.device("cpu"))
    return loaded.eval()


def _check(name: str, faults: Sequence[str], good: str) -> Check:
    if not faults:
        return Check(name, True, good)
    more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
    return Check(name, False, "\n".join([*faults[:_SHOWN], *more]))


def _stored_outputs(model: nn.Module, directory: Path, manifest: Manifest, example: ExampleRecord) -> Check:
    threads = torch.get_num_threads()
    try:
        inputs, wanted = read_example(directory, example)
        torch.set_num_threads(manifest.environment.threads)  # sums are split by thread
        found = compute_outputs(model, inputs)
        differences = manifest.environment.differences(Environment.current())
    except Exception as error:  # whatever a model's forward may raise
        return Check("outputs", False, f"the stored example cannot be run: {type(error).__name__}: {error}")
    finally:
        torch.set_num_threads(threads)
    return _outputs_check("outputs", found, wanted, manifest, differences)


def _outputs_check(
    name: str,
    found: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.Tensor],
    manifest: Manifest,
    differences: Sequence[str],
) -> Check:
    """Bit for bit; where the environment differs, within the tolerance, and the report says so."""
    if manifest.float_grid:
        differences = (*differences, "scales derived afresh by the stock load")
    tolerance = TOLERANCE[manifest.dtype] if differences else 0.0
    faults, worst = output_faults(found, wanted, tolerance)
    if not differences:
        return _check(name, faults, f"{len(wanted)} output tensors equal, bit for bit")
    where = f"not in the same environment ({'; '.join(differences)}), so {tolerance:g} relative is allowed"
    return _check(name, [*faults, where] if faults else [], f"{len(wanted)} output tensors within {worst:.2g}: {where}")


def _reference_outputs(
    loaded: nn.Module, reference: nn.Module, directory: Path, manifest: Manifest, inputs: Any
) -> Iterator[Check]:
    if inputs is None and manifest.example is not None:
        inputs, _ = read_example(directory, manifest.example)
    if inputs is None:
        told = "not compared: the export holds no example, and no inputs= were given"
        yield Check("reference outputs", True, told, asked=False)
        return
    device = model_device(reference).type
    differences = () if device == "cpu" else (f"device {device} -> cpu",)
    found, wanted = compute_outputs(loaded, inputs), compute_outputs(reference, inputs)
    yield _outputs_check("reference outputs", found, wanted, manifest, differences)
