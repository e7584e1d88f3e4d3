"""`gptfast cache`: what compilers have made here, kept between processes: how much there is, in one
file for another machine, from such a file, and away with it.

A file is a tar of the folders of the cache behind a page of facts. What it holds is run by whoever
loads it, as with any program.
"""

import argparse
import gzip
import io
import json
import os
import platform
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from gptfast.commands.options import note
from gptfast.compiler import compiled_folder
from gptfast.device import format_bytes
from quantize.kernels.build import Unavailable, cache_folder, processor

FACTS = "gptfast-cache.json"
FORMAT = 1
# Instructions that compiled code may use, by the names of /proc/cpuinfo.
INSTRUCTIONS = ("avx", "avx2", "fma", "f16c", "bmi2", "avx512", "amx", "sve", "asimd", "vnni")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "GPTFAST_CACHE_DIR names another folder than ~/.cache/gptfast. A file fits the same "
        "PyTorch, Python and kind of processor and GPU. Load only files of people you trust: what "
        "is in them will be run."
    )
    parser.add_argument(
        "action",
        choices=["info", "save", "load", "clear"],
        help="show what there is; write it to FILE; add what FILE has; remove everything",
    )
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="for save and load")


def run(args: argparse.Namespace) -> int:
    takes_file = args.action in ("save", "load")
    if takes_file != (args.file is not None):
        needed = "needs a FILE" if takes_file else "takes no FILE"
        raise ValueError(f"gptfast cache {args.action} {needed}")
    try:
        folders = {"graphs": compiled_folder(), "kernels": cache_folder("kernels")}
    except Unavailable as error:
        raise ValueError(f"{error}; GPTFAST_CACHE_DIR can name another folder") from None
    if args.action == "info":
        print("\n".join(_lines(folders)))
    elif args.action == "save":
        note(f"Wrote {_many(save(folders, args.file))} to {args.file}")
    elif args.action == "load":
        note(f"Added {_many(load(folders, args.file))} of {args.file}")
    else:
        note(f"Removed {_many(clear(folders))}")
    return 0


def facts() -> dict[str, Any]:
    """What compiled code depends on, beside its sources."""
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": sorted(flag for flag in processor() if flag.startswith(INSTRUCTIONS)),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def save(folders: dict[str, Path], file: Path) -> list[int]:
    """Writes everything to a file, which appears when it is complete -> the sizes of what is in it.
    ValueError where there is nothing.
    """
    sizes = [path.stat().st_size for folder in folders.values() for path in _files(folder)]
    if not sizes:
        raise ValueError(
            "there is nothing in the cache yet; gptfast generate --compile fills it, for the model "
            "and the options that it is given"
        )
    page = json.dumps({"format": FORMAT, **facts()}).encode()
    with tempfile.NamedTemporaryFile(dir=file.absolute().parent, delete=False) as out:
        try:
            with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as tar:
                entry = tarfile.TarInfo(FACTS)
                entry.size = len(page)
                tar.addfile(entry, io.BytesIO(page))
                for kind, folder in folders.items():
                    for path in _files(folder):
                        tar.add(path, f"{kind}/{path.relative_to(folder).as_posix()}")
            os.replace(out.name, file)
        except BaseException:
            os.unlink(out.name)
            raise
    return sizes


def load(folders: dict[str, Path], file: Path) -> list[int]:
    """Adds what a file has and the cache has not -> its sizes. ValueError where the file is no such
    file, or was made where compiled code is another.
    """
    added = []
    try:
        with gzip.open(file) as whole:  # its checksum comes last, and tarfile does not look at it
            while whole.read(1 << 20):
                pass
        with tarfile.open(file) as tar:
            entries = iter(tar)
            _check_facts(file, tar, next(entries, None))
            for entry in entries:
                kind, *parts = PurePosixPath(entry.name).parts or ("",)
                if not entry.isfile() or kind not in folders or not parts or ".." in parts:
                    raise ValueError(f"{file}: {entry.name!r} does not belong in a saved cache")
                target = folders[kind].joinpath(*parts)
                if not target.exists():
                    _put(tar, entry, target)
                    added.append(entry.size)
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        reason = str(error).splitlines()[0].rstrip(":")
        raise ValueError(
            f"{file}: not a complete file of gptfast cache save ({reason}); make it again"
        ) from None
    return added


def clear(folders: dict[str, Path]) -> list[int]:
    """Removes everything, also what other versions of PyTorch or of the sources have left -> its
    sizes. What a process has loaded stays with it.
    """
    sizes = []
    for folder in folders.values():
        sizes += [path.stat().st_size for path in _files(folder)]
        shutil.rmtree(folder)
    return sizes


def _check_facts(file: Path, tar: tarfile.TarFile, first: tarfile.TarInfo | None) -> None:
    reader = None
    if first is not None and first.name == FACTS and first.isfile():
        reader = tar.extractfile(first)
    if reader is None:
        raise ValueError(f"{file}: not a file of gptfast cache save: it does not begin with facts")
    theirs, ours = json.load(reader), {"format": FORMAT, **facts()}
    if not isinstance(theirs, dict) or not isinstance(theirs.get("processor", []), list):
        raise ValueError(f"{file}: not a file of gptfast cache save: its facts are none")
    for key in ("format", *sorted(theirs.keys() | ours.keys())):
        if theirs.get(key) != ours.get(key):
            found, here = theirs.get(key), ours.get(key)
            if key == "processor":
                found, here = _difference(found or [], here or [])
            raise ValueError(
                f"{file} was made with {key} {found}, and here it is {here}: what was compiled "
                "there would not run here, or not be used"
            )


def _difference(theirs: list[str], ours: list[str]) -> tuple[str, str]:
    more, fewer = sorted(set(theirs) - set(ours)), sorted(set(ours) - set(theirs))
    return f"with {', '.join(more) or 'nothing more'}", f"with {', '.join(fewer) or 'nothing more'}"


def _put(tar: tarfile.TarFile, entry: tarfile.TarInfo, target: Path) -> None:
    """Under its name only when it is complete: other processes may be looking."""
    reader = tar.extractfile(entry)
    assert reader is not None
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as out:
        try:
            shutil.copyfileobj(reader, out)
            os.chmod(out.name, 0o700)
            os.replace(out.name, target)
        except BaseException:
            os.unlink(out.name)
            raise


def _files(folder: Path) -> Iterator[Path]:
    """What is worth keeping: no locks, no links."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink() and path.suffix != ".lock":
            yield path


def _lines(folders: dict[str, Path]) -> list[str]:
    lines = []
    for kind, folder in folders.items():
        lines.append(f"{kind}: {_many([path.stat().st_size for path in _files(folder)])}, {folder}")
    return lines


def _many(sizes: list[int]) -> str:
    return f"{len(sizes)} files, {format_bytes(sum(sizes))}"
