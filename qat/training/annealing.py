"""Training that begins with more bits, such as int4 for layers that end as int2.

With few values a weight, the first steps from a float model are noise. With four times as many, masters and other
parameters settle first. Groups are the same, so a quantizer keeps its parameters and changes its type; its range
starts again from the weight as it is then, by the algorithm's own start. One that needs data waits for it again:
the callback brings it, or `qat.calibrate` in a loop of your own. A state dict holds a type that is not the one
to be served, so that a checkpoint goes on as it was, and `qat.freeze` refuses it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from qat.errors import TrainingError
from qat.hosts import get_target
from qat.layers import QuantizedLayer, quantized_layers
from qat.numerics import QType
from qat.optimizers import look_again
from qat.preparation import prepared_as
from qat.quantizers import Algorithm
from qat.spec import WeightType

__all__ = ["begin_with", "end_first_type"]


def begin_with(model: nn.Module, weights: WeightType) -> None:
    """Let layers of fewer bits quantize to the type ``weights``, until `end_first_type`; others stay as they are.

    Layers that do already keep their ranges, as in a run that is resumed. `qat.freeze` refuses the model meanwhile.

    Args:
        model: as `qat.prepare` left it.
        weights: a type with a shift, as those of fewer bits have it.

    Raises:
        TrainingError: no layer has fewer bits and the same groups; nothing is changed then.
        StateError: the model is not prepared.

    >>> import qat
    >>> model = nn.Sequential(nn.Linear(256, 64))
    >>> _ = qat.prepare(model, qat.QuantSpec(weights="int2"), algorithm=qat.LearnedAffine())
    >>> begin_with(model, "int4")
    >>> model[0].weight_quantizer
    LearnedRange(int4, dtype=bfloat16)
    >>> end_first_type(model)
    >>> model[0].weight_quantizer
    LearnedRange(int2, dtype=bfloat16)
    """
    prepared = prepared_as(model)
    format = get_target(prepared.target).format
    first = format.types(weights, None, prepared.spec.torch_dtype).weights
    layers = [layer for _, layer in quantized_layers(model) if _can_begin(layer, first)]
    if not layers:
        found = sorted({layer.weight_quantizer.final_qtype.name for _, layer in quantized_layers(model)})
        raise TrainingError(
            f"first_weights: {weights!r} is for layers of fewer bits and the same groups, but this model has only "
            f"{', '.join(found)}: prepare layers of a smaller type, or leave first_weights out"
        )
    _change([(layer, first) for layer in layers], prepared.algorithm)


def end_first_type(model: nn.Module, optimizers: Iterable[Optimizer] = ()) -> None:
    """Let every layer quantize to the type that it is frozen to; the ranges of those that change start again.

    Where their start needs data, `qat.calibrate` comes next.

    What ``optimizers`` remember of learned ranges that start again, such as momentum, is forgotten.
    """
    layers = [layer for _, layer in quantized_layers(model)]
    changed = [layer for layer in layers if layer.weight_quantizer.qtype != layer.weight_quantizer.final_qtype]
    if not changed:
        return
    _change([(layer, layer.weight_quantizer.final_qtype) for layer in changed], prepared_as(model).algorithm)
    for optimizer in optimizers:
        for layer in changed:
            for parameter in layer.weight_quantizer.parameters():
                optimizer.state.pop(parameter, None)


def _can_begin(layer: QuantizedLayer, first: QType) -> bool:
    served, (_, in_features) = layer.weight_quantizer.final_qtype, layer.like_weight(layer).shape
    same = served.has_shift == first.has_shift and served.group_size(in_features) == first.group_size(in_features)
    return same and served.bits < first.bits


@torch.no_grad()
def _change(changes: list[tuple[QuantizedLayer, QType]], algorithm: Algorithm) -> None:
    fresh = []
    for layer, qtype in changes:
        quantizer = layer.weight_quantizer
        if quantizer.qtype == qtype:
            continue
        made = algorithm.make(layer.effective_weight(layer), qtype, quantizer.dtype)
        shapes, own = (
            {k: v.shape for k, v in made.named_parameters()},
            {k: v.shape for k, v in quantizer.named_parameters()},
        )
        if type(made) is not type(quantizer) or shapes != own:
            raise TrainingError(
                f"first_weights: {type(algorithm).__name__} learns other parameters at {qtype.name} than at "
                f"{quantizer.qtype.name}: choose another algorithm, or leave first_weights out"
            )
        fresh.append((quantizer, qtype, made.state_dict()))  # the type that it names is not compared here
    for quantizer, qtype, state in fresh:  # now, so that no error leaves a half-changed model
        compensated = quantizer.compensated  # and stays so, with the master
        quantizer.load_state_dict(state)
        if compensated:
            quantizer.compensated = True
        quantizer.qtype = qtype
    look_again()  # at the next step, starts that wait have waited too long
