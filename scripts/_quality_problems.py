"""What `benchmark_quality` trains: a language model, a vision transformer, an encoder and a diffusion transformer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qat.training.losses import divergence

RECIPES = Path(__file__).parents[1] / "recipes"
BLOCK, BATCH = 256, 8  # 2,048 tokens a step


class Problem:
    """A float model, an endless stream of batches to train on for each seed, and held-out batches."""

    target = "transformers"
    excluded: tuple[str, ...] = ()
    model: nn.Module
    device: str
    held_out: list[Any]

    def batches(self, seed: int) -> Iterator[Any]:
        """Batches in an order that the seed alone decides."""
        raise NotImplementedError

    def inputs(self, batch: Any, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """What the model is called with; floating inputs in ``dtype``."""
        raise NotImplementedError

    def loss(self, outputs: Any, batch: Any) -> Any:
        """The task's loss."""
        raise NotImplementedError

    def divergence(self, outputs: Any, goal: Any) -> Any:
        """How far outputs are from those of a teacher."""
        raise NotImplementedError

    def changed(self, outputs: Any, goal: Any) -> Any:
        """Share of predictions that are others."""
        return (outputs.logits.argmax(-1) != goal.logits.argmax(-1)).float().mean()

    def compared(self, outputs: Any) -> tuple[Tensor, None]:
        """What of outputs is compared with a teacher's, of every example."""
        return outputs.logits, None

    def task_loss(self, model: nn.Module, batch: Any) -> Any:
        """Of one training step."""
        return self.loss(model(**self.inputs(batch)), batch)


class LanguageModel(Problem):
    """The reference language model; held out are blocks of files of the standard library that it never saw."""

    def __init__(self, device: str, held_out: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from recipes.data.text import standard_library_documents

        folder = RECIPES / "reference"
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

        def blocks(split: Any) -> Tensor:
            ids: list[int] = []
            for document in standard_library_documents(split):
                ids += [*tokenizer(document["text"], verbose=False)["input_ids"], tokenizer.eos_token_id]
            whole = len(ids) // BLOCK
            return torch.tensor(ids[: whole * BLOCK]).view(whole, BLOCK)

        self._train, evaluation = blocks("train").to(device), blocks("evaluation").to(device)
        chosen = torch.linspace(0, len(evaluation) - 1, min(held_out, len(evaluation))).long()
        self.held_out = list(torch.split(evaluation[chosen], BATCH))
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
        self.model, self.device = model.to(device).eval(), device

    def batches(self, seed: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self._train), generator=generator)
            for part in torch.split(order[: len(order) // BATCH * BATCH], BATCH):
                yield self._train[part]

    def inputs(self, batch: Tensor, dtype: torch.dtype | None = None) -> dict[str, Any]:
        return {"input_ids": batch}

    def loss(self, outputs: Any, batch: Tensor) -> Tensor:
        return functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())

    def divergence(self, outputs: Any, goal: Any) -> Any:
        return divergence(outputs.logits[:, :-1], goal.logits[:, :-1])


class Classifier(Problem):
    """The reference vision transformer on digits, or the reference encoder on pieces of modules."""

    def __init__(self, device: str, which: str) -> None:
        from scripts._calibration_models import encoder, vision_transformer

        case = (vision_transformer if which == "vit" else encoder)(device)
        self.model, self.device, self._case = case.model, device, case
        self.held_out = case.held_out

    def batches(self, seed: int) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(self._case.examples, generator=generator)
            for part in torch.split(order[: len(order) // 32 * 32], 32):
                yield self._case.collate(part.tolist())

    def inputs(self, batch: Any, dtype: torch.dtype | None = None) -> dict[str, Any]:
        given = {name: value for name, value in batch.items() if name != "labels"}
        return {n: v.to(dtype) if dtype and v.is_floating_point() else v for n, v in given.items()}

    def loss(self, outputs: Any, batch: Any) -> Any:
        return functional.cross_entropy(outputs.logits.float(), batch["labels"])

    def divergence(self, outputs: Any, goal: Any) -> Any:
        return divergence(outputs.logits, goal.logits)


class Diffusion(Problem):
    """The reference Flux pipeline's transformer: velocity of noised images at stratified timesteps."""

    target = "diffusers"

    def __init__(self, device: str) -> None:
        from recipes.common.diffusion import diffusion_data
        from recipes.common.diffusion_config import DiffusionConfig, source_of
        from recipes.common.models import load_pipeline
        from recipes.data.tensors import move
        from recipes.tasks.diffusion import prediction

        config = DiffusionConfig.model_validate({"spec": {"weights": "int4"}})
        pipeline, folder = load_pipeline(source_of(config), trust_remote_code=False)
        self._data = diffusion_data(pipeline, folder, config, torch.device(device), 32, 0)
        self._move, self._prediction = move, prediction
        self.model, self.device = pipeline.transformer.float().to(device).eval(), device
        self.held_out = [move(batch, torch.device(device)) for batch in self._data.evaluation]

    def batches(self, seed: int) -> Iterator[Any]:
        for number in itertools.count():
            yield self._move(replace(self._data.batches, seed=seed).batch(number), torch.device(self.device))

    def inputs(self, batch: Any, dtype: torch.dtype | None = None) -> dict[str, Any]:
        moved: dict[str, Any] = self._move(batch["inputs"], torch.device(self.device), dtype)
        return moved

    def loss(self, outputs: Any, batch: Any) -> Any:
        return (self._prediction(outputs, batch["target"]).float() - batch["target"].float()).square().mean()

    def divergence(self, outputs: Any, goal: Any) -> Any:
        mine, theirs = (found[0] if isinstance(found, tuple) else found.sample for found in (outputs, goal))
        return (mine.float() - theirs.float()).square().mean()

    def changed(self, outputs: Any, goal: Any) -> Any:
        return torch.zeros(())

    def compared(self, outputs: Any) -> tuple[Tensor, None]:
        return outputs[0] if isinstance(outputs, tuple) else outputs.sample, None


def problem(name: str, device: str, held_out: int) -> Problem:
    """By name: ``language``, ``vit``, ``encoder``, ``flux``."""
    if name == "language":
        return LanguageModel(device, held_out)
    return Diffusion(device) if name == "flux" else Classifier(device, name)
