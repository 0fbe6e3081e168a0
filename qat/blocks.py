"""`find_blocks`: the repeated blocks of a transformer, such as its decoder layers.

Block-wise reconstruction trains them one after another; distillation compares their outputs. A block is a child of an
``nn.ModuleList`` or ``nn.Sequential`` whose children have one class and hold layers of the library. Only outermost
lists count, so experts inside a block make no blocks of their own.
"""

from __future__ import annotations

from torch import nn

from qat.errors import SpecError, listed
from qat.layers import QuantizedLayer, layer_class

__all__ = ["find_blocks"]


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Full name to block, in the order of the model's modules; an encoder's and a decoder's both.

    Args:
        model: float or prepared.

    Raises:
        SpecError: there is no list of blocks; one block counts in an ``nn.ModuleList``, not in an ``nn.Sequential``.

    >>> block = lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    >>> list(find_blocks(nn.ModuleDict({"layers": nn.ModuleList([block(), block()]), "head": nn.Linear(4, 2)})))
    ['layers.0', 'layers.1']
    """
    blocks: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or any(name.startswith(f"{b}.") for b in blocks):
            continue
        children = dict(module.named_children())
        alike = len({type(child) for child in children.values()}) == 1
        alike = alike and (len(children) > 1 or isinstance(module, nn.ModuleList))
        if alike and all(not _is_layer(child) and any(map(_is_layer, child.modules())) for child in children.values()):
            blocks |= {f"{name}.{key}" if name else key: child for key, child in children.items()}
    if not blocks:
        lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
        raise SpecError(
            f"model: {type(model).__name__} has no list of blocks of one class that hold linear layers "
            f"(lists: {listed(lists, 4) or 'none'}): name the blocks yourself"
        )
    return blocks


def _is_layer(module: nn.Module) -> bool:
    cls = layer_class(module)
    return isinstance(module, QuantizedLayer) or (cls is not None and not cls.float_by_default)
