"""What tokenizer files say, in one shape for every format: a Vocabulary.

Owns which tokens are control tokens and what stands around a text by default. Knows no format:
library.py and model_files.py bring the learned pieces.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

# How GPT-4's kin cut a text before the merges; they differ in how many digits may stay together.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SINGLE_NAMES = "bos_token eos_token unk_token pad_token sep_token cls_token mask_token".split()
LISTS_OF_NAMES = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class AddedToken:
    """A token beside the learned pieces. special: decoding drops it; strips: eats white space."""

    content: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False


class Pieces(Protocol):
    """The learned part of a tokenizer: ids below num_learned."""

    num_learned: int
    unknown_id: int | None
    drops_space: bool  # decoding drops one leading space: encode put it before the first word

    def encode(self, text: str, at_start: bool) -> list[int]:
        """Ids of text in which nothing is a control token; at_start: nothing stands before it."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, added ones too; b"" for an id without one."""

    def token_id(self, content: str) -> int | None:
        """The id of the piece that is written so."""


@dataclass(frozen=True)
class Vocabulary:
    """All that a tokenizer's files say."""

    pieces: Pieces
    vocab_size: int
    control: tuple[AddedToken, ...]  # text where a user writes them, ids where a template does
    words: tuple[AddedToken, ...]  # added tokens that are text, unless pieces.encode finds them
    guarded: tuple[AddedToken, ...]  # must never come out of pieces.encode
    bos: AddedToken | None
    eos: AddedToken | None
    special_tokens: dict[str, str]  # bos_token, eos_token, ... as templates call them
    prefix: tuple[int, ...]  # what the files put before and behind a text by default
    suffix: tuple[int, ...]


@dataclass(frozen=True)
class Declared:
    """What tokenizer_config.json, special_tokens_map.json and added_tokens.json declare."""

    config: dict[str, Any]  # tokenizer_config.json over special_tokens_map.json
    tokens: tuple[AddedToken, ...]  # in the order of their ids
    special_names: frozenset[str]

    @classmethod
    def read(cls, folder: Path) -> "Declared":
        config = read_json(folder / "special_tokens_map.json")
        config |= read_json(folder / "tokenizer_config.json")
        added = read_json(folder / "added_tokens.json")
        try:
            names = _special_names(config)
            return cls(config, _declared_tokens(config, added, names), names)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder}: added tokens in tokenizer_config.json, special_tokens_map.json or "
                f"added_tokens.json are not in the form of transformers ({error!r})"
            ) from error

    @property
    def tokenizer_class(self) -> str | None:
        """The class name without the suffix of its fast twin."""
        name = self.config.get("tokenizer_class")
        return name.removesuffix("Fast") if isinstance(name, str) else None

    def name(self, key: str, default: str | None) -> str | None:
        """The token named by a key; an explicit null means none, only a missing key the default."""
        return _content(self.config[key]) if key in self.config else default


def _special_names(config: dict[str, Any]) -> frozenset[str]:
    names = [_content(config.get(key)) for key in SINGLE_NAMES]
    for key in LISTS_OF_NAMES:
        values = config.get(key) or []
        names += map(_content, values.values() if isinstance(values, dict) else values)
    return frozenset(name for name in names if name)


def _declared_tokens(
    config: dict[str, Any], added: dict[str, int], special_names: frozenset[str]
) -> tuple[AddedToken, ...]:
    """added_tokens.json is the older form; added_tokens_decoder replaces what it says."""
    entries: dict[int, dict[str, Any]] = {int(i): {"content": name} for name, i in added.items()}
    decoder = config.get("added_tokens_decoder") or {}
    entries |= {int(token_id): entry for token_id, entry in decoder.items()}
    return tuple(
        AddedToken(
            content=str(entry["content"]),
            id=token_id,
            special=entry.get("special", False) or entry["content"] in special_names,
            lstrip=entry.get("lstrip", False),
            rstrip=entry.get("rstrip", False),
        )
        for token_id, entry in sorted(entries.items())
    )


def assemble(
    pieces: Pieces,
    declared: Declared,
    own: Iterable[AddedToken],
    *,
    names: tuple[str | None, str | None],
    adds_bos: bool,
    around: tuple[list[int], list[int]] | None = None,
) -> Vocabulary:
    """Joins a vocabulary file's pieces and `own` added tokens with what its neighbours declare.

    `names` are BOS and EOS where no file names them, `adds_bos` holds where none says, and `around`
    is what stands before and behind a text where a template says so.
    """
    added = _added_tokens(pieces, declared, own, names)
    control = tuple(token for token in added.values() if _is_control(token, pieces.num_learned))

    def named(key: str, default: str | None) -> AddedToken | None:
        content = declared.name(key, default)
        token_id = None if content is None else _find(content, added, pieces)
        return None if content is None or token_id is None else AddedToken(content, token_id)

    bos, eos = named("bos_token", names[0]), named("eos_token", names[1])
    unknown = named("unk_token", None)
    if around is None:
        puts_bos = declared.config.get("add_bos_token", adds_bos)
        puts_eos = declared.config.get("add_eos_token", False)
        around = [bos.id] if bos and puts_bos else [], [eos.id] if eos and puts_eos else []
    emitted = {pieces.unknown_id, unknown.id if unknown else None}
    return Vocabulary(
        pieces=pieces,
        vocab_size=max([pieces.num_learned, *(token.id + 1 for token in added.values())]),
        control=control,
        words=tuple(
            token
            for token in added.values()
            if token.id >= pieces.num_learned and not _is_control(token, pieces.num_learned)
        ),
        # A control token of one character cannot be cut open: there the character is the token.
        guarded=tuple(t for t in control if t.id not in emitted and len(t.content) > 1),
        bos=bos,
        eos=eos,
        special_tokens=_special_tokens(declared.config, bos, eos),
        prefix=tuple(around[0]),
        suffix=tuple(around[1]),
    )


def _special_tokens(
    config: dict[str, Any], bos: AddedToken | None, eos: AddedToken | None
) -> dict[str, str]:
    """By the names that chat templates know them by; a model may have names of its own."""
    own = config.get("extra_special_tokens")
    named = {name: config.get(name) for name in SINGLE_NAMES} | (own if type(own) is dict else {})
    contents = {name: _content(value) for name, value in named.items()}
    contents["bos_token"] = bos.content if bos else None
    contents["eos_token"] = eos.content if eos else None
    return {name: content for name, content in contents.items() if content is not None}


def _added_tokens(
    pieces: Pieces,
    declared: Declared,
    own: Iterable[AddedToken],
    names: tuple[str | None, str | None],
) -> dict[str, AddedToken]:
    """By content. The vocabulary file's own ids win; a token is special if any file says so."""
    added = {token.content: token for token in declared.tokens}
    for token in own:
        special = token.special or (token.content in added and added[token.content].special)
        added[token.content] = replace(token, special=special)
    for name in (*declared.special_names, *names):
        # A file may name ordinary text, as `"pad_token": "!"`: that stays text.
        if name and looks_like_markup(name):
            token_id = _find(name, added, pieces)
            if token_id is not None:
                known = added.get(name, AddedToken(name, token_id))
                added[name] = replace(known, special=True)
    return {content: token for content, token in added.items() if content}


def _find(content: str, added: dict[str, AddedToken], pieces: Pieces) -> int | None:
    return added[content].id if content in added else pieces.token_id(content)


def _is_control(token: AddedToken, num_learned: int) -> bool:
    """Special tokens, and markup that was added without being called so.

    Such are Qwen's `<tool_call>` and DeepSeek's `<｜User｜>`. Markup among the learned pieces, as
    Gemma's HTML tags, is text; so are added words and runs of spaces.
    """
    return token.special or (looks_like_markup(token.content) and token.id >= num_learned)


def looks_like_markup(content: str) -> bool:
    return len(content) > 2 and content[0] + content[-1] in ("<>", "[]")


def _content(value: Any) -> str | None:
    """A token given as a string, or as the object that older configs write."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where the file is not there."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not readable as JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is needed, found {type(value).__name__}")
    return value


def read_text(path: Path) -> str:
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8 ({error}); download it again") from error


def read_bytes(path: Path) -> bytes:
    data = path.read_bytes()
    if data.startswith(b"version https://git-lfs"):
        raise ValueError(
            f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"
        )
    if not data:
        raise ValueError(f"{path} is empty; download it again")
    return data
