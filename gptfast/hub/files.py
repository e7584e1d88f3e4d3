"""Downloads a model from the Hugging Face hub: only the files that are read here, into the hub
client's cache or a folder.

Large files are fetched here, so that one that broke off goes on where it stopped: the client starts
such files anew. All else, and the layout of the cache, is the client's.
"""

import errno
import glob
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

from gptfast.device import format_bytes

NEEDED_FILES = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.jinja", "merges.txt"]
NEEDED_FILES += ["*.model.v[0-9]*"]  # Mistral's tokenizers
NEEDED_FOLDER = "additional_chat_templates"
# Other formats and copies of the same weights live in subfolders and under these names.
UNNEEDED_FILES = ["*/*", "consolidated*"]
NUM_AT_ONCE = 4
MAX_RESUMABLE = 50_000_000_000  # bytes; the hub serves larger files by its own protocol only


@dataclass(frozen=True)
class Download:
    """Where a model's files lie; `files` and `skipped` are their sizes in bytes by name."""

    folder: Path
    files: dict[str, int]
    skipped: dict[str, int]


def fetch(
    model: str, revision: str | None, out: Path | None, note: Callable[[str], None]
) -> Download:
    """The files of a hub id that are needed here, in the cache or the folder `out`; `note` hears a
    line about the others. Unlisted where the hub cannot be asked. Wants `explained` around it.
    """
    # Only here: 0.3 s of every start that downloads nothing (measured).
    from huggingface_hub import snapshot_download

    commit, siblings = _list_files(model, revision)
    files = {file.rfilename: file.size or 0 for file in siblings if _is_needed(file.rfilename)}
    skipped = {file.rfilename: file.size or 0 for file in siblings if file.rfilename not in files}
    if skipped:
        note(_skipped_line(skipped))
    if not any(name.endswith(".safetensors") for name in files):
        raise ValueError(
            f"hub model {model!r} has no .safetensors files, and other formats of weights are not "
            "downloaded; look for a conversion of it, or a revision refs/pr/N that holds one"
        )
    place = _Place(model, commit, out)
    missing = [file for file in siblings if file.rfilename in files and not place.has(file)]
    _check_space(sum((file.size or 0) - place.num_arrived(file) for file in missing), place.root)
    try:
        _fetch_all(model, commit, place, [file for file in missing if _is_resumable(file)])
        folder = snapshot_download(
            model,
            # With a folder of its own nothing need be remembered under the name of the revision.
            revision=revision if out is None else commit,
            allow_patterns=[glob.escape(name) for name in files],
            local_dir=out,
        )
    except _network_errors() as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ValueError(
                f"no space is left in {place.root} while downloading {model!r}; make some and run "
                "the same again, it goes on where it stopped"
            ) from None
        if _is_a_file_here(error) or _is_the_hubs(error):
            raise
        raise _BrokeOff(error) from None
    return Download(Path(folder), files, skipped)


def _list_files(model: str, revision: str | None) -> tuple[str, list[Any]]:
    """The commit that a revision is now, and its files with their sizes."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RevisionNotFoundError

    try:
        info = HfApi().model_info(model, revision=revision, files_metadata=True)
    except (RevisionNotFoundError, HFValidationError):
        raise
    except _network_errors() as error:
        raise Unlisted(error) from None
    if info.sha is None or info.siblings is None:
        raise ValueError(f"hub model {model!r}: the hub does not say which files it has")
    return info.sha, info.siblings


def from_cache(model: str, revision: str | None, unlisted: "Unlisted") -> Path:
    """What an earlier download left, where the hub cannot be asked."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    try:
        path = snapshot_download(
            model,
            revision=revision,
            allow_patterns=NEEDED_FILES,
            ignore_patterns=UNNEEDED_FILES,
            local_files_only=True,
        )
    except IncompleteSnapshotError:
        raise ValueError(
            f"hub model {model!r} is only in part in the local cache, and the hub could not be "
            f"reached for the rest ({_reason(unlisted.error)})"
        ) from None
    except LocalEntryNotFoundError:
        raise unlisted.error from None
    return Path(path)


# -- which files --


def _is_needed(name: str) -> bool:
    folder, _, file = name.rpartition("/")
    if folder == NEEDED_FOLDER:
        return file.endswith(".jinja")
    return _matches(name, NEEDED_FILES) and not _matches(name, UNNEEDED_FILES)


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _skipped_line(skipped: dict[str, int]) -> str:
    largest = sorted(skipped, key=lambda name: -skipped[name])
    named = ", ".join(f"{name} {format_bytes(skipped[name])}" for name in largest[:8])
    more = f" and {len(largest) - 8} smaller" if len(largest) > 8 else ""
    total = format_bytes(sum(skipped.values()))
    return f"Skipped, not needed: {named}{more} ({total} in all)"


def _is_resumable(file: Any) -> bool:
    return file.lfs is not None and file.lfs.size <= MAX_RESUMABLE


# -- where they go --


class _Place:
    """The cache, or a folder: where finished and unfinished files of one commit lie."""

    def __init__(self, model: str, commit: str, out: Path | None) -> None:
        from huggingface_hub import constants, try_to_load_from_cache
        from huggingface_hub.file_download import repo_folder_name

        self._out = out
        cache = Path(constants.HF_HUB_CACHE).expanduser()
        blobs = cache / repo_folder_name(repo_id=model, repo_type="model") / "blobs"
        self._blobs = blobs if out is None else out / ".cache" / "huggingface" / "download"
        self._cached = lambda name: try_to_load_from_cache(model, name, revision=commit)
        self.root = cache if out is None else out

    def has(self, file: Any) -> bool:
        if self._out is not None:
            target = self._out / file.rfilename
            if target.is_file():
                return target.stat().st_size == file.size
        return isinstance(self._cached(file.rfilename), str)

    def target(self, file: Any) -> Path:
        """The cache names a blob by its hash; the client links names to it, and finds files in a
        folder of the user's."""
        return self._blobs / file.lfs.sha256 if self._out is None else self._out / file.rfilename

    def part(self, file: Any) -> Path:
        return self._blobs / f"{file.lfs.sha256}.part.incomplete"

    def num_arrived(self, file: Any) -> int:
        if not _is_resumable(file):
            return 0
        if self._out is None and self.target(file).is_file():
            return file.size or 0
        part = self.part(file)
        return part.stat().st_size if part.is_file() else 0


def _check_space(num_bytes: int, root: Path) -> None:
    folder = root.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ValueError(
            f"{format_bytes(num_bytes)} are to be downloaded to {root}, where "
            f"{format_bytes(free)} are free; make space, or choose another folder (--out, HF_HOME)"
        )


# -- large files --


def _fetch_all(model: str, commit: str, place: _Place, files: list[Any]) -> None:
    """Several at once; the first failure ends them all."""
    stop = threading.Event()
    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        try:
            jobs = [pool.submit(_fetch, model, commit, place, file, stop) for file in files]
            for job in as_completed(jobs):
                job.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _fetch(model: str, commit: str, place: _Place, file: Any, stop: threading.Event) -> None:
    from filelock import FileLock
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    target, part, size = place.target(file), place.part(file), file.lfs.size
    part.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{part}.lock"):  # two processes would append to the same file
        if target.is_file() and target.stat().st_size == size:
            return
        num_arrived = place.num_arrived(file)
        if num_arrived > size:
            part.unlink()
            num_arrived = 0
        with part.open("ab") as destination:
            http_get(
                hf_hub_url(model, file.rfilename, revision=commit),
                _Stoppable(destination, stop),  # type: ignore[arg-type]
                resume_size=num_arrived,
                headers=build_hf_headers(),
                expected_size=size,
                displayed_filename=file.rfilename,
            )
        if num_arrived and _sha256(part) != file.lfs.sha256:
            part.unlink()
            raise ValueError(
                f"{file.rfilename} of {model!r} arrived damaged and was deleted; run the same again"
            )
        os.replace(part, target)
    Path(f"{part}.lock").unlink(missing_ok=True)


class _Stoppable:
    """A file that takes no more once `stop` is set: so a download ends, in whichever thread."""

    def __init__(self, file: BinaryIO, stop: threading.Event) -> None:
        self._file, self._stop = file, stop

    def write(self, data: bytes) -> int:
        if self._stop.is_set():
            raise InterruptedError("another file failed")
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- what can go wrong --


class Unlisted(Exception):
    """The hub could not be asked for a model's files; `error` is why."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class _BrokeOff(Exception):
    def __init__(self, error: Exception) -> None:
        self.error = error


def _network_errors() -> tuple[type[Exception], ...]:
    """OSError, and the base of all errors of the client's HTTP library (requests, httpx or httpx2,
    by release), which raises its own when a connection breaks off."""
    from huggingface_hub.errors import HfHubHTTPError

    return OSError, *HfHubHTTPError.__bases__


def _is_a_file_here(error: Exception) -> bool:
    return isinstance(error, OSError) and error.filename is not None


def _is_the_hubs(error: Exception) -> bool:
    """An answer that explained has words for: no such model, say, or a licence to accept."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    return isinstance(error, RepositoryNotFoundError | RevisionNotFoundError)


@contextmanager
def explained(model: str, revision: str | None) -> Iterator[None]:
    """Turns what the client raises into one line: what was found, and what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError:
        raise ValueError(
            f"hub model {model!r} is gated: accept its licence on its page, then `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise ValueError(
            f"no model {model!r}: there is no such folder, and the hub has no such id (or hides it)"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"hub model {model!r} has no revision {revision!r}") from None
    except HFValidationError as error:
        raise ValueError(f"no model {model!r}: there is no such folder, and {error}") from None
    except _BrokeOff as broke_off:
        raise ValueError(
            f"the download of {model!r} broke off ({_reason(broke_off.error)}); run the same "
            "again, it goes on where it stopped"
        ) from None
    except _network_errors() as error:
        if _is_a_file_here(error):
            raise
        raise ValueError(
            f"no model {model!r}: there is no such folder, it is not in the local cache, and the "
            f"hub could not be reached ({_reason(error)})"
        ) from None


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
