"""A folder of a checkpoint that appears under its name when it is complete, and not at all where
something goes wrong; and what may stand in such a folder.
"""

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from gptfast.device import format_bytes
from gptfast.tensor_files import some

# What stands beside the weights and belongs to the model.
COMPANIONS = (
    "generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json "
    "added_tokens.json vocab.json merges.txt chat_template.json *.model *.model.v[0-9]* *.tiktoken "
    "*.jinja LICENSE* NOTICE* USE_POLICY*"
).split()
COMPANIONS_FOLDER = "additional_chat_templates"


def companions(source: Path) -> list[Path]:
    """Files of tokenizer, templates and licence. Beside a single file only a tokenizer is taken for
    its own, and nothing where other weights stand there too.
    """
    folder = source
    if source.is_file():
        folder, kinds = source.parent, ("*.bin", "*.pt", "*.pth", "*.safetensors")
        others = {p for kind in kinds for p in folder.glob(kind)} - {folder / "tokenizer.bin"}
        own = [folder / name for name in ("tokenizer.json", "tokenizer.model", "vocab.json")]
        own += [folder / name for name in ("merges.txt", "tokenizer_config.json")]
        return [path for path in own if path.is_file()] if others == {source} else []
    found = [p for p in folder.iterdir() if any(fnmatchcase(p.name, c) for c in COMPANIONS)]
    found += (folder / COMPANIONS_FOLDER).glob("*.jinja")
    return sorted(path for path in found if path.is_file())


def check_places(source: Path, out: Path, adapters: Sequence[Path], replaces: bool) -> None:
    there = out.absolute().parent.resolve() / out.name
    place = source.resolve()
    if there == place or (place.is_dir() and there.is_relative_to(place)):
        raise ValueError(f"{out} is {source} or inside of it; convert into another folder")
    if not out.exists() and not out.is_symlink():
        return
    if out.is_dir() and not out.is_symlink() and not any(out.iterdir()):
        return
    if not replaces:
        raise ValueError(f"{out} exists; give another folder, or --force to replace a checkpoint")
    if out.is_symlink() or not _holds_checkpoint(out):
        raise ValueError(f"{out} exists and is no folder with a checkpoint; it is not replaced")
    for used in (source, *adapters):
        parts = used.iterdir() if used.is_dir() else ()  # links may point anywhere
        if any(part.resolve().is_relative_to(there) for part in (used, *parts)):
            raise ValueError(f"{used} is inside of {out}, which would be replaced")
    if strangers := sorted(path.name for path in out.iterdir() if not _belongs(path)):
        raise ValueError(
            f"{out} holds more than a checkpoint, which would be lost: {some(strangers)}; move it "
            "away, or convert into another folder"
        )


def _belongs(path: Path) -> bool:
    """Whether a file or folder may stand in the folder of a checkpoint."""
    if path.is_dir():
        return path.name in (COMPANIONS_FOLDER, ".cache")
    kinds = ("*.json", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.md", ".git*", *COMPANIONS)
    return any(fnmatchcase(path.name, kind) for kind in kinds)


def _holds_checkpoint(folder: Path) -> bool:
    weights = ("*.safetensors", "*.bin", "*.pth", "*.pt")
    return (folder / "config.json").is_file() and any(any(folder.glob(w)) for w in weights)


def check_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ValueError(
            f"the new checkpoint needs {format_bytes(num_bytes)}, and {format_bytes(free)} are "
            f"free in {folder}; nothing was written"
        )


@contextmanager
def new_folder(out: Path, replaces: bool) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when all has gone well, and disappears otherwise."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{out.parent} cannot be made ({error.strerror})") from None
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    replaced = partial / "replaced"
    try:
        folder = partial / out.name
        folder.mkdir()  # mkdtemp's own is for its owner only
        yield folder
        for path in (*folder.rglob("*"), folder):
            _sync(path)
        if replaces and out.exists():
            out.rename(replaced)
        folder.rename(out)
        _sync(out.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise ValueError(
                f"{error.strerror} in {out.parent}; make space and convert again ({out} is as it "
                "was)"
            ) from None
        raise
    finally:
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
