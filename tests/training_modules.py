"""What the tests of training share: a tiny model, a user's LightningModule, a learned algorithm, quiet trainers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from qat import Algorithm, QuantizationAwareTraining, QuantizationSchedule, QuantSpec, WeightQuantizer, parameter_groups
from qat.layers import QLinear, quantized_layers
from qat.numerics import QType
from qat.quantizers import Quantized

INT8 = QuantSpec(weights="int8", dtype="float32")
INT4 = QuantSpec(weights="int4", dtype="float32")
INT8_INT8 = QuantSpec(weights="int8", activations="int8", dtype="float32")


class Tiny(nn.Module):
    """Two linear layers with a relu between them, so that the second input arrives quantized."""

    def __init__(self, *, checkpointing: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.second = nn.Linear(32, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 4)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.block, x, use_reentrant=False) if self.checkpointing else self.block(x)
        return self.head(self.norm(x))

    def block(self, x: Tensor) -> Tensor:
        return self.second(functional.relu(self.first(x)))


class LearnedStepQuantizer(WeightQuantizer):
    """One learned scale a row."""

    def __init__(self, weight: Tensor, qtype: QType, dtype: torch.dtype) -> None:
        super().__init__(qtype, dtype, masked=True)
        self.scale = nn.Parameter(qtype.scale_shift(*qtype.weight_range(weight))[0])

    def quantize(self, weight: Tensor, out_dtype: torch.dtype) -> Quantized:
        return self.by_scale(weight, self.scale, None, out_dtype)


class LearnedStep(Algorithm):
    """Thrown away after the tests: nothing but this file knows of it."""

    kind: Literal["learned_step"] = "learned_step"

    def make(self, weight: Tensor, qtype: QType, dtype: torch.dtype) -> LearnedStepQuantizer:
        return LearnedStepQuantizer(weight, qtype, dtype)


class UserModule(LightningModule):
    """A module whose author never heard of quantization, but for its parameter groups."""

    def __init__(self, model: nn.Module | None = None, *, poison_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.model = Tiny() if model is None else model
        self.poison_at = poison_at
        self.losses: list[float] = []

    def loss(self, batch: list[Tensor]) -> Tensor:
        return functional.cross_entropy(self.model(batch[0]).float(), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        if self.poison_at == self.global_step:
            loss = loss * float("nan")
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.model(batch[0])

    def val_dataloader(self) -> Any:
        return loader(1, seed=9)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(parameter_groups(self, lr=1e-2, weight_decay=0.1))


class LateModule(UserModule):
    """A module that builds its model in ``configure_model``."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.model = None

    def configure_model(self) -> None:
        if self.model is None:
            torch.manual_seed(1)
            self.model = Tiny()


def loader(batches: int = 8, *, seed: int = 0, **options: Any) -> DataLoader[Any]:
    """Batches of 4 inputs and classes."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4 * batches, 32, generator=generator)
    classes = torch.randint(4, (4 * batches,), generator=generator)
    return DataLoader(TensorDataset(inputs, classes), batch_size=4, **options)


class ResumableLoader:
    """A loader that goes on in the middle of an epoch, as torchdata's does."""

    def __init__(self, batches: int = 8) -> None:
        self.batches = list(loader(batches))
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for index in range(self.position, len(self.batches)):
            self.position = (index + 1) % len(self.batches)
            yield self.batches[index]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def inputs_of(batches: DataLoader[Any]) -> list[Tensor]:
    """What the model is called with."""
    return [batch[0] for batch in batches]


def quiet_trainer(directory: Path, *callbacks: Callback, **options: Any) -> Trainer:
    """A trainer on one CPU that prints and logs nothing; checkpoints only if a callback writes them."""
    checkpoints = any("Checkpoint" in type(callback).__name__ for callback in callbacks)
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": checkpoints,
        "default_root_dir": directory,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})


def quantization(
    spec: QuantSpec = INT4, algorithm: Algorithm | None = None, **options: Any
) -> QuantizationAwareTraining:
    """The callback, with the schedule's fields among ``options``."""
    fields = {name: options.pop(name) for name in list(options) if name in QuantizationSchedule.model_fields}
    return QuantizationAwareTraining(spec, algorithm, QuantizationSchedule(**fields), **options)


def layers_of(module: nn.Module) -> list[QLinear]:
    """All prepared layers."""
    return [layer for _, layer in quantized_layers(module)]


def assert_equal_state(one: nn.Module, other: nn.Module) -> None:
    """The same keys, dtypes and bits."""
    left, right = one.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name
