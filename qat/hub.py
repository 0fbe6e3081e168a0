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
    token = token or get_token()
    if token is None:
        raise ExportError("token: the hub takes files with one, got none: run `hf auth login`, set HF_TOKEN or pass it")
    if verify:
        verify_export(path, model=model)
    elif faults := check_files(path, manifest, hashes=True):
        raise load_error(f"{str(path)!r} is not what was exported (files)", faults)
    card = regular_file(path, CARD_NAME).read_bytes() if (path / CARD_NAME).exists() else b""
    names = dict.fromkeys([*manifest.files, MANIFEST_NAME, *_pictures(path, card)])
    card += b"" if verify else _UNVERIFIED.encode()
    operations = [CommitOperationAdd(name, regular_file(path, name)) for name in names]
    operations += [CommitOperationAdd(CARD_NAME, card)] if card else []
    api = HfApi(token=token)
    try:
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        commit = api.create_commit(name, operations, commit_message=commit_message, revision=revision)
    except Exception as error:  # of each release of the client, and of its network library, its own
        raise ExportError(
            f"repo_id: {repo_id!r} was not uploaded to {api.endpoint}: {_reason(error)}: see to the network, and to a "
            "token that may write there"
        ) from error
    return str(commit.commit_url)


def _pictures(directory: Path, card: bytes) -> list[str]:
    """Pictures beside a card that it shows, by the names of their files."""
    linked = re.findall(r"!\[[^\]]*\]\(([^)/\s]+\.(?:png|jpe?g))\)", card.decode("utf-8", "replace"), re.IGNORECASE)
    return [name for link in linked if os.path.lexists(directory / (name := unquote(link))) and "/" not in name]


def _reason(error: Exception) -> str:
    """What went wrong first: the client says of an upload only that it failed."""
    cause = error.__cause__
    return f"{told(error)}: {told(cause)}" if isinstance(cause, Exception) else told(error)
