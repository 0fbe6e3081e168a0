"""Target ``transformers``: ``from_pretrained`` with the plug-in ``qat.integrations.transformers``.

The plug-in reads each module's type from the directory, so mixed types and activations are expressible. What the
loader adds is its own rule for dtypes: modules in ``_keep_in_fp32_modules`` stay float32 when float16 is asked for,
those in ``_keep_in_fp32_modules_strict`` also with bfloat16 (``PreTrainedModel._get_dtype_plan``, transformers 5).
Models are built on the meta device, so that buffers which no file holds are computed afterwards, by ``_init_weights``.
"""

from __future__ import annotations

from typing import Any

from qat.spec import QuantSpec
from qat.targets.base import Target, matches_path_part

__all__ = ["TRANSFORMERS"]


class _Transformers(Target):
    def spec_faults(self, spec: QuantSpec) -> list[str]:
        """None: the plug-in is ours, and can leave outputs unquantized too."""
        return []

    def kept_in_float32(self, model: Any, name: str, dtype: str) -> bool:
        """As the loader's dtype plan has it."""
        kept: set[str] = set()
        if dtype == "float16":
            kept |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
        if dtype in ("float16", "bfloat16"):
            kept |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
        return matches_path_part(name, kept)


TRANSFORMERS = _Transformers("transformers", initialises_buffers=True)
