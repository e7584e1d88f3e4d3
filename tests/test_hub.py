"""From a name to a folder, without a network: the hub's cache is honoured, all else is refused."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_llama

from gptfast.hub import BUNDLED, DEFAULT_MODEL, find_model
from gptfast.loading import load

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def refused(model: Any, *needles: str, revision: str | None = None) -> None:
    with pytest.raises(ValueError, match=r".+") as caught:
        find_model(model, revision)
    message = str(caught.value)
    assert "\n" not in message and "Traceback" not in message
    for needle in needles:
        assert needle in message


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache in place of the user's own, and no network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def fill_cache(hub_cache: Path, model: str, revision: str = "main") -> Path:
    """The folder of a model as the hub client leaves it after a download."""
    repository = hub_cache / f"models--{model.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / revision).write_text(COMMIT)
    return tiny_llama(repository / "snapshots" / COMMIT)


def test_bundled_names() -> None:
    assert DEFAULT_MODEL in BUNDLED
    for name, folder in BUNDLED.items():
        assert find_model(name) == folder
        assert folder.parent.parent.name == "gptfast"


def test_a_folder_is_itself(
    tmp_path: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its name could be a hub id."""
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    assert find_model(folder) == find_model(str(folder)) == find_model(f"{folder}/") == folder
    monkeypatch.chdir(tmp_path)
    assert find_model("owner/name").resolve() == folder.resolve()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_model("~/owner") == folder.parent


def test_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    refused(path, str(path), "is a file", "folder")


@pytest.mark.parametrize(
    "model",
    [
        "no such model",
        "a/b/c",
        "./models/llama",
        "/nowhere/to/be/found",
        "https://example.org/model",
        "owner/name\n",
        "owner/näme?",
        "~nobody-by-this-name/model",
        "\0",
    ],
)
def test_nonsense_is_refused(model: str, hub_cache: Path) -> None:
    refused(model, "no model at", "no such folder")


@pytest.mark.parametrize(
    "model", ["..name/x", "owner/-name", "owner/name.git", "a--b/c", "./x", "x" * 5000]
)
def test_ids_that_the_hub_client_refuses(model: str, hub_cache: Path) -> None:
    refused(model, f"no model {model!r}", "no such folder")


@pytest.mark.parametrize("model", ["owner/name", "gpt2"])
def test_an_id_that_is_not_cached_offline(model: str, hub_cache: Path) -> None:
    refused(model, f"no model {model!r}", "local cache", "hub")


@pytest.mark.parametrize("model", ["owner/name", "gpt2"])
def test_the_cache_is_honoured_offline(model: str, hub_cache: Path) -> None:
    folder = fill_cache(hub_cache, model)
    assert find_model(model) == folder
    load(find_model(model))


def test_a_revision_is_its_own_entry(hub_cache: Path) -> None:
    folder = fill_cache(hub_cache, "owner/name", "v2")
    assert find_model("owner/name", "v2") == find_model("owner/name", COMMIT) == folder
    refused("owner/name", "owner/name", revision="v3")


# -- a hub that misbehaves, on this machine --

NAMES = ["config.json", "model.safetensors"]
TREE = json.dumps([{"type": "file", "path": name, "size": 1000, "oid": "abc"} for name in NAMES])
SIBLINGS = [{"rfilename": name, "size": 1000, "blobId": "abc"} for name in NAMES]
INFO = json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": SIBLINGS})


class BrokenHub(BaseHTTPRequestHandler):
    """Knows one model; every download breaks off after a few bytes."""

    def do_GET(self) -> None:
        if not self.path.removeprefix("/api/models").startswith("/owner/name"):
            self.answer(404, "", {"X-Error-Code": "RepoNotFound"})
        elif "/api/" in self.path:
            self.answer(200, TREE if "/tree/" in self.path else INFO)
        else:
            self.answer(200, "{" + " " * 9, {"Content-Length": "1000"})

    def do_HEAD(self) -> None:
        headers = {"ETag": '"abc"', "X-Repo-Commit": COMMIT, "Content-Length": "1000"}
        self.answer(200, "", headers)

    def answer(self, status: int, body: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def broken_hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), BrokenHub)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


FIND = """
import sys, time
time.sleep = lambda seconds: None  # between its attempts the client waits
from gptfast.hub import find_model
try:
    find_model(sys.argv[1])
except ValueError as error:
    print(error)
"""


def find_at(endpoint: str, model: str, home: Path) -> list[str]:
    """What find_model says in a process of its own: the client reads its settings once."""
    environment = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[1]),
    }
    command = [sys.executable, "-c", FIND, model]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_a_download_that_breaks_off(broken_hub: str, tmp_path: Path) -> None:
    """The HTTP library's own exception came through as a traceback."""
    [line] = find_at(broken_hub, "owner/name", tmp_path)
    assert "the download of 'owner/name' broke off" in line and "run the same again" in line


def test_an_id_that_the_hub_does_not_know(broken_hub: str, tmp_path: Path) -> None:
    [line] = find_at(broken_hub, "owner/other", tmp_path)
    assert "no model 'owner/other'" in line and "no such id" in line


def test_nobody_listens(tmp_path: Path) -> None:
    [line] = find_at("http://127.0.0.1:9", "owner/name", tmp_path)
    assert "could not be reached" in line
