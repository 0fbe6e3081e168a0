"""Code of strangers: no code from a model's directory runs.

transformers asks on the standard input whether it may run a directory's own code, and takes a piped "yes" for an
answer. So every call passes ``trust_remote_code=False``, and `refuse_remote_code` comes first, for its message.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qat.errors import LoadError

__all__ = ["refuse_remote_code"]


def refuse_remote_code(directory: Path, argument: str = "directory", *, auto_class: str | None = None) -> None:
    """Check that the libraries can build a directory's model without code that the directory brings.

    A directory without a readable ``config.json`` passes: its loader says what is wrong.

    Args:
        directory: a model's directory.
        argument: what the user calls the directory, for the message.
        auto_class: the class of transformers that will choose the model's class, such as ``AutoModelForCausalLM``;
            None where the model's class is known.

    Raises:
        LoadError: ``auto_map`` names the directory's own code, and the library has none for this model.
    """
    try:
        fields = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if "configuration_files" in fields:  # of which transformers takes the one for its version
            from transformers import PreTrainedConfig

            fields = PreTrainedConfig.get_config_dict(directory)[0]
        own_code = dict(fields.get("auto_map") or {})
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return
    if own_code and not _library_has_code(fields, auto_class if auto_class in own_code else None):
        raise LoadError(
            f"{argument}: the model's directory {str(directory)!r} brings code of its own (auto_map in config.json: "
            f"{', '.join(map(str, own_code.values()))}), which qat does not run: build the model in your own program, "
            "with trust_remote_code=True if you trust that code, and pass the model instead of the directory"
        )


def _library_has_code(fields: dict[str, Any], auto_class: str | None) -> bool:
    if "_class_name" in fields:
        import diffusers

        return hasattr(diffusers, str(fields["_class_name"]))
    import transformers

    if fields.get("model_type") not in transformers.CONFIG_MAPPING:
        return False
    config_class = transformers.CONFIG_MAPPING[fields["model_type"]]
    return auto_class is None or config_class in getattr(getattr(transformers, auto_class), "_model_mapping", ())
