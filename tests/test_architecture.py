"""The map of docs/architecture.md, kept: who may import whom, what may be loaded when, how long a file may be.

Imports are read from the source, those inside functions included, so that a forbidden one is found even where no
test runs it. What only a type checker sees (`if TYPE_CHECKING`) loads nothing and is judged by milder rules.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.sources import (
    RECIPES,
    ROOT,
    code_of,
    imports_below,
    imports_of,
    internal_imports,
    library_imports,
    library_modules,
    listing,
    module_name,
    part_of,
    path_of,
    recipe_modules,
)

# A part may import every part above it, and its neighbours in the same line; those in SIDE_PARTS only what is
# named there. A new module needs a place in one of the two.
ORDER: tuple[frozenset[str], ...] = tuple(
    frozenset(line.split())
    for line in (
        "errors",
        "adapters compatibility data jobs operators progress spec tensors",
        "numerics",
        "kernels",
        "observers",
        "starts",
        "quantizers",
        "layers",
        "files",
        "formats",
        "hosts",
        "agreement allocation blocks calibration checkpoints checks codes_only distributed folding freezing inspection "
        "moments optimizers output_errors packing preparation probing reconstruction runs serving starting",
        "conversion exporting loading untrusted verification",
        "hub run_report training",
        "integrations",
        "cli cli_runs __main__",
    )
)
# Each with the parts of qat that it may import, at run time.
SIDE_PARTS: dict[str, frozenset[str]] = {
    "command_line": frozenset({"errors"}),
    "report": frozenset({"errors"}),
    "strict_yaml": frozenset({"errors"}),
}
# Side parts serve the command and the recipes.
USERS_OF_SIDE_PARTS = frozenset({"cli", "cli_runs", "__main__", *SIDE_PARTS})
# Folders of the recipes that know nothing of quantization, each with all that it may import at run time.
PLAIN_RECIPE_PACKAGES: dict[str, frozenset[str]] = {
    "recipes.tasks": frozenset({"recipes.tasks", "recipes.data", "torch", "torchmetrics"}),
    "recipes.data": frozenset(
        {"recipes.data", "recipes.tasks", "qat.errors", "qat.files.whole", "torch", "pydantic", "safetensors"}
    )
    | {"datasets", "numpy", "PIL", "sklearn"},
}

KERNEL_PARTS = frozenset({"kernels", "starts", "quantizers", "layers"})
MODEL_LIBRARIES = frozenset({"transformers", "diffusers", "peft"})
# Where what belongs to one format, or to one library, may stand.
QUANTO_FILES = ("qat/formats/quanto", "qat/integrations/")
HOST_FILES = {
    "transformers": ("qat/hosts/", "qat/integrations/", "qat/layers/conv1d.py"),
    "diffusers": ("qat/hosts/", "qat/formats/gguf.py", "qat/integrations/"),
    "peft": ("qat/layers/lora.py",),
}
# Modules that are imported only where the library is there already: integrations, and classes derived from a library's.
LATE_FILES = ("qat/integrations/", "qat/layers/conv1d.py", "qat/layers/lora.py", "qat/formats/quanto_modules.py")
TYPE_NAMES = frozenset({"int8", "float8", "int4", "int2"})
TYPE_FILES = (
    "qat/spec.py",
    "qat/formats/quanto",
    "qat/formats/compressed_types.py",
)  # where a type's name is turned into an object

MOST_LIBRARY_LINES = 27_729
MOST_LINES = 400
MOST_RECIPE_LINES = 150  # of a recipe itself


def may_import(source: str, target: str) -> bool:
    rank = {part: place for place, parts in enumerate(ORDER) for part in parts}
    if source == target:
        return True
    if source in SIDE_PARTS:
        return target in SIDE_PARTS[source]
    if target in SIDE_PARTS:
        return source in USERS_OF_SIDE_PARTS
    return rank.get(target, len(ORDER)) <= rank.get(source, -1)


def test_the_reader_finds_every_kind_of_import() -> None:
    source = (
        "import torch.nn as nn\nfrom . import errors\nfrom ..layers import linear\n"
        "if TYPE_CHECKING:\n    import transformers\nelse:\n    import diffusers\n"
        "class A:\n    def f(self):\n        try:\n            from optimum import quanto\n"
        "        finally:\n            pass\n"
    )
    found = [(i.target, i.when) for i in imports_below(ast.parse(source), "qat.exporting.quanto", False)]
    assert found == [
        ("torch.nn", "module"),
        ("qat.exporting", "module"),
        ("qat.layers.linear" if "qat.layers.linear" in library_modules() else "qat.layers", "module"),
        ("transformers", "type checking"),
        ("diffusers", "module"),
        ("optimum", "function"),
    ]


def test_every_module_has_a_place() -> None:
    known = {"", *SIDE_PARTS}.union(*ORDER)
    without_place = [module for module in library_modules() if part_of(module) not in known]
    assert not without_place, f"give these parts a place in ORDER or SIDE_PARTS: {without_place}"


def test_no_module_imports_through_the_facade() -> None:
    violations = [found for found in internal_imports() if found.target == "qat"]
    assert not violations, listing(violations)


def test_imports_run_in_one_direction() -> None:
    violations = [
        found
        for found in internal_imports()
        if found.when != "type checking" and not may_import(part_of(found.source), part_of(found.target))
    ]
    assert not violations, listing(violations)


def test_type_imports_run_in_one_direction_too() -> None:
    violations = [
        found
        for found in internal_imports()
        if found.when == "type checking" and not may_import(part_of(found.source), part_of(found.target))
    ]
    assert not violations, listing(violations)


def test_there_is_no_import_circle() -> None:
    graph: dict[str, set[str]] = {}
    for found in internal_imports():
        if found.when != "type checking" and found.target != found.source:
            graph.setdefault(found.source, set()).add(found.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import circle: " + " <- ".join(error.args[1]))


def test_the_library_never_imports_recipes() -> None:
    violations = [found for found in library_imports() if found.package in {"recipes", "scripts", "tests"}]
    assert not violations, listing(violations)


@pytest.mark.parametrize("package", sorted(PLAIN_RECIPE_PACKAGES))
def test_tasks_and_data_know_few_packages(package: str) -> None:
    allowed = PLAIN_RECIPE_PACKAGES[package] | sys.stdlib_module_names
    modules = {name: path for name, path in recipe_modules().items() if f"{name}.".startswith(f"{package}.")}
    assert modules
    violations = [
        found
        for found in imports_of(modules)
        if found.when != "type checking" and not any(f"{found.target}.".startswith(f"{name}.") for name in allowed)
    ]
    assert not violations, listing(violations)


def test_quanto_is_imported_late_and_in_its_format_alone() -> None:
    violations = [
        found
        for found in library_imports()
        if found.package == "optimum"
        and not path_of(found.source).startswith(QUANTO_FILES if found.when != "module" else LATE_FILES[2:])
    ]
    assert not violations, listing(violations)


def test_compressed_tensors_is_imported_late_and_in_its_format_alone() -> None:
    violations = [
        found
        for found in library_imports()
        if found.package == "compressed_tensors"
        and (found.when != "function" or not path_of(found.source).startswith("qat/formats/compressed"))
    ]
    assert not violations, listing(violations)


def test_quantos_names_stand_in_its_format_and_in_messages_alone() -> None:
    """Its classes, attributes, keys and files; a word in a message, a target's name or an import of the format may."""
    marks = (
        "weight_qtype",
        "qmap",
        "QBits",
        "QBytes",
        "_data._data",
        "weight_qb",
        "qint",
        "qfloat8",
    )
    violations = [
        f"{path.relative_to(ROOT)}: {mark}"
        for path in library_modules().values()
        if not path.relative_to(ROOT).as_posix().startswith(QUANTO_FILES)
        for mark in marks
        if mark in code_of(path)
    ]
    assert not violations, listing(violations)


@pytest.mark.parametrize("library", sorted(MODEL_LIBRARIES))
def test_a_library_is_imported_late_and_by_its_host_alone(library: str) -> None:
    violations = [
        found
        for found in library_imports()
        if found.package == library
        and found.when != "type checking"
        and (
            not path_of(found.source).startswith(HOST_FILES[library])
            or (found.when == "module" and not path_of(found.source).startswith(LATE_FILES))
        )
    ]
    assert not violations, listing(violations)


def test_no_module_asks_which_library_a_model_is_of() -> None:
    """Such questions are methods of a host."""
    asked = ("is_diffusers", "is_transformers", "PreTrainedModel", "ModelMixin", "from_single_file", "sub_configs")
    asked += ("all_tied_weights_keys", "_attn_implementation", "_keep_in_fp32")
    violations = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in library_modules().values()
        if part_of(module_name(path)) not in {"hosts", "integrations"}
        for word in asked
        if word in code_of(path)
    ]
    assert not violations, listing(violations)


def test_no_type_is_looked_up_by_its_name_below_the_spec() -> None:
    """Types are objects; a name is compared or looked up nowhere but where a format makes them."""
    violations = []
    for path in library_modules().values():
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(TYPE_FILES):
            continue
        for node in ast.walk(ast.parse(code_of(path))):
            used: list[ast.expr] = []
            if isinstance(node, ast.Compare):
                used = [node.left, *node.comparators]
            elif isinstance(node, ast.Subscript):
                used = [node.slice]
            texts = [part.value for part in used if isinstance(part, ast.Constant)]
            if TYPE_NAMES.intersection(text for text in texts if isinstance(text, str)):
                violations.append(f"{name}: {ast.unparse(node)}")
    assert not violations, listing(violations)


def test_only_training_imports_lightning_at_its_top() -> None:
    violations = [
        found
        for found in library_imports()
        if found.package in {"lightning", "pytorch_lightning"}
        and found.when == "module"
        and part_of(found.source) != "training"
    ]
    assert not violations, listing(violations)


def test_kernels_are_called_by_starts_quantizers_and_layers_alone() -> None:
    violations = [
        found
        for found in internal_imports()
        if part_of(found.target) == "kernels" and part_of(found.source) not in KERNEL_PARTS
    ]
    assert not violations, listing(violations)


def test_the_library_stays_within_its_budget() -> None:
    lines = sum(len(path.read_text().splitlines()) for path in library_modules().values())
    assert lines <= MOST_LIBRARY_LINES, f"{lines} lines: a capability pays for its own by what it lets go"


def test_no_star_imports() -> None:
    violations = [
        f"{module}, line {node.lineno}"
        for module, path in library_modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    ]
    assert not violations, listing(violations)


def test_files_are_short() -> None:
    violations = [
        f"{path.relative_to(ROOT)}: {lines} lines, at most {limit}"
        for folder in ("qat", "tests", "scripts", "recipes")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for limit in [MOST_RECIPE_LINES if path.parent == RECIPES else MOST_LINES]
        if (lines := len(path.read_text().splitlines())) > limit
    ]
    assert not violations, listing(violations)


def test_every_module_has_a_test_file() -> None:
    """`qat/a.py` is tested by `test_a.py`; `qat/a/b.py` by `test_a_b.py`, by its part's `test_a.py`, or by `test_b.py`
    where no other part has a `b`. An `__init__.py` or `__main__.py` that defines nothing needs none.
    """
    present = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    leaves = Counter(module.rpartition(".")[2] for module in library_modules())
    missing = []
    for module, path in library_modules().items():
        names = [name.lstrip("_") for name in module.split(".")[1:]]
        defines = any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.parse(path.read_text()).body)
        if not names or (path.name in ("__init__.py", "__main__.py") and not defines):
            continue
        accepted = {f"test_{'_'.join(names)}", f"test_{names[0]}"}
        if leaves[module.rpartition(".")[2]] == 1:
            accepted.add(f"test_{names[-1]}")
        if not accepted & present:
            missing.append(f"{module}: none of {sorted(accepted)}")
    assert not missing, listing(missing)
