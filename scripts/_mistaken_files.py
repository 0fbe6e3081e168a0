"""The files that `scripts.mistakes` names: model folders, checkpoints and exports, each wrong in one way."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

__all__ = ["prepare", "prepare_models"]

_RECIPES = Path(__file__).parents[1] / "recipes"


class _Stranger:
    """What no loader may build."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("a pickle ran",)


def prepare(folder: Path) -> None:
    """Put into a folder what command lines and YAML name."""
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 500)
    (folder / "blank.txt").write_text(" \n\n")
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("mine")
    os.mkfifo(folder / "pipe")
    (folder / "folder.yaml").mkdir()
    os.mkfifo(folder / "pipe.yaml")
    (folder / "zero.yaml").symlink_to("/dev/zero")
    (folder / "large.yaml").write_text("# \n" * 1_000_000)
    for name, step, about in (
        ("other", 3, {"step": 3, "settings": {"recipe": "text_to_image", "seed": 0}}),
        ("wrong", 3, ["step", 3]),
        ("wrong", 4, {"step": "many", "settings": {}}),
    ):
        path = folder / name / f"step-{step}.ckpt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"a checkpoint")
        if isinstance(about, dict):
            about |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        path.with_suffix(".json").write_text(json.dumps(about))


def prepare_models(folder: Path) -> None:
    """Put into a folder the models and exports too."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    import qat
    from tests.exports import frozen, frozen_llama

    for name, source in (("reference", "reference"), ("encoder", "reference_encoder"), ("vit", "reference_vit")):
        shutil.copytree(_RECIPES / source, folder / name)
    shutil.copytree(_RECIPES / "reference_flux", folder / "flux")
    reference, fields = folder / "reference", json.loads((folder / "reference" / "config.json").read_text())

    def other(name: str, *missing: str, config: Any = None, text: str | None = None, **changes: Any) -> Path:
        made = folder / name
        made.mkdir()
        for file in reference.iterdir():
            if file.name not in missing:
                os.link(file, made / file.name)
        if "config.json" not in missing:
            (made / "config.json").unlink()
            (made / "config.json").write_text(text or json.dumps(config or {**fields, **changes}))
        return made

    weights = "model.safetensors"
    other("no_tokenizer", "tokenizer.json", "tokenizer_config.json")
    other("small", weights, vocab_size=100)
    state = _weights(folder / "reference")
    state["model.embed_tokens.weight"] = state["model.embed_tokens.weight"][:100].clone()
    _save(state, folder / "small" / weights)
    other("broken", text="{'model_type")
    other("list", text="[1, 2]")
    other("no_type", config={"hidden_size": 3})
    other("unknown", model_type="nosuchmodel", architectures=["NoSuchModel"])
    other("no_weights", weights)
    other("others", hidden_size=128, head_dim=32)
    other("deep", num_hidden_layers=10**6)
    other("wide", hidden_size=10**9)
    other("nested", text="[" * 100_000)
    (other("truncated", weights) / weights).write_bytes((reference / weights).read_bytes()[:5000])
    (other("pickle", weights) / "pytorch_model.bin").write_bytes(pickle.dumps(_Stranger()))
    os.mkfifo(other("piped", "config.json") / "config.json")
    (folder / "empty").mkdir()

    torch.manual_seed(0)
    small = T5Config(vocab_size=4096, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    T5ForConditionalGeneration(small).save_pretrained(folder / "t5")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        os.link(reference / file, folder / "t5" / file)

    plain = torch.nn.Sequential(torch.nn.Linear(128, 64), torch.nn.Linear(64, 10))
    qat.export(frozen(plain, weights="int8"), folder / "plain")
    qat.export(frozen_llama(weights="int8", target="transformers"), folder / "export")
    shutil.copytree(folder / "export", folder / "damaged")
    found = bytearray((folder / "damaged" / weights).read_bytes())
    found[-1] ^= 1
    (folder / "damaged" / weights).write_bytes(found)


def _weights(folder: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def _save(state: Any, path: Path) -> None:
    from safetensors.torch import save_file

    save_file(state, path, metadata={"format": "pt"})
