"""What the tests of folding share: small models, and whether they are as before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import qat
from qat.files.examples import flatten_outputs
from tests.helpers import same_bits

INT8 = qat.QuantSpec(activations="int8", dtype="float32")


@torch.no_grad()
def outputs(model: nn.Module, batch: Any) -> dict[str, Tensor]:
    return flatten_outputs(model(**batch) if isinstance(batch, dict) else model(batch))


def random_vectors(model: nn.Module) -> nn.Module:
    """Norms with weights other than one, and biases other than zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                noise = torch.rand(parameter.shape, generator=generator)
                parameter.mul_(1 + noise).add_(noise.to(parameter.dtype), alpha=0.1)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(same_bits(tensor, before[key]) for key, tensor in model.state_dict().items())


class Block(nn.Module):
    """A norm before two linear layers around a function; its output is added to its input, or to the norm's."""

    def __init__(
        self, between: Callable[[Tensor], Tensor] = torch.relu, *, post: bool = False, gate: float = 1.0
    ) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.between, self.post, self.gate = between, post, gate

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.gate * self.down(self.between(self.up(y))) + (y if self.post else x)


def made(*blocks: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    for block in blocks:
        for child in block.modules():
            if isinstance(child, nn.Linear | nn.LayerNorm):
                child.reset_parameters()
    return nn.Sequential(*blocks).eval()


def rows(seed: int = 0, outlier: float = 1.0) -> Tensor:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(seed))
    x[:, 3] *= outlier
    return x
