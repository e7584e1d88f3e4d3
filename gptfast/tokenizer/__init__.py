"""Text to token ids and back, the same for every tokenizer.

Owns three promises: control tokens in a text stay text unless the caller says otherwise, a stream
never emits half a character, and a stream's pieces joined are exactly `decode` of all its ids,
because decode is a stream. Knows nothing of models, chat templates or file formats: the readers
beside this file hand over a Vocabulary.
"""

import codecs
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

from gptfast.tokenizer.library import read_tokenizer_json, read_vocab_and_merges
from gptfast.tokenizer.model_files import find_model_file, read_model_file
from gptfast.tokenizer.vocabulary import AddedToken, Declared, Pieces, Vocabulary

__all__ = ["TextStream", "Tokenizer", "load_tokenizer"]


def load_tokenizer(folder: Path) -> "Tokenizer | None":
    """The tokenizer in a checkpoint folder, None where there is none; ValueError for corrupt files.

    tokenizer.json goes first because it says most: normalisation, split, template.
    """
    folder = Path(folder)
    if (path := folder / "tokenizer.json").is_file():
        return Tokenizer(read_tokenizer_json(path, Declared.read(folder)))
    if (model_file := find_model_file(folder)) is not None:
        return Tokenizer(read_model_file(model_file, Declared.read(folder)))
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return Tokenizer(read_vocab_and_merges(folder, Declared.read(folder)))
    return None


class Tokenizer:
    """Encodes and decodes; immutable, so threads may share it.

    `special_tokens` are the ones that files name: bos_token, eos_token, pad_token and so on.
    `control_tokens` maps each control token to its id; `hidden_ids` are those that decode drops by
    default. Some control tokens are visible: a model that writes `<tool_call>` wants it read.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        bos, eos = vocabulary.bos, vocabulary.eos
        self.vocab_size = vocabulary.vocab_size
        self.bos_token = bos.content if bos else None
        self.eos_token = eos.content if eos else None
        self.bos_token_id = bos.id if bos else None
        self.eos_token_id = eos.id if eos else None
        self.special_tokens = vocabulary.special_tokens
        self.control_tokens = {token.content: token.id for token in vocabulary.control}
        self.hidden_ids = frozenset(token.id for token in vocabulary.control if token.special)
        self._pieces: Pieces = vocabulary.pieces
        self._prefix, self._suffix = vocabulary.prefix, vocabulary.suffix
        self._guarded = {token.id: token.content for token in vocabulary.guarded}
        words = {token.content: token for token in vocabulary.words}
        self._words = _AddedTokens(words)
        self._words_and_control = _AddedTokens(
            words | {token.content: token for token in vocabulary.control}
        )

    def encode(
        self,
        text: str,
        *,
        bos: bool | None = None,
        control: bool = False,
        literals: Mapping[str, str] | None = None,
    ) -> list[int]:
        """The ids of a text. bos: True puts BOS in front, False adds nothing, None what files say.

        With `control`, control tokens in the text become their ids; without, they are text like any
        other. `literals` maps single characters to strings that they stand for; these stay text
        also with `control`.
        """
        _check_unicode(text)
        added = self._words_and_control if control else self._words
        ids = list(self._encode_chunks(text, added, str.maketrans(dict(literals or {}))))
        if bos is None:
            return [*self._prefix, *ids, *self._suffix]
        if not bos:
            return ids
        if self.bos_token_id is None:
            raise ValueError("bos=True, but this tokenizer names no BOS token; use bos=None")
        return [self.bos_token_id, *ids]

    def decode(self, ids: Iterable[int], *, skip_control: bool = True) -> str:
        """The text of ids: bytes that are no UTF-8 become U+FFFD, ids without a token nothing.

        `clean_up_tokenization_spaces` is ignored on purpose: it deletes spaces before punctuation,
        which suits WordPiece and corrupts all others (transformers 5 ignores it for them too).
        """
        stream = self.stream(skip_control=skip_control)
        return stream.push(ids) + stream.flush()

    def stream(self, *, after: Iterable[int] = (), skip_control: bool = True) -> "TextStream":
        """An incremental decode. `after` are ids that came before (a prompt).

        Their text is not repeated, but decides whether a leading space counts: it continues a
        text, while at the beginning sentencepiece's first word carries one that nobody wrote.
        """
        stream = TextStream(self._pieces, self.hidden_ids if skip_control else frozenset())
        stream.push(after)
        return stream

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, perhaps part of a character; b"" for an id without a token."""
        return self._pieces.token_bytes(token_id)

    def _encode_chunks(
        self, text: str, added: "_AddedTokens", literals: Mapping[int, str]
    ) -> Iterator[int]:
        for chunk, at_start, token in added.split(text):
            if chunk:
                yield from self._encode_text(chunk.translate(literals), at_start)
            if token is not None:
                yield token.id

    def _encode_text(self, text: str, at_start: bool) -> list[int]:
        """Pieces.encode, cut open wherever the model's own pieces spell a control token.

        Unigram vocabularies and sentencepiece's user-defined pieces (Gemma's `<start_of_turn>`) do:
        their search takes a control token from the text like any other piece.
        """
        ids = self._pieces.encode(text, at_start)
        if self._guarded.keys().isdisjoint(ids):
            return ids
        if len(text) == 1:
            return [token_id for token_id in ids if token_id not in self._guarded]
        leaked = next(self._guarded[token_id] for token_id in ids if token_id in self._guarded)
        parts = re.split(f"(?<={re.escape(leaked[:1])})(?={re.escape(leaked[1:])})", text)
        if (
            len(parts) == 1
        ):  # spelled only once normalised (full-width forms): halve until it breaks
            parts = [text[: len(text) // 2], text[len(text) // 2 :]]
        chunks = (self._encode_text(part, at_start and i == 0) for i, part in enumerate(parts))
        return [token_id for chunk in chunks for token_id in chunk]


class TextStream:
    """Turns ids into text as they come: push returns complete characters, flush what is left."""

    def __init__(self, pieces: Pieces, hidden: frozenset[int]) -> None:
        self._pieces, self._hidden = pieces, hidden
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._drop_space = pieces.drops_space

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete; costs their own length, not that of the text before."""
        data = b"".join(self._pieces.token_bytes(i) for i in ids if i not in self._hidden)
        return self._without_first_space(self._utf8.decode(data))

    def flush(self) -> str:
        """Ends the stream: an unfinished character becomes U+FFFD."""
        return self._without_first_space(self._utf8.decode(b"", final=True))

    def _without_first_space(self, text: str) -> str:
        if self._drop_space and text:
            self._drop_space = False
            return text.removeprefix(" ")
        return text


class _AddedTokens:
    """Finds added tokens in a text, the longest where several begin."""

    def __init__(self, tokens: Mapping[str, AddedToken]) -> None:
        self._tokens = tokens
        self._pattern = _any_of(tokens) if tokens else None

    def split(self, text: str) -> Iterator[tuple[str, bool, AddedToken | None]]:
        """(text before a token, whether the whole text starts there, the token or None at the end).

        A token with rstrip or lstrip swallows white space on that side (Phi-3's `<|end|>` does).
        """
        start, strip = 0, False
        for match in self._pattern.finditer(text) if self._pattern else ():
            token = self._tokens[match.group()]
            chunk = text[start : match.start()]
            chunk = chunk.lstrip() if strip else chunk
            yield chunk.rstrip() if token.lstrip else chunk, start == 0, token
            start, strip = match.end(), token.rstrip
        yield text[start:].lstrip() if strip else text[start:], start == 0, None


def _any_of(contents: Collection[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(contents, key=len, reverse=True))))


def _check_unicode(text: str) -> None:
    """JSON may carry half a surrogate pair into a Python string; it has no UTF-8 and so no ids."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = text[error.start]
        raise ValueError(
            f"the text has {found!r} at position {error.start}, half of a surrogate pair and no "
            "character; remove or replace it"
        ) from None
