"""`push_to_hub`: an export as a repository of the Hugging Face Hub, file by file what was verified here."""

from __future__ import annotations

import os
import re
from os import PathLike
from pathlib import Path
from urllib.parse import unquote

from torch import nn

from qat.errors import ExportError, LoadError, load_error, shown, told
from qat.files.directory import as_path
from qat.files.manifest import CARD_NAME, MANIFEST_NAME
from qat.files.trusted import regular_file
from qat.untrusted import check_files, read_trusted
from qat.verification import verify as verify_export

__all__ = ["push_to_hub"]

_UNVERIFIED = (
    "\n\n## Not verified\n\nThis export was uploaded without `qat verify`; its files have the recorded hashes.\n"
)
_LINKS = re.compile(
    r"""!\[[^\]]*\]\(\s*(?:<([^>]+)>|([^)\s]+))[^)]*\)|<img\b[^>]*?\bsrc=["']([^"']+)["']""", re.IGNORECASE
)
_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp")


def push_to_hub(
    directory: str | PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload an export of qat",
    model: nn.Module | None = None,
    verify: bool = True,
) -> str:
    """Verify an exported directory, upload its files in one commit, and return the address of the commit.

    The files of the manifest, the manifest, the model card and pictures that it shows go up, and nothing else that lies
    in the directory. Files that a repository already has besides these stay there.

    Args:
        directory: what `qat.export` wrote.
        repo_id: the repository, as ``"owner/name"``, or ``"name"`` in the token's account; it is made where there is
            none.
        private: whether a new repository is private; None: as the account has it, which may be public. One that exists
            stays as it is.
        token: a token that may write; default the one of ``HF_TOKEN`` or of ``hf auth login``.
        revision: the branch, made where there is none; default the main one.
        commit_message: what the commit says.
        model: a float model of the exported architecture, for an export of a plain module, which no file builds.
        verify: False: only the hashes of files are compared, and the uploaded card says that.

    Raises:
        LoadError: the directory is no export, or not a whole and unchanged one.
        VerifyError: what loads is not what was frozen.
        UnjudgedError: no file builds its model, and none was given.
        ExportError: the name is none, there is no token, or the hub cannot be reached or refuses.

    >>> import tempfile, qat
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     qat.push_to_hub(folder, "owner/name", token="hf_...")
    Traceback (most recent call last):
    ...
    qat.errors.LoadError: ...
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, yet in no __all__

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ExportError(
            f"repo_id: must be 'owner/name', or 'name' in your own account, got {shown(repo_id)}: {told(error)}"
        ) from error
    if not commit_message:
        raise ExportError("commit_message: must say something, got '': leave it out for the default")
    path = as_path(directory, LoadError)
    manifest = read_trusted(path)
    token = (token or get_token() or "").strip()
    if not token:
        raise ExportError("token: the hub takes files with one, got none: run `hf auth login`, set HF_TOKEN or pass it")
    if not (token.isascii() and token.isprintable()):  # it is never shown
        raise ExportError("token: must be printable ASCII, got other characters in it: copy it again")
    if not os.path.lexists(path / CARD_NAME):
        raise LoadError(f"{str(path)!r} has no {CARD_NAME}: restore the model card, or export the model again")
    if verify:
        verify_export(path, model=model)
    elif faults := check_files(path, manifest, hashes=True):
        raise load_error(f"{str(path)!r} is not what was exported (files)", faults)
    card = regular_file(path, CARD_NAME).read_bytes()
    names = dict.fromkeys([*manifest.files, MANIFEST_NAME, *_pictures(path, card)])
    card += b"" if verify else _UNVERIFIED.encode()
    operations = [CommitOperationAdd(name, regular_file(path, name)) for name in names]
    operations += [CommitOperationAdd(CARD_NAME, card)]
    api = HfApi(token=token)
    try:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        commit = api.create_commit(name, operations, commit_message=commit_message, revision=revision)
    except Exception as error:  # of each release of the client, and of its network library, its own
        reason = _reason(error).replace(token, "***")
        raise ExportError(
            f"repo_id: {repo_id!r} was not uploaded to {api.endpoint}: {reason}: see to the network, and to a "
            "token that may write there"
        ) from error
    return str(commit.commit_url)


def _pictures(directory: Path, card: bytes) -> list[str]:
    """Pictures beside a card that it shows, in Markdown or HTML, by the names of their files."""
    links = ("".join(found) for found in _LINKS.findall(card.decode("utf-8", "replace")))
    names = dict.fromkeys(unquote(link).removeprefix("./") for link in links)
    pictures = [name for name in names if "/" not in name and name.lower().endswith(_PICTURES)]
    return [name for name in pictures if os.path.lexists(directory / name)]


def _reason(error: Exception) -> str:
    """What went wrong first: the client says of an upload only that it failed."""
    cause, first = error.__cause__, told(error)
    return f"{first}: {told(cause)}" if isinstance(cause, Exception) and told(cause) not in first else first
