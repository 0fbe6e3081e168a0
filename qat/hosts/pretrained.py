"""Float models of transformers, from a directory or by a hub's name, with what makes their inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat.errors import LoadError
from qat.hosts.remote_code import refuse_remote_code

__all__ = ["load_float"]


def load_float(source: str, *, trust_remote_code: bool = False) -> tuple[nn.Module, Any]:
    """Load a model in float32, in the class that its configuration names, and its tokenizer or image processor.

    Args:
        source: a local directory or a hub's name.
        trust_remote_code: run code that comes with the model.

    Raises:
        LoadError: there is no such model, its weights are not complete, only code of its own can build it, it has no
            tokenizer or image processor, or it takes neither texts nor images alone.
    """
    import transformers

    directory = Path(source).expanduser()
    if (directory / "model_index.json").is_file():
        raise LoadError(
            f"MODEL: {source!r} is a pipeline of diffusers: build it in your own program, then calibrate a part: "
            "qat.calibrate(pipeline.transformer, prompts, spec=spec, forward=lambda _, prompt: pipeline(prompt))"
        )
    if not trust_remote_code:
        refuse_remote_code(directory, "MODEL")
    library: Any = transformers
    try:
        config = library.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        name = (getattr(config, "architectures", None) or ["AutoModel"])[0]
        own = getattr(config, "auto_map", {}) if trust_remote_code else {}
        name = next((auto for auto, path in own.items() if str(path).endswith(f".{name}")), name)
        model_class = getattr(library, name, library.AutoModel)
        options = {"dtype": torch.float32, "output_loading_info": True}
        model, info = model_class.from_pretrained(source, trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # what can be wrong with a directory, a file or a download has no common base
        meant = "" if directory.is_dir() else "is no directory here, and as a hub's name "
        raise LoadError(f"MODEL: {source!r} {meant}cannot be loaded: {' '.join(str(error).split())}") from error
    if unfilled := sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"]))):
        raise LoadError(f"MODEL: the weights in {source!r} do not fill {unfilled[:5]}: give a complete checkpoint")
    kinds = {"input_ids": ("AutoTokenizer", "tokenizer"), "pixel_values": ("AutoImageProcessor", "image processor")}
    if getattr(model.config, "is_encoder_decoder", False) or model.main_input_name not in kinds:
        raise LoadError(
            f"MODEL: {type(model).__name__} takes neither texts nor images alone: build its inputs in your own "
            "program, and call qat.calibrate(model, batches, spec=spec)"
        )
    auto, kind = kinds[model.main_input_name]
    try:
        processor = getattr(library, auto).from_pretrained(source, trust_remote_code=trust_remote_code)
        # For a directory without one, transformers makes tokenizers of some classes with an empty vocabulary.
        if kind == "tokenizer" and len(processor) <= len(processor.all_special_tokens):
            raise FileNotFoundError("its vocabulary is empty")
    except Exception as error:  # likewise
        raise LoadError(
            f"MODEL: {source!r} has no {kind} that can be loaded ({' '.join(str(error).split())}): put the files of "
            f"the model's {kind} there"
        ) from error
    return model.eval(), processor
