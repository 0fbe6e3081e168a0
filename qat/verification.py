"""`verify`: does a directory give back, through the target's own loader, exactly what was frozen?

Four questions, each answered by checks of their own in the report:

1. *files*, *keys*: is what lies on disk what was written? Hashes against the manifest; then keys, dtypes, packed
   shapes and alignment from the headers, before any loader runs: stock loaders are lenient, and a misaligned file
   can end the process.
2. *load*, *layers*, *tensors*: does the target's own loader (quanto's, or transformers with the plug-in) rebuild every
   layer's codes, scale, shift and dequantized weight, by the digests that freezing left, and every other tensor?
3. *outputs*: does the reloaded model answer the stored example with the frozen model's numbers? Bit for bit where the
   environment is that of the export; elsewhere sums may round differently, and a stated tolerance holds.
4. *reference layers*, *reference outputs*: with the live model at hand, the same directly, with how much differs.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat.errors import LoadError, StateError, VerifyError
from qat.evidence import FrozenRecord, digest, frozen_record, layer_evidence, unpack_weight
from qat.exporting.examples import compute_outputs, difference, output_faults, read_example
from qat.exporting.layout import DTYPE_NAMES
from qat.exporting.manifest import QMAP_NAME, Environment, ExampleRecord, Manifest, read_manifest
from qat.exporting.quanto import PackedState, qmap_faults, stored_tensors
from qat.loading import (
    attention_arguments,
    check_files,
    check_headers,
    frozen_record_of,
    load_pretrained,
    model_class,
    read_headers,
)

__all__ = ["Check", "VerificationError", "VerifyReport", "verify"]

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3}
"""Largest difference of outputs, relative to the largest output, allowed between different environments."""
_SHOWN = 6


@dataclass(frozen=True)
class Check:
    """One question that verification asked, and the answer."""

    name: str
    passed: bool
    detail: str


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
        return {**asdict(self), "checks": [asdict(check) for check in self.checks], "ok": self.ok}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> VerifyReport:
        """The inverse of `to_json`."""
        return cls(data["directory"], data["target"], tuple(Check(**check) for check in data["checks"]))

    def __str__(self) -> str:
        width = max((len(check.name) for check in self.checks), default=0)
        lines = [f"{self.directory} (target {self.target!r}): {'verified' if self.ok else 'NOT what was frozen'}"]
        for check in self.checks:
            detail = check.detail.replace("\n", "\n" + " " * (width + 12))
            lines.append(f"  {check.name:{width}}  {'ok' if check.passed else 'FAILED':6}  {detail}")
        return "\n".join(lines)


class VerificationError(VerifyError):
    """A verification that does not hold, with its report."""

    def __init__(self, report: VerifyReport) -> None:
        super().__init__(str(report))
        self.report = report


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
        LoadError: when the directory is missing or its manifest cannot be read.
        StateError: when ``inputs`` come without a reference, or the reference was never frozen.

    >>> import tempfile, qat
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
        frozen_record(reference)
    path = Path(directory)
    manifest = read_manifest(path)
    checks: list[Check] = []
    if fresh_process:
        checks += _in_fresh_process(path).checks
    if not fresh_process or (reference is not None and all(check.passed for check in checks)):
        own = tuple(_checks(path, manifest, reference, inputs, model))
        known = {check.name for check in checks}
        checks += [check for check in own if check.name not in known or not check.passed]
    report = VerifyReport(str(directory), manifest.target, tuple(checks))
    if not report.ok:
        raise VerificationError(report)
    return report


def _in_fresh_process(directory: Path) -> VerifyReport:
    command = [sys.executable, "-m", "qat.cli", "verify", str(directory), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        report = VerifyReport.from_json(json.loads(done.stdout))
    except (ValueError, KeyError, TypeError):
        said = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-30:])
        ended = f"was ended by signal {-done.returncode}" if done.returncode < 0 else f"ended with {done.returncode}"
        raise VerifyError(f"the verifying process for {str(directory)!r} {ended}:\n{said}") from None
    if not report.ok:
        raise VerificationError(report)
    return report


def _checks(
    directory: Path, manifest: Manifest, reference: nn.Module | None, inputs: Any, model: nn.Module | None
) -> Iterator[Check]:
    record = frozen_record_of(manifest)
    faults = check_files(directory, manifest, hashes=True)
    yield _check("files", faults, f"{len(manifest.files)} files, sizes and hashes as written")
    try:
        headers = read_headers(directory, manifest)
        faults = check_headers(manifest, headers)
        faults += qmap_faults(record, directory) if QMAP_NAME in manifest.files else []
    except LoadError as error:
        faults = [str(error)]
    yield _check("keys", faults, f"{len(manifest.tensors)} tensors, dtypes, packed shapes and alignment as declared")
    if faults:
        return  # a loader could answer with garbage, or end the process
    try:
        loaded, loader = _load(directory, manifest, record, model)
    except Exception as error:  # a stock loader can fail in any way
        yield Check("load", False, f"the target's own loader failed: {type(error).__name__}: {error}")
        return
    faults = _meta_faults(loaded)
    yield _check("load", faults, loader)
    if faults:
        return
    faults = _layer_faults(loaded, record, codes_only=manifest.float_grid)
    what = "codes" if manifest.float_grid else "codes, scale, shift and dequantized weight"
    yield _check("layers", faults, f"{len(record.layers)} layers: {what} equal those of freezing")
    faults, count = _tensor_faults(loaded, manifest, record)
    yield _check("tensors", faults, f"{count} other tensors equal those exported")
    if manifest.example is not None:
        yield _stored_outputs(loaded, directory, manifest, manifest.example)
    if reference is not None:
        faults = list(_reference_faults(loaded, reference, record, codes_only=manifest.float_grid))
        yield _check("reference layers", faults, f"{len(record.layers)} layers and all else equal the live ones")
        yield from _reference_outputs(loaded, reference, directory, manifest, inputs)


def _check(name: str, faults: Sequence[str], good: str) -> Check:
    if not faults:
        return Check(name, True, good)
    more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
    return Check(name, False, "\n".join([*faults[:_SHOWN], *more]))


def _load(directory: Path, manifest: Manifest, record: FrozenRecord, model: nn.Module | None) -> tuple[nn.Module, str]:
    """Load with the target's own loader, and say which that was."""
    if manifest.target != "quanto":
        loaded = load_pretrained(directory, manifest)
        return loaded, f"{type(loaded).__name__}.from_pretrained"
    if model is None and (directory / "config.json").is_file():
        kind = model_class(manifest)
        if _is_causal_language_model(kind):
            from optimum.quanto import QuantizedModelForCausalLM

            wrapper: Any = QuantizedModelForCausalLM.from_pretrained(str(directory), **attention_arguments(manifest))
            return wrapper._wrapped, "QuantizedModelForCausalLM.from_pretrained"
        config = kind.config_class.from_pretrained(directory, **attention_arguments(manifest))
        # On CPU, not meta: requantize fills the buffers of a meta model with garbage.
        skeleton: nn.Module = kind._from_config(config, dtype=getattr(torch, manifest.dtype))
    elif model is not None:
        skeleton = copy.deepcopy(model).to("cpu")
    else:
        raise LoadError(f"{str(directory)!r} has no config.json: pass the float model as model=")
    return _requantized(skeleton, directory, manifest, record), "optimum.quanto.requantize on a model built on CPU"


def _is_causal_language_model(kind: Any) -> bool:
    from transformers import AutoModelForCausalLM

    mapping = AutoModelForCausalLM._model_mapping
    return kind.config_class in mapping and mapping[kind.config_class] is kind


def _requantized(model: nn.Module, directory: Path, manifest: Manifest, record: FrozenRecord) -> nn.Module:
    from optimum.quanto import requantize
    from safetensors.torch import load_file

    dtypes = {name: dtype for dtype, name in DTYPE_NAMES.items()}
    for name, tensor in stored_tensors(model):  # requantize copies into the model, whose dtypes therefore decide
        kept = manifest.tensors.get(name)
        if kept is not None:
            tensor.data = tensor.data.to(dtypes[kept.dtype])
        elif name.rpartition(".")[0] in record.layers:
            tensor.data = tensor.data.to(getattr(torch, manifest.dtype))
    state: dict[str, torch.Tensor] = {}
    for file in sorted({tensor.file for tensor in manifest.tensors.values()}):
        state |= load_file(directory / file)
    requantize(model, state, json.loads((directory / QMAP_NAME).read_text(encoding="utf-8")))
    return model.eval()


def _meta_faults(model: nn.Module) -> list[str]:
    """Tensors without data; torch computes garbage with them on CPU and says nothing."""
    faults = []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        inner = _inner_tensors(tensor)
        if any(part.device.type == "meta" for part in inner):
            faults.append(f"{name} is on the meta device: it was never loaded")
    return faults


def _inner_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    flatten: Callable[[], Any] | None = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return [tensor]
    return [tensor, *(part for name in flatten()[0] for part in _inner_tensors(getattr(tensor, name)))]


def _layer_faults(model: nn.Module, record: FrozenRecord, codes_only: bool) -> list[str]:
    """Where a reloaded layer is not what freezing left, by digests: which part, not how much."""
    from optimum.quanto.nn import QModuleMixin

    modules, faults = dict(model.named_modules()), []
    extra = [name for name, m in modules.items() if isinstance(m, QModuleMixin) and name not in record.layers]
    faults += [f"{name} is quantized after loading, but freezing left it float" for name in extra]
    for name, kept in record.layers.items():
        module = modules.get(name)
        if not isinstance(module, QModuleMixin) or not module.frozen:
            faults.append(f"{name} is not a quantized layer after loading")
            continue
        found = layer_evidence(module)
        compared = ("weights", "shape", "group_size", "codes") if codes_only else [field.name for field in fields(kept)]
        differ = [part for part in compared if getattr(found, part) != getattr(kept, part)]
        if differ:
            faults.append(f"{name}: {', '.join(differ)} differ from what freezing left")
    return faults


def _tensor_faults(model: nn.Module, manifest: Manifest, record: FrozenRecord) -> tuple[list[str], int]:
    """Compare everything but quantized weights with the digests of the export."""
    state, faults, count = PackedState(model), [], 0
    entries = {entry.name: entry for entry in state.entries}
    for name, kept in manifest.tensors.items():
        if _belongs_to_weight(name, record):
            continue
        count += 1
        source = name if name in entries else state.tied.get(name, name)
        if source not in entries:
            faults.append(f"{name} is in the files, but not in the reloaded model")
        elif DTYPE_NAMES.get(entries[source].dtype) != kept.dtype:
            faults.append(f"{name} is {entries[source].dtype} after loading, {kept.dtype} in the files")
        elif digest(state.fetch(source)) != kept.sha256:
            faults.append(f"{name} differs from what was exported")
    for name in entries:
        twin = manifest.tied.get(name)
        if twin is not None and digest(state.fetch(name)) != manifest.tensors[twin].sha256:
            faults.append(f"{name} is tied to {twin}, but differs from it after loading")
        stock = manifest.float_grid and name.endswith((".input_scale", ".output_scale"))  # no file holds those
        if twin is None and not (stock or name in manifest.tensors or _belongs_to_weight(name, record)):
            faults.append(f"{name} is in the reloaded model, but not in the files")
    return faults, count


def _belongs_to_weight(name: str, record: FrozenRecord) -> bool:
    layer, dot, rest = name.rpartition(".weight")
    return bool(dot) and layer in record.layers and (not rest or rest.startswith("._"))


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


def _reference_faults(loaded: nn.Module, reference: nn.Module, record: FrozenRecord, codes_only: bool) -> Iterator[str]:
    """Compare the reloaded model with the live one, tensor by tensor, and say by how much they differ."""
    live, again = dict(reference.named_modules()), dict(loaded.named_modules())
    for name in record.layers:
        old: Any = live.get(name)
        new: Any = again.get(name)
        if not hasattr(old, "weight_qtype") or not hasattr(new, "weight_qtype"):
            yield f"{name} is not a quantized layer in both models"
            continue
        three = ("codes", "scale", "shift")
        parts = list(zip(three, unpack_weight(old.weight), unpack_weight(new.weight), strict=True))
        parts.append(("weight", old.weight.dequantize(), new.weight.dequantize()))
        for part, expected, given in parts[:1] if codes_only else parts:
            if expected is None or given is None:
                gap: object = None if expected is given else "exists in one model only"
            else:
                gap = difference(expected, given)
            if gap is not None:
                yield f"{name}, {part}: {gap}"
    first, second = PackedState(reference), PackedState(loaded)
    names = {entry.name for entry in second.entries} | set(second.tied)
    for entry in first.entries:
        activation_scale = entry.name.endswith(("input_scale", "output_scale"))
        if _belongs_to_weight(entry.name, record) or (codes_only and activation_scale):
            continue
        if entry.name not in names:
            yield f"{entry.name} is in the live model only"
            continue
        gap = difference(first.fetch(entry.name), second.fetch(second.tied.get(entry.name, entry.name)))
        if gap is not None:
            yield f"{entry.name}: {gap}"


def _reference_outputs(
    loaded: nn.Module, reference: nn.Module, directory: Path, manifest: Manifest, inputs: Any
) -> Iterator[Check]:
    if inputs is None and manifest.example is not None:
        inputs, _ = read_example(directory, manifest.example)
    if inputs is None:
        return
    device = next((tensor.device.type for tensor in reference.parameters()), "cpu")
    differences = () if device == "cpu" else (f"device {device} -> cpu",)
    found, wanted = compute_outputs(loaded, inputs), compute_outputs(reference, inputs)
    yield _outputs_check("reference outputs", found, wanted, manifest, differences)
