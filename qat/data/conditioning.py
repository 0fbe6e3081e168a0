"""What a diffusion pipeline tells its transformer about a caption, recorded from a real call of the pipeline.

Every pipeline encodes prompts, builds position ids, scales timesteps and embeds guidance in its own way. Instead of
writing that again, the pipeline is called and the arguments with which it first calls its transformer are kept; the
call ends there. Three calls tell the arguments apart: one prompt against two shows which belong to each example (their
first dimension doubles), and the call without guidance shows which half of a guided call has no caption.

The pipeline is only ever an object handed in: nothing here imports the library that it comes from.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from qat.errors import DataError

__all__ = ["Conditioner", "Template", "call_arguments", "calls_of", "record_calls"]

Rows: TypeAlias = dict[str, Tensor]
"""What belongs to one example, by where it stands among the transformer's arguments; without a batch dimension."""


class _EndOfCallError(Exception):
    """Ends a pipeline's call once enough was recorded."""


@contextmanager
def record_calls(transformer: nn.Module, limit: int | None = None) -> Iterator[list[dict[str, Any]]]:
    """Collect the arguments of every call of ``transformer``, by name, while the context is open.

    Args:
        transformer: what a pipeline calls.
        limit: end the pipeline's call when the transformer is called for the ``limit``-th time, before it runs.

    >>> layer = nn.Linear(2, 1)
    >>> with record_calls(layer) as calls:
    ...     _ = layer(torch.ones(1, 2))
    >>> list(calls[0])
    ['input']
    """
    calls: list[dict[str, Any]] = []
    signature = inspect.signature(transformer.forward)

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(dict(signature.bind(*args, **kwargs).arguments))
        if len(calls) == limit:
            raise _EndOfCallError

    handle = transformer.register_forward_pre_hook(record, with_kwargs=True)
    try:
        yield calls
    except _EndOfCallError:
        pass
    finally:
        handle.remove()


def call_arguments(
    pipeline: Any, captions: Sequence[Any], size: int, *, max_sequence_length: int | None = None, **options: Any
) -> dict[str, Any]:
    """Return the arguments that make a pipeline draw images of captions; of ``options``, those that it takes.

    Raises:
        DataError: it takes neither prompts nor class labels, or a caption is no class label.
    """
    accepted = inspect.signature(pipeline.__call__).parameters
    # Some pipelines would replace a size that they were not trained on.
    wanted = {"height": size, "width": size, "use_resolution_binning": False, **options}
    if max_sequence_length is not None:
        wanted["max_sequence_length"] = max_sequence_length
    if "prompt" in accepted:
        wanted["prompt"] = [str(caption) for caption in captions]
    elif "class_labels" in accepted:
        wanted["class_labels"] = [_label(pipeline, caption) for caption in captions]
    else:
        raise DataError(f"model: {type(pipeline).__name__} takes neither prompts nor class labels: give one that does")
    return {name: value for name, value in wanted.items() if name in accepted}


def calls_of(
    pipeline: Any,
    captions: Sequence[Any],
    size: int,
    *,
    max_sequence_length: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    **options: Any,
) -> list[dict[str, Any]]:
    """Call a pipeline and return the arguments of its transformer's calls.

    Args:
        pipeline: a text-to-image pipeline, or one that takes class labels.
        captions: texts, or integers for a pipeline that takes class labels.
        size: pixels a side.
        max_sequence_length: tokens a caption, where the pipeline takes that; none: its own default.
        limit: end at so many calls.
        seed: of the first noise.
        options: handed on where the pipeline takes them, such as ``guidance_scale`` and ``num_inference_steps``.

    Raises:
        DataError: the pipeline cannot run this.
    """
    options |= {"output_type": "latent", "generator": torch.Generator().manual_seed(seed)}
    given = call_arguments(pipeline, captions, size, max_sequence_length=max_sequence_length, **options)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), record_calls(pipeline.transformer, limit) as calls:
            pipeline(**given)
    except Exception as error:  # whatever the pipeline's own code raises
        raise DataError(
            f"model: {type(pipeline).__name__} cannot make an image of size {size} ({type(error).__name__}: {error}): "
            "give a data.size and a max_sequence_length that it takes, and a complete pipeline whose parts fit"
        ) from error
    if not calls:
        raise DataError(f"model: {type(pipeline).__name__} never called its transformer")
    return calls


def _label(pipeline: Any, caption: Any) -> int:
    if isinstance(caption, int) or str(caption).isdigit():
        return int(caption)
    if caption in getattr(pipeline, "labels", {}):
        return int(pipeline.labels[caption])
    raise DataError(
        f"data.caption_field: {type(pipeline).__name__} takes class labels, and {caption!r} is none: name a column of "
        "integers, or of labels that the pipeline knows"
    )


@dataclass(frozen=True)
class _PerExample:
    path: str


@dataclass(frozen=True)
class _Repeated:
    value: Any


@dataclass(frozen=True)
class _Lengths:
    """A mask that a pipeline passes only for captions of different lengths."""

    dtype: torch.dtype


@dataclass(frozen=True)
class Template:
    """A transformer's arguments with holes: for latents, timesteps, and what belongs to each example."""

    arguments: Mapping[str, Any]
    sample: str
    """The argument that takes the noised latents."""
    sample_shape: tuple[int, ...]
    """Of one example."""
    sample_dtype: torch.dtype
    timestep_dtype: torch.dtype
    timestep_divisor: float
    """The pipeline passes the scheduler's timestep divided by this (below 1: multiplied)."""

    def fill(self, rows: Sequence[Rows], sample: Tensor, timesteps: Tensor) -> dict[str, Any]:
        """Put a batch of arguments together.

        Args:
            rows: what `Conditioner.rows` returned, for each example.
            sample: noised latents, (batch, *sample_shape).
            timesteps: the scheduler's, (batch,).

        Raises:
            DataError: captions of different lengths, for a pipeline that passes no mask.
        """
        times = timesteps.to(self.timestep_dtype)
        times = times / self.timestep_divisor if self.timestep_divisor >= 1 else times * (1 / self.timestep_divisor)
        filled = {name: self._filled(value, rows) for name, value in self.arguments.items()}
        return {**filled, self.sample: sample, "timestep": times.to(self.timestep_dtype)}

    def _filled(self, value: Any, rows: Sequence[Rows]) -> Any:
        if isinstance(value, _PerExample):
            return self._stacked([row[value.path] for row in rows])
        if isinstance(value, _Repeated):
            return [value.value] * len(rows)
        if isinstance(value, _Lengths):
            lengths = self._lengths(rows)
            longest = max(lengths)
            if min(lengths) == longest:
                return None  # as the pipeline does
            return torch.stack([torch.arange(longest) < length for length in lengths]).to(value.dtype)
        if isinstance(value, dict):
            return {name: self._filled(item, rows) for name, item in value.items()}
        return value

    def _stacked(self, tensors: Sequence[Tensor]) -> Tensor:
        lengths = [len(tensor) if tensor.ndim else 0 for tensor in tensors]
        if len(set(lengths)) == 1:
            return torch.stack(list(tensors))
        if not any("mask" in name for name in self.arguments):
            raise DataError(
                "max_sequence_length: captions have different lengths and the pipeline passes no mask: give a batch "
                "size of 1"
            )
        longest = max(lengths)
        return torch.stack([torch.cat([t, t.new_zeros(longest - len(t), *t.shape[1:])]) for t in tensors])

    def _lengths(self, rows: Sequence[Rows]) -> list[int]:
        """Of each caption, from the first of its tensors that has a length of its own."""
        for path in rows[0]:
            lengths = [len(row[path]) if row[path].ndim else 0 for row in rows]
            if len(set(lengths)) > 1:
                return lengths
        return [0] * len(rows)


class Conditioner:
    """Records what a pipeline tells its transformer about captions.

    Args:
        pipeline: with its encoders; only its calls are used.
        size: pixels a side.
        max_sequence_length: tokens a caption; none: the pipeline's own default.
        captions: two captions, of different lengths where there are such, to learn the arguments from.

    Attributes:
        template: how to put a batch of arguments together; holds no part of the pipeline.
        guided: whether the pipeline runs its transformer with and without the caption at once.
        empty: `Rows` of no caption; none where the pipeline has no such thing.

    Raises:
        DataError: the pipeline cannot be run, or calls its transformer in a way that is not understood.
    """

    def __init__(self, pipeline: Any, size: int, max_sequence_length: int | None, captions: tuple[Any, Any]) -> None:
        self._pipeline, self._size, self._length = pipeline, size, max_sequence_length
        self._options: dict[str, Any] = {}
        default = self._call([captions[0]])
        sample = next(iter(inspect.signature(pipeline.transformer.forward).parameters))
        if not isinstance(default.get(sample), Tensor) or not isinstance(default.get("timestep"), Tensor):
            raise DataError(
                f"model: {type(pipeline.transformer).__name__} is called with {sorted(default)}, where latents "
                f"({sample}) and timestep must be tensors: give another pipeline"
            )
        self.guided = len(default[sample]) == 2
        if self.guided:
            self._options["guidance_scale"] = 1.0  # what all pipelines that double their batch take for no guidance
        one, two = (default if not self.guided else self._call(captions[:1])), self._call(captions)
        if (len(one[sample]), len(two[sample])) != (1, 2):
            raise DataError(
                f"model: {type(pipeline).__name__} runs its transformer on {len(one[sample])} latents for one caption "
                f"and {len(two[sample])} for two, with {self._options or 'its default guidance'}: give another pipeline"
            )
        arguments = {name: _merge(one[name], two[name], name) for name in one if name not in (sample, "timestep")}
        divisor = self._divisor(one["timestep"])
        self.template = Template(
            {name: value for name, value in arguments.items() if value is not None},
            sample,
            tuple(one[sample].shape[1:]),
            one[sample].dtype,
            one["timestep"].dtype,
            divisor,
        )
        self.empty = self._without_caption(default, self._rows(one))

    def _divisor(self, passed: Tensor) -> float:
        """The scheduler's first timestep over what the transformer is told: a power of ten, but for rounding."""
        first, told = float(self._pipeline.scheduler.timesteps[0]), float(passed.flatten()[0])
        if first <= 0 or told <= 0:
            raise DataError(
                f"model: {type(self._pipeline).__name__} passes the timestep {told} for the scheduler's {first}, which "
                "is no multiple of it: give another pipeline"
            )
        power = 10.0 ** round(math.log10(first / told))
        return power if abs(first / told / power - 1) < 0.01 else first / told

    def rows(self, caption: Any) -> Rows:
        """What belongs to a caption, on the CPU."""
        return self._rows(self._call([caption]))

    def _call(self, captions: Sequence[Any]) -> dict[str, Any]:
        settings = {"max_sequence_length": self._length, "num_inference_steps": 2, **self._options}
        return calls_of(self._pipeline, captions, self._size, limit=1, **settings)[0]

    def _rows(self, call: Mapping[str, Any], example: int = 0) -> Rows:
        found: Rows = {}
        _collect(self.template.arguments, call, example, found)
        return found

    def _without_caption(self, default: Mapping[str, Any], captioned: Rows) -> Rows | None:
        if not self.guided:
            takes_text = "prompt" in inspect.signature(self._pipeline.__call__).parameters
            return self.rows("") if takes_text else None
        halves = [self._rows(default, example) for example in (0, 1)]
        # Which half comes first is the pipeline's choice; the one further from the captioned call has no caption.
        return max(halves, key=lambda half: sum(float((half[p] - captioned[p]).abs().sum()) for p in captioned))


def _merge(one: Any, two: Any, path: str) -> Any:
    """Tell what belongs to each example from what all share, by the calls for one and for two captions."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        if one.ndim and (len(one), len(two)) == (1, 2):
            return _PerExample(path)
        return one.detach().cpu()
    if one is None and isinstance(two, Tensor) and two.ndim == 2:
        return _Lengths(two.dtype)
    if isinstance(one, Mapping) and isinstance(two, Mapping):
        return {name: _merge(one[name], two.get(name), f"{path}.{name}") for name in one}
    if isinstance(one, list) and isinstance(two, list) and (len(one), len(two)) == (1, 2):
        return _Repeated(one[0])
    return one


def _collect(template: Mapping[str, Any], call: Mapping[str, Any], example: int, found: Rows) -> None:
    for name, value in template.items():
        if isinstance(value, _PerExample):
            found[value.path] = call[name][example].detach().cpu().clone()
        elif isinstance(value, dict):
            _collect(value, call[name], example, found)
