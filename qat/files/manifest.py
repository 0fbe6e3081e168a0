"""`qat_manifest.json`: what an export contains, and the evidence that freezing left.

The manifest is what makes a directory checkable on its own: hashes of the files, a digest of every tensor, the
digests of every layer's codes, scale, shift and dequantized weight, the example that was run through the frozen model,
and the environment in which all that was computed. Stock loaders never notice it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qat.errors import LoadError, shown
from qat.files.evidence import FrozenRecord
from qat.files.places import like_folder
from qat.files.trusted import regular_file
from qat.spec import ServingDtype

__all__ = [
    "CARD_NAME",
    "EVIDENCE_NAME",
    "MANIFEST_NAME",
    "Environment",
    "ExampleRecord",
    "FileRecord",
    "Manifest",
    "TensorRecord",
    "file_record",
    "read_manifest",
]

MANIFEST_NAME = "qat_manifest.json"
EVIDENCE_NAME = "qat_evidence.safetensors"
CARD_NAME = "README.md"
_MOST = 1_000_000_000  # bytes: models of experts have some 100 MB
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_DECIDES_ROUNDING = ("torch", "quanto", "transformers", "diffusers", "cpu_capability", "threads", "device")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Frozen):
    """Size of a file of the export, and the hash of all of it."""

    bytes: _Count
    sha256: str


class TensorRecord(_Frozen):
    """A tensor of the weight files."""

    file: str
    """The shard that holds it."""
    dtype: str
    """safetensors' name of its dtype."""
    shape: tuple[_Count, ...]
    """Its shape as stored (packed codes: the packed shape)."""
    sha256: str
    """Digest of its bytes."""
    stored_as: tuple[str, ...] = ()
    """Its name in the file where that is another one; or several, each of which holds as many of its rows."""


class ExampleRecord(_Frozen):
    """The example that was run through the frozen model; its tensors are in `EVIDENCE_NAME`."""

    inputs: dict[str, Any]
    """Structure of the inputs, with names in place of tensors."""
    outputs: tuple[str, ...]
    """Names of the output tensors, in order."""


class Environment(_Frozen):
    """The versions (None: not installed) and the machine that an export was made with."""

    qat: str
    torch: str
    quanto: str | None
    transformers: str | None
    diffusers: str | None = None
    python: str
    platform: str
    """Operating system and processor architecture."""
    cpu_capability: str
    """The vector instructions that torch's CPU kernels chose, which decide how sums round."""
    threads: int = Field(ge=1, le=1024)
    """torch's number of threads, which decides how sums are split."""
    device: str
    """Where the frozen outputs were computed."""

    @classmethod
    def current(cls, device: str = "cpu") -> Environment:
        """Describe this process."""
        flags: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        extra = [name for name in ("avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8") if flags.get(name)]
        return cls(
            qat=getattr(sys.modules["qat"], "__version__", None) or _version("qat") or "unknown",
            torch=str(torch.__version__),
            quanto=_version("optimum-quanto"),
            transformers=_version("transformers"),
            diffusers=_version("diffusers"),
            python=platform.python_version(),
            platform=f"{platform.system()} {platform.machine()}",
            cpu_capability="+".join([torch.backends.cpu.get_cpu_capability(), *extra]),
            threads=torch.get_num_threads(),
            device=device,
        )

    def differences(self, other: Environment) -> tuple[str, ...]:
        """What differs between two environments in a way that may round sums differently."""
        return tuple(
            f"{name} {getattr(self, name)} -> {getattr(other, name)}"
            for name in _DECIDES_ROUNDING
            if getattr(self, name) != getattr(other, name)
        )


class Manifest(_Frozen):
    """Everything that an export says about itself."""

    format: Literal[1] = 1
    """Version of this layout."""
    target: str
    """Who is meant to load the directory."""
    dtype: ServingDtype
    """The serving dtype."""
    model_class: str
    """Module path and name of the model's class."""
    attn_implementation: str | None = None
    """The attention implementation that the frozen model ran with, where it has one: it decides how outputs round."""
    experts_implementation: str | None = None
    """That of experts, likewise."""
    float_grid: bool = False
    """Whether the weights are on-grid floats for a stock load instead of packed codes."""
    stock_arguments: dict[str, Any] | None = None
    """With ``float_grid``: the arguments of the stock ``QuantoConfig`` that gives the codes back."""
    frozen: FrozenRecord
    """Spec, target it was frozen for, algorithm, per-layer evidence, notes."""
    environment: Environment
    """Where it was made."""
    weights_stem: str = Field("model", pattern=r"^\w+$")
    """How the names of the weight files begin, as the loader expects it."""
    tensors: dict[str, TensorRecord]
    """Every tensor of the weight files."""
    tied: dict[str, str] = Field(default_factory=dict)
    """Names that share another tensor and are therefore not written, with the name that is."""
    files: dict[str, FileRecord]
    """Every file except this one, and except the model card and its pictures, which are for people to edit."""
    example: ExampleRecord | None = None
    """The example and its frozen outputs, when one was given."""
    config: dict[str, Any] | None = None
    """The resolved recipe configuration, when one was given."""
    notes: tuple[str, ...] = ()
    """What a reader should know."""
    digest: str | None = None
    """sha256 of the manifest's bytes before this field, the last one; None: of an export from before it was written."""

    def write(self, directory: Path) -> Path:
        """Write the manifest and return its path."""
        path = directory / MANIFEST_NAME
        text = json.dumps(self.model_dump(mode="json", exclude={"digest"}), indent=1)
        data = f"{text.removesuffix('}').rstrip()},\n ".encode()
        path.write_bytes(data + f'"digest": "{hashlib.sha256(data).hexdigest()}"\n}}\n'.encode())
        return path


def _is_interrupted(checkpoints: Path) -> bool:
    """Whether a folder holds what a recipe goes on from."""
    try:
        run = json.loads((checkpoints / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(run, dict) and run.get("ended") is False


def read_manifest(directory: Path) -> Manifest:
    """Read the manifest of an exported directory.

    Raises:
        LoadError: when the directory or the manifest is missing or unreadable, or the manifest was changed since.
    """
    if not os.path.isdir(directory):  # of os, to whom no name is too long
        begun = _is_interrupted(Path(f"{directory}-checkpoints"))
        remedy = "its run has not ended: start it again, and it goes on" if begun else "name what qat.export wrote"
        raise LoadError(
            f"directory must be an exported model; {shown(str(directory))} is not a directory{like_folder(directory)}: "
            f"{remedy}"
        )
    if not os.path.lexists(directory / MANIFEST_NAME):
        raise LoadError(
            f"{str(directory)!r} has no {MANIFEST_NAME}: it is no export, or not a whole one: write one with "
            "qat.export from a frozen model (qat train and qat calibrate do); a float model is for its own library to "
            "load, as by from_pretrained"
        )
    data = regular_file(directory, MANIFEST_NAME, _MOST).read_bytes()
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise LoadError(
            f"{MANIFEST_NAME} in {str(directory)!r} is corrupt: {where[:200]}: {first['msg']}: export the model again"
        ) from error
    if manifest.digest not in (None, hashlib.sha256(data.rpartition(b'"digest"')[0]).hexdigest()):
        raise LoadError(f"{MANIFEST_NAME} in {str(directory)!r} was changed after the export: export the model again")
    return manifest


def file_record(path: Path) -> FileRecord:
    """Size and hash of a file."""
    with path.open("rb") as file:
        return FileRecord(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
