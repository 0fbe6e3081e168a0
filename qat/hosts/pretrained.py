"""Float models of transformers, from a directory or by a hub's name, with what makes their inputs.

What is wrong with a directory is said before its library is asked, where it can be: libraries repeat the advice of
theirs, such as to install a package for a tokenizer that is not there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qat.errors import LoadError, shown, told
from qat.hosts.configurations import config_fields, hub_directory, local_directory
from qat.hosts.remote_code import refuse_remote_code

__all__ = ["cannot_load", "check_folder", "load_float", "load_processor", "require_filled"]

_TOKENIZER = re.compile(r"(tokenizer|vocab|merges|spiece|sentencepiece|bpe).*")


def check_folder(source: str, argument: str) -> Path | None:
    """What can be said of a model's directory without its library: it has a configuration, and weights.

    Args:
        source: a local directory, which is returned, or a hub's name, of which its configuration is asked for.
        argument: what the user calls it, for the message.

    Raises:
        LoadError: it is neither, or a pipeline, its config.json cannot be read, there are no weights, or one of its
            files is none of safetensors.
    """
    from safetensors import safe_open

    if (directory := local_directory(source)) is None:
        hub_directory(source, argument)
        return None
    if (directory / "model_index.json").is_file():
        raise LoadError(
            f"{argument}: {source!r} is a pipeline of diffusers: give a model of transformers; for a pipeline, build "
            "it in your own program, and calibrate a part: qat.calibrate(pipeline.transformer, prompts, spec=spec, "
            "forward=lambda _, prompt: pipeline(prompt))"
        )
    config_fields(directory, argument)
    files = sorted(directory.glob("*.safetensors"))
    if not files and not any(directory.glob("*.bin")):
        raise LoadError(f"{argument}: {source!r} holds no weights: put the model's, such as model.safetensors, there")
    for file in files:
        try:
            if not file.is_file():
                raise OSError("no regular file")
            with safe_open(file, framework="pt"):
                pass
        except Exception as error:  # of Rust, without a base
            raise LoadError(
                f"{argument}: {str(file)!r} is cut off or no safetensors ({told(error)}): copy it again"
            ) from error
    return directory


def cannot_load(source: str, argument: str, error: Exception) -> LoadError:
    """What a library's exception means for who named a model."""
    directory, text = local_directory(source), told(error)
    if "trust_remote_code" in str(error):
        text = "it brings code of its own, which does not run: trust_remote_code (--trust-remote-code) lets it"
    if directory is None:
        return LoadError(
            f"{argument}: {shown(source)} is no directory here, and as a hub's name cannot be loaded: {text}"
        )
    if "weights_only" in text:  # which torch advises to switch off
        names = ", ".join(sorted(file.name for file in directory.glob("*.bin")))
        text = f"{names} is a pickle that builds more than tensors, and so could run code: save it as safetensors"
    elif "ignore_mismatched_sizes" in text:
        text = "weights have other shapes than config.json says: give both of one model"
    elif "Unrecognized configuration class" in text:
        fields, wanted = config_fields(directory, argument), re.search(r"AutoModelFor(\w+)", text)
        kind = " ".join(re.findall("[A-Z][a-z]+|[A-Z]+", wanted[1])) if wanted else "model"
        kind = {"Causal LM": "causal language model"}.get(kind, f"model for {kind.lower()}")
        text = f"{(fields.get('architectures') or [fields.get('model_type')])[0]} is no {kind}: give one"
    return LoadError(f"{argument}: {source!r} cannot be loaded: {text}")


def load_processor(source: str, argument: str, processor_class: Any, kind: str, *, trust_remote_code: bool) -> Any:
    """Load a tokenizer or an image processor.

    Args:
        source: a local directory or a hub's name.
        argument: what the user calls it, for the message.
        processor_class: transformers' AutoTokenizer or AutoImageProcessor.
        kind: what it is called.
        trust_remote_code: run code that comes with the model.

    Raises:
        LoadError: it cannot be loaded.
    """
    directory = local_directory(source)
    try:
        names = [] if directory is None else [file.name for file in directory.iterdir()]
        if directory is not None and kind == "tokenizer" and not any(map(_TOKENIZER.fullmatch, names)):
            raise FileNotFoundError("none of its files, such as tokenizer.json, is there")
        processor = processor_class.from_pretrained(source, trust_remote_code=trust_remote_code)
        # Without the vocabulary, transformers makes tokenizers of some classes with an empty one.
        files = {*getattr(processor, "vocab_files_names", {}).values()}
        if directory is not None and files and not {*names} & {*files, "tokenizer.json"}:
            raise FileNotFoundError(f"none of {', '.join(sorted({*files, 'tokenizer.json'}))} is there")
    except Exception as error:  # what can be wrong with a directory, a file or a download has no common base
        if directory is None:
            raise cannot_load(source, argument, error) from error
        raise LoadError(
            f"{argument}: {source!r} has no {kind} that can be loaded ({told(error)}): put the files of the model's "
            f"{kind} there"
        ) from error
    return processor


def require_filled(
    source: str,
    argument: str,
    model: Any,
    unfilled: Iterable[Any],
    processor: Any,
    remedy: str = "give a complete checkpoint of one",
) -> None:
    """Check that files filled a model, and that it has a row of its embedding for each token.

    Args:
        source: where both are from.
        argument: what the user calls it, for the message.
        model: of transformers.
        unfilled: names that no file holds, or holds in another shape.
        processor: its tokenizer or image processor.
        remedy: for the message.

    Raises:
        LoadError: something is missing.
    """
    if names := sorted(str(key[0] if isinstance(key, tuple) else key) for key in unfilled):
        directory = local_directory(source)
        saved = None if directory is None else config_fields(directory, argument).get("architectures")
        raise LoadError(
            f"{argument}: the weights in {source!r}{f' (of a {saved[0]})' if saved else ''} do not fill {names[:5]} of "
            f"a {type(model).__name__}: {remedy}"
        )
    tokens, rows = getattr(processor, "vocab_size", None), None
    with suppress(NotImplementedError):  # of classes without a table
        rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if isinstance(tokens, int) and isinstance(rows, int) and tokens > rows:
        raise LoadError(
            f"{argument}: the vocabulary of the tokenizer in {source!r} has {tokens} tokens, and the model's embedding "
            f"{rows} rows: give the tokenizer of this model"
        )


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

    directory = check_folder(source, "MODEL")
    if directory is not None and not trust_remote_code:
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
        raise cannot_load(source, "MODEL", error) from error
    kinds = {"input_ids": ("AutoTokenizer", "tokenizer"), "pixel_values": ("AutoImageProcessor", "image processor")}
    if getattr(model.config, "is_encoder_decoder", False) or model.main_input_name not in kinds:
        raise LoadError(
            f"MODEL: {type(model).__name__} takes neither texts nor images alone: build its inputs in your own "
            "program, and call qat.calibrate(model, batches, spec=spec)"
        )
    auto, kind = kinds[model.main_input_name]
    processor = load_processor(source, "MODEL", getattr(library, auto), kind, trust_remote_code=trust_remote_code)
    require_filled(source, "MODEL", model, (*info["missing_keys"], *info["mismatched_keys"]), processor)
    return model.eval(), processor
