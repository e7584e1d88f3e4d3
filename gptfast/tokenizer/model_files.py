"""`.model` and `.tiktoken` files: sentencepiece's protobuf, or tiktoken's lines of token and rank.

The bytes tell which of the two a file is.
"""

import base64
import re
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path

import sentencepiece
import tiktoken

from gptfast.tokenizer.vocabulary import (
    SPLIT,
    AddedToken,
    Declared,
    Vocabulary,
    assemble,
    read_bytes,
)


@dataclass(frozen=True)
class RanksUse:
    """What a tiktoken file does not say: how text is split and composed (NFC), and which control
    tokens follow the `size` ranks of the published file."""

    split: str
    size: int
    control: tuple[str, ...]
    bos: str | None
    eos: str
    composes: bool = False


def _llama3_control() -> tuple[str, ...]:
    """Llama 3's 256 control tokens; Meta's own folders name them nowhere."""
    names = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id"}
    names[9] = "eot_id"
    others = iter(range(256))
    contents = [names.get(i) or f"reserved_special_token_{next(others)}" for i in range(256)]
    return tuple(f"<|{name}|>" for name in contents)


LLAMA3 = RanksUse(
    split=SPLIT.replace("DIGITS", r"\p{N}{1,3}"),
    size=128_000,
    control=_llama3_control(),
    bos="<|begin_of_text|>",
    eos="<|end_of_text|>",
)
QWEN = RanksUse(
    split=SPLIT.replace("DIGITS", r"\p{N}"),
    size=151_643,
    control=(
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        *(f"<|extra_{i}|>" for i in range(205)),
    ),
    bos=None,
    eos="<|endoftext|>",
    composes=True,
)
# By tokenizer_class. Meta's own folders name none.
RANKS_USES: dict[str | None, RanksUse] = {
    **dict.fromkeys((None, "PreTrainedTokenizer", "TokenizersBackend", "LlamaTokenizer"), LLAMA3),
    "QWenTokenizer": QWEN,
}
# Joined protobuf messages merge: this is ModelProto{normalizer_spec{add_dummy_prefix: false}}.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


def find_model_file(folder: Path) -> Path | None:
    """The file of sentencepiece or tiktoken (Mistral's also end in `.model.v3`, Qwen's in
    `.tiktoken`); of several, tokenizer.model."""
    endings = ("*.model", "*.model.v[0-9]*", "*.tiktoken")
    paths = sorted({path for ending in endings for path in folder.glob(ending)})
    if len(paths) < 2:
        return paths[0] if paths else None
    if folder / "tokenizer.model" in paths:
        return folder / "tokenizer.model"
    names = ", ".join(path.name for path in paths)
    raise ValueError(
        f"{folder}: several tokenizer files ({names}); keep one, or name one tokenizer.model"
    )


def read_model_file(path: Path, declared: Declared) -> Vocabulary:
    data = read_bytes(path)
    if data[:1] == b"\n":  # tag and wire type of ModelProto.pieces
        return _read_sentencepiece(path, data, declared)
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\s", data):
        return _read_tiktoken(path, data, declared)
    raise ValueError(
        f"{path}: neither a sentencepiece model nor a tiktoken file; download it again"
    )


def _read_sentencepiece(path: Path, data: bytes, declared: Declared) -> Vocabulary:
    try:
        pieces = SentencePieces(data, declared)
    except RuntimeError as error:
        raise ValueError(
            f"{path}: no readable sentencepiece model ({error}); download it again"
        ) from error
    model = pieces.model
    special_ids = [
        i for i in range(pieces.num_learned) if model.is_control(i) or model.is_unknown(i)
    ]
    bos_id, eos_id = model.bos_id(), model.eos_id()
    return assemble(
        pieces,
        declared,
        [AddedToken(model.id_to_piece(i), i) for i in special_ids],
        names=(
            model.id_to_piece(bos_id) if bos_id >= 0 else None,
            model.id_to_piece(eos_id) if eos_id >= 0 else None,
        ),
        adds_bos=True,
    )


class SentencePieces:
    """Pieces of a sentencepiece model, read with and without the space before the first word.

    With `legacy` in tokenizer_config.json each text between control tokens gets that space, as old
    Llama models were tuned; otherwise only a text that begins the prompt does.
    """

    def __init__(self, data: bytes, declared: Declared) -> None:
        self.model = sentencepiece.SentencePieceProcessor(model_proto=data)
        self._inner = sentencepiece.SentencePieceProcessor(model_proto=data + NO_DUMMY_PREFIX)
        self.num_learned = self.model.get_piece_size()
        self.unknown_id: int | None = self.model.unk_id()
        self._legacy = declared.config.get("legacy") is True
        self._spaced = declared.config.get("add_prefix_space") is not False
        begins = "".join(self.model.encode_as_pieces("a"))
        self.drops_space = self._spaced and begins.startswith("▁")
        self._added = {token.id: token.content.encode() for token in declared.tokens}

    def encode(self, text: str, at_start: bool) -> list[int]:
        spaced = self._spaced and (at_start or self._legacy)
        return (self.model if spaced else self._inner).encode_as_ids(text)

    def token_bytes(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.num_learned:
            return self._added.get(token_id, b"")
        piece = self.model.id_to_piece(token_id)
        if self.model.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()

    def token_id(self, content: str) -> int | None:
        found = self.model.piece_to_id(content)
        return found if self.model.id_to_piece(found) == content else None


def _read_tiktoken(path: Path, data: bytes, declared: Declared) -> Vocabulary:
    use = RANKS_USES.get(declared.tokenizer_class)
    if use is None:
        raise ValueError(
            f"{path}: a tiktoken file does not say how text is split, and tokenizer_class "
            f"{declared.tokenizer_class} is not Llama 3's or Qwen's; add the model's tokenizer.json"
        )
    ranks = _read_ranks(path, data)
    if not declared.tokens and len(ranks) == use.size:
        own = [AddedToken(name, use.size + i) for i, name in enumerate(use.control)]
        declared = replace(declared, tokens=tuple(own))
    pieces = TiktokenPieces(ranks, declared, use)
    names = (use.bos, use.eos)
    return assemble(pieces, declared, (), names=names, adds_bos=use.bos is not None)


def _read_ranks(path: Path, data: bytes) -> dict[bytes, int]:
    """Each line is a token in base64 and its rank, which is its id."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ValueError(
                f"{path}: line {number} is no token and rank ({line[:40]!r}); download it again"
            ) from error
    missing = sum(bytes([byte]) not in ranks for byte in range(256))
    if missing or sorted(ranks.values()) != list(range(number)):
        what = f"{missing} of 256 single bytes are missing" if missing else "ranks repeat or skip"
        raise ValueError(f"{path}: {what}; the file is damaged, download it again")
    return ranks


class TiktokenPieces:
    """Pieces of a tiktoken file."""

    drops_space = False
    unknown_id: int | None = None

    def __init__(self, ranks: dict[bytes, int], declared: Declared, use: RanksUse) -> None:
        self.num_learned = len(ranks)
        self._composes = use.composes
        self._ranks = ranks
        self._bytes = {rank: token for token, rank in ranks.items()}
        self._bytes |= {token.id: token.content.encode() for token in declared.tokens}
        self._encoding = tiktoken.Encoding(
            "file", pat_str=use.split, mergeable_ranks=ranks, special_tokens={}
        )

    def encode(self, text: str, at_start: bool) -> list[int]:
        text = unicodedata.normalize("NFC", text) if self._composes else text
        return self._encoding.encode_ordinary(text)

    def token_bytes(self, token_id: int) -> bytes:
        return self._bytes.get(token_id, b"")

    def token_id(self, content: str) -> int | None:
        return self._ranks.get(content.encode())
