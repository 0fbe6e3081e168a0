"""`QConv1D`: transformers' ``Conv1D``, a linear layer whose weight is stored as ``(in, out)``, as in GPT-2."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qat.layers.linear import LinearForm

__all__ = ["QConv1D"]


class QConv1D(LinearForm, Conv1D):
    """``x W + b`` with a fake-quantized ``W^T`` and, if asked, fake-quantized inputs and outputs.

    It is frozen to the format's linear layer. Stock loaders replace ``nn.Linear`` alone, so `qat.load` and the plug-in
    of transformers are its loaders.
    """

    replaces: ClassVar[type[nn.Module]] = Conv1D
    targets: ClassVar[tuple[str, ...]] = ("transformers", "gguf")

    @staticmethod
    def effective_weight(module: Any) -> Tensor:
        """The weight as ``(out, in)``."""
        weight: Tensor = module.weight
        return weight.t()
