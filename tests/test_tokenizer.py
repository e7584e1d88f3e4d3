"""Text to ids and back: promises on toy tokenizers of every format, goldens on real ones."""

import base64
import json
import os
import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from gptfast.hub import BUNDLED
from gptfast.tokenizer import Tokenizer, load_tokenizer

SENTENCES = [
    "Once upon a time there was a little fox who lived by the river.",
    "The fox said: hello, little bird! Will you play with me?",
    "They played  all day, and at 12:30 they ate 3 apples.",
    "Наступил вечер, и лиса пошла домой. Größe, naïve, 你好 🦙.",
] * 3
CONTROL = ["<s>", "</s>", "<|eot|>"]
TEXTS = st.text(max_size=40) | st.lists(
    st.sampled_from(
        [*CONTROL, "<", "s>", " ", "  ", "\n", "fox", " fox", "é", "🦙", "<tool>", "▁"]
    ),
    max_size=12,
).map("".join)
quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


# --- toy tokenizers, one of each format ---


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def added(content: str) -> dict[str, Any]:
    return {"content": content, "special": True, "normalized": False}


def train_byte_level() -> tokenizers.Tokenizer:
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(SENTENCES, trainer)
    return library


def write_tokenizer_json(folder: Path) -> None:
    """Byte-level, with a template, a visible control token and an added run of spaces."""
    library = train_byte_level()
    library.add_special_tokens(CONTROL)
    library.add_tokens([tokenizers.AddedToken("<tool>", normalized=False), "   "])
    bos = library.token_to_id("<s>")
    library.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", bos)])
    library.enable_truncation(5)
    library.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})


def write_spm_json(folder: Path, *, prepend: str = "first") -> None:
    """What transformers makes of a sentencepiece model: merges over characters, byte fallback."""
    library = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if prepend == "normalizer":  # Llama 2's file
        spaces = normalizers.Replace(" ", "▁")
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
    else:
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    pieces = [*CONTROL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", *pieces], show_progress=False
    )
    library.train_from_iterator(SENTENCES, trainer)
    state = json.loads(library.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if "0x" not in t["content"]]
    library = tokenizers.Tokenizer.from_str(json.dumps(state))
    library.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    library.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": True},
    )


def write_sentencepiece(folder: Path, **options: Any) -> None:
    corpus = folder.parent / "corpus.txt"
    corpus.write_text("\n".join(SENTENCES), encoding="utf-8")
    defaults: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 420,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "control_symbols": ["<|eot|>"],
        "minloglevel": 3,
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), **(defaults | options)
    )
    (folder / "tokenizer.vocab").unlink()


def write_tiktoken(folder: Path) -> None:
    pieces = [bytes([byte]) for byte in range(256)]
    pieces += [b"th", b"the", b" t", b" the", b"fox", b" fox", "é".encode(), b"  "]
    lines = [base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces)]
    (folder / "tokenizer.model").write_bytes(b"".join(lines))
    tokens = {str(len(pieces) + i): added(name) for i, name in enumerate(CONTROL)}
    write_json(
        folder / "tokenizer_config.json",
        {"added_tokens_decoder": tokens, "bos_token": "<s>", "eos_token": "</s>"},
    )


def write_vocab_and_merges(folder: Path) -> None:
    library = train_byte_level()
    library.model.save(str(folder))
    size = library.get_vocab_size()
    tokens = {str(size + i): added(name) for i, name in enumerate([*CONTROL, "<tool>"])}
    tokens[str(size + 3)]["special"] = False
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "added_tokens_decoder": tokens,
            "bos_token": None,
            "eos_token": "</s>",
        },
    )


WRITERS: dict[str, Callable[[Path], None]] = {
    "tokenizer.json": write_tokenizer_json,
    "tokenizer.json of sentencepiece": write_spm_json,
    "sentencepiece": write_sentencepiece,
    "tiktoken": write_tiktoken,
    "vocab and merges": write_vocab_and_merges,
}


@pytest.fixture(scope="module", params=list(WRITERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "checkpoint"
    path.mkdir()
    WRITERS[request.param](path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return loaded(folder)


def loaded(folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


def made(tmp_path: Path, write: Callable[..., None], **options: Any) -> Tokenizer:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write(folder, **options)
    return loaded(folder)


# --- the promises, for every format ---


@quick
@given(text=TEXTS)
def test_text_survives_encode_and_decode(tokenizer: Tokenizer, text: str) -> None:
    """Control tokens included: what a user wrote comes back as the user wrote it."""
    ids = tokenizer.encode(text, bos=False)
    if tokenizer.decode(tokenizer.encode("a▁", bos=False)) == "a ":  # sentencepiece's mark
        text = text.replace("▁", " ")
    if tokenizer.decode(tokenizer.encode(" a", bos=False)) == "a":  # the library's Metaspace
        text = text.removeprefix(" ")
    assert tokenizer.decode(ids) in (text, unicodedata.normalize("NFC", text))  # Qwen2 composes
    assert tokenizer.hidden_ids.isdisjoint(ids)
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in ids)


@quick
@given(text=TEXTS)
def test_ids_survive_decode_and_encode(tokenizer: Tokenizer, text: str) -> None:
    """The ids of a text; any ids at all do not (two tokens may spell a third), nor do those of a
    tokenizer whose decoder takes a space that its encoder did not put there."""
    ids = tokenizer.encode(text, bos=False)
    if tokenizer.decode(tokenizer.encode(" a", bos=False)) == " a":
        assert tokenizer.encode(tokenizer.decode(ids), bos=False) == ids


@quick
@given(seed=st.integers(0, 10**6), num_ids=st.integers(0, 60), skip=st.booleans())
def test_stream_equals_decode_for_any_ids(
    tokenizer: Tokenizer, seed: int, num_ids: int, skip: bool
) -> None:
    generator = random.Random(seed)
    ids = [generator.randrange(tokenizer.vocab_size + 3) for _ in range(num_ids)]
    stream = tokenizer.stream(skip_control=skip)
    pieces, start = [], 0
    while start < num_ids:
        end = start + generator.randrange(4)
        pieces.append(stream.push(ids[start:end]))
        start = end
    pieces.append(stream.flush())
    assert "".join(pieces) == tokenizer.decode(ids, skip_control=skip)


@quick
@given(text=TEXTS)
def test_stream_never_shows_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    if "\ufffd" in text:
        return
    stream = tokenizer.stream()
    so_far = ""
    ids = tokenizer.encode(text, bos=False)
    whole = tokenizer.decode(ids)
    for token_id in ids:
        so_far += stream.push([token_id])
        assert whole.startswith(so_far)
    assert so_far == whole and stream.flush() == ""


def test_control_tokens_are_ids_only_where_asked_for(tokenizer: Tokenizer) -> None:
    for name, token_id in tokenizer.control_tokens.items():
        text = f"fox{name}fox"
        assert token_id not in tokenizer.encode(text, bos=False)
        assert tokenizer.encode(text, bos=False, control=True).count(token_id) == 1
    assert set(CONTROL) <= set(tokenizer.control_tokens)


def test_literals_stay_text_beside_real_control_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a<|eot|>\ue000b", control=True, literals={"\ue000": "<|eot|>"})
    assert ids.count(tokenizer.control_tokens["<|eot|>"]) == 1
    assert tokenizer.decode(ids, skip_control=False).endswith("a<|eot|><|eot|>b")
    assert tokenizer.decode(ids) == "a<|eot|>b"


def test_unknown_ids_are_no_text(tokenizer: Tokenizer) -> None:
    """A model's vocabulary is often padded beyond its tokenizer's."""
    assert tokenizer.decode([tokenizer.vocab_size, 10**7, -1]) == ""
    assert tokenizer.token_bytes(tokenizer.vocab_size + 1) == b""


def test_bos(tokenizer: Tokenizer, folder: Path) -> None:
    plain = tokenizer.encode("fox", bos=False)
    if tokenizer.bos_token_id is None:
        assert tokenizer.encode("fox") == plain
        with pytest.raises(ValueError, match="no BOS"):
            tokenizer.encode("fox", bos=True)
    else:
        assert tokenizer.encode("fox") == tokenizer.encode("fox", bos=True)
        assert tokenizer.encode("fox", bos=True) == [tokenizer.bos_token_id, *plain]
        assert tokenizer.encode("") == [tokenizer.bos_token_id]
    assert tokenizer.control_tokens["</s>"] == tokenizer.eos_token_id


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"position 1.*surrogate"):
        tokenizer.encode("a\ud83e")


def test_a_long_text_is_not_truncated(tokenizer: Tokenizer) -> None:
    """The toy tokenizer.json carries a truncation to 5 tokens, as real ones do by accident."""
    assert tokenizer.decode(tokenizer.encode("fox " * 50)) == "fox " * 50


def test_a_stream_after_a_prompt_keeps_the_space_between(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the fox said", bos=False)
    for cut in range(1, len(ids)):
        stream = tokenizer.stream(after=ids[:cut])
        assert tokenizer.decode(ids[:cut]) + stream.push(ids[cut:]) == "the fox said"


# --- the library's own parse as oracle ---


@quick
@given(text=TEXTS)
@pytest.mark.parametrize("prepend", ["first", "always", "never", "normalizer"])
def test_control_parse_equals_the_librarys(
    tmp_path_factory: pytest.TempPathFactory, prepend: str, text: str
) -> None:
    """Metaspace's "first" puts its space only where a text begins the prompt."""
    folder = tmp_path_factory.getbasetemp() / f"metaspace-{prepend}"
    if not folder.exists():
        folder.mkdir()
        write_spm_json(folder, prepend=prepend)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = library.encode(text, add_special_tokens=False).ids
    assert loaded(folder).encode(text, bos=False, control=True) == ids


def test_control_tokens_that_swallow_white_space(tmp_path: Path) -> None:
    """Phi-3's `<|end|>` is written with a line break behind it that the model never sees."""
    library = train_byte_level()
    library.add_special_tokens([tokenizers.AddedToken("<|end|>", rstrip=True, normalized=False)])
    library.add_special_tokens([tokenizers.AddedToken("<mask>", lstrip=True, normalized=False)])
    library.save(str(tmp_path / "tokenizer.json"))
    for text in ("a <|end|>\n  b <|end|> <mask> c <mask>", "<|end|> ", " <mask><|end|>"):
        wanted = library.encode(text, add_special_tokens=False).ids
        assert loaded(tmp_path).encode(text, control=True) == wanted


# --- facts of single formats ---


def test_no_tokenizer_files(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {})
    assert load_tokenizer(tmp_path) is None


def test_opt_puts_its_end_token_in_front(tmp_path: Path) -> None:
    """GPT-2's class and files, but BOS is EOS is `</s>`, a word of vocab.json, and comes first."""

    def write(folder: Path) -> None:
        library = train_byte_level()
        library.model.save(str(folder))
        vocab = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
        learned = json.loads((folder / "vocab.json").read_text())
        write_json(folder / "vocab.json", vocab | {t: i + 4 for t, i in learned.items()})
        end = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "rstrip": False}
        names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), end)
        config = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "pad_token": "<pad>"}
        write_json(folder / "tokenizer_config.json", names | config)
        write_json(folder / "config.json", {"model_type": "opt"})

    tokenizer = made(tmp_path, write)
    assert tokenizer.encode("fox")[0] == tokenizer.bos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.encode("", bos=None) == [2]
    assert 2 not in tokenizer.encode("a </s> b")[1:]
    assert tokenizer.special_tokens["pad_token"] == "<pad>"
    transformers = pytest.importorskip("transformers")
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    for text in (*SENTENCES, "", " fox", "a</s>b", "  \n"):
        assert tokenizer.encode(text, control=True) == oracle(text)["input_ids"]


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "CodeGenTokenizer", "GPTNeoXTokenizer"])
def test_classes_of_vocab_and_merges_equal_transformers(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")

    def write(folder: Path) -> None:
        library = train_byte_level()
        library.add_special_tokens(["<|endoftext|>"])
        library.model.save(str(folder))
        size = library.get_vocab_size(with_added_tokens=False)
        tokens = {str(size): added("<|endoftext|>")}
        config = {"tokenizer_class": name, "added_tokens_decoder": tokens}
        write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "config.json", {"model_type": "gpt2"})

    tokenizer = made(tmp_path, write)
    oracle = transformers.AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    assert type(oracle).__name__ == name
    # e and a combining acute: only some compose them
    for text in (*SENTENCES, " fox", "cafe\u0301 12345", "a<|endoftext|>b", "I'll\n\n  go"):
        assert tokenizer.encode(text, control=True) == oracle(text)["input_ids"], text


def test_added_words_and_visible_control_tokens(tmp_path: Path) -> None:
    """Added spaces are text; `<tool>` is control, but a reader sees it."""
    tokenizer = made(tmp_path, write_tokenizer_json)
    assert "   " not in tokenizer.control_tokens
    assert len(tokenizer.encode("   ", bos=False)) == 1
    ids = tokenizer.encode("<tool>", bos=False, control=True)
    assert ids == [tokenizer.control_tokens["<tool>"]]
    assert tokenizer.decode(ids) == "<tool>"
    assert tokenizer.decode(tokenizer.encode("<|eot|>", control=True)) == ""


def test_config_decides_bos_where_there_is_no_template(tmp_path: Path) -> None:
    library = train_byte_level()
    library.add_special_tokens(CONTROL)
    library.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    for add_bos, add_eos in ((True, False), (False, True), (True, True)):
        flags = {"add_bos_token": add_bos, "add_eos_token": add_eos}
        write_json(tmp_path / "tokenizer_config.json", config | flags)
        tokenizer = loaded(tmp_path)
        ids = tokenizer.encode("fox")
        assert (ids[0] == tokenizer.bos_token_id) == add_bos
        assert (ids[-1] == tokenizer.eos_token_id) == add_eos


def test_a_gemma_like_piece_of_the_model_itself_is_guarded(tmp_path: Path) -> None:
    """sentencepiece finds user-defined pieces in any text, also those that steer the model."""

    def write(folder: Path) -> None:
        write_sentencepiece(folder, user_defined_symbols=["<turn>", "<b>"])
        write_json(
            folder / "tokenizer_config.json", {"additional_special_tokens": ["<turn>", "<|eot|>"]}
        )

    tokenizer = made(tmp_path, write)
    turn = tokenizer.control_tokens["<turn>"]
    text = "hello <turn><turn>fox <b>"
    assert turn not in tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text, control=True).count(turn) == 2
    assert "<b>" not in tokenizer.control_tokens  # markup that the model learned as text
    many = tokenizer.encode("<turn>" * 3000)
    assert turn not in many and tokenizer.decode(many) == "<turn>" * 3000


def test_a_unigram_vocabulary_is_guarded(tmp_path: Path) -> None:
    """The library's Unigram search takes `</s>` from a text, as a piece like any other."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((char, -5.0) for char in "<>/s▁fox/")]
    library = tokenizers.Tokenizer(models.Unigram(list(dict(pieces).items()), 0, False))
    library.normalizer = normalizers.NFKC()
    library.decoder = decoders.Metaspace()
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    library.add_special_tokens(["<unk>", "</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = loaded(tmp_path)
    for text in ("fox</s>fox", "＜/s＞", "</s></s>"):  # full-width forms: NFKC makes `</s>` of them
        ids = tokenizer.encode(text)
        assert 1 not in ids
        assert tokenizer.decode(ids) == text.replace("＜", "<").replace("＞", ">")


def test_noncharacters_are_text(tmp_path: Path) -> None:
    """The library reader keeps an added token of its own, written with two noncharacters."""
    tokenizer = made(tmp_path, write_tokenizer_json)
    text = "\U0010fffe\U0010ffff" * 2 + "fox"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert max(tokenizer.encode(text)) < tokenizer.vocab_size


def test_legacy_sentencepiece_puts_a_space_after_every_control_token(tmp_path: Path) -> None:
    pieces = {}
    for legacy in (True, False):
        folder = tmp_path / str(legacy)
        folder.mkdir()
        write_sentencepiece(folder)
        write_json(folder / "tokenizer_config.json", {"legacy": legacy})
        tokenizer = loaded(folder)
        ids = tokenizer.encode("fox<|eot|>fox", bos=False, control=True)
        pieces[legacy] = tokenizer.decode(ids, skip_control=False)
    assert pieces == {True: "fox<|eot|> fox", False: "fox<|eot|>fox"}


def test_tokens_added_beside_a_sentencepiece_model(tmp_path: Path) -> None:
    """Phi-3: control tokens beyond the model's pieces; a word added by a user is text."""

    def write(folder: Path) -> None:
        write_sentencepiece(folder)
        write_json(folder / "added_tokens.json", {"<|end|>": 420, "photosynthesis": 421})
        write_json(folder / "special_tokens_map.json", {"eos_token": "<|end|>"})

    tokenizer = made(tmp_path, write)
    assert tokenizer.eos_token_id == 420 and tokenizer.vocab_size == 422
    ids = tokenizer.encode("a photosynthesis<|end|>", bos=False)
    assert 421 in ids and 420 not in ids
    assert tokenizer.decode(ids) == "a photosynthesis<|end|>"


def test_a_wordlevel_tokenizer_joins_words_by_spaces(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "fox": 2}, "<unk>"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = loaded(tmp_path)
    assert tokenizer.encode("the fox ran") == [1, 2, 0]
    assert tokenizer.decode([1, 2]) == "the fox"


# --- corrupt files ---


def lfs_pointer(data: bytes) -> bytes:
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


DAMAGES = {
    "truncated": lambda data: data[: len(data) // 2 - 1],
    "empty": lambda data: b"",
    "garbage": lambda data: b"\x00\xff" * 50,
    "lfs": lfs_pointer,
}
FILES = {
    "tokenizer.json": (write_tokenizer_json, "tokenizer.json"),
    "sentencepiece": (write_sentencepiece, "tokenizer.model"),
    "tiktoken": (write_tiktoken, "tokenizer.model"),
    "vocab.json": (write_vocab_and_merges, "vocab.json"),
    "tokenizer_config.json": (write_tiktoken, "tokenizer_config.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_named(tmp_path: Path, file: str, damage: str) -> None:
    write, name = FILES[file]
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    write(folder)
    (folder / name).write_bytes(DAMAGES[damage]((folder / name).read_bytes()))
    with pytest.raises(ValueError, match=name) as error:
        load_tokenizer(folder)
    assert ("git lfs" in str(error.value)) == (damage == "lfs")


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (["IQ== 0", "Ig=="], "line 2"),
        (["IQ== 0", "Ig== 1"], "254 of 256 single bytes"),
    ],
)
def test_damaged_tiktoken_lines(tmp_path: Path, lines: list[str], problem: str) -> None:
    (tmp_path / "tokenizer.model").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=problem):
        load_tokenizer(tmp_path)


def test_repeated_ranks(tmp_path: Path) -> None:
    write_tiktoken(tmp_path)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(path.read_bytes() + base64.b64encode(b"zebra") + b" 7\n")
    with pytest.raises(ValueError, match="ranks repeat"):
        load_tokenizer(tmp_path)


def test_merges_of_another_model(tmp_path: Path) -> None:
    write_vocab_and_merges(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nzz yy\n")
    with pytest.raises(ValueError, match=r"merges.txt does not fit vocab.json"):
        load_tokenizer(tmp_path)


def test_added_tokens_of_another_model(tmp_path: Path) -> None:
    write_tokenizer_json(tmp_path)
    write_json(tmp_path / "added_tokens.json", {"<|new|>": 5})
    with pytest.raises(ValueError, match=r"'<\|new\|>' the id 5"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": {"five": {"content": "<x>"}}},
        {"added_tokens_decoder": {"5": "<x>"}},
        {"added_tokens_decoder": [1]},
        {"additional_special_tokens": 3},
    ],
)
def test_malformed_declarations(tmp_path: Path, config: dict[str, Any]) -> None:
    write_tiktoken(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", config)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)


def test_split_patterns_are_never_guessed(tmp_path: Path) -> None:
    for name, write in (("json", write_vocab_and_merges), ("model", write_tiktoken)):
        folder = tmp_path / name
        folder.mkdir()
        write(folder)
        write_json(folder / "tokenizer_config.json", {"tokenizer_class": "StrangeTokenizer"})
        with pytest.raises(ValueError, match="StrangeTokenizer"):
            load_tokenizer(folder)


def test_unknown_decoders_are_refused(tmp_path: Path) -> None:
    library = train_byte_level()
    library.decoder = decoders.CTC()
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="CTC"):
        load_tokenizer(tmp_path)


def test_several_model_files(tmp_path: Path) -> None:
    write_tiktoken(tmp_path)
    (tmp_path / "tokenizer.model").rename(tmp_path / "one.model")
    assert loaded(tmp_path).vocab_size == 267
    (tmp_path / "two.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"one.model, two.model"):
        load_tokenizer(tmp_path)


# --- real tokenizers ---

GOLDEN = {
    "llama-spm": ("llama2", ["tokenizer.model", "tokenizer_config.json"]),
    "llama-spm alone": ("llama2", ["tokenizer.model"]),
    "llama-spm json": ("llama2", ["tokenizer.json", "tokenizer_config.json"]),
    "llama-bpe": ("llama3", ["tokenizer.model", "tokenizer_config.json"]),
    "llama-bpe alone": ("llama3", ["tokenizer.model"]),
    "gpt-2": ("gpt2", ["vocab.json", "merges.txt"]),
    "qwen2": ("qwen2", ["vocab.json", "merges.txt", "tokenizer_config.json"]),
    "mpt": ("gpt-neox-20b", ["tokenizer.json"]),
}
BOS_AND_EOS = {
    "llama2": (1, 2),
    "llama3": (128_000, 128_001),
    "gpt2": (50_256, 50_256),
    "qwen2": (None, 151_645),
    "gpt-neox-20b": (0, 0),
}


def alone(source: Path, names: list[str], tmp_path: Path) -> Tokenizer:
    for name in names:
        os.symlink(source / name, tmp_path / name)
    return loaded(tmp_path)


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_ids(shared_data: Path, tmp_path: Path, case: str) -> None:
    source, names = GOLDEN[case]
    tokenizer = alone(shared_data / "tokenizers" / source, names, tmp_path)
    golden = json.loads((shared_data / "tokenizers" / "golden.json").read_text())[case.split()[0]]
    assert len(golden) == 46
    for entry in golden:
        assert tokenizer.encode(entry["text"], bos=False) == entry["ids"]
        assert tokenizer.decode(entry["ids"]) == entry["text"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == BOS_AND_EOS[source]
    starts_with_bos = source.startswith("llama")
    assert (tokenizer.encode("Hello")[0] == tokenizer.bos_token_id) == starts_with_bos
    for name, token_id in tokenizer.control_tokens.items():
        ids = tokenizer.encode(f"a {name} b")
        assert token_id not in ids[1:] and tokenizer.decode(ids) == f"a {name} b"
        assert token_id in tokenizer.encode(f"a{name}b", control=True)


@pytest.mark.parametrize(
    ("name", "size"),
    [("tokenizer.model.v1", 32_000), ("mistral_instruct_tokenizer_240323.model.v3", 32_768)],
)
def test_mistral_files_load(shared_data: Path, tmp_path: Path, name: str, size: int) -> None:
    tokenizer = alone(shared_data / "tokenizers" / "mistral", [name], tmp_path)
    assert tokenizer.vocab_size == size
    ids = tokenizer.encode("[INST] hi[/INST]", control=True)
    if size == 32_768:  # v3 has control tokens for its turns
        assert ids == [1, 3, 12782, 4]
    assert tokenizer.decode(tokenizer.encode("[INST] hi[/INST]")) == "[INST] hi[/INST]"


def test_qwens_tiktoken_file(shared_data: Path, tmp_path: Path) -> None:
    """The ranks of Qwen 1 are the ids of Qwen 2's vocab.json, written differently."""
    source = shared_data / "tokenizers" / "qwen2"
    pieces = loaded(source)
    lines = [base64.b64encode(pieces.token_bytes(i)) + b" %d\n" % i for i in range(151_643)]
    (tmp_path / "qwen.tiktoken").write_bytes(b"".join(lines))
    write_json(tmp_path / "tokenizer_config.json", {"tokenizer_class": "QWenTokenizer"})
    tokenizer = loaded(tmp_path)
    golden = json.loads((shared_data / "tokenizers" / "golden.json").read_text())["qwen2"]
    for entry in golden:
        assert tokenizer.encode(entry["text"]) == entry["ids"]
        assert tokenizer.decode(entry["ids"]) == entry["text"]
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9")
    assert tokenizer.eos_token_id == 151_643 and tokenizer.vocab_size == 151_851
    ids = tokenizer.encode("<|im_start|>a<|im_end|>", control=True)
    assert [ids[0], ids[-1]] == [151_644, 151_645]
    assert 151_644 not in tokenizer.encode("<|im_start|>")


def real_tokenizers(shared_data: Path) -> dict[str, Path]:
    """Every tokenizer there is: folders, and single files of Mistral's."""
    folder = shared_data / "tokenizers"
    found = {name: folder / name for name in ("llama2", "llama3", "gpt2", "qwen2", "gpt-neox-20b")}
    found |= {path.name: path for path in sorted((folder / "mistral").glob("*.model.v*"))}
    found["llama2 sentencepiece"] = folder / "llama2" / "tokenizer.model"
    found["stories260K"] = shared_data / "checkpoints" / "stories260K-hf"
    return found | dict(BUNDLED)


def test_ids_of_real_tokenizers_survive_decode_and_encode(
    shared_data: Path, tmp_path: Path
) -> None:
    golden = json.loads((shared_data / "tokenizers" / "golden.json").read_text())
    assert set(golden) == {case.split()[0] for case in GOLDEN}  # each has its test above
    texts = [entry["text"] for entries in golden.values() for entry in entries]
    texts += [*SENTENCES, (shared_data / "text" / "tinyshakespeare.txt").read_text()[:5000]]
    sources = real_tokenizers(shared_data)
    assert len(sources) == 11
    for name, source in sources.items():
        if source.is_file():
            (tmp_path / name).mkdir()
            tokenizer = alone(source.parent, [source.name], tmp_path / name)
        else:
            tokenizer = loaded(source)
        for text in texts:
            ids = tokenizer.encode(text, bos=False)
            assert tokenizer.encode(tokenizer.decode(ids), bos=False) == ids, (name, text)


def test_story_checkpoint_texts(shared_data: Path) -> None:
    tokenizer = loaded(shared_data / "checkpoints" / "stories260K-hf")
    path = shared_data / "checkpoints" / "stories260K-golden" / "golden_greedy.json"
    for case in json.loads(path.read_text())["cases"]:
        prompt_ids = case["prompt_ids"]
        assert tokenizer.encode(case["prompt"]) == prompt_ids
        assert tokenizer.decode(case["token_ids"]) == case["text"]
        stream = tokenizer.stream(after=prompt_ids)
        new = "".join(stream.push([token_id]) for token_id in case["token_ids"][len(prompt_ids) :])
        assert case["prompt"] + new == case["text"]
