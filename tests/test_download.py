"""`gptfast download` against a hub on this machine: what is fetched, what goes on where it stopped,
and each thing that can come in between as one line."""

import errno
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from gptfast.commands import main

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = bytes(range(256)) * 20_000  # 5 MB, which the client reads in one piece
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model-00001-of-00002.safetensors": WEIGHTS,
    "model-00002-of-00002.safetensors": WEIGHTS[::-1],
    "tokenizer.model": b"\n tokenizer",
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "README.md": b"words",
    "pytorch_model.bin": WEIGHTS,
    "onnx/model.json": b"{}",
    "consolidated.safetensors": WEIGHTS,
}
NEEDED = list(FILES)[:6]


class Hub(ThreadingHTTPServer):
    """One model, owner/name; it hangs up `breaks_at` bytes into a large file."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = dict(FILES)
        self.breaks_at: int | None = None
        self.gated = False
        self.damaged = False
        self.claimed_sizes: dict[str, int] = {}
        self.ranges: list[tuple[str, str | None]] = []  # what was asked for, of large files

    def handle_error(self, *_: Any) -> None:
        pass  # the command hung up

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def facts(self, name: str) -> dict[str, Any]:
        data = self.files[name]
        size = self.claimed_sizes.get(name, len(data))
        sha256 = hashlib.sha256(data).hexdigest()
        facts: dict[str, Any] = {"size": size, "oid": sha256[:40], "blobId": sha256[:40]}
        if name.endswith((".safetensors", ".bin")):
            facts["lfs"] = {"size": size, "sha256": sha256, "oid": sha256, "pointerSize": 130}
        return facts


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/owner/name"):
            return self.answer_about_the_model(path)
        if match := re.fullmatch(r"/owner/name/resolve/([^/]+)/(.+)", path):
            return self.answer_with_a_file(match[2])
        self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer_about_the_model(self, path: str) -> None:
        hub = self.server
        if "/revision/" in path and not path.endswith(("/main", COMMIT)):
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if "/tree/" in path:
            tree = [{"type": "file", "path": name} | hub.facts(name) for name in hub.files]
            return self.answer(200, json.dumps(tree).encode())
        siblings = [{"rfilename": name} | hub.facts(name) for name in hub.files]
        info = {"id": "owner/name", "sha": COMMIT, "siblings": siblings}
        self.answer(200, json.dumps(info).encode())

    def answer_with_a_file(self, name: str) -> None:
        hub, data = self.server, self.server.files[name]
        if hub.gated:
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        facts = hub.facts(name)
        etag = facts["lfs"]["sha256"] if "lfs" in facts else facts["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            return self.answer(200, data, headers)
        status, start = 200, 0
        asked = self.headers.get("Range")
        if "lfs" in facts:
            hub.ranges.append((name, asked))
        if asked:
            status, start = 206, int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        if hub.damaged:
            body = bytes(len(body))
        headers["Content-Length"] = str(len(body))
        if hub.breaks_at is not None and "lfs" in facts:
            body = data[start : hub.breaks_at]
        self.answer(status, body, headers)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


Outcome = tuple[int, list[str], list[str]]
Download = Callable[..., Outcome]


@pytest.fixture
def download(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> Iterator[Download]:
    """Runs the command with a cache in tmp_path: exit code, lines of stdout and of stderr.

    The client reads pieces of 10 MB, of which only whole ones are kept; between attempts it waits.
    """
    constants = pytest.importorskip("huggingface_hub.constants")
    for name, value in {
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "DOWNLOAD_CHUNK_SIZE": 1 << 16,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    caplog.set_level("ERROR", "huggingface_hub")  # it says each time that it tries again
    disable_progress_bars()

    def run(endpoint: str, *options: str, model: str = "owner/name") -> Outcome:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        code = main(["download", model, *options])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err.splitlines()

    yield run
    enable_progress_bars()


def one_error(outcome: Outcome, *needles: str) -> None:
    code, out, err = outcome
    assert code == 2 and out == []
    errors = [line for line in err if not line.startswith("Skipped")]
    assert len(errors) == 1 and errors[0].startswith("gptfast: error: "), err
    for needle in needles:
        assert needle in errors[0], errors[0]


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return {name: data for name, data in files.items() if not name.startswith(".cache/")}


@pytest.mark.parametrize("into", ["cache", "folder"])
def test_what_is_fetched_and_what_is_skipped(
    hub: Hub, download: Download, tmp_path: Path, into: str
) -> None:
    options = ["--out", str(tmp_path / "out")] if into == "folder" else []
    code, out, err = download(hub.endpoint, *options)
    assert code == 0
    folder = Path(out[-1].split(" in ")[1])
    if into == "folder":
        assert folder == tmp_path / "out"
    else:
        assert folder.name == COMMIT
        refs = tmp_path / "hub" / "models--owner--name" / "refs"
        assert (refs / "main").read_text() == COMMIT  # so that it is found without a network
    assert contents(folder) == {name: FILES[name] for name in NEEDED}
    assert "10.24 MB  in" in out[-1]
    assert [line.split("  ")[-1] for line in out[:-1]] == sorted(NEEDED)
    (skipped,) = err
    assert skipped.startswith("Skipped") and "README.md 5 B" in skipped
    assert "pytorch_model.bin 5.12 MB" in skipped and "consolidated.safetensors" in skipped
    hub.ranges.clear()
    assert download(hub.endpoint, *options)[0] == 0  # nothing is fetched twice
    assert hub.ranges == []


@pytest.mark.parametrize("into", ["cache", "folder"])
def test_a_download_that_broke_off_goes_on(
    hub: Hub, download: Download, tmp_path: Path, into: str
) -> None:
    """The client of the hub itself would start each file anew."""
    options = ["--out", str(tmp_path / "out")] if into == "folder" else []
    hub.breaks_at = 200_000
    outcome = download(hub.endpoint, *options)
    one_error(outcome, "the download of 'owner/name' broke off", "run the same again")
    assert not list(tmp_path.rglob("*.safetensors"))  # nothing unfinished under a final name
    parts = {path.stat().st_size for path in tmp_path.rglob("*.part.incomplete")}
    assert parts and min(parts) >= 65_536
    hub.breaks_at = None
    hub.ranges.clear()
    code, out, _ = download(hub.endpoint, *options)
    assert code == 0
    assert contents(Path(out[-1].split(" in ")[1])) == {name: FILES[name] for name in NEEDED}
    starts = {int(asked.removeprefix("bytes=").split("-")[0]) for _, asked in hub.ranges if asked}
    assert len(hub.ranges) == 2 and starts and starts <= parts
    assert not list(tmp_path.rglob("*.incomplete"))


def test_a_download_that_goes_on_with_other_bytes(
    hub: Hub, download: Download, tmp_path: Path
) -> None:
    hub.breaks_at = 200_000
    download(hub.endpoint)
    hub.breaks_at, hub.damaged = None, True
    one_error(download(hub.endpoint), "damaged", "run the same again")
    hub.damaged = False
    # A second file may have taken damaged bytes too before the first one's failure stopped it.
    assert 0 in (download(hub.endpoint)[0], download(hub.endpoint)[0])


def test_a_gated_model(hub: Hub, download: Download, tmp_path: Path) -> None:
    hub.gated = True
    one_error(download(hub.endpoint), "'owner/name' is gated", "hf auth login")


def test_a_model_that_is_not_there(hub: Hub, download: Download, tmp_path: Path) -> None:
    outcome = download(hub.endpoint, model="owner/other")
    one_error(outcome, "no model 'owner/other'", "no such id")


def test_a_revision_that_is_not_there(hub: Hub, download: Download, tmp_path: Path) -> None:
    outcome = download(hub.endpoint, "--revision", "v9")
    one_error(outcome, "'owner/name' has no revision 'v9'")


def test_no_network(download: Download, tmp_path: Path) -> None:
    """Also where the folder exists: the client would take whatever lies in it for the model."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    outcome = download("http://127.0.0.1:9", "--out", str(tmp_path / "out"))
    one_error(outcome, "no model 'owner/name'", "could not be reached")


def test_more_than_the_disk_has_room_for(hub: Hub, download: Download, tmp_path: Path) -> None:
    hub.claimed_sizes["model-00001-of-00002.safetensors"] = 10**18
    outcome = download(hub.endpoint, "--out", str(tmp_path / "new" / "out"))
    one_error(outcome, "1000000.00 TB are to be downloaded to", "are free")
    assert hub.ranges == [] and not (tmp_path / "new").exists()


def test_a_disk_that_fills_up(
    hub: Hub, download: Download, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Any, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gptfast.hub.files._Stoppable.write", full)
    outcome = download(hub.endpoint)
    one_error(outcome, "no space is left in", "run the same again")


def test_a_model_without_safetensors(hub: Hub, download: Download, tmp_path: Path) -> None:
    hub.files = {"config.json": b"{}", "pytorch_model.bin": WEIGHTS}
    one_error(download(hub.endpoint), "no .safetensors files", "refs/pr/N")


def test_names_that_are_no_hub_ids(download: Download, tmp_path: Path) -> None:
    endpoint = "http://127.0.0.1:9"
    one_error(download(endpoint, model="storyteller"), "is bundled")
    one_error(download(endpoint, model="a/b/c"), "no model 'a/b/c'")
    (tmp_path / "file").write_text("")
    one_error(download(endpoint, "--out", str(tmp_path / "file")), "is a file")
