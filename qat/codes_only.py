"""`fix_codes`: a prepared model lets its float masters go. Codes stay as they are, and scales and shifts train on.

The end-to-end phase of EfficientQAT (Chen et al. 2024, https://arxiv.org/abs/2407.11062, section 3.3), best after
`qat.reconstruct`. A float32 master takes 16 bytes a weight with its gradient and AdamW's two moments; a code takes one.
So models train whose masters do not fit; what was exported can be loaded and trained on, without any master. What it
trades away: no weight can move to another code any more.

The value is ``s q - z``, by the arithmetic of serving, so ``dv/ds = q`` and ``dv/dz = -1``. The layer hands the codes
to `quantized_linear` in place of a master, with a type that encodes codes as themselves.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from qat.adapters import without_peft
from qat.checks import require_final_types, require_finite
from qat.distributed import refuse_sharded
from qat.errors import StateError, listed
from qat.files.evidence import forget_frozen, frozen_record, is_frozen
from qat.formats import FrozenLayer
from qat.hosts import get_target
from qat.layers import Mode, QLinear, QuantizedLayer, quantized_layers
from qat.layers.functional import quantized_linear
from qat.numerics import FrozenWeight, QType
from qat.observers import Best
from qat.optimizers import forget_training
from qat.preparation import Prepared, mark_prepared, prepared_as
from qat.quantizers import Algorithm, AnyAlgorithm, Quantized, WeightQuantizer
from qat.starting import awaiting

__all__ = ["FixCodesReport", "fix_codes"]

logger = logging.getLogger("qat")


@dataclass(frozen=True, kw_only=True)
class _FixedCodes(QType):
    """The type ``base`` for weights that are codes already."""

    fused = False
    base: QType

    @property
    def has_shift(self) -> bool:
        return self.base.has_shift

    def group_size(self, in_features: int) -> int | None:
        return self.base.group_size(in_features)

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.base.scale_dtype(dtype)

    def serve(
        self, scale: Tensor, shift: Tensor | None, dtype: torch.dtype, in_features: int
    ) -> tuple[Tensor, Tensor | None]:
        return self.base.serve(scale, shift, dtype, in_features)

    def encode(self, weight: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
        return weight

    def decode(self, codes: Tensor, scale: Tensor, shift: Tensor | None, dtype: torch.dtype) -> Tensor:
        return self.base.decode(codes, scale, shift, dtype)

    def scale_gradients(
        self, weight: Tensor, scale: Tensor, shift: Tensor | None, grad: Tensor, margin: float = 0.0
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        rows = self.grouped(grad).float()
        grad_scale = (rows * self.grouped(weight).float()).sum(1, keepdim=True)
        return grad_scale, None if shift is None else -rows.sum(1, keepdim=True), grad.clone()

    def __reduce__(self) -> tuple[Any, ...]:
        return _fixed, (self.base,)  # so that the type is known in a process that reads a pickle


@functools.cache
def _fixed(base: QType) -> _FixedCodes:
    own = {field.name: getattr(base, field.name) for field in fields(QType)}
    return _FixedCodes(**(own | {"name": f"{base.name} codes"}), base=base)


class FixedCodes(WeightQuantizer):
    """Codes that stay, with a scale and a shift that move from where they were.

    The unit of a move is the scale itself, and for the shift half the range: one learning rate fits all sizes.
    """

    bits: Tensor
    """The codes; float8 ones as int8, which no cast changes and every backend of torch.distributed sends."""
    scale_start: Tensor
    shift_start: Tensor | None

    def __init__(self, weight: FrozenWeight) -> None:
        super().__init__(_fixed(weight.qtype), weight.dtype)
        self.register_buffer("bits", weight.codes.view(torch.int8) if weight.qtype.floating else weight.codes)
        self.register_buffer("scale_start", weight.scale.float())
        self.register_buffer("shift_start", None if weight.shift is None else weight.shift.float())
        self.scale_move = nn.Parameter(torch.zeros_like(self.scale_start))
        self.shift_move = None if weight.shift is None else nn.Parameter(torch.zeros_like(self.scale_start))

    @property
    def codes(self) -> Tensor:
        """``(out, in)``, in the type's `storage` dtype."""
        return self.bits.view(self.qtype.storage)

    def _served(self) -> tuple[Tensor, Tensor | None]:
        scale, shift = self.scale_start * (1 + self.scale_move), None
        if self.shift_start is not None and self.shift_move is not None:
            shift = self.shift_start + self.shift_move * (self.scale_start * (self.qtype.steps / 2))
        return self.qtype.serve(scale, shift, self.dtype, self.codes.shape[1])

    def quantize(self, weight: Tensor, out_dtype: torch.dtype) -> Quantized:
        """The value of the codes; ``weight`` is not read."""
        return self.by_served(self.codes, *self._served(), out_dtype)

    def quantize_to_codes(self, weight: Tensor) -> Quantized:
        """The codes themselves."""
        return Quantized(self.codes, *self._served())

    def final_codes(self, weight: Tensor) -> FrozenWeight:
        """These codes, as weights of the type that they are of."""
        frozen = super().final_codes(weight)
        assert isinstance(self.qtype, _FixedCodes)
        return replace(frozen, qtype=self.qtype.base)


class CodesLinear(QLinear):
    """A linear layer without a master weight; its quantizer has the codes."""

    weight_quantizer: FixedCodes
    master_dtype: torch.dtype

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """What the codes stand for, ``(out, in)``, in the dtype of the master that they replace."""
        return self.weight_quantizer.quantize(self.weight_quantizer.codes, self.master_dtype).value

    @staticmethod
    def effective_weight(module: Any) -> Tensor:
        """The value of the codes; there is no float weight to take in its place."""
        if not isinstance(module, CodesLinear):
            raise StateError(
                "state_dict: holds float weights, but the model only codes, since qat.fix_codes: load it into a "
                "prepared model, and call qat.fix_codes then"
            )
        return module.weight

    @staticmethod
    def object_fault(module: nn.Module) -> str | None:
        """As for any layer, but for the weight."""
        return "its object has a forward of its own: remove it first" if "forward" in vars(module) else None

    def compute(self, x: Tensor, weight: Quantized | None) -> Tensor:
        """``x W^T + b``."""
        if weight is None:
            return nn.functional.linear(x, self.weight, self.bias)
        quantizer = self.weight_quantizer
        return quantized_linear(x, quantizer.codes, self.bias, weight, quantizer, self.active_input_quantizer())


@dataclass(frozen=True)
class FixCodesReport:
    """What was fixed; prints as a sentence."""

    layers: tuple[str, ...]
    nbytes_before: int
    """Bytes of the masters; 0 of a frozen model, which has none."""
    nbytes: int
    """Bytes of codes, scales and shifts, one byte a code."""

    def __str__(self) -> str:
        return (
            f"fixed the codes of {len(self.layers)} layers: {self.nbytes_before / 2**20:.1f} MiB of masters became "
            f"{self.nbytes / 2**20:.1f} MiB of codes and scales"
        )


def fix_codes(model: nn.Module, *, vectors: bool = False) -> FixCodesReport:
    """Replace the masters of a model by their codes, in place: only scales and shifts train from now on.

    The weights of a prepared model are what they were, bit for bit. `qat.freeze` gives exactly these codes with the
    trained scales and shifts. All other parameters stop to require a gradient. Build the optimizer afterwards, with
    `qat.parameter_groups`. Checkpoints of the model hold codes. They load into a model that went through the same
    calls.

    Args:
        model: a prepared model; or a frozen one, as `qat.load` gives it, with float activations. What stayed float in
            that one is in the serving dtype.
        vectors: let norms and biases that require a gradient train on.

    Raises:
        StateError: the model was not prepared or frozen; it has layers on the meta device or without a master, a layer
            that is not an `nn.Linear`, one that still trains as another type (``first_weights``), or inf or NaN in a
            layer; or it is frozen with quantized activations, or by an
            algorithm of your own. Nothing is changed then.

    >>> from qat import LearnedAffine, QuantSpec, parameter_groups, prepare
    >>> model = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 16))
    >>> _ = prepare(model, QuantSpec(weights="int4"), algorithm=LearnedAffine())
    >>> print(fix_codes(model))
    fixed the codes of 2 layers: 0.1 MiB of masters became 0.0 MiB of codes and scales
    >>> [group["name"] for group in parameter_groups(model, lr=1e-4)]
    ['scales']
    """
    model, before = without_peft(model), 0
    if isinstance(model, nn.Module) and is_frozen(model):
        _thaw(model)
    else:
        before = _replace_masters(model)
    layers = list(quantized_layers(model))
    scales = {id(p) for _, layer in layers for p in layer.quantizer_parameters()}
    for parameter in model.parameters():
        if id(parameter) not in scales and not (vectors and parameter.ndim < 2):
            parameter.requires_grad_(False)
    forget_training(model)
    after = sum(b.nbytes for _, layer in layers for b in layer.weight_quantizer.buffers())
    return FixCodesReport(tuple(name for name, _ in layers), before, after)


@torch.no_grad()
def _replace_masters(model: nn.Module) -> int:
    """Let the layers of a prepared model hold codes, one after another; the bytes of the masters."""
    prepared_as(model)
    refuse_sharded(model, "qat.fix_codes")
    layers = list(quantized_layers(model))
    _require_masters(layers)
    require_final_types(model, "fixed")
    if waiting := awaiting(model):
        logger.warning(
            "%d layers are fixed as they start with 'clip', for their own start needs data: call qat.calibrate(model, "
            "batches) before: %s",
            len(waiting),
            listed(list(waiting), 4),
        )
    nbytes = 0
    for _, layer in layers:
        master = layer.effective_weight(layer)
        weight, _ = layer.weight_quantizer.freeze(master)
        nbytes += master.nbytes
        _hold_codes(layer, weight, master.dtype)
    return nbytes


def _require_masters(layers: list[tuple[str, QuantizedLayer]]) -> None:
    faults = (
        ("have codes only, since an earlier qat.fix_codes", lambda layer: isinstance(layer, CodesLinear)),
        ("are no plain QLinear: exclude them in the spec", lambda layer: type(layer) is not QLinear),
        ("are on the meta device, without numbers: load the weights first", lambda layer: layer.weight.is_meta),
    )
    for fault, has in faults:
        if names := [name for name, layer in layers if has(layer)]:
            raise StateError(f"model: {len(names)} layers {fault} ({listed(names, 4)})")
    for name, layer in layers:
        require_finite(name, layer)


def _hold_codes(layer: Any, weight: FrozenWeight, dtype: torch.dtype) -> None:
    """Turn a linear layer with all attributes of a `QLinear` into one with these codes, which computes in ``dtype``."""
    del layer._parameters["weight"]
    layer.__class__ = CodesLinear
    layer.master_dtype = dtype
    layer.weight_quantizer = FixedCodes(weight).train(layer.training)


def _thaw(model: nn.Module) -> None:
    """Let the layers of a frozen model hold codes that they were frozen with, and the model be a prepared one."""
    record = frozen_record(model)
    format = get_target(record.target).format
    if others := [name for name in record.layers if not isinstance(model.get_submodule(name), nn.Linear)]:
        kind = type(model.get_submodule(others[0])).__name__
        raise StateError(
            f"model: is frozen, and {len(others)} layers are none that can train again ({listed(others, 3)}; the first "
            f"is a {kind}): exclude them, or call qat.fix_codes on the prepared model, before qat.freeze"
        )
    if active := [name for name, layer in record.layers.items() if layer.activations is not None]:
        raise StateError(
            f"model: is frozen, and {len(active)} layers quantize activations ({listed(active, 3)}); no file says "
            "which inputs arrive quantized: prepare and calibrate a float model"
        )
    if held := [name for name in record.layers if hasattr(model.get_submodule(name), "value")]:
        raise StateError(
            f"model: is frozen, and {len(held)} layers are experts in one parameter ({listed(held, 3)}), which train "
            "with a master alone: prepare a float model, and exclude them before qat.fix_codes"
        )
    try:
        kind = "automatic" if "," in record.algorithm else record.algorithm
        algorithm = TypeAdapter[Algorithm](AnyAlgorithm).validate_python({"kind": kind})
    except ValidationError as error:
        raise StateError(
            f"model: was frozen by {record.algorithm!r}, no algorithm of the library: prepare it"
        ) from error
    fresh = {id(model.get_submodule(name)): _thawed(format.read(model.get_submodule(name))) for name in record.layers}
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            parent._modules[key] = fresh.get(id(child), child)
    forget_frozen(model)
    own = (record.notes, record.left_float, tuple(record.layers))
    mark_prepared(model, Prepared(record.spec, algorithm, record.target, Best(), *own))


def _thawed(frozen: FrozenLayer) -> nn.Module:
    out_features, in_features = frozen.weight.shape
    layer: Any = nn.Linear(in_features, out_features, bias=frozen.bias is not None, device="meta")
    if frozen.bias is not None:
        layer.bias = nn.Parameter(frozen.bias, requires_grad=False)
    layer.input_quantizer = layer.output_quantizer = None
    layer.mode, layer.reached = Mode(), False
    _hold_codes(layer.eval(), frozen.weight, frozen.weight.dtype)
    return layer  # type: ignore[no-any-return]
