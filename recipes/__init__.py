"""Recipes: each tells the whole story of one task, from a float model to a verified quantized checkpoint."""

import os

__all__ = ["IS_OF_QAT", "command"]

IS_OF_QAT = True
"""That this is the package which `qat train` looks for, whose name another one may have too."""


def command(recipe: str) -> str:
    """What runs a recipe, as its help shows it: what was typed, if that was scripts/quickstart, which says so."""
    return os.environ.get("RECIPE_COMMAND") or f"python -m recipes.{recipe}"
