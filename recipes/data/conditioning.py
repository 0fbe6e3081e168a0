"""What a diffusion pipeline tells its transformer about a caption, recorded from a real call of the pipeline.

Every pipeline encodes prompts, builds position ids, scales timesteps and embeds guidance in its own way. Instead of
writing that again, the pipeline is called and the arguments with which it first calls its transformer are kept; the
call ends there. Calls for one prompt, for another and for both show which arguments belong to each example
(`recipes.data.templates`); the call without guidance shows which part of a guided one has no caption, be that half of
its batch or a second call at the same timestep; and the first two timesteps show how the transformer is told of them.

The pipeline is only ever an object handed in: nothing here imports the library that it comes from.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from recipes.data import DataError
from recipes.data.templates import Rows, Template, merged_arguments
from recipes.data.tensors import move

__all__ = ["Conditioner", "call_arguments", "calls_of", "record_calls", "timestep_of"]

Limit: TypeAlias = int | Callable[[Sequence[Mapping[str, Any]]], bool]
"""When to end a pipeline's call: at so many calls of its transformer, or at those for which this is true."""


class _EndOfCallError(Exception):
    """Ends a pipeline's call once enough was recorded."""


@contextmanager
def record_calls(transformer: nn.Module, limit: Limit | None = None) -> Iterator[list[dict[str, Any]]]:
    """Collect the arguments of every call of ``transformer``, by name, while the context is open.

    Args:
        transformer: what a pipeline calls.
        limit: end the pipeline's call when the transformer is called for the ``limit``-th time, before it runs; or
            when this is true of the calls so far.

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
        if limit(calls) if callable(limit) else len(calls) == limit:
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
    limit: Limit | None = None,
    seed: int = 0,
    **options: Any,
) -> list[dict[str, Any]]:
    """Call a pipeline and return the arguments of its transformer's calls.

    Args:
        pipeline: a text-to-image pipeline, or one that takes class labels.
        captions: texts, or integers for a pipeline that takes class labels.
        size: pixels a side.
        max_sequence_length: tokens a caption, where the pipeline takes that; none: its own default.
        limit: as for `record_calls`.
        seed: of the first noise.
        options: handed on where the pipeline takes them, such as ``guidance_scale`` and ``num_inference_steps``.

    Raises:
        DataError: the pipeline cannot run this.
    """
    options |= {"output_type": "latent", "generator": torch.Generator().manual_seed(seed)}
    given = call_arguments(pipeline, captions, size, max_sequence_length=max_sequence_length, **options)
    try:
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            _checked_lookups(pipeline.transformer),
            record_calls(pipeline.transformer, limit) as calls,  # before its arguments are moved
            _run_where_it_lies(pipeline.transformer),
        ):
            pipeline(**given)
    except (DataError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the pipeline's own code raises
        raise DataError(
            f"model: {type(pipeline).__name__} cannot make an image of size {size} ({type(error).__name__}: {error}): "
            "give a data.size and a max_sequence_length that it takes, and a complete pipeline whose parts fit"
        ) from error
    if not calls:
        raise DataError(f"model: {type(pipeline).__name__} never called its transformer")
    return calls


def _label(pipeline: Any, caption: Any) -> int:
    if str(caption).isdigit():
        return int(caption)
    if caption in getattr(pipeline, "labels", {}):
        return int(pipeline.labels[caption])
    raise DataError(
        f"data.caption_field: {type(pipeline).__name__} takes class labels, and {caption!r} is none: name a column of "
        "integers, or of labels that the pipeline knows"
    )


class Conditioner:
    """Records what a pipeline tells its transformer about captions.

    Args:
        pipeline: with its encoders; only its calls are used.
        size: pixels a side.
        max_sequence_length: tokens a caption; none: the pipeline's own default.
        captions: two captions, of different lengths where there are such, to learn the arguments from. The transformer
            runs with the first one, so that a label it does not know is found here.

    Attributes:
        template: how to put a batch of arguments together; holds no part of the pipeline.
        guided: whether the pipeline runs its transformer with and without the caption, at once or one after the other.
        takes_text: whether captions are texts, rather than class labels.
        empty: `Rows` of no caption; none where the pipeline has no such thing.

    Raises:
        DataError: the pipeline cannot be run, or calls its transformer in a way that is not understood.
    """

    def __init__(self, pipeline: Any, size: int, max_sequence_length: int | None, captions: tuple[Any, Any]) -> None:
        self._pipeline, self._size, self._length = pipeline, size, max_sequence_length
        self._options: dict[str, Any] = {}
        accepted = inspect.signature(pipeline.__call__).parameters
        self.takes_text = "prompt" in accepted
        *default, later = self._first_step(captions[0])
        sample = next(iter(inspect.signature(pipeline.transformer.forward).parameters))
        self.guided = len(default) == 2 or len(default[0][sample]) == 2
        if self.guided:  # 1 is what all pipelines take for no guidance
            self._options = {"true_cfg_scale" if "true_cfg_scale" in accepted else "guidance_scale": 1.0}
        first, both = (self._call(captions[:1]) if self.guided else default[0]), self._call(captions)
        calls = len(self._first_step(captions[0])) - 1 if len(default) > 1 and self.guided else len(default)
        if (len(first[sample]), len(both[sample]), calls) != (1, 2, 1):
            raise DataError(
                f"model: {type(pipeline).__name__} runs its transformer on {len(first[sample])} latents for one "
                f"caption and {len(both[sample])} for two, in {calls} calls a step, with "
                f"{self._options or 'its default guidance'}: give another pipeline"
            )
        self.template = Template(
            merged_arguments(first, self._call(captions[1:]), both, (sample, "timestep")),
            sample,
            tuple(first[sample].shape[1:]),
            first[sample].dtype,
            first["timestep"].dtype,
            self._divisor(default[0]["timestep"], later["timestep"]),
        )
        self.empty = self._without_caption(default, self.template.rows(first))

    def rows(self, caption: Any) -> Rows:
        """What belongs to a caption, on the CPU.

        Raises:
            DataError: the pipeline cannot be run, or an argument that all captions should share depends on this one.
        """
        return self.template.rows(self._call([caption]))

    def _settings(self) -> dict[str, Any]:
        return {"max_sequence_length": self._length, "num_inference_steps": 2, **self._options}

    def _call(self, captions: Sequence[Any]) -> dict[str, Any]:
        return calls_of(self._pipeline, captions, self._size, limit=1, **self._settings())[0]

    def _first_step(self, caption: Any) -> list[dict[str, Any]]:
        """Record all calls of the first step, and after them the first one of the second step."""
        calls = calls_of(self._pipeline, [caption], self._size, limit=_second_step, **self._settings())
        sample = next(iter(inspect.signature(self._pipeline.transformer.forward).parameters))
        for call in calls:
            if not isinstance(call.get(sample), Tensor) or not isinstance(call.get("timestep"), Tensor):
                raise DataError(
                    f"model: {type(self._pipeline.transformer).__name__} is called with {sorted(call)}, where latents "
                    f"({sample}) and timestep must be tensors: give another pipeline"
                )
        if not _second_step(calls):
            raise DataError(
                f"model: {type(self._pipeline).__name__} calls its transformer at one timestep only, in two steps, so "
                "what it passes for the scheduler's cannot be told: give another pipeline"
            )
        return calls

    def _divisor(self, *passed: Tensor) -> float:
        """The scheduler's timesteps over what the transformer is told: a power of ten, but for rounding."""
        steps = list(dict.fromkeys(float(step) for step in self._pipeline.scheduler.timesteps))[:2]
        told = [float(tensor.flatten()[0]) for tensor in passed]
        # Both timesteps must be told alike: another rule, such as one minus the noise, has no divisor.
        if steps[0] <= 0 or told[0] <= 0 or len(steps) < 2 or abs(told[1] / told[0] - steps[1] / steps[0]) > 0.02:
            raise DataError(
                f"model: {type(self._pipeline).__name__} passes the timesteps {told} for the scheduler's {steps}, "
                "which are no multiple of them: give another pipeline"
            )
        ratio = steps[0] / told[0]
        power = 10.0 ** round(math.log10(ratio))
        return power if abs(ratio / power - 1) < 0.01 else ratio

    def _without_caption(self, default: Sequence[Mapping[str, Any]], captioned: Rows) -> Rows | None:
        if not self.guided:
            return self.rows("") if self.takes_text else None
        examples = len(default[0][self.template.sample])
        halves = [self.template.rows(call, example) for call in default for example in range(examples)]

        def distance(half: Rows) -> float:
            if any(half[path].shape != captioned[path].shape for path in captioned):
                return math.inf
            return sum(float((half[path].double() - captioned[path].double()).abs().sum()) for path in captioned)

        # Which comes first is the pipeline's choice; the one further from the captioned call has no caption.
        return max(halves, key=distance)


def timestep_of(call: Mapping[str, Any]) -> float | None:
    """The timestep of a recorded call, as the transformer was told it; none where it was told none."""
    time = call.get("timestep")
    return float(time.flatten()[0]) if isinstance(time, Tensor) else None


def _second_step(calls: Sequence[Mapping[str, Any]]) -> bool:
    return timestep_of(calls[0]) != timestep_of(calls[-1])


@contextmanager
def _run_where_it_lies(model: nn.Module) -> Iterator[None]:
    """Let a pipeline call a model on another device than the pipeline's own, as where only its encoders were moved."""
    own = next((parameter.device for parameter in model.parameters()), None)
    came_from: list[torch.device] = []

    def bring(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        devices = [leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        came_from[:] = devices[:1]
        return None if own is None or set(devices) <= {own} else move((args, kwargs), own)

    def give_back(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return move(output, came_from[0]) if came_from and came_from[0] != own else None

    handles = [
        model.register_forward_pre_hook(bring, with_kwargs=True),
        model.register_forward_hook(give_back),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _checked_lookups(model: nn.Module) -> Iterator[None]:
    """Refuse what is in no table of embeddings before it is looked up, which some devices do not survive."""

    def check(module: nn.Module, args: tuple[Any, ...]) -> None:
        size: int = module.num_embeddings  # type: ignore[assignment]
        if not args or not args[0].numel():
            return
        lowest, highest = (int(bound) for bound in args[0].aminmax())
        if lowest < 0 or highest >= size:
            raise DataError(
                f"data.caption_field: the transformer has embeddings for the numbers 0 to {size - 1}, and was given "
                f"{lowest if lowest < 0 else highest}: name a column of labels that the model knows"
            )

    handles = [part.register_forward_pre_hook(check) for part in model.modules() if isinstance(part, nn.Embedding)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
