"""A tiny random model of any class in transformers' auto mappings, made by rules from its default configuration.

`tests.architectures` holds configurations written by hand; here is the rest: one class for each model type and task.
Rules turn widths, depths, vocabularies, experts and images into small ones that fit each other, in nested
configurations too. Inputs follow from the names in a forward's signature: candidates are tried until one runs. What the
rules do not know is in tiny_transformers.yaml, and so is what cannot be made, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from tests.tiny_configurations import shrunk
from tests.tiny_inputs import candidates, tensor_of

__all__ = ["EXCEPTIONS", "LEFT_OUT", "TASKS", "TinyTransformer", "tiny_transformers"]

TASKS: dict[str, tuple[str, ...]] = {
    "causal": ("CAUSAL_LM", "CAUSAL_IMAGE_MODELING"),
    "encoder": ("MASKED_LM", "TEXT_ENCODING"),
    "encoder-decoder": ("SEQ_TO_SEQ_CAUSAL_LM",),
    "vision": (
        "IMAGE_CLASSIFICATION",
        "MASKED_IMAGE_MODELING",
        "BACKBONE",
        "OBJECT_DETECTION",
        "ZERO_SHOT_OBJECT_DETECTION",
        "UNIVERSAL_SEGMENTATION",
        "SEMANTIC_SEGMENTATION",
        "INSTANCE_SEGMENTATION",
        "IMAGE_MATTING",
        "DEPTH_ESTIMATION",
        "KEYPOINT_DETECTION",
        "KEYPOINT_MATCHING",
        "POSE_ESTIMATION",
        "VIDEO_CLASSIFICATION",
        "MASK_GENERATION",
        "IMAGE_TO_IMAGE",
        "TEXT_RECOGNITION",
        "TABLE_RECOGNITION",
    ),
    "speech": (
        "CTC",
        "RNNT",
        "TDT",
        "SPEECH_SEQ_2_SEQ",
        "AUDIO_CLASSIFICATION",
        "TEXT_TO_SPECTROGRAM",
        "TEXT_TO_WAVEFORM",
    ),
    "image and text": ("IMAGE_TEXT_TO_TEXT", "ZERO_SHOT_IMAGE_CLASSIFICATION", "MULTIMODAL_LM", "RETRIEVAL"),
}
"""Mappings of transformers by task. Classes that only put another head on the same body are left to the hand-written
ones; `base` holds the model types that no task names, as their bare models."""

_TABLE = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
EXCEPTIONS: dict[str, dict[str, Any]] = _TABLE["exceptions"]
"""By class: ``sizes`` (configuration arguments, nested), ``inputs`` (as `tests.tiny_inputs`), ``config`` (a class)."""
LEFT_OUT: dict[str, str] = _TABLE["left_out"]
"""By class: why no tiny model of it can be made and run here."""


@dataclass(frozen=True)
class TinyTransformer:
    """A class of transformers and its task; the model and its inputs are made when asked for."""

    model: str
    task: str = ""

    @cached_property
    def configuration(self) -> Any:
        import transformers

        kind = getattr(transformers, self.model).config_class
        known = EXCEPTIONS.get(self.model, {})
        return shrunk(kind, known.get("sizes", {}), known.get("rules", "all"))

    def build(self) -> nn.Module:
        """The model, with the same random weights every time, in training mode, but without dropout."""
        import transformers

        config = type(self.configuration).from_dict(self.configuration.to_dict())  # models write into theirs
        torch.manual_seed(0)
        with _defined_memory():
            model: nn.Module = getattr(transformers, self.model)(config)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        with torch.no_grad():
            for parameter in model.parameters():  # what no initialization reached, or reached with zeros
                if not parameter.isfinite().all() or (parameter.ndim > 1 and not parameter.any()):
                    parameter.normal_(std=0.02)
        return model.train()

    @cached_property
    def inputs(self) -> Mapping[str, Any]:
        """The first candidate that the model runs with; raises the first candidate's error when none runs."""
        fixed = EXCEPTIONS.get(self.model, {}).get("inputs")
        model = self.build().eval()
        first: Exception | None = None
        for inputs in [fixed] if fixed else candidates(model):
            try:
                with torch.no_grad():
                    model(**{name: tensor_of(name, kind) for name, kind in inputs.items()})
            except Exception as error:
                first = first or error
            else:
                return inputs
        raise first or RuntimeError("no candidate for the inputs")

    def example(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Inputs, the same every time; floating ones in ``dtype``."""
        return {name: tensor_of(name, kind, dtype) for name, kind in self.inputs.items()}


@cache
def tiny_transformers() -> dict[str, TinyTransformer]:
    """One class for each model type and task, by the class's name, those left out included."""
    from transformers.models.auto import modeling_auto

    found: dict[str, TinyTransformer] = {}
    seen: set[str] = set()
    for task, names in {**TASKS, "base": ("",)}.items():
        for name in names:
            mapping = getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES" if name else "MODEL_MAPPING_NAMES")
            for model_type, classes in mapping.items():
                if not name and model_type in seen:
                    continue
                seen.add(model_type)
                for model in (classes,) if isinstance(classes, str) else classes[:1]:
                    found.setdefault(model, TinyTransformer(model, task))
    return found


@contextmanager
def _defined_memory() -> Iterator[None]:
    """New memory holds NaN instead of whatever was there, so that no test depends on it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
