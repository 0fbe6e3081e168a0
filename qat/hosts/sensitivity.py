"""The linear layers of a diffusion transformer that quantized activations harm most.

The embeddings of the timestep and the text, the first and the last layer, and the layers that make shifts, scales and
gates of the embedded timestep (modulation) see inputs whose range changes with the timestep, and every block, or the
picture itself, depends on their output. They are a small part of the computation, so with quantized activations they
stay float unless they are named. Weights alone can be quantized in them as anywhere.
"""

from __future__ import annotations

import re

from torch import nn

__all__ = ["sensitive_part"]

_MODULATION_CLASS = re.compile(r"AdaLayerNorm|Norm(Zero|Single|Continuous)|Modulation")
_MODULATION_NAME = re.compile(r"modulation|(^|_)mod$")


def sensitive_part(model: nn.Module, name: str) -> str | None:
    """Say in which sensitive part of a model of diffusers a linear layer stands.

    That is ``"modulation"``, ``"outside the blocks"``, or None for a layer that is not sensitive.

    >>> sensitive_part(nn.Sequential(nn.Linear(4, 4)), "0")
    'outside the blocks'
    """
    parts = name.split(".")
    module, blocks = model, False
    for depth, part in enumerate(parts[:-1]):
        in_list = depth == 1 and isinstance(module, nn.ModuleList)
        module = module.get_submodule(part)
        # With one linear layer it is no block but a projection of its own, of each caption encoder, say.
        blocks |= in_list and sum(isinstance(below, nn.Linear) for below in module.modules()) > 1
        if _MODULATION_CLASS.search(type(module).__name__) or _MODULATION_NAME.search(part):
            return "modulation"
    return None if blocks else "outside the blocks"
