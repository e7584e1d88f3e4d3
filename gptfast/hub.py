"""From what a user calls a model to a folder on this machine: a bundled name, a folder, or a
Hugging Face id.
"""

import os
import re
from pathlib import Path

BUNDLED = {
    name: Path(__file__).parent / "storyteller" / name
    for name in ("storyteller", "storyteller-draft")
}
DEFAULT_MODEL = "storyteller"
NEEDED_FILES = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.jinja", "merges.txt"]
# Other formats and copies of the same weights live in subfolders and under these names.
UNNEEDED_FILES = ["*/*", "consolidated*"]


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
    return _download(str(model), revision)


def _download(model: str, revision: str | None) -> Path:
    # Only here: 0.3 s of every start that downloads nothing (measured).
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # The second base is that of all errors of the client's HTTP library (requests, httpx or httpx2,
    # by release), which raises its own when a connection breaks off.
    network_errors: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
    try:
        path = snapshot_download(
            model,
            revision=revision,
            allow_patterns=NEEDED_FILES,
            ignore_patterns=UNNEEDED_FILES,
        )
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
    except network_errors as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"no model {model!r}: there is no such folder, it is not in the local cache, and the "
            f"hub could not be reached ({reason[:160]})"
        ) from None
    return Path(path)
