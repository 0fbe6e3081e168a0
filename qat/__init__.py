"""Quantization-aware training for transformers: what you train is what you serve, to the bit.

The verbs, in the order in which they are used::

    report = qat.inspect(model, spec)      # what will be quantized, what will not, and why
    qat.prepare(model, spec)               # fake-quantized layers, in place
    qat.calibrate(model, batches)          # scales for activations
    ...                                    # train, with Lightning or a plain loop
    qat.freeze(model)                      # codes are packed as trained
    qat.export(model, "out")               # files for diffusers, transformers or optimum-quanto
    qat.verify("out", reference=model)     # proof that what loads is what was trained
    qat.load("out")                        # a model ready for inference
    qat.convert("out", "other", target=...)  # the same values for another loader, where its grid has them
    qat.push_to_hub("out", "owner/name")     # the verified files, on the hub

Names are imported when they are first used: ``import qat`` loads neither torch nor Lightning nor any model library.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from qat import errors

_HOMES = {
    "qat.allocation": ("LayerChoice", "SearchReport", "search"),
    "qat.calibration": ("CalibrationReport", "calibrate"),
    "qat.codes_only": ("FixCodesReport", "fix_codes"),
    "qat.conversion": ("convert",),
    "qat.distributed": ("shard",),
    "qat.errors": tuple(errors.__all__),
    "qat.exporting": ("ExportReport", "export"),
    "qat.folding": ("FoldReport", "fold_outliers"),
    "qat.freezing": ("FreezeReport", "freeze"),
    "qat.hub": ("push_to_hub",),
    "qat.inspection": ("InspectReport", "inspect"),
    "qat.layers": ("QLinear",),
    "qat.loading": ("load",),
    "qat.observers": ("Absmax", "Best", "MovingAverage", "Mse", "Percentile"),
    "qat.packing": ("PackReport", "pack_base"),
    "qat.preparation": ("PrepareReport", "parameter_groups", "prepare"),
    "qat.quantizers": (
        *("Algorithm", "AnyAlgorithm", "Automatic", "DualLSQ", "LearnedAffine", "LearnedClipping"),
        *("StraightThrough", "StretchedElastic", "WeightQuantizer"),
    ),
    "qat.reconstruction": ("ReconstructionReport", "reconstruct"),
    "qat.spec": ("LayerSpec", "QuantSpec"),
    "qat.training.callback": ("QuantizationAwareTraining",),
    "qat.training.cage": ("cage_step",),
    "qat.training.distillation": ("Distillation", "Distiller"),
    "qat.training.guards": ("NumericalGuards",),
    "qat.training.schedule": ("QuantizationSchedule", "rate_factor"),
    "qat.training.steps": ("QuantizationSteps",),
    "qat.training.task": ("QuantizedTask",),
    "qat.training.teacher": ("CachedLogits", "cache_logits"),
    "qat.verification": ("VerifyReport", "verify"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__version__ = "0.1.0"
__all__ = sorted(_HOME_OF)  # the stub beside this file lists the same names, and a test compares


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'qat' has no attribute {name!r}")
    value = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
