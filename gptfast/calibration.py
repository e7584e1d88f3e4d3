"""Calibration text: what a quantizer shows a model, as sequences of token ids.

Documents follow each other as in training: each with the beginning that the tokenizer gives it, an
end-of-sequence token behind it, the whole cut into sequences of one length. Knows files and a
tokenizer; knows no model.
"""

import sys
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from gptfast.tokenizer import Tokenizer

# Ends a document inside of a file, on a line of its own or not.
SEPARATOR = "<|endoftext|>"
STDIN = "-"
SUFFIXES = (".txt", ".md")
# The storyteller's own language, composed for this: see storyteller/README.md.
BUNDLED_TEXT = Path(__file__).parent / "storyteller" / "stories.txt"
DEFAULT_NUM_SAMPLES, DEFAULT_SEQ_LEN = 128, 512
# How much of a long document is encoded at first: languages have 1 to 5 characters a token.
CHARACTERS_PER_TOKEN = 6


def read_documents(source: str | Path | None) -> Iterator[str]:
    """The documents of a text file, of the text files in a folder (all below it, in turn), or of
    stdin ("-"); None: the bundled stories. `<|endoftext|>` ends a document.

    ValueError for what is not there or no text.
    """
    if source is not None and str(source) == STDIN:
        yield from _split(_decoded(sys.stdin.buffer.read(), "stdin"))
        return
    files = _text_files(BUNDLED_TEXT if source is None else Path(source))
    # In turn, so that the first file is not all that is read.
    waiting = deque(_split_file(path) for path in files)
    while waiting:
        documents = waiting.popleft()
        if (document := next(documents, None)) is not None:
            yield document
            waiting.append(documents)


def _text_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"calibration text {path} is not there; give a text file, a folder or -")
    found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    if not found:
        raise ValueError(f"{path} holds no calibration text: no {' or '.join(SUFFIXES)} files")
    return found


def _split_file(path: Path) -> Iterator[str]:
    yield from _split(_decoded(path.read_bytes(), str(path)))


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is no text: {error}; UTF-8 is needed") from None


def _split(text: str) -> Iterator[str]:
    for part in text.split(SEPARATOR):
        if document := part.strip():
            yield document


def calibration_ids(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    num_samples: int = DEFAULT_NUM_SAMPLES,
    seq_len: int = DEFAULT_SEQ_LEN,
) -> Tensor:
    """The first `num_samples` sequences [S, T] of the documents; ValueError says how many tokens
    were found where they are too few.
    """
    for name, value in (("samples", num_samples), ("tokens in a sample", seq_len)):
        if value < 1:
            raise ValueError(f"{value} {name} cannot calibrate anything; at least 1 is needed")
    needed = num_samples * seq_len
    ids: list[int] = []
    for document in documents:
        ids += _encoded(document, tokenizer, needed - len(ids))
        if len(ids) >= needed:
            return torch.tensor(ids[:needed]).view(num_samples, seq_len)
    raise ValueError(
        f"the calibration text has {len(ids)} tokens, and {num_samples} samples of {seq_len} need "
        f"{needed}; give more text, or fewer or shorter samples"
    )


def _encoded(document: str, tokenizer: Tokenizer, needed: int) -> list[int]:
    """A document between its marks, or the first `needed` ids of it and some more."""
    size = CHARACTERS_PER_TOKEN * needed
    while len(document) > size:
        if len(ids := tokenizer.encode(document[:size])) >= needed:
            return ids
        size *= 4
    ids, end = tokenizer.encode(document), tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]
