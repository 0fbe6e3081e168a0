"""Shards of torch's FSDP2 (``fully_shard``): how a prepared model trains, calibrates and freezes in them.

**Training.** A unit of ``fully_shard`` gathers its weights before its forward, so layers and operators see whole, plain
tensors there; where a shard ends within a group does not matter. Learned ranges stay float32 whatever a policy casts:
`shard` gives those of the whole model one unit of their own, without a policy. One collective gathers them before a
forward, and one reduces their gradients after a backward. They are sharded with their optimizer's state.

**Freezing.** `unwrap` takes fully_shard off a model and leaves the shards. Then `gather` makes one layer whole after
another, as the forward saw it: cast to what a mixed-precision policy gave. So codes are the trained ones, and no rank
ever holds all masters. Each rank ends with the whole frozen model; rank 0 writes it (`on_first_rank`).

A failure that a rank finds between runs is told to all. One inside a run of a sharded model ends that rank alone, since
the others wait for its shards: the launcher (torchrun, Lightning) then ends them.
"""

from __future__ import annotations

import itertools
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qat.blocks import find_blocks
from qat.errors import CalibrationError, ExportError, StateError, listed
from qat.files.evidence import is_frozen
from qat.layers import QuantizedLayer, quantized_layers
from qat.probing import several_processes, together
from qat.tensors import is_sharded, whole

__all__ = [
    "equal_batches",
    "gather",
    "gather_rest",
    "gathered",
    "is_unit",
    "mark_gathered",
    "on_first_rank",
    "own_hooks",
    "prepared_first",
    "refuse_cast_ranges",
    "refuse_sharded",
    "reshard",
    "shard",
    "sharded",
    "together_between_runs",
    "unshard",
    "unwrap",
]

Item = TypeVar("Item")
_HOOKS, _GATHERED = "_qat_shard_hooks", "_qat_gathered"
_FSDP = "torch.distributed.fsdp"
_prepare_first: ContextVar[Callable[[nn.Module], None] | None] = ContextVar("prepare_first", default=None)
_written = itertools.count()


def shard(
    model: nn.Module,
    mesh: Any = None,
    *,
    blocks: Iterable[nn.Module] | None = None,
    mp_policy: Any = None,
    reshard_after_forward: bool | int | None = None,
) -> None:
    """Shard a model by torch's ``fully_shard``, in place: each block a unit, the rest another, and learned ranges one.

    Call it after `qat.prepare`, with equal weights on every rank, and before the optimizer is made. A float model is
    sharded too, without that last unit. In Lightning's ``configure_model`` the callback prepares the model first. All
    ranks call this, and later `qat.calibrate`, `qat.freeze` and `qat.export`.

    Args:
        model: a prepared or a float model, on the CPU or on this rank's device.
        mesh: a DeviceMesh of one dimension, or two (replicate, shard), or the ``device_mesh`` of a LightningModule;
            None: of all ranks.
        blocks: the modules that become units; default those of repeated class, such as decoder layers.
        mp_policy: torch's ``MixedPrecisionPolicy``. With ``param_dtype`` layers quantize the cast copies of masters,
            and `qat.freeze` freezes just these. Learned ranges stay float32.
        reshard_after_forward: as ``fully_shard`` takes it.

    Raises:
        StateError: the model is frozen or sharded already; there is no process group; the mesh is tensor parallel.
        SpecError: the model has no repeated blocks and none are given.

    Example::

        qat.prepare(model, qat.QuantSpec(weights="int4"))
        qat.shard(model, mesh)
        optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=1e-4))
    """
    if is_frozen(model) or sharded(model):
        state = "frozen" if is_frozen(model) else "sharded already"
        raise StateError(f"model: is {state}: pass a prepared or float model with whole weights")
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise StateError(
            "mesh: there is no process group: start the script by torchrun and call "
            "torch.distributed.init_process_group() first; Lightning does that"
        )
    if "tensor_parallel" in (getattr(mesh, "mesh_dim_names", None) or ()):
        if mesh["tensor_parallel"].size() > 1:
            raise StateError(
                "mesh: its dimension 'tensor_parallel' has more than one rank, and quantized layers need whole "
                "weights: use ModelParallelStrategy(data_parallel_size=<all ranks>, tensor_parallel_size=1)"
            )
        mesh = mesh["data_parallel"]
    if (prepare := _prepare_first.get()) is not None:
        prepare(model)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    units = list(find_blocks(model).values()) if blocks is None else list(blocks)
    layers = [layer for _, layer in quantized_layers(model)]
    quantizers = {id(q): q for own in layers for q in (own.weight_quantizer, *own.activation_quantizers())}
    ranges: list[Any] = [quantizer for quantizer in quantizers.values() if [*quantizer.parameters()]]
    if ranges:
        fully_shard(ranges, mesh=mesh, reshard_after_forward=False)
    options = {"mesh": mesh, "reshard_after_forward": reshard_after_forward}
    for unit in (*units, model):
        fully_shard(unit, mp_policy=mp_policy or MixedPrecisionPolicy(), **options)

    def before(*_: Any) -> None:
        if ranges:
            ranges[0].unshard()

    def after(*_: Any) -> None:
        if not (torch.is_grad_enabled() or model.training):  # no backward will do it, and none may be to come
            reshard(model)

    eager: Any = torch.compiler.disable(before)  # type: ignore[no-untyped-call]
    setattr(model, _HOOKS, [model.register_forward_pre_hook(eager), model.register_forward_hook(after)])


def sharded(model: nn.Module) -> bool:
    """Whether parameters of a model are shards, or units of ``fully_shard`` hold them while they are whole."""
    return any(map(is_sharded, model.parameters())) or any(map(is_unit, model.modules()))


def refuse_sharded(model: nn.Module, verb: str) -> None:
    """Raise `StateError` where ``verb`` needs whole weights, but those of ``model`` are shards."""
    if isinstance(model, nn.Module) and sharded(model):
        raise StateError(f"model: its weights are sharded: call {verb} before qat.shard (or fully_shard)")


@contextmanager
def prepared_first(prepare: Callable[[nn.Module], None]) -> Iterator[None]:
    """Let `shard` prepare the model within the block, before it shards."""
    token = _prepare_first.set(prepare)
    try:
        yield
    finally:
        _prepare_first.reset(token)


def is_unit(module: nn.Module) -> bool:
    """Whether ``fully_shard`` was called on this very module."""
    return any(base.__name__ == "FSDPModule" and base.__module__.startswith(_FSDP) for base in type(module).__mro__)


def reshard(model: nn.Module) -> None:
    """Let go of what the last forward left gathered, so that parameters are the shards that an optimizer holds."""
    for module in model.modules():
        if is_unit(module):
            module.reshard()  # type: ignore[operator]


def _dtypes(model: nn.Module) -> dict[int, torch.dtype]:
    """Parameters that a mixed-precision policy casts for the forward, by ``id``, and to what."""
    found: dict[int, torch.dtype] = {}
    for unit in filter(is_unit, model.modules()):  # units within others come later, and overrule them
        dtype = unit._get_fsdp_state()._mp_policy.param_dtype  # type: ignore[operator]
        for parameter in unit.parameters():
            found[id(parameter)] = dtype or parameter.dtype
    shards = filter(is_sharded, model.parameters())  # others are ignored by fully_shard
    return {id(p): found[id(p)] for p in shards if found.get(id(p), p.dtype) is not p.dtype}


def refuse_cast_ranges(model: nn.Module) -> None:
    """Raise `StateError` where a mixed-precision policy of ``fully_shard`` casts learned ranges."""
    if not any(map(is_unit, model.modules())):
        return
    cast = _dtypes(model)
    if names := [n for n, layer in quantized_layers(model) if any(id(p) in cast for p in layer.quantizer_parameters())]:
        raise StateError(
            f"model: the mixed-precision policy of fully_shard casts the learned ranges of {len(names)} layers "
            f"({listed(names, 4)}), which must stay float32: shard by qat.shard(model, mesh, mp_policy=...)"
        )


def unwrap(model: nn.Module) -> dict[int, torch.dtype]:
    """Take ``fully_shard`` off a model: classes and hooks are what they were, parameters stay shards.

    Returns:
        Parameters that a mixed-precision policy cast for the forward, by ``id``, and to what.
    """
    reshard(model)
    cast = _dtypes(model)
    for hook in vars(model).pop(_HOOKS, ()):
        hook.remove()
    for module in model.modules():
        hooks: Any
        for hooks in (v for k, v in vars(module).items() if k.endswith("_hooks") and isinstance(v, dict)):
            for key in [k for k, hook in hooks.items() if _of_fsdp(hook)]:
                del hooks[key]
        if is_unit(module):
            module.__class__ = type(module).__mro__[2]  # FSDP's own class, FSDPModule, the class before
        for key in [k for k in vars(module) if k.startswith(("__composable_api", "_is_fsdp_", "_fsdp_"))]:
            del vars(module)[key]
    return cast


def _of_fsdp(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith(_FSDP)


def own_hooks(layer: nn.Module) -> bool:
    """Whether a layer has forward hooks that others than ``fully_shard`` gave it."""
    return not all(map(_of_fsdp, (*layer._forward_hooks.values(), *layer._forward_pre_hooks.values())))


def _shards(layer: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """The sharded parameters that a layer computes with, and where they stand."""
    holders = [layer.holder(layer)] if isinstance(layer, QuantizedLayer) else []
    modules = {id(module): module for module in (*layer.modules(), *holders)}.values()
    return [(m, key, p) for m in modules for key, p in m._parameters.items() if p is not None and is_sharded(p)]


@torch.no_grad()
def gather(layer: nn.Module | None, cast: dict[int, torch.dtype]) -> None:
    """Put whole parameters in the place of a layer's shards, cast as the forward saw them; all ranks call it."""
    for module, key, parameter in () if layer is None else _shards(layer):
        value = whole(parameter.detach().to(cast.get(id(parameter), parameter.dtype)))
        module._parameters[key] = nn.Parameter(value, requires_grad=parameter.requires_grad)


@contextmanager
def gathered(layer: QuantizedLayer) -> Iterator[None]:
    """Let a layer's parameters be whole within the block; what changes in them is written into the shards."""
    kept = _shards(layer)
    gather(layer, {})
    try:
        yield
        with torch.no_grad():
            for module, key, parameter in kept:
                changed: Any = module._parameters[key]
                _write(parameter, changed.detach())
    finally:
        for module, key, parameter in kept:
            module._parameters[key] = parameter


def _write(parameter: Any, value: Tensor) -> None:
    from torch.distributed.tensor import distribute_tensor

    placed: Any = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.to_local().copy_(placed.to_local())


@torch.no_grad()
def gather_rest(model: nn.Module, made_of: Callable[[str, Tensor], Tensor]) -> None:
    """Put whole parameters in the place of all shards, one after another: what is made of a name and a whole tensor."""
    made: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None or not is_sharded(parameter):
                continue
            if id(parameter) not in made:
                value = made_of(f"{path}.{key}" if path else key, whole(parameter.detach()))
                made[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
            module._parameters[key] = made[id(parameter)]


def unshard(model: nn.Module) -> None:
    """Make a sharded model whole on every rank, on the CPU, as it was before `shard`; all ranks call it."""
    unwrap(model)
    gather_rest(model, lambda _, value: value.cpu())
    model.cpu()


def together_between_runs(model: nn.Module) -> Any:
    """`together`, but for a sharded model: where a run of it fails, others wait for shards and not for a word."""
    return nullcontext() if sharded(model) else together()


def equal_batches(batches: Iterable[Item]) -> list[Item]:
    """A list of the batches of this rank; `CalibrationError` on all ranks where one brings another number."""
    with together():
        kept = list(batches)
    counts: list[int] = [0] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(counts, len(kept))
    if len(set(counts)) > 1:
        raise CalibrationError(
            f"batches: ranks bring {counts}, but a sharded model runs on all ranks at once: give each the same number"
        )
    return kept


def mark_gathered(model: nn.Module) -> None:
    """Note that each rank has the same frozen model, which was sharded before."""
    setattr(model, _GATHERED, True)


def on_first_rank(model: nn.Module, action: Callable[[], Item]) -> Item:
    """What ``action`` returns on rank 0; other ranks wait for it, or raise `ExportError` where it failed.

    They wait without a collective. So it has no deadline, and rank 0 may also call this alone. For a model that was
    never sharded, each process acts by itself.
    """
    if not (getattr(model, _GATHERED, False) and several_processes()):
        return action()
    store = torch.distributed.distributed_c10d._get_default_store()
    key = f"qat/first_rank/{next(_written)}"
    if torch.distributed.get_rank() == 0:
        fault, result = "it was interrupted", None
        try:
            result = action()
            fault = ""
            return result
        except Exception as error:
            fault = str(error) or type(error).__name__
            raise
        finally:
            store.set(key, pickle.dumps((fault, result)))  # type: ignore[arg-type]
    try:
        while not store.check([key]):
            time.sleep(0.05)
        fault, result = pickle.loads(store.get(key))
    except RuntimeError as error:  # the store ends with rank 0
        raise ExportError(f"rank 0: ended before it was done ({error})") from error
    if fault:
        raise ExportError(f"rank 0: {fault}")
    return result  # type: ignore[no-any-return]
