"""What the tests of trainers share: a tiny Llama, its rows, and a plain loop to compare with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import qat
from qat.integrations.trainer import QuantizationCallback, grouped_optimizer

INT4 = qat.QuantSpec(weights="int4", dtype="float32")
INT4_INT8 = qat.QuantSpec(
    weights="int4", activations="int8", dtype="float32", include=("*q_proj", "*up_proj", "*down_proj")
)
GPTQ = qat.LearnedAffine(start="gptq")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
ROWS = [
    {"input_ids": row, "labels": row} for row in torch.randint(64, (32, 16), generator=torch.Generator().manual_seed(3))
]
LATE = qat.QuantizationSchedule(calibration_batches=2, start_step=2, hold_scales_from=6)


@dataclass(frozen=True)
class How:
    """What is trained, and when; all else is the same."""

    spec: qat.QuantSpec = INT4_INT8
    algorithm: qat.Algorithm | None = GPTQ
    schedule: qat.QuantizationSchedule = LATE


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **SIZES)).train()


def prepared(how: How) -> Any:
    model = llama()
    qat.prepare(model, how.spec, algorithm=how.algorithm, target="transformers")
    return model


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(qat.parameter_groups(model, lr=1e-3, weight_decay=0.1))


def loader() -> DataLoader[Any]:
    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    return DataLoader(ROWS, batch_size=4, collate_fn=collate)  # type: ignore[arg-type]


def plain_loop(
    how: How, loss_of: Callable[[Any, Any], torch.Tensor] = lambda model, batch: model(**batch).loss, model: Any = None
) -> tuple[Any, list[float]]:
    """The trained model, and the loss of each step."""
    model, losses = model or prepared(how), []
    optimizer = optimizer_of(model)
    training = qat.QuantizationSteps(model, how.schedule, loader())
    training.begin([optimizer], steps=8)
    for batch in loader():
        training.before_step()
        loss = loss_of(model, batch)
        losses.append(loss.item())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        training.after_step()
    training.end()
    return model, losses


def accelerated(how: How, directory: Path, *, save_at: int | None = None, resume: bool = False) -> Any:
    """The trained model and the losses, saved by accelerate or resumed from what it saved."""
    accelerator, losses = Accelerator(cpu=True), []
    model = prepared(how)
    training = qat.QuantizationSteps(model, how.schedule, loader())
    model, optimizer, batches = accelerator.prepare(model, optimizer_of(model), loader())
    accelerator.register_for_checkpointing(training)
    if resume:
        accelerator.load_state(str(directory))
    training.begin([optimizer], steps=8)
    for batch in accelerator.skip_first_batches(batches, training.step):
        training.before_step()
        loss = model(**batch).loss
        losses.append(loss.item())
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        training.after_step()
        if training.step == save_at:
            accelerator.save_state(str(directory))
    training.end()
    return accelerator.unwrap_model(model), losses


class Losses(TrainerCallback):
    """Notes the loss of each step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, *_: Any, logs: dict[str, float], **others: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])


def options(**own: Any) -> dict[str, Any]:
    """Arguments of a quiet Trainer that does what `plain_loop` does."""
    return {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "optim": "adamw_torch",
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        **own,
    }


def huggingface(
    directory: Path, how: How, *, resume: Path | None = None, callback: dict[str, Any] | None = None, **own: Any
) -> tuple[Any, list[float], Trainer]:
    """The trained model, the loss of each step, and the Trainer."""
    model, noted, arguments = llama(), Losses(), TrainingArguments(str(directory), **options(**own))
    trainer = Trainer(
        model,
        arguments,
        train_dataset=ROWS,  # type: ignore[arg-type]
        eval_dataset=ROWS[:8],  # type: ignore[arg-type]
        callbacks=[QuantizationCallback(how.spec, how.algorithm, how.schedule, **(callback or {})), noted],
        optimizer_cls_and_kwargs=grouped_optimizer(arguments),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model, noted.losses, trainer
