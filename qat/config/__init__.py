"""Configuration, read once at the edge into typed objects: default < YAML file < command line.

The models are pydantic's, frozen and without extra fields; `load_config` reads the optional first argument
``config.yaml`` over their defaults, hands the result to tyro as the defaults of the command line, and validates what
tyro parsed as a whole. So help texts, types and choices come from tyro (`command_line`), while every rule is stated
once, in the model, and every fault is reported with all the others in one `ConfigError`: where, which key, which rule,
which value (`validation`).

A union told apart by a ``kind`` field is chosen in YAML by its kind, and on the command line by a subcommand
(``algorithm:straight-through --algorithm.mask-saturated``); without one, the kind stays what the file made it.
Mappings are given on the command line as ``KEY=VALUE`` words: ``--spec.overrides '*.down_proj=int8' 'lm_head=float'``.
"""

from qat.config.command_line import load_config, parse_arguments
from qat.config.validation import ConfigError, read_yaml, validate

__all__ = [
    "ConfigError",
    "load_config",
    "parse_arguments",
    "read_yaml",
    "validate",
]
