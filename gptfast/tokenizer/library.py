"""tokenizer.json, and GPT-2's pair vocab.json + merges.txt: what the library `tokenizers` encodes.

Decoding is done here, token by token: the library decodes whole texts, a stream needs bytes.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from gptfast.tokenizer.vocabulary import (
    SPLIT,
    AddedToken,
    Declared,
    Vocabulary,
    assemble,
    looks_like_markup,
    read_bytes,
    read_json,
)

# The tokenizer_class of a folder with vocab.json + merges.txt tells the split pattern (None:
# GPT-2's, which the library knows) and whether text is composed first (NFC).
BYTE_LEVEL_CLASSES: dict[str | None, tuple[str | None, bool]] = {
    None: (None, False),
    "GPT2Tokenizer": (None, False),
    "CodeGenTokenizer": (None, False),
    "GPTNeoXTokenizer": (None, True),
    "Qwen2Tokenizer": (SPLIT.replace("DIGITS", r"\p{N}"), True),
}
# GPT-2's only control token, and its heirs' BOS and EOS; their configs often name none at all.
DOCUMENT_END = "<|endoftext|>"
# An added token of our own, two noncharacters: the library encodes what follows it as text in the
# middle of a prompt, without the space that some put before the first word.
ANCHOR = "\U0010fffe\U0010ffff"


def read_tokenizer_json(path: Path, declared: Declared) -> Vocabulary:
    data = read_bytes(path)
    try:
        library = tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{path}: no readable tokenizer ({error}); download it again") from error
    return _from_library(path, library, declared)


def read_vocab_and_merges(folder: Path, declared: Declared) -> Vocabulary:
    name = declared.tokenizer_class
    if name not in BYTE_LEVEL_CLASSES:
        known = ", ".join(known for known in BYTE_LEVEL_CLASSES if known)
        raise ValueError(
            f"{folder}: vocab.json and merges.txt do not say how text is split, and "
            f"tokenizer_class {name} is not known ({known} are); add the model's tokenizer.json"
        )
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    read_json(vocab)
    read_bytes(merges)
    try:
        library = tokenizers.Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"{merges} does not fit {vocab.name} ({error}); download both again"
        ) from error
    pattern, composes = BYTE_LEVEL_CLASSES[name]
    spaced = bool(declared.config.get("add_prefix_space", False))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=spaced, use_regex=pattern is None)
    split = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")] if pattern else []
    library.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    library.decoder = decoders.ByteLevel()
    if composes:
        library.normalizer = normalizers.NFC()
    return _from_library(vocab, library, declared)


def _from_library(path: Path, library: tokenizers.Tokenizer, declared: Declared) -> Vocabulary:
    library.no_truncation()  # some files carry the limits of their training script
    library.no_padding()
    _add_declared(path, library, declared)
    own = [
        AddedToken(token.content, token_id, token.special, token.lstrip, token.rstrip)
        for token_id, token in library.get_added_tokens_decoder().items()
    ]
    vocabulary = assemble(
        LibraryPieces(path, library),
        declared,
        own,
        names=(DOCUMENT_END, DOCUMENT_END),
        adds_bos=False,
        around=_template_around(library),
    )
    # What the library calls special is from here on text to it: Tokenizer cuts the real ones out.
    library.add_special_tokens(
        [tokenizers.AddedToken(token.content, normalized=False) for token in vocabulary.control]
    )
    library.encode_special_tokens = True
    library.add_tokens([tokenizers.AddedToken(ANCHOR, normalized=False)])
    anchor_id = library.token_to_id(ANCHOR)
    assert anchor_id is not None
    guarded = (*vocabulary.guarded, AddedToken(ANCHOR, anchor_id))
    return replace(vocabulary, words=(), guarded=guarded)  # the library finds added words itself


def _add_declared(path: Path, library: tokenizers.Tokenizer, declared: Declared) -> None:
    for token in declared.tokens:
        if library.token_to_id(token.content) is not None:
            continue
        library.add_tokens(
            [
                tokenizers.AddedToken(
                    token.content,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=False,
                    special=token.special,
                )
            ]
        )
        found = library.token_to_id(token.content)
        if found != token.id:
            raise ValueError(
                f"{path.parent}: the files beside {path.name} give {token.content!r} the id "
                f"{token.id}, but the next free id is {found}; they belong to different models"
            )


def _template_around(library: tokenizers.Tokenizer) -> tuple[list[int], list[int]] | None:
    """What the post-processor puts before and behind a text, None where it has no say about that.

    A template wins over add_bos_token, as in transformers 5; without one add_bos_token decides.
    """
    processor = library.post_processor
    if processor is None or b'Processing"' not in processor.__getstate__():
        return None
    inner = library.encode("a", add_special_tokens=False).ids
    ids = library.encode("a").ids
    for start in range(len(ids) - len(inner) + 1):
        if ids[start : start + len(inner)] == inner:
            return ids[:start], ids[start + len(inner) :]
    return None


class LibraryPieces:
    """Pieces of a `tokenizers` tokenizer."""

    def __init__(self, path: Path, library: tokenizers.Tokenizer) -> None:
        self.num_learned = library.get_vocab_size(with_added_tokens=False)
        unknown = getattr(library.model, "unk_token", None)
        self.unknown_id = library.token_to_id(unknown) if unknown else None
        self.drops_space = False
        self._library = library
        self._added = {i: t.content for i, t in library.get_added_tokens_decoder().items()}
        self._byte_level = self._byte_fallback = False
        self._replacements: list[tuple[str, str]] = []
        self._before = ""
        self._byte_of = _byte_alphabet()
        if library.decoder is None:  # such tokens are words, joined by spaces
            self._before, self.drops_space = " ", True
        else:
            self._read_decoder(path, json.loads(library.decoder.__getstate__()))

    def _read_decoder(self, path: Path, step: dict[str, Any]) -> None:
        match step:
            case {"type": "Sequence", "decoders": list(steps)}:
                for inner in steps:
                    self._read_decoder(path, inner)
            case {"type": "ByteLevel"}:
                self._byte_level = True
            case {"type": "ByteFallback"}:
                self._byte_fallback = True
            case {"type": "Fuse"}:
                pass
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                self._replacements.append((old, new))
            case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0}:
                self.drops_space = start == 1
            case {"type": "Metaspace", "replacement": str(mark), **options}:
                self._replacements.append((mark, " "))
                self.drops_space = options.get("prepend_scheme", "always") != "never"
            case _:
                raise ValueError(
                    f"{path}: decoder {json.dumps(step)} is not supported; ByteLevel, "
                    "ByteFallback, Fuse, Metaspace, Replace of a string and Strip of one leading "
                    "space are"
                )

    def encode(self, text: str, at_start: bool) -> list[int]:
        if at_start:
            return self._library.encode(text, add_special_tokens=False).ids
        return self._library.encode(ANCHOR + text, add_special_tokens=False).ids[1:]

    def token_bytes(self, token_id: int) -> bytes:
        added = self._added.get(token_id)
        if added is not None and (self._byte_level or looks_like_markup(added)):
            return (self._before + added).encode()
        token = self._library.id_to_token(token_id) if token_id >= 0 else None
        if token is None or token == ANCHOR:
            return b""
        if self._byte_level:
            return b"".join(self._byte_of.get(char) or char.encode() for char in token)
        if self._byte_fallback and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        for old, new in self._replacements:
            token = token.replace(old, new)
        return (self._before + token).encode()

    def token_id(self, content: str) -> int | None:
        return self._library.token_to_id(content)


def _byte_alphabet() -> dict[str, bytes]:
    """The byte behind each of GPT-2's printable characters: itself, or the next from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return {chr(byte if byte in printable else next(others)): bytes([byte]) for byte in range(256)}
