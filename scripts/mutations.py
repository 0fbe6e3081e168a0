"""The ways in which `scripts.mutate_exports` damages a directory. Each says what it did."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["MUTATIONS", "reseal"]

_MANIFEST = "qat_manifest.json"
_EXTREME = (0, 1, 100_000_001, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)
_BEYOND = ("../outside/stolen", "/dev/zero", "..", "", ".", "/", "sub/../../outside/stolen", "a\0b", "~/x", "x" * 300)


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.name != "README.md")


def _pick(directory: Path, draw: random.Random, *suffixes: str) -> Path:
    found = [path for path in _files(directory) if not suffixes or path.suffix in suffixes]
    return draw.choice(found or _files(directory))


def _changed(path: Path, change: Callable[[bytearray], Any]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def _at(size: int, draw: random.Random) -> int:
    """A place in a file, in half of the draws near its begin."""
    return draw.randrange(max(1, min(size, 2000) if draw.random() < 0.5 else size))


def flip(directory: Path, draw: random.Random, outside: Path) -> str:
    path = _pick(directory, draw)
    places = [_at(path.stat().st_size, draw) for _ in range(draw.choice((1, 1, 1, 3, 20)))]

    def change(data: bytearray) -> None:
        for place in places:
            data[place] ^= 1 << draw.randrange(8)

    _changed(path, change)
    return f"{path.name} at {places[:3]}"


def truncate(directory: Path, draw: random.Random, outside: Path) -> str:
    path = _pick(directory, draw)
    size = draw.choice((0, 1, 7, 8, 9, _at(path.stat().st_size, draw), path.stat().st_size - 1))
    os.truncate(path, size)
    return f"{path.name} to {size}"


def extend(directory: Path, draw: random.Random, outside: Path) -> str:
    path = _pick(directory, draw)
    _changed(path, lambda data: data.extend(draw.choice((b" ", b"\0" * 64, b"{}", data[:200]))))
    return path.name


def zero(directory: Path, draw: random.Random, outside: Path) -> str:
    path = _pick(directory, draw)
    start, length = _at(path.stat().st_size, draw), draw.choice((1, 8, 64, 4096))

    def change(data: bytearray) -> None:
        stop = min(len(data), start + length)
        data[start:stop] = bytes(stop - start)

    _changed(path, change)
    return f"{path.name} {length} at {start}"


def swap(directory: Path, draw: random.Random, outside: Path) -> str:
    one, other = draw.sample(_files(directory), 2)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    return f"{one.name} and {other.name}"


def header(directory: Path, draw: random.Random, outside: Path) -> str:
    """An extreme number of 4 or 8 bytes where lengths and counts stand."""
    path = _pick(directory, draw, ".safetensors", ".gguf")
    value, width = draw.choice(_EXTREME), draw.choice((4, 8, 8))
    place = draw.choice((0, 8, 16, _at(2000, draw), _at(2000, draw))) if path.suffix == ".gguf" else 0
    _changed(path, lambda data: struct.pack_into("<Q" if width == 8 else "<I", data, place, value % (1 << 8 * width)))
    return f"{path.name} {value} at {place}"


def _any_value(draw: random.Random, old: Any) -> Any:
    other: list[Any] = [None, True, [], {}, "", -1, 0, 3, 1 << 20, 1 << 70, 0.5, 1e300, float("nan"), [[[]]]]
    other += [{"a": 1}, "int4"]
    other += [*_BEYOND, "float32", "bfloat16", "eager", "sdpa", "none", [old], {"x": old}, str(old)]
    if isinstance(old, bool):
        other += [not old] * 20
    elif isinstance(old, int | float):
        other += [old + 1, old * 2, old - 1, -old, old // 2] * 4
    elif isinstance(old, str):
        other += [old[:-1], old[1:] + old[:1], old.replace("8", "4"), old.replace("a", "e", 1)] * 4
    return draw.choice(other)


def _holders(value: Any) -> list[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [found for key in keys for found in [(value, key), *_holders(value[key])]]


def _edit(fields: Any, draw: random.Random) -> str:
    """One edit of a value; fields near the top are drawn as often as the many below."""
    top = [(fields, key) for key in fields] if isinstance(fields, dict) else []
    holder, key = draw.choice(top if top and draw.random() < 0.4 else _holders(fields) or [({"": 0}, "")])
    kind = draw.choice(("value", "value", "value", "delete", "rename", "add"))
    if kind == "value":
        holder[key] = _any_value(draw, holder[key])
        return f"{key} = {str(holder[key])[:60]!r}"
    if kind == "delete":
        del holder[key]
    elif isinstance(holder, dict) and kind == "rename":
        holder[draw.choice((*_BEYOND, f"{key}_", str(key)[:-1]))] = holder.pop(key)
    elif isinstance(holder, dict):
        holder[draw.choice((*_BEYOND, "auto_map", "quantization_config", "x"))] = holder[key]
    return f"{kind} {key}"


def json_fields(directory: Path, draw: random.Random, outside: Path) -> str:
    """Other values, types, keys in a JSON file; the manifest in half of the draws."""
    path = directory / _MANIFEST if draw.random() < 0.5 else _pick(directory, draw, ".json")
    fields = json.loads(path.read_text())
    told = [_edit(fields, draw) for _ in range(draw.choice((1, 1, 1, 2)))]
    path.write_text(json.dumps(fields))
    return f"{path.name} {told}"


def tensor_fields(directory: Path, draw: random.Random, outside: Path) -> str:
    """Other names, shapes, dtypes, offsets in the header of a safetensors file."""
    path = _pick(directory, draw, ".safetensors")
    if path.suffix != ".safetensors":
        return flip(directory, draw, outside)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    fields = json.loads(data[8 : 8 + length])
    told = _edit(fields, draw)
    text = json.dumps(fields).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return f"{path.name} {told}"


def json_text(directory: Path, draw: random.Random, outside: Path) -> str:
    path = _pick(directory, draw, ".json")
    text = draw.choice(("", "[]", "null", "{", "[" * 100_000, '{"a":' * 50_000, "1" * 5000, "{}", "\xff", '"x"'))
    path.write_text(text, encoding="latin-1")
    return f"{path.name} = {text[:10]!r}"


def link(directory: Path, draw: random.Random, outside: Path) -> str:
    path = _pick(directory, draw)
    kind = draw.choice(("copy", "copy", "zero", "loop", "inside", "folder", "nothing"))
    shutil.copy(path, outside / "stolen")
    path.unlink()
    goal = {"copy": outside / "stolen", "zero": Path("/dev/zero"), "loop": path, "folder": outside}
    path.symlink_to(goal.get(kind, _pick(directory, draw) if kind == "inside" else directory / "nothing"))
    return f"{path.name} to {kind}"


def special(directory: Path, draw: random.Random, outside: Path) -> str:
    path = _pick(directory, draw)
    kind, size = draw.choice(("fifo", "sparse", "zeros", "folder")), path.stat().st_size
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.touch()
        os.truncate(path, size if kind == "zeros" else 1 << 38)
    return f"{path.name} as {kind}"


def names(directory: Path, draw: random.Random, outside: Path) -> str:
    """A name in the manifest or an index that leads to an equal file outside."""
    path = draw.choice([p for p in _files(directory) if p.name == _MANIFEST or p.name.endswith("index.json")])
    fields, file = json.loads(path.read_text()), _pick(directory, draw, ".safetensors", ".gguf")
    shutil.copy(file, outside / "stolen")
    beyond = draw.choice(("../outside/stolen", str(outside / "stolen")))
    if path.name != _MANIFEST:
        fields["weight_map"] = {k: beyond if v == file.name else v for k, v in fields["weight_map"].items()}
    else:
        fields["files"][beyond] = fields["files"].pop(file.name, {"bytes": 1, "sha256": ""})
        for tensor in fields["tensors"].values() if draw.random() < 0.7 else ():
            tensor["file"] = beyond if tensor["file"] == file.name else tensor["file"]
        if draw.random() < 0.3:
            fields["weights_stem"] = draw.choice(("../outside/st", "*", "**/", "/", "../*"))
    if draw.random() < 0.5:
        file.unlink()
    path.write_text(json.dumps(fields))
    return f"{path.name}: {file.name} is {beyond}"


def remove(directory: Path, draw: random.Random, outside: Path) -> str:
    path = _pick(directory, draw)
    path.unlink()
    return path.name


def extra(directory: Path, draw: random.Random, outside: Path) -> str:
    """One more file, of a name that loaders look for."""
    file = _pick(directory, draw, ".safetensors", ".gguf")
    shutil.copy(file, outside / "stolen")
    stem, number = file.name.partition("-0")[0].partition(".")[0], "-00009-of-00009"
    names = [f"{stem}.safetensors.index.json", f"{stem}{number}.safetensors", f"{stem}.safetensors", f"{stem}.gguf"]
    names += ["pytorch_model.bin", "adapter_config.json", "generation_config.json", "quanto_qmap.json", "modeling_x.py"]
    names += ["config.json", "config.4.0.0.json", "diffusion_pytorch_model.bin", "adapter_model.safetensors"]
    name = draw.choice(names)
    index = {"metadata": {}, "weight_map": dict.fromkeys(_tensors(directory), draw.choice(("../outside/stolen", "y")))}
    settings = {"base_model_name_or_path": str(outside), "peft_type": "LORA", "r": 4, "target_modules": ["q_proj"]}
    text = json.dumps(index if "index" in name else settings).encode()
    was = "another" if (directory / name).exists() else "one more"
    (directory / name).write_bytes(file.read_bytes() if Path(name).suffix == file.suffix else text)
    if draw.random() < 0.4:
        _edit_manifest(directory, lambda fields: fields["files"].update({name: {"bytes": 0, "sha256": ""}}))
        was += ", listed"
    return f"{was} {name}"


def _tensors(directory: Path) -> list[str]:
    return list(json.loads((directory / _MANIFEST).read_text())["tensors"])


def _edit_manifest(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    fields = json.loads((directory / _MANIFEST).read_text())
    change(fields)
    (directory / _MANIFEST).write_text(json.dumps(fields))


def same_size(directory: Path, draw: random.Random, outside: Path) -> str:
    """Another digit or letter in a JSON file."""
    path = _pick(directory, draw, ".json")
    text = path.read_text()
    place = draw.choice([place for place, letter in enumerate(text) if letter.isalnum()])
    other = draw.choice("0123456789" if text[place].isdigit() else "abcdefghijklmnopqrstuvwxyz_")
    path.write_text(text[:place] + other + text[place + 1 :])
    return f"{path.name}: {other!r} at {text[place - 20 : place]!r}"


_POINTED: list[tuple[str, str, Any]] = [
    *((_MANIFEST, "frozen.spec.quantize_outputs", value) for value in (True, False, None)),
    *((_MANIFEST, "environment.threads", value) for value in (0, -1, 64, 1 << 20, 1 << 40, "2", None)),
    *((_MANIFEST, "model_class", f"{name}") for name in ("transformers.LlamaModel", "transformers.MistralForCausalLM")),
    *((_MANIFEST, "model_class", f"{name}") for name in ("transformers.pipeline", "os.system", "diffusers.x", "", "x")),
    *((_MANIFEST, "target", name) for name in ("quanto", "transformers", "diffusers", "gguf", "compressed-tensors")),
    *((_MANIFEST, key, "sdpa") for key in ("attn_implementation", "experts_implementation")),
    *((_MANIFEST, "attn_implementation", name) for name in ("eager", "../outside/stolen", None)),
    *((_MANIFEST, "dtype", name) for name in ("float16", "bfloat16", "float32", "int8")),
    (_MANIFEST, "float_grid", True),
    (_MANIFEST, "frozen.layers", {}),
    (_MANIFEST, "files", {}),
    (_MANIFEST, "tied", {"lm_head.weight": "nowhere"}),
    *(("config.json", "num_hidden_layers", value) for value in (2, 1000, 10**7, 1 << 50)),
    *(("config.json", "vocab_size", value) for value in (97, 1 << 24, 1 << 40)),
    *(("config.json", "max_position_embeddings", value) for value in (1, 1 << 40)),
    *(("config.json", "num_layers", value) for value in (2, 1000, 10**7, 1 << 50)),
    *(("config.json", "quantization_config", value) for value in (None, {}, {"quant_method": "bitsandbytes"})),
    *(("config.json", "auto_map", {"AutoModelForCausalLM": "x.Y"}) for _ in range(2)),
    ("config.json", "configuration_files", ["config.../../outside/stolen.json"]),
    ("config.json", "model_type", "bert"),
    ("config.json", "_class_name", "UNet2DConditionModel"),
]


def pointed(directory: Path, draw: random.Random, outside: Path) -> str:
    """One of the edits that an attacker would try first."""
    name, key, value = draw.choice([edit for edit in _POINTED if (directory / edit[0]).exists()])
    fields = json.loads((directory / name).read_text())
    *path, last = key.split(".")
    functools.reduce(dict.__getitem__, path, fields)[last] = value
    (directory / name).write_text(json.dumps(fields))
    return f"{name} {key} = {value}"


_KINDS = [flip, truncate, extend, zero, swap, header, json_fields, tensor_fields, json_text, link, special, names]
MUTATIONS: dict[str, Callable[[Path, random.Random, Path], str]] = {
    kind.__name__: kind for kind in (*_KINDS, remove, extra, same_size, pointed)
}
"""Each changes a directory; an equal file, or one to be stolen, is put outside."""


def reseal(directory: Path) -> None:
    """Write the manifest anew, with sizes and hashes of the files as they are, where it is still a manifest."""
    path = directory / _MANIFEST
    try:
        if not path.is_file() or path.is_symlink() or path.stat().st_size > 1 << 24:
            return
        fields = json.loads(path.read_text())
        for name in list(fields["files"]):
            file = directory / str(name)
            if not os.path.lexists(file):
                del fields["files"][name]
            elif file.is_file() and file.stat().st_size < 1 << 24:
                data = file.read_bytes()
                fields["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        fields.pop("digest", None)
        path.write_text(json.dumps(fields))
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError):
        return
