"""Target ``diffusers``: ``AutoModel.from_pretrained`` with ``QuantoConfig``, stock, no code of ours.

One weight type a model, no activations. ``modules_to_not_convert`` matches the last part of a module's name, so two
layers of one last name are both quantized or both float. Modules in ``_keep_in_fp32_modules`` are cast before the
loader's float8 check and then fail in forward: their linear layers stay float.
"""

from __future__ import annotations

from typing import Any

from qat.spec import LayerSpec, QuantSpec
from qat.targets.base import Target, matches_path_part

__all__ = ["DIFFUSERS"]


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

    def kept_in_float32(self, model: Any, name: str, dtype: str) -> bool:
        """As diffusers casts: any part of the path that a class keeps in float32."""
        return dtype != "float32" and matches_path_part(name, getattr(model, "_keep_in_fp32_modules", None) or ())


DIFFUSERS = _Diffusers("diffusers", leaf_names_only=True)
