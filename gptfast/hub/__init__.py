"""From what a user calls a model to a folder on this machine: a bundled name, a folder, or a
Hugging Face id, whose files are downloaded where they are not in the cache (files.py).
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

from gptfast.hub.files import Download, Unlisted, explained, fetch, from_cache

__all__ = ["BUNDLED", "DEFAULT_MODEL", "Download", "download", "find_model"]

BUNDLED = {
    name: Path(__file__).parents[1] / "storyteller" / name
    for name in ("storyteller", "storyteller-draft")
}
DEFAULT_MODEL = "storyteller"


def find_model(model: str | Path, revision: str | None = None) -> Path:
    """The folder of `model`, downloaded first where it is a hub id (only the files needed; the
    cache is honoured).
    """
    if str(model) in BUNDLED:
        return BUNDLED[str(model)]
    # os.path: pathlib raises where a name is too long, or "~nobody" is not there.
    folder = Path(os.path.expanduser(model))
    if os.path.isdir(folder):
        return folder
    if os.path.exists(folder):
        raise ValueError(f"{folder} is a file; a model is a folder with a config.json, or a hub id")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(model)):
        raise ValueError(
            f"no model at {str(model)!r}: there is no such folder, and a hub id is owner/name"
        )
    with explained(str(model), revision):
        try:
            return fetch(str(model), revision, None, _silent).folder
        except Unlisted as unlisted:
            return from_cache(str(model), revision, unlisted)


def download(
    model: str,
    revision: str | None = None,
    out: Path | None = None,
    note: Callable[[str], None] | None = None,
) -> Download:
    """Downloads the files of a hub id that are needed here, into the cache or the folder `out`.

    What was there already, whole or in part, is not fetched again. `note` hears a line about what
    is done. ValueError, in one line, for whatever comes in between.
    """
    if model in BUNDLED:
        raise ValueError(f"{model} is bundled with gptfast: there is nothing to download")
    if out is not None and out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; --out is the folder to download into")
    with explained(model, revision):
        try:
            return fetch(model, revision, out, note or _silent)
        except Unlisted as unlisted:
            raise unlisted.error from None


def _silent(line: str) -> None:
    pass
