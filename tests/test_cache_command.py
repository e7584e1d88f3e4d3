"""`gptfast cache`: what is saved comes back whole, elsewhere or not at all."""

import io
import json
import os
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest

from gptfast.commands import cache, main

Capture = pytest.CaptureFixture[str]
CONTENT = {"graphs/fxgraph/ab/key": b"graph", "graphs/xy.so": b"library", "kernels/linear.so": b"k"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache, filled."""
    monkeypatch.setenv("GPTFAST_CACHE_DIR", str(tmp_path / "cache"))
    for name, content in CONTENT.items():
        path = tmp_path / "cache" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "cache" / "graphs" / "locks").mkdir()
    (tmp_path / "cache" / "graphs" / "locks" / "a.lock").touch()
    return tmp_path / "cache"


def files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def refused(capsys: Capture, *arguments: object) -> str:
    assert main(["cache", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gptfast: error: ") and error.count("\n") == 1
    return error


def test_what_is_saved_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    assert main(["cache", "save", str(tmp_path / "file")]) == 0
    assert "3 files, 13 B" in capsys.readouterr().err
    other = tmp_path / "other"
    monkeypatch.setenv("GPTFAST_CACHE_DIR", str(other))
    assert main(["cache", "load", str(tmp_path / "file")]) == 0
    assert files(other) == CONTENT
    # A library that others could write is not loaded (quantize/kernels/build.py).
    for path in (other, *other.rglob("*")):
        assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH), path
    assert main(["cache", "load", str(tmp_path / "file")]) == 0
    assert "Added 0 files" in capsys.readouterr().err


def test_loading_replaces_nothing(tmp_path: Path, folder: Path) -> None:
    assert main(["cache", "save", str(tmp_path / "file")]) == 0
    (folder / "graphs/xy.so").write_bytes(b"newer")
    (folder / "kernels/linear.so").unlink()
    assert main(["cache", "load", str(tmp_path / "file")]) == 0
    assert files(folder) == CONTENT | {"graphs/xy.so": b"newer"}


def test_info_and_clear(folder: Path, capsys: Capture) -> None:
    assert main(["cache", "info"]) == 0
    graphs, kernels = capsys.readouterr().out.splitlines()
    assert graphs == f"graphs: 2 files, 12 B, {folder / 'graphs'}"
    assert kernels == f"kernels: 1 files, 1 B, {folder / 'kernels'}"
    assert main(["cache", "clear"]) == 0
    assert "Removed 3 files, 13 B" in capsys.readouterr().err
    assert files(folder) == {}
    assert main(["cache", "info"]) == 0
    assert "graphs: 0 files" in capsys.readouterr().out


def test_an_empty_cache_is_not_saved(tmp_path: Path, capsys: Capture) -> None:
    assert main(["cache", "clear"]) == 0
    capsys.readouterr()
    assert "nothing in the cache yet" in refused(capsys, "save", tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_a_save_that_fails_leaves_no_file(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    before = {*tmp_path.iterdir()}

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device", "file")

    monkeypatch.setattr(tarfile.TarFile, "add", full)
    assert "No space left" in refused(capsys, "save", tmp_path / "file")
    assert {*tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"torch": "2.11.0"}, "made with torch 2.11.0, and here it is"),
        ({"python": "3.10.1"}, "made with python 3.10.1"),
        ({"machine": "riscv64"}, "made with machine riscv64"),
        ({"processor": ["avx2", "avx99"]}, "made with processor with avx99, and here it is"),
        ({"gpu": "NVIDIA Imaginary"}, "made with gpu NVIDIA Imaginary"),
    ],
)
def test_a_file_from_elsewhere_is_refused(
    tmp_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    changed: dict[str, Any],
    said: str,
) -> None:
    ours = cache.facts()
    with monkeypatch.context() as there:
        there.setattr(cache, "facts", lambda: ours | changed)
        assert main(["cache", "save", str(tmp_path / "file")]) == 0
    assert main(["cache", "clear"]) == 0
    capsys.readouterr()
    assert said in refused(capsys, "load", tmp_path / "file")
    assert files(folder) == {}


def test_a_broken_file_is_refused(tmp_path: Path, capsys: Capture) -> None:
    file = tmp_path / "file"
    assert main(["cache", "save", str(file)]) == 0
    capsys.readouterr()
    whole = file.read_bytes()
    for content in (b"", b"no archive", whole[: len(whole) // 2], whole[:40] + b"x" * 40):
        file.write_bytes(content)
        assert "not a complete file of gptfast cache save" in refused(capsys, "load", file)
    assert "No such file" in refused(capsys, "load", tmp_path / "absent")


@pytest.mark.parametrize("name", ["graphs/../../evil", "/evil", "others/file", "graphs"])
def test_nothing_is_put_elsewhere(tmp_path: Path, capsys: Capture, name: str) -> None:
    file = tmp_path / "file"
    write_tar(file, tarfile.TarInfo(name))
    assert "does not belong in a saved cache" in refused(capsys, "load", file)
    assert not (tmp_path / "evil").exists() and not Path("/evil").exists()


def test_links_are_not_followed(tmp_path: Path, folder: Path, capsys: Capture) -> None:
    link = tarfile.TarInfo("graphs/link")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    write_tar(tmp_path / "file", link)
    assert "does not belong in a saved cache" in refused(capsys, "load", tmp_path / "file")
    os.symlink("/etc/passwd", folder / "graphs" / "link")
    assert main(["cache", "save", str(tmp_path / "file")]) == 0
    with tarfile.open(tmp_path / "file") as tar:
        assert set(tar.getnames()) == {cache.FACTS, *CONTENT}


def write_tar(file: Path, entry: tarfile.TarInfo) -> None:
    page = json.dumps({"format": cache.FORMAT, **cache.facts()}).encode()
    first = tarfile.TarInfo(cache.FACTS)
    first.size = len(page)
    with tarfile.open(file, "w:gz") as tar:
        tar.addfile(first, io.BytesIO(page))
        tar.addfile(entry, io.BytesIO())


def test_a_tar_without_facts_is_refused(tmp_path: Path, capsys: Capture) -> None:
    with tarfile.open(tmp_path / "file", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("graphs/file"), io.BytesIO())
    assert "does not begin with facts" in refused(capsys, "load", tmp_path / "file")


def test_arguments(tmp_path: Path, capsys: Capture) -> None:
    assert "cache save needs a FILE" in refused(capsys, "save")
    assert "cache clear takes no FILE" in refused(capsys, "clear", tmp_path / "file")


def test_a_folder_that_others_can_write_is_refused(folder: Path, capsys: Capture) -> None:
    (folder / "graphs").chmod(0o777)
    assert "others can write it; GPTFAST_CACHE_DIR can name" in refused(capsys, "info")
