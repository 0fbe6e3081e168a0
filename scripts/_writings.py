"""Whatever of the library and of the recipes writes files, each as a writing that replaces an older one."""

from __future__ import annotations

import functools
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import nn

import qat
from qat.allocation.state import State
from qat.training.teacher import cache_logits
from recipes.causal_lm import Config
from recipes.common import checkpoints
from recipes.common.callbacks import LastCheckpoints, _DirectFiles
from recipes.common.card import add_section
from recipes.common.fine_tuned import FineTunedWeights
from recipes.common.judged import Judged
from recipes.common.pictures import plot_losses
from recipes.common.results import ResultRow, show_results
from tests.exports import IDS, frozen, small_llama

__all__ = ["WRITINGS", "Writing"]


def _nothing(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)


class Writing(NamedTuple):
    """Writes number 0, then number 1 over it."""

    name: str
    write: Callable[[Path, int], object]
    """Into a folder; called again with equal arguments, it leaves equal bytes."""
    prepare: Callable[[Path], object] = _nothing
    """Makes a folder without any writing."""
    check: Callable[[Path], object] = _nothing
    """Raises for a folder that is not whole."""
    files_count_alone: bool = False
    """Whether one file may be new and another old."""
    between: Callable[[Path], str] = lambda _: "between"
    """What that is called, once it is looked at."""


@functools.cache
def _model(number: int) -> Any:
    weights = ("int8", "int4")[number]
    return frozen(small_llama(intermediate_size=64), "transformers", weights=weights, dtype="bfloat16")


def _export(folder: Path, number: int) -> None:
    more: dict[str, Any] = {"config": {"seed": number}, "max_shard_size": "60KB", "overwrite": True}
    qat.export(_model(number), folder / "out", example_inputs={"input_ids": IDS}, **more)


@functools.cache
def _source(number: int) -> Path:
    import atexit
    import tempfile

    kept = tempfile.TemporaryDirectory()
    atexit.register(kept.cleanup)
    model = frozen(small_llama(intermediate_size=64), "quanto", weights=("int8", "float8")[number])
    qat.export(model, kept.name, example_inputs={"input_ids": IDS})
    return Path(kept.name)


def _convert(folder: Path, number: int) -> None:
    qat.convert(_source(number), folder / "out", target="compressed-tensors", overwrite=True)


def _teacher(folder: Path, number: int) -> None:
    if number:  # it replaces nothing
        shutil.rmtree(folder / "out", ignore_errors=True)
        torch.manual_seed(0)
        batches = [{"input_ids": IDS + more} for more in range(24)]
        cache_logits(small_llama(intermediate_size=64), batches, folder / "out", top_k=8)


def _state(folder: Path, number: int) -> None:
    for layer in range(number + 1):
        State(folder / "state.json", {"seed": 0}).add(
            f"layer{layer}", dict.fromkeys(map(str, range(1000 * layer + 1)), 0.1234567891234567)
        )


def _save_checkpoint(folder: Path, number: int) -> None:
    torch.manual_seed(number)
    model = nn.Linear(200, 200)
    trainer: Any = SimpleNamespace(
        global_step=number + 1,
        is_global_zero=True,
        lightning_module=model,
        optimizers=[],
        save_checkpoint=lambda path: _DirectFiles().save_checkpoint({"state_dict": model.state_dict()}, path),
        strategy=SimpleNamespace(barrier=lambda: None),
    )
    LastCheckpoints(folder, 1, 1, checkpoints.settings_of(Config()))._save(trainer)


def _checkpoint_between(folder: Path) -> str:
    found = checkpoints.newest(folder)
    return "between" if found is not None else "no whole checkpoint"


def _fine_tuned(folder: Path, number: int) -> None:
    torch.manual_seed(number)
    trainer: Any = SimpleNamespace(is_global_zero=True)
    FineTunedWeights(folder, Config(seed=number)).save(nn.Linear(200, 200), trainer)


def _judged(folder: Path, number: int) -> None:
    from PIL import Image

    image = Image.frombytes("L", (300, 300), random.Random(number).randbytes(300 * 300))
    judged = Judged(folder, Config(seed=number))
    judged.keep("float", {"loss": 0.5}, [0.25, 0.75], [image])


def _results(folder: Path, number: int) -> None:
    rows = [ResultRow("model" * 2000, {"loss": row + number / 2}, 10, 0) for row in range(10)]
    show_results(rows, folder / "out-results.json", ("loss",))


def _picture(folder: Path, number: int) -> None:
    plot_losses({"a": [1.0, 2.0 + number], "b": [2.0, 3.0]}, "a", folder / "out-losses.png")


def _card(folder: Path, number: int) -> None:
    card = folder / "out" / "README.md"
    if "Results" in card.read_text():  # of a writing that was killed later
        card.write_text("# model\n")
    if number:
        add_section(folder / "out", "Results", "loss\n" * 20_000, {"grid": folder / "grid.png"})


def _card_folder(folder: Path) -> None:
    from PIL import Image

    (folder / "out").mkdir(parents=True, exist_ok=True)
    (folder / "out" / "README.md").write_text("# model\n")
    Image.linear_gradient("L").save(folder / "grid.png")


WRITINGS = (
    Writing("export", _export, check=lambda folder: qat.verify(folder / "out", fresh_process=False)),
    Writing("convert", _convert, check=lambda folder: qat.verify(folder / "out", fresh_process=False)),
    Writing("teacher", _teacher),
    Writing("state", _state),
    Writing("checkpoint", _save_checkpoint, files_count_alone=True, between=_checkpoint_between),
    Writing("fine-tuned", _fine_tuned, files_count_alone=True),
    Writing("judged", _judged),
    Writing("results", _results),
    Writing("picture", _picture),
    Writing("card", _card, _card_folder, files_count_alone=True),
)
