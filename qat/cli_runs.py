"""Verbs of the ``qat`` command about runs: train by a recipe, export a checkpoint, report, compare."""

from __future__ import annotations

import json as jsonlib
import os
import pkgutil
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from qat.command_line import require_first
from qat.errors import LoadError, SpecError, VerifyError
from qat.report import quiet_libraries

__all__ = ["compare", "export", "report", "run_recipe", "train"]


def train(recipe: str, /) -> None:
    """Train, export and verify by a recipe.

    Example: qat train causal_lm --spec.weights int4

    Args:
        recipe: Its name: causal_lm, sequence_classification, image_classification or text_to_image. A configuration
            file and its options come after it; --help after it lists them.
    """
    run_recipe([recipe])


def run_recipe(words: Sequence[str]) -> None:
    """Run a recipe with its own arguments, which follow its name.

    Raises:
        QatError: there is no such recipe, or it does not come first.
    """
    package = None if find_spec("recipes") is None else import_module("recipes")
    if package is None or not getattr(package, "IS_OF_QAT", False):
        if package is not None:
            raise SpecError(f"recipe: another package recipes is in the way, in {list(package.__path__)}: leave it")
        raise SpecError("recipe: recipes are not installed here: install qat as a whole, or run it in a checkout")
    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.ispkg)
    recipe, *others = words
    if recipe.endswith((".yaml", ".yml")):
        there = "" if os.path.isfile(recipe) else ", and no file has this name"
        raise SpecError(f"recipe: a configuration comes after the recipe{there}: qat train causal_lm {recipe}")
    require_first("recipe", words, names, "qat train")
    os.environ.setdefault("RECIPE_COMMAND", f"qat train {recipe}")  # how its help and its errors name it
    import_module(f"recipes.{recipe}").main(others)


def export(
    checkpoint: Path,
    model: str,
    output: Path,
    /,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """Freeze and export the model of a checkpoint, as Lightning wrote it in quantization-aware training, and verify it.

    Example: qat export outputs/causal_lm/int4-checkpoints/step-80.ckpt recipes/reference my-int4

    Activation scales are those of the checkpoint. A recipe calibrates once more at its end, so that its own export of a
    model with quantized activations has others.

    Args:
        checkpoint: A file such as outputs/causal_lm/int4-checkpoints/step-80.ckpt.
        model: The float model that was trained: a directory, or a hub's name, of a model for texts or images.
        output: The directory to write.
        overwrite: Replace an older export.
        trust_remote_code: Run code that comes with the model.
    """
    from qat.files.directory import check_destination
    from qat.hosts.pretrained import check_folder, load_float

    check_destination(output, overwrite, "output")
    if not os.path.isfile(checkpoint):  # of os, to whom no name is too long
        inside = sorted(checkpoint.glob("*.ckpt"), key=os.path.getmtime) if os.path.isdir(checkpoint) else []
        remedy = f"name one in it, such as {str(inside[-1])!r}" if inside else "name one"
        raise LoadError(
            f"checkpoint: {str(checkpoint)!r} is no file: {remedy}, as Lightning's save_checkpoint writes it"
        )
    check_folder(model, "MODEL")
    from qat.exporting import export as write  # these take seconds: a mistake is told before
    from qat.freezing import freeze
    from qat.training.restoring import restore
    from qat.verification import verify

    quiet_libraries()
    loaded, processor = load_float(model, trust_remote_code=trust_remote_code)
    restore(loaded, checkpoint)
    freeze(loaded, progress=True)
    print(write(loaded, output, processor=processor, overwrite=overwrite, progress=True))
    print(verify(output, loaded))


def report(run: Path, /, output: Path | None = None, verify: bool = False) -> None:
    """Write a page about a run: results, curves, layers, bytes, samples, settings.

    Example: qat report outputs/causal_lm/int4

    Args:
        run: The directory of its export; results and logs that a recipe left beside it are shown too.
        output: The file; none: RUN-report.html.
        verify: Verify the export first, and show what was found.
    """
    from qat.run_report import write_report
    from qat.verification import verify as verified

    found = None
    if verify:
        quiet_libraries()
        try:
            found = verified(run)
        except VerifyError as error:
            if (found := getattr(error, "report", None)) is None:
                raise
    print(f"report: {write_report(run, output, verified=found)}")
    if found is not None and not found.ok:
        raise VerifyError(f"{str(run)!r} is not what was frozen; the report says what differs")


def compare(runs: tuple[Path, ...], /, json: bool = False) -> None:
    """Show runs side by side: types, sizes, metrics, and settings that differ.

    Example: qat compare outputs/causal_lm/int4 outputs/causal_lm/int8

    Args:
        runs: Directories of exports, two or more.
        json: Print JSON instead of a table.
    """
    from qat.run_report import compare_runs

    found = compare_runs(runs)
    print(jsonlib.dumps(found.to_json(), indent=1) if json else found)
