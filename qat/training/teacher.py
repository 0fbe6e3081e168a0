"""Teachers that take little of the device's memory: a model whose blocks stay in CPU memory, and logits on disk.

A teacher on the device costs its weights: 2 bytes a parameter in bfloat16. With `one_block_at_a_time` the device holds
what lies outside the blocks (embeddings, norms, head) and the block that runs; each step copies every block once.
Cached logits cost no device memory: k + 1 numbers and k indices for each token of a batch. They need the very rows that
they were made of, and on disk (bytes of a logit + 4) bytes times k for each token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qat.blocks import find_blocks
from qat.errors import LoadError, TrainingError, shown
from qat.files.directory import as_path, atomic_directory
from qat.files.trusted import file_fault
from qat.tensors import map_tensors, model_device
from qat.training.losses import CHUNK

__all__ = ["INDEX", "CachedLogits", "TopLogits", "cache_logits", "logits_of", "one_block_at_a_time"]

INDEX = "qat_logits.json"
"""The file that says which rows a directory of logits holds."""


def logits_of(outputs: Any) -> Tensor:
    """The logits of what a model returned: a tensor, or an object that has them as ``logits``.

    Raises:
        TrainingError: it is neither.
    """
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor):
        raise TrainingError(
            f"outputs: expected a tensor or an object with logits, got {type(outputs).__name__}: say which tensor of "
            "it is compared (predictions=...)"
        )
    return logits


@contextmanager
def one_block_at_a_time(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it ``model`` runs on ``device`` while its blocks stay where they are: each moves there while it runs.

    What lies outside the blocks moves once and stays.

    Raises:
        SpecError: the model has no blocks (`qat.blocks.find_blocks`).
    """
    blocks = {block: [*block.parameters(), *block.buffers()] for block in find_blocks(model).values()}
    inside = {id(tensor) for tensors in blocks.values() for tensor in tensors}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in inside:
            tensor.data = tensor.data.to(device)
    with ExitStack() as hooks:
        for block, tensors in blocks.items():
            homes = [(tensor, tensor.data) for tensor in tensors]

            def come(*_: Any, homes: list[tuple[Tensor, Tensor]] = homes) -> None:
                for tensor, home in homes:
                    tensor.data = home.to(device)

            def leave(*_: Any, homes: list[tuple[Tensor, Tensor]] = homes) -> None:
                for tensor, home in homes:
                    tensor.data = home

            hooks.callback(block.register_forward_pre_hook(come).remove)
            hooks.callback(block.register_forward_hook(leave, always_call=True).remove)
        yield


class TopLogits(NamedTuple):
    """A teacher's logits for its k likeliest classes, as `qat.training.losses.divergence` takes them."""

    values: Tensor
    """``(..., k + 1)``, float32; the last is the logsumexp of all other classes."""
    indices: Tensor
    """``(..., k)``, int64."""


def cache_logits(
    teacher: nn.Module, batches: Iterable[Mapping[str, Any]], directory: str | Path, *, top_k: int = 64
) -> CachedLogits:
    """Run a teacher over batches and keep its largest logits for each token, for a later distillation without it.

    Each row of ``input_ids`` is kept under a fingerprint of its tokens, padding left out. So rows may be shuffled and
    padded in another way later, but not cut or tokenized in another way. Other inputs do not enter the fingerprint.

    Args:
        teacher: a model that returns logits ``(batch, length, classes)`` or ``(batch, classes)``.
        batches: what it is called with: mappings with ``input_ids`` ``(batch, length)``; they move to its device.
        directory: does not exist, or is empty; it appears when all is written.
        top_k: classes kept for each row of logits. All others are kept as one class with the sum of their probability,
            so that the divergence is a lower bound of the one over all classes, and not an estimate.

    Raises:
        TrainingError: a batch has no ``input_ids``, there is no batch, the teacher gives NaN, or ``top_k`` is below 1.
        ExportError: the directory cannot be written, or holds something.
    """
    from safetensors.torch import save_file

    if top_k < 1:
        raise TrainingError(f"top_k: must be at least 1, got {top_k}: a language model wants 64 and more")
    rows: dict[str, tuple[int, int, int]] = {}
    classes, per_token, modes = 0, False, [(module, module.training) for module in teacher.modules()]
    device = model_device(teacher.eval())
    try:
        with atomic_directory(target := as_path(directory, TrainingError), overwrite=False) as folder, torch.no_grad():
            for number, batch in enumerate(batches):
                prints, start = _fingerprints(batch), 0
                logits = logits_of(teacher(**map_tensors(lambda tensor: tensor.to(device), dict(batch))))
                classes, per_token = logits.shape[-1], logits.ndim > 2
                logits, k = logits.flatten(0, -2), min(top_k, classes - 1)  # one is left, so that there is a rest
                counted = _counted(batch).to(device).flatten() if per_token else torch.ones_like(logits[:, 0]).bool()
                size = max(1, CHUNK // classes)
                pairs = zip(torch.split(logits, size), torch.split(counted, size), strict=True)
                parts = [_top_and_rest(part[kept], k) for part, kept in pairs]
                for key, count in prints:
                    rows[key] = number, start, (start := start + (count if per_token else 1))
                if any(bool(rest.isnan().any() | values.isnan().any()) for values, _, rest in parts):
                    raise TrainingError(f"batches: the teacher gives NaN for batch {number}: check batch and model")
                whole = zip(("values", "indices", "rest"), map(torch.cat, zip(*parts, strict=True)), strict=True)
                save_file(dict(whole), folder / _file(number))
            if not rows:
                raise TrainingError("batches: there is none: give the batches that will be trained on")
            (folder / INDEX).write_text(json.dumps({"classes": classes, "per_token": per_token, "rows": rows}))
    finally:
        for module, training in modes:
            module.training = training
    return CachedLogits(target)


class CachedLogits:
    """The teacher whose logits `cache_logits` has written: called with a batch, it reads those of its rows.

    A call copies ``input_ids`` to the CPU, to know the rows.

    Raises:
        LoadError: there are no logits in the directory.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = as_path(directory, LoadError)
        try:
            if fault := file_fault(self.directory, INDEX):
                raise OSError(fault)
            index = json.loads((self.directory / INDEX).read_text())
            self.classes: int = index["classes"]
            self._per_token: bool = index["per_token"]
            self._rows: dict[str, tuple[int, int, int]] = index["rows"]  # digest to file, start and end
            of_types = type(self.classes) is int and type(self._per_token) is bool
            places = self._rows.values()
            if not of_types or not all([*map(type, place)] == [int] * 3 and min(place) >= 0 for place in places):
                raise TypeError("classes, per_token or rows are no such values")
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise LoadError(
                f"teacher: {str(directory)!r} holds no cached logits ({type(error).__name__}: {error}): write them "
                "with qat.cache_logits"
            ) from error

    def __call__(self, inputs: Mapping[str, Any]) -> TopLogits:
        """The logits of each row of ``inputs["input_ids"]``, on its device; 0 where padding is.

        Raises:
            TrainingError: rows are not in the cache: it was made of other data.
            LoadError: a file is missing or damaged.
        """
        from safetensors import SafetensorError, safe_open

        prints = _fingerprints(inputs)
        if missing := [row for row, (key, _) in enumerate(prints) if key not in self._rows]:
            what = "was made of other data" if len(missing) == len(prints) else "is incomplete"
            raise TrainingError(
                f"teacher: the cache in {str(self.directory)!r} {what}: it lacks {len(missing)} of {len(prints)} rows "
                f"of input_ids, such as row {missing[0]}: write it with qat.cache_logits from the batches of this "
                "training"
            )
        parts: dict[str, list[Tensor]] = {"values": [], "indices": [], "rest": []}
        number = 0
        try:
            for (number, start, end), count in ((self._rows[key], count) for key, count in prints):
                if fault := file_fault(self.directory, _file(number)):
                    raise OSError(fault)
                with safe_open(self.directory / _file(number), "pt") as file:
                    for name, found in parts.items():
                        found.append(file.get_slice(name)[start:end])
                if {*(len(found[-1]) for found in parts.values())} != {count if self._per_token else 1}:
                    raise OSError(f"it lacks rows {start} to {end}")
                if not parts["indices"][-1].lt(self.classes).all():
                    raise OSError(f"it has classes beyond {self.classes}")
        except (OSError, SafetensorError) as error:
            raise LoadError(
                f"teacher: the cache in {str(self.directory)!r} has lost entries, {_file(number)} cannot be read "
                f"({error}): write it again with qat.cache_logits"
            ) from error
        values, indices, rest = (torch.cat(found) for found in parts.values())
        values, indices = torch.cat([values.float(), rest[:, None]], -1), indices.long()
        if self._per_token:
            counted = _counted(inputs).cpu()
            values, indices = (
                part.new_zeros(*counted.shape, part.shape[-1]).masked_scatter(counted[..., None], part)
                for part in (values, indices)
            )
        device = inputs["input_ids"].device
        return TopLogits(values.to(device), indices.to(device))


def _top_and_rest(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of a few rows the k largest logits, their classes, and the logsumexp of all others, on the CPU."""
    top = logits.topk(k)
    rest = logits.float().scatter(-1, top.indices, -torch.inf).logsumexp(-1)
    return top.values.cpu(), top.indices.int().cpu(), rest.cpu()


def _file(number: int) -> str:
    return f"logits-{number:06d}.safetensors"


def _counted(batch: Mapping[str, Any]) -> Tensor:
    """``(batch, length)``: which tokens are no padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def _fingerprints(batch: Mapping[str, Any]) -> list[tuple[str, int]]:
    """For each row a digest of its tokens, and how many there are."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim != 2 or _counted(batch).shape != ids.shape:
        found = {k: tuple(getattr(v, "shape", ())) for k, v in batch.items()} if isinstance(batch, Mapping) else batch
        raise TrainingError(
            "batches: logits are cached by input_ids, (batch, length), with an attention_mask of that shape or none; "
            f"got the batch {shown(found)}: pass several such batches, or use the teacher's model"
        )
    rows = [row[kept].numpy() for row, kept in zip(ids.cpu().long(), _counted(batch).cpu(), strict=True)]
    return [(hashlib.sha256(row.tobytes()).hexdigest(), len(row)) for row in rows]
