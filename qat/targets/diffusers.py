"""Target ``diffusers``: ``AutoModel.from_pretrained`` with ``QuantoConfig``, stock, no code of ours.

One weight type a model, no activations. ``modules_to_not_convert`` matches the last part of a module's name, so two
layers of one last name are both quantized or both float. Modules in ``_keep_in_fp32_modules`` are cast before the
loader's float8 check and then fail in forward: their linear layers stay float. A linear layer whose own last name is
in that list is never replaced, whatever the dtype.
"""

from __future__ import annotations

from typing import Any

from qat.spec import LayerSpec, QuantSpec
from qat.targets.base import Target

__all__ = ["DIFFUSERS", "is_diffusers_model"]


def is_diffusers_model(model: Any) -> bool:
    """Whether a model, or a class, is one of diffusers (or derived from one), told without importing diffusers."""
    kind = model if isinstance(model, type) else type(model)
    return any(base.__module__.partition(".")[0] == "diffusers" for base in kind.__mro__)


class _Diffusers(Target):
    def spec_faults(self, spec: QuantSpec) -> list[str]:
        """Activations and a second weight type."""
        faults = super().spec_faults(spec)
        if spec.activation_type is not None:
            faults.append(
                f"activations={spec.activation_type!r}: diffusers' QuantoConfig has no activations: use None, or "
                "target 'quanto'"
            )
        others = {value.weights if isinstance(value, LayerSpec) else value for value in spec.overrides.values()}
        mixed = sorted(others - {"float", spec.weights})
        if mixed:
            faults.append(
                f"overrides: diffusers loads one weight type a model ({spec.weights!r} here), got also {mixed}: "
                "use 'float' for those layers, or target 'quanto'"
            )
        return faults

    def model_faults(self, model: Any) -> list[str]:
        """A model of any other library."""
        if is_diffusers_model(model):
            return []
        return [
            f"model: target 'diffusers' loads models of diffusers, got a {type(model).__name__}: pass the pipeline's "
            "transformer itself, or use target 'quanto' or 'transformers'"
        ]

    def kept_in_float32(self, model: Any, name: str, dtype: str) -> bool:
        """As diffusers casts: any part of the path that a class keeps in float32."""
        return dtype != "float32" and not _kept(model).isdisjoint(name.split("."))

    def layer_fault(self, model: Any, name: str, weights: str, dtype: str) -> str | None:
        """As diffusers replaces and casts; float8 codes would be cast when float32 is served, too."""
        kept = _kept(model)
        leaf = name.rpartition(".")[2]
        if leaf in kept:
            return f"the loader never quantizes layers called {leaf!r} in a {type(model).__name__}"
        casts = dtype != "float32" or weights == "float8"
        return "kept in float32 by the loader" if casts and not kept.isdisjoint(name.split(".")) else None


def _kept(model: Any) -> set[str]:
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    return {kept} if isinstance(kept, str) else set(kept)


DIFFUSERS = _Diffusers("diffusers", leaf_names_only=True, plain_on_cpu=True)
