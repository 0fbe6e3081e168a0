"""The ``quantization_config`` that transformers sees for a packed directory, and its group ``qat``.

It stays apart from the quantizer because it is plain data: transformers makes it from config.json, copies it, and
writes it back in ``save_pretrained``.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantoConfig

from qat.errors import LoadError, load_error
from qat.formats.quanto import QUANTO
from qat.spec import ActivationType, ServingDtype, WeightType

__all__ = ["PackedGroup", "PackedModule", "PackedQuantoConfig"]

_REMEDY = "Leave the argument out: the directory knows how it is packed."


class PackedModule(BaseModel):
    """How one module is packed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: WeightType
    """Type of the codes."""
    activations: ActivationType | None = None
    """Type of the quantized input and output; None: both stay float."""
    group_size: int | None = None
    """Elements of a row that share a scale; None: the whole row."""


class PackedGroup(BaseModel):
    """The group ``qat`` of ``quantization_config``: what the plug-in needs beyond a stock configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1]
    """Version of this group."""
    dtype: ServingDtype
    """The serving dtype, which scales and shifts hold and which cannot be cast afterwards."""
    modules: dict[str, PackedModule]
    """Every packed module by its full name; no other module is packed."""
    quantize_outputs: bool = True
    """Whether layers with an activation type quantize their output too, as stock layers do."""


class PackedQuantoConfig(QuantoConfig):
    """The ``quantization_config`` of an exported directory; it writes itself back as it was read.

    Args:
        weights: the hint that a stock load shows, which names the default weight type.
        activations: the activation type, or None.
        modules_to_not_convert: modules left float, for readers; the group ``qat`` decides.
        qat: the group `PackedGroup`, as plain data.

    Raises:
        LoadError: when the configuration is not one that qat writes.
    """

    def __init__(
        self,
        weights: str,
        activations: str | None = None,
        modules_to_not_convert: list[str] | None = None,
        qat: object = None,
        **_: Any,
    ) -> None:
        self.qat = qat
        super().__init__(weights, activations, modules_to_not_convert)

    def post_init(self) -> None:
        """Validate what the directory declares."""
        self.group()
        if self.default_weights not in QUANTO.qtypes:
            raise LoadError(
                f"config.json: weights must name one of {', '.join(QUANTO.qtypes)}; got {self.weights!r}: export again"
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Make ours from a dictionary with the group ``qat``, the stock configuration from any other."""
        if "qat" not in config_dict:
            return QuantoConfig.from_dict(config_dict, return_unused_kwargs, **kwargs)  # type: ignore[no-untyped-call]
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)  # type: ignore[no-untyped-call]

    @property
    def default_weights(self) -> str:
        """The weight type of modules that no override names."""
        return _weight_type(self.weights)

    def group(self) -> PackedGroup:
        """The group ``qat``, validated. It is kept as plain data, since transformers copies and serializes it."""
        try:
            return PackedGroup.model_validate(self.qat)
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, fault['loc'])) or 'qat'}: {fault['msg']}" for fault in error.errors()]
            raise load_error("quantization_config's group 'qat' in config.json is not valid", faults) from error

    def require_agreement(self, given: object) -> None:
        """Compare with the configuration that the user passed to ``from_pretrained``.

        Raises:
            LoadError: when it asks for what the packed files are not.
        """
        if not isinstance(given, QuantoConfig):
            raise LoadError(f"quantization_config: must be a QuantoConfig, got {type(given).__name__}. {_REMEDY}")
        skipped = given.modules_to_not_convert
        agreements = {
            f"weights={given.weights!r}": _weight_type(given.weights) == self.default_weights,
            f"activations={given.activations!r}": given.activations in (None, self.activations),
            f"modules_to_not_convert={skipped!r}": all(should_convert_module(n, skipped) for n in self.group().modules),
        }
        wrong = [argument for argument, agrees in agreements.items() if not agrees]
        if wrong:
            raise LoadError(
                f"quantization_config asks for {' and '.join(wrong)}, but the directory holds packed "
                f"{self.default_weights} weights, with activations={self.activations!r}. {_REMEDY}"
            )


def _weight_type(weights: str) -> str:
    return next((word for word in re.findall(r"\w+", str(weights)) if word in QUANTO.qtypes), str(weights))
