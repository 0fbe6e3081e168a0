"""`push_to_hub` against a server on this machine that speaks the hub's endpoints for uploads."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import pytest
from torch import nn

import qat
from qat.cli import main
from qat.errors import ExportError, LoadError, UnjudgedError
from qat.files.manifest import MANIFEST_NAME, read_manifest
from tests.exports import frozen_layers, frozen_llama

TOKEN = "hf_of_a_test"
# The client's own call of its network library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


class Hub(ThreadingHTTPServer):
    """Takes uploads: large files by LFS, the others in the commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.lfs: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.made: dict[str, Any] = {}
        self.asked: list[str] = []


class Requests(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, value: Any, code: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        self.server.asked.append(self.path)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_PUT(self) -> None:
        self.server.lfs[self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_POST(self) -> None:
        body, hub = self.body(), self.server
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "this token may not write"}, 403)
        elif self.path == "/api/repos/create":
            hub.made = json.loads(body)
            self.answer({"url": f"{hub.url}/owner/name"})
        elif self.path == "/api/validate-yaml" or "/branch/" in self.path:
            self.answer({})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            files = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
            self.answer({"files": files})
        elif self.path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{hub.url}/lfs/{each['oid']}", "header": {}}}
            self.answer({"objects": objects, "transfer": "basic"})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.lfs[value["oid"]]
            self.answer({"commitUrl": f"{hub.url}/owner/name/commit/1", "commitOid": "1"})
        else:
            self.answer({"error": self.path}, 404)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as server:
        # shutdown() waits for the end of a poll, which is half a second by default
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.hf_api.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hub") / "out"
    qat.export(frozen_llama("transformers", weights="int8"), path)
    return path


def held(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def test_the_hub_gets_the_very_bytes_and_no_other_file(hub: Hub, export: Path, tmp_path: Path) -> None:
    wanted = held(export)
    out = Path(shutil.copytree(export, tmp_path / "out"))
    (out / "notes.png").write_bytes(b"a picture beside it, which the card does not show")
    assert qat.push_to_hub(out, "owner/name", token=TOKEN, private=True) == f"{hub.url}/owner/name/commit/1"
    assert hub.files == wanted
    assert hub.lfs.keys() == {
        hashlib.sha256(data).hexdigest() for name, data in wanted.items() if name.endswith(".safetensors")
    }
    assert (hub.made["name"], hub.made["organization"], hub.made["visibility"]) == ("name", "owner", "private")
    for name, data in hub.files.items():
        (tmp_path / "back" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "back" / name).write_bytes(data)
    assert qat.verify(tmp_path / "back").ok


def test_without_verifying_the_card_says_so(hub: Hub, export: Path) -> None:
    qat.push_to_hub(export, "owner/name", token=TOKEN, verify=False, revision="trial")
    assert "## Not verified" in hub.files.pop("README.md").decode()
    assert hub.files == {name: data for name, data in held(export).items() if name != "README.md"}
    assert any("/branch/trial" in path for path in hub.asked)
    assert "Not verified" not in (export / "README.md").read_text(encoding="utf-8")


def test_pictures_that_the_card_shows_go_up_too(hub: Hub, export: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(export, tmp_path / "out"))
    shown = {"loss curve.png", "grid.JPG", "a.webp", "b.png", "c d.svg", "e.gif"}
    for name in (*shown, "other.png", "secret.txt"):
        (out / name).write_bytes(name.encode())
    (tmp_path / "outside.png").write_bytes(b"outside")
    links = ("loss%20curve.png", "grid.JPG", "missing.png", "../outside.png", "..%2Foutside.png", "secret.txt")
    with (out / "README.md").open("a") as card:
        card.write("".join(f"\n![it]({link})\n" for link in (*links, "https://example.org/far.png")))
        card.write('![it](./a.webp) ![it](b.png "its title") ![it](<c d.svg>) <img width=3 src="e.gif">')
    qat.push_to_hub(out, "owner/name", token=TOKEN, verify=False)
    assert hub.files.keys() - held(export).keys() == shown
    assert hub.files["grid.JPG"] == b"grid.JPG"
    (out / "grid.JPG").unlink()
    (out / "grid.JPG").symlink_to(tmp_path / "outside.png")
    with pytest.raises(LoadError, match=r"grid\.JPG"):
        qat.push_to_hub(out, "owner/name", token=TOKEN, verify=False)


def test_a_module_that_no_file_builds_needs_its_model(hub: Hub, tmp_path: Path) -> None:
    qat.export(frozen_layers((16, 32)), tmp_path / "out")
    with pytest.raises(UnjudgedError):
        qat.push_to_hub(tmp_path / "out", "owner/name", token=TOKEN)
    assert not hub.asked
    qat.push_to_hub(tmp_path / "out", "owner/name", token=TOKEN, model=nn.Sequential(nn.Linear(32, 16)))
    assert hub.files == held(tmp_path / "out")


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("fault", ["float", "half-written", "changed", "changed manifest"])
def test_what_is_no_whole_export_is_refused(hub: Hub, export: Path, tmp_path: Path, fault: str, verify: bool) -> None:
    out = Path(shutil.copytree(export, tmp_path / "out"))
    weights = out / next(name for name in read_manifest(out).files if name.startswith("model"))
    if fault == "float":
        (out / MANIFEST_NAME).unlink()
    elif fault == "half-written":
        weights.unlink()
    elif fault == "changed":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    else:
        (out / MANIFEST_NAME).write_bytes((out / MANIFEST_NAME).read_bytes().replace(b"int8", b"int4", 1))
    told = {"float": MANIFEST_NAME, "changed manifest": MANIFEST_NAME}.get(fault, weights.name)
    with pytest.raises((LoadError, qat.VerifyError), match=told.replace(".", r"\.")):
        qat.push_to_hub(out, "owner/name", token=TOKEN, verify=verify)
    assert not hub.asked


@pytest.mark.parametrize("name", ["", "a/b/c", "owner/na me", "a..b"])
def test_a_bad_name_is_one_error(hub: Hub, export: Path, name: str) -> None:
    with pytest.raises(ExportError, match="repo_id: must be 'owner/name'"):
        qat.push_to_hub(export, name, token=TOKEN)
    assert not hub.asked


def test_no_token_a_wrong_one_and_no_network(hub: Hub, export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match=r"token: .* HF_TOKEN"):
        qat.push_to_hub(export, "owner/name", verify=False)
    with pytest.raises(ExportError, match=r"'owner/name' was not uploaded to .*403"):
        qat.push_to_hub(export, "owner/name", token="hf_other", verify=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ExportError, match=r"'owner/name' was not uploaded to http://127.0.0.1:9"):
        qat.push_to_hub(export, "owner/name", token=TOKEN, verify=False)


@pytest.mark.parametrize("token", ["hf_secret\0", "hf_sécret", "hf_secret\nX-Other: 1"])
def test_a_token_is_never_shown(hub: Hub, export: Path, token: str) -> None:
    with pytest.raises(ExportError) as caught:
        qat.push_to_hub(export, "owner/name", token=token, verify=False)
    assert "cret" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert not hub.asked
    qat.push_to_hub(export, "owner/name", token=f"{TOKEN}\n", verify=False)  # as a file of one line holds it


def test_an_export_without_its_card_is_refused(hub: Hub, export: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(export, tmp_path / "out"))
    (out / "README.md").unlink()
    for verify in (True, False):
        with pytest.raises(LoadError, match=r"has no README\.md: restore"):
            qat.push_to_hub(out, "owner/name", token=TOKEN, verify=verify)
    assert not hub.asked


def test_the_command_names_its_own_way_for_a_plain_module(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    qat.export(frozen_layers((16, 32)), tmp_path / "out")
    with pytest.raises(SystemExit) as ended:
        main(["push", str(tmp_path / "out"), "owner/name"])
    assert ended.value.code == 3
    assert "or qat push --no-verify" in capsys.readouterr().err


def test_the_command(
    hub: Hub, export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    with pytest.raises(SystemExit) as ended:
        main(["push", str(export), "owner/name", "--no-verify"])
    assert ended.value.code in (None, 0)
    assert capsys.readouterr().out.strip() == f"{hub.url}/owner/name/commit/1"
