"""LLM: text in, text out. What is streamed, joined, is the text; a stop never shows; ids and text,
one prompt and many, turn by turn or at once give the same.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny import GPT2, LLAMA, gpt2_tensors, llama_tensors, tiny_llama, write_folder
from tokenizers import decoders, models, pre_tokenizers

from gptfast.llm import LLM, Chunk
from gptfast.sampling import SamplingParams

BOS, EOS, USER, ASSISTANT = range(256, 260)
CONTROL = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
# Tokens of several bytes, two of them with half a character: "é" is C3 A9, "ñ" C3 B1.
LONG = [b"ab", b"bc", b"stop", b" the", b"x\xc3", b"\xa9y", "🦙!".encode()]
VOCAB = 260 + len(LONG)
CONTEXT = 256
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GREEDY = SamplingParams(temperature=0, max_new_tokens=20, ignore_eos=True)


# --- folders ---


def write_byte_tokenizer(
    folder: Path,
    bos: bool = True,
    begins_with_bos: bool = True,
    template: str | None = TEMPLATE,
) -> None:
    """Every byte is a token; the tokens of LONG are never encoded, but a model may say them."""
    alphabet = byte_alphabet()
    vocabulary = {alphabet[byte]: byte for byte in range(256)}
    vocabulary |= {
        "".join(alphabet[byte] for byte in token): 260 + number for number, token in enumerate(LONG)
    }
    # The library numbers added tokens after the learned ones unless they are there already.
    vocabulary |= {name: 256 + number for number, name in enumerate(CONTROL)}
    library = tokenizers.Tokenizer(models.BPE(vocabulary, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens(CONTROL)
    library.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<s>" if bos else None,
        "add_bos_token": bos and begins_with_bos,
        "eos_token": "</s>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def byte_alphabet() -> list[str]:
    """GPT-2's printable character for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def write_random_model(folder: Path, context: int = 1024, **facts: Any) -> Path:
    """A random Llama that says any byte, so half characters all the time."""
    raw = LLAMA | {
        "vocab_size": VOCAB,
        "max_position_embeddings": context,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        **facts,
    }
    tensors = llama_tensors(raw)
    tensors["model.embed_tokens.weight"] *= 3  # else it soon repeats itself
    return write_folder(folder, raw, tensors)


def write_scripted_model(folder: Path) -> Path:
    """A GPT-2 that knows only where it is: its blocks add nothing and its positions are one-hot.

    `say` writes into its head which token follows at each place.
    """
    raw = GPT2 | {
        "vocab_size": VOCAB,
        "n_embd": CONTEXT,
        "n_layer": 1,
        "n_inner": 4,
        "n_positions": CONTEXT,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    tensors = {name: torch.zeros_like(value) for name, value in gpt2_tensors(raw).items()}
    tensors["transformer.wpe.weight"] = 10 * torch.eye(CONTEXT)
    tensors["transformer.ln_f.weight"] = torch.ones(CONTEXT)
    # LayerNorm takes the mean away; with this the most frequent token leads where none is scripted.
    tensors["transformer.ln_f.bias"] = torch.full([CONTEXT], 0.1)
    return write_folder(folder, raw, tensors)


def say(llm: LLM, token_ids: Sequence[int], start: int = 1) -> None:
    """Lets a scripted model continue a prompt of `start` tokens with `token_ids`, then with EOS."""
    head = llm.model.head.weight
    head.zero_()
    head[EOS] = 1
    for place, token in enumerate(token_ids, start - 1):
        head[:, place] = 0
        head[token, place] = 1


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = write_random_model(tmp_path_factory.mktemp("random"))
    write_byte_tokenizer(folder)
    return LLM(folder, device="cpu")


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    folder = write_scripted_model(tmp_path_factory.mktemp("scripted"))
    write_byte_tokenizer(folder)
    return LLM(folder, device="cpu", batch_size=1)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """A folder without a tokenizer."""
    return LLM(write_random_model(tmp_path_factory.mktemp("bare")), device="cpu")


def tokens_of(text: str | bytes) -> list[int]:
    return list(text.encode() if isinstance(text, str) else text)


def bytes_of(token_ids: Sequence[int]) -> bytes:
    parts = [LONG[i - 260] if i >= 260 else b"" if i >= 256 else bytes([i]) for i in token_ids]
    return b"".join(parts)


# --- generate ---


def test_a_prompt_may_be_text_or_ids_one_or_many(llm: LLM) -> None:
    ids = [BOS, *b"fox"]
    assert llm.encode("fox") == ids == llm.encode(ids)
    forms: list[Any] = ["fox", ["fox"], ids, [ids], tuple(ids), [tuple(ids)]]
    outputs = [llm.generate(form, GREEDY) for form in forms]
    assert all(len(output) == 1 for output in outputs)
    assert len({output[0].text for output in outputs}) == 1
    expected = ["fox", "fox", ids, ids, tuple(ids), tuple(ids)]
    assert [output[0].prompt for output in outputs] == expected
    mixed = llm.generate(["fox", [1, 2], "a longer text than these"], GREEDY)
    alone = [llm.generate(prompt, GREEDY)[0] for prompt in ("fox", [1, 2])]
    assert [output.token_ids for output in mixed[:2]] == [output.token_ids for output in alone]
    assert len(mixed[0].token_ids) == 20 and mixed[0].finish_reason == "length"
    assert llm.generate([], GREEDY) == []


def test_parameters_are_one_for_all_or_one_for_each(llm: LLM) -> None:
    each = [replace(GREEDY, max_new_tokens=count) for count in (1, 5, 3)]
    outputs = llm.generate(["a", "b", "c"], each)
    assert [len(output.token_ids) for output in outputs] == [1, 5, 3]
    assert [output.stats.num_new_tokens for output in outputs] == [1, 5, 3]
    assert all(output.logprobs is None for output in outputs)
    with pytest.raises(ValueError, match="3 prompts and 2 sampling parameters"):
        llm.generate(["a", "b", "c"], each[:2])
    # The default samples 256 tokens; an end may come earlier.
    assert 0 < len(llm.generate("a")[0].token_ids) <= 256


def test_n_outputs_stand_next_to_each_other(llm: LLM) -> None:
    """Output k of a seeded prompt is what seed + k gives alone."""
    params = SamplingParams(n=3, seed=5, max_new_tokens=9, ignore_eos=True)
    outputs = llm.generate(["one", "two"], [params, replace(params, n=2, seed=None)])
    assert [output.prompt for output in outputs] == ["one"] * 3 + ["two"] * 2
    for copy, output in enumerate(outputs[:3]):
        [alone] = llm.generate("one", replace(params, n=1, seed=5 + copy))
        assert output.token_ids == alone.token_ids
    assert len({tuple(output.token_ids) for output in outputs}) == 5
    last = llm.generate("one", replace(params, n=2, seed=2**63 - 1))
    assert last[0].token_ids != last[1].token_ids, "seeds go round after the last"


def test_logprobs_come_with_every_token(llm: LLM) -> None:
    [output] = llm.generate("fox", replace(GREEDY, logprobs=2))
    assert output.logprobs is not None
    assert [entry.token_id for entry in output.logprobs] == output.token_ids
    scores = llm.score([*llm.encode("fox"), *output.token_ids])[-20:]
    assert [entry.logprob for entry in output.logprobs] == pytest.approx(scores.tolist(), abs=1e-4)
    assert all(next(iter(entry.top)) == entry.token_id for entry in output.logprobs), "greedy"


def test_an_end_token_ends_the_text_and_is_no_part_of_it(scripted: LLM) -> None:
    say(scripted, [*b"abc", EOS, *b"def"])
    [output] = scripted.generate("", replace(GREEDY, ignore_eos=False))
    assert (output.text, output.token_ids, output.finish_reason) == (
        "abc",
        [*b"abc", EOS],
        "stop",
    )
    [output] = scripted.generate("", replace(GREEDY, max_new_tokens=7))
    assert (output.text, output.finish_reason) == ("abcdef", "length")
    [output] = scripted.generate("", replace(GREEDY, stop_token_ids=[ord("e")]))
    assert (output.text, output.finish_reason) == ("abcd", "stop")
    # An unfinished character at the end is shown as what it is.
    say(scripted, [*b"ab\xc3", EOS])
    [output] = scripted.generate("", replace(GREEDY, ignore_eos=False))
    assert (output.text, output.finish_reason) == ("ab\ufffd", "stop")


def test_the_context_ends_an_output(scripted: LLM) -> None:
    say(scripted, tokens_of("x" * CONTEXT))
    [output] = scripted.generate("", replace(GREEDY, max_new_tokens=None))
    assert len(output.token_ids) == CONTEXT - 1 and output.finish_reason == "length"
    [output] = scripted.generate([[1] * CONTEXT], GREEDY)
    assert (output.token_ids, output.text, output.finish_reason) == ([], "", "length")


# --- stop strings ---


def text_after(chunks: Sequence[bytes], stops: Sequence[str]) -> tuple[str, bool]:
    """By the definition: as soon as whole characters show a stop, the text ends where it begins."""
    data = b""
    for chunk in chunks:
        data += chunk
        text = data.decode(errors="ignore")  # whole characters
        starts = [text.find(stop) for stop in stops if stop in text]
        if starts:
            return text[: min(starts)], True
    return data.decode(errors="replace"), False


PIECES = [tokens_of(text) for text in ("a", "b", "c", "stop", " the", "é", "ñ", "🦙", "x", "y")]
PIECES += [[260 + number] for number in (0, 1, 2, 3, 6)] + [[264, 265]]  # LONG; "xéy" in two


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    pieces=st.lists(st.sampled_from(PIECES), max_size=16),
    stops=st.lists(
        st.sampled_from(["stop", "ab", "abc", "bc", "é", "xé", "aab", "🦙!", "top the", "c", "éy"])
        | st.text("abcé🦙", min_size=1, max_size=4),
        max_size=3,
    ),
)
@example(pieces=[[ord("s")], [ord("t")], [ord("o")], [ord("x")]], stops=["stop"])
@example(pieces=[[260], [261], [260]], stops=["bb", "abbc"])
@example(pieces=[*[[byte] for byte in b"aaaaab"]], stops=["aaab"])
@example(pieces=[[264], [265]], stops=["é"])
def test_a_stop_ends_the_text_and_none_of_it_is_ever_seen(
    scripted: LLM, pieces: list[list[int]], stops: list[str]
) -> None:
    """Over tokens that hold parts of a stop, several, or half a character; overlapping stops."""
    ids = [token for piece in pieces for token in piece]
    say(scripted, ids)
    expected, stopped = text_after([bytes_of([token]) for token in ids], stops)
    params = replace(GREEDY, stop=stops, max_new_tokens=len(ids) + 5, ignore_eos=False)
    seen, chunks = "", list(scripted.stream("", params))
    for chunk in chunks:
        seen += chunk.text
        assert expected.startswith(seen), "more than the text was streamed"
    assert seen == expected
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == "stop"
    if not stopped:
        assert [token for chunk in chunks for token in chunk.token_ids] == [*ids, EOS]
    assert not scripted.engine.has_work


def test_what_may_become_a_stop_is_held_back_but_not_lost(scripted: LLM) -> None:
    say(scripted, tokens_of("an st st stool"))
    params = replace(GREEDY, stop="stop", max_new_tokens=14)
    texts = [chunk.text for chunk in scripted.stream("", params)]
    assert texts == ["a", "n", " ", "", "", "st ", "", "", "st ", "", "", "", "stoo", "l"]
    # At the end nothing more can come.
    texts = [chunk.text for chunk in scripted.stream("", replace(params, max_new_tokens=5))]
    assert texts == ["a", "n", " ", "", "st"]


def test_a_stop_counts_from_the_first_new_token(scripted: LLM) -> None:
    """The prompt ends with what would be the first half of a stop."""
    say(scripted, tokens_of("op and stop"), start=4)
    [output] = scripted.generate(["not"], replace(GREEDY, stop=["stop"], ignore_eos=False))
    assert (output.text, output.finish_reason) == ("op and ", "stop")


def test_a_stopped_output_makes_room_for_the_next(scripted: LLM) -> None:
    """Rows that a stop string has ended are cancelled and filled again; some end at once, beside
    rows that go on.
    """
    llm = LLM(scripted.folder, device="cpu", batch_size=3)
    say(llm, tokens_of("out of the box"))
    stops = [[], ["f"], ["o"], ["f t"]]
    params = [replace(GREEDY, stop=stops[number % 4], max_new_tokens=14) for number in range(24)]
    outputs = llm.generate([""] * 24, params)
    expected = [("out of the box", "length"), ("out o", "stop"), ("", "stop"), ("out o", "stop")]
    assert [(output.text, output.finish_reason) for output in outputs] == expected * 6
    assert [len(output.token_ids) for output in outputs] == [14, 6, 1, 8] * 6
    assert not llm.engine.has_work


# --- streaming ---


def test_the_pieces_of_a_stream_are_the_decoded_ids(llm: LLM) -> None:
    """Random bytes: nearly every token begins, continues or breaks off a character."""
    assert llm.tokenizer is not None
    params = SamplingParams(temperature=3, max_new_tokens=120, ignore_eos=True)
    broken = 0
    for seed in range(4):
        prompt, params = "start é" * (seed % 3), replace(params, seed=seed)
        chunks = list(llm.stream(prompt, params))
        ids = [token for chunk in chunks for token in chunk.token_ids]
        text = "".join(chunk.text for chunk in chunks)
        assert text == llm.tokenizer.decode(ids) == bytes_of(ids).decode(errors="replace")
        [output] = llm.generate(prompt, params)
        assert (output.text, output.token_ids) == (text, ids)
        for place, chunk in enumerate(chunks[:-1]):
            whole = bytes_of(ids[: place + 1]).decode(errors="ignore")
            assert "".join(c.text for c in chunks[: place + 1]).replace("\ufffd", "") == whole
            broken += not chunk.text
    assert broken > 20, "no character was ever in two tokens: the test shows nothing"


def test_a_character_of_four_tokens_comes_whole(scripted: LLM) -> None:
    say(scripted, tokens_of("é🦙"))
    texts = [chunk.text for chunk in scripted.stream("", replace(GREEDY, ignore_eos=False))]
    assert texts == ["", "é", "", "", "", "🦙", ""]


def test_a_stream_that_is_left_early_is_cancelled(llm: LLM) -> None:
    long = replace(GREEDY, max_new_tokens=500)
    stream = llm.stream("fox", long)
    first = next(stream)
    assert isinstance(first, Chunk) and len(first.token_ids) == 1 and first.index == 0
    assert llm.engine.has_work
    stream.close()  # type: ignore[attr-defined]
    assert not llm.engine.has_work
    for _ in llm.stream_many(["fox", "hen", "elk"], long):
        break
    assert not llm.engine.has_work
    assert len(llm.score([1, 2, 3])) == 2
    assert llm.generate("fox", GREEDY)[0].finish_reason == "length"


def test_a_second_stream_beside_an_open_one_is_refused(llm: LLM) -> None:
    """It would take the first one's tokens, which then waited for them for ever."""
    stream = llm.stream("fox", GREEDY)
    next(stream)
    with pytest.raises(RuntimeError, match=r"another stream .* is running; finish or close it"):
        llm.generate("hen", GREEDY)
    assert sum(len(chunk.token_ids) for chunk in stream) == 19
    assert len(llm.generate("hen", GREEDY)[0].token_ids) == 20


def test_several_prompts_stream_side_by_side(llm: LLM) -> None:
    prompts = ["a", "bcd", "e" * 40]
    texts = ["", "", ""]
    order = []
    for chunk in llm.stream_many(prompts, GREEDY):
        texts[chunk.index] += chunk.text
        order.append(chunk.index)
    assert texts == [llm.generate(prompt, GREEDY)[0].text for prompt in prompts]
    assert sorted(order[-3:]) == [0, 1, 2] and len(order) == 60, "one after the other"


# --- what a folder lacks ---


def test_ids_need_no_tokenizer_and_text_does(bare: LLM, llm: LLM) -> None:
    [output] = bare.generate([1, 2, 3], GREEDY)
    assert output.token_ids == llm.generate([1, 2, 3], GREEDY)[0].token_ids
    assert output.text == ""
    for call in (
        lambda: bare.generate("text"),
        lambda: bare.generate([[1], "text"]),
        lambda: bare.stream("text"),
        lambda: bare.generate([1], SamplingParams(stop="x")),
    ):
        with pytest.raises(ValueError, match=r"has no tokenizer; give prompts as token ids"):
            call()
    with pytest.raises(ValueError, match="has no chat template"):
        bare.chat([{"role": "user", "content": "hi"}])


def test_an_empty_prompt_is_bos_alone_or_an_error(llm: LLM, tmp_path: Path) -> None:
    assert llm.encode("") == [BOS]
    assert llm.generate("", GREEDY)[0].token_ids == llm.generate([BOS], GREEDY)[0].token_ids
    folder = write_random_model(tmp_path)
    write_byte_tokenizer(folder, begins_with_bos=False)
    named = LLM(folder, device="cpu")
    assert (named.encode(""), named.encode("a")) == ([BOS], [ord("a")])
    write_byte_tokenizer(folder, bos=False)
    without = LLM(folder, device="cpu")
    assert without.encode("a") == [ord("a")]
    with pytest.raises(ValueError, match=r"prompt is empty .* no beginning-of-sequence"):
        without.generate("")
    with pytest.raises(ValueError, match=r"no tokens"):
        without.generate([[]])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([["a"] * 3, [1, VOCAB]], "outside the vocabulary"),
        ([[1, 2], [3] * 1025], "1025 tokens and the context holds 1024"),
    ],
)
def test_bad_input_is_met_before_anything_runs(llm: LLM, prompts: list[Any], message: str) -> None:
    """Also by `stream`, before its first chunk is asked for."""
    prompts[0] = "good"
    with pytest.raises(ValueError, match=message):
        llm.stream_many(prompts)
    with pytest.raises(ValueError, match=message):
        llm.stream(prompts[1])
    assert not llm.engine.has_work


# --- chat ---


def test_a_second_turn_reads_only_what_is_new(scripted: LLM) -> None:
    first = [{"role": "user", "content": "hi"}]
    prompt = [USER, *b"hi", EOS, ASSISTANT]
    assert scripted.encode_chat(first) == prompt
    answer = "hello é"
    say(scripted, [*tokens_of(answer), EOS], start=len(prompt))
    params = replace(GREEDY, ignore_eos=False)
    output = scripted.chat(first, params)
    assert (output.text, output.finish_reason) == (answer, "stop")
    assert output.stats.num_prompt_tokens == len(prompt)
    second = [
        *first,
        {"role": "assistant", "content": output.text},
        {"role": "user", "content": "and <|user|>?"},  # text, not a control token
    ]
    output = scripted.chat(second, params)
    held = len(prompt) + len(tokens_of(answer))  # the end token was said, but never read
    assert output.stats.num_cached_tokens == held
    total = held + len([EOS, USER, *b"and <|user|>?", EOS, ASSISTANT])
    assert output.stats.num_prompt_tokens == total
    assert "".join(chunk.text for chunk in scripted.stream_chat(first, params)) == answer


def test_a_second_turn_says_what_a_fresh_engine_says(llm: LLM) -> None:
    messages: list[dict[str, Any]] = []
    for text in ("first", "second, longer than the first", "third"):
        messages.append({"role": "user", "content": text})
        output = llm.chat(messages, GREEDY)
        cached = output.stats.num_cached_tokens
        assert (cached > 0) == (len(messages) > 1)
        llm.engine.forget()
        fresh = llm.chat(messages, GREEDY)
        assert fresh.stats.num_cached_tokens == 0 and fresh.token_ids == output.token_ids
        messages.append({"role": "assistant", "content": output.text})


# --- numbers ---


def test_logits_and_scores_are_those_of_transformers(tmp_path: Path) -> None:
    """Longer than one piece."""
    from transformers import AutoModelForCausalLM

    folder = tiny_llama(tmp_path, max_position_embeddings=1024)
    ids = torch.randint(3, 96, (700,)).tolist()
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits[0]
    llm = LLM(folder, device="cpu", dtype="fp32")
    logits = llm.logits(ids)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    chosen = expected.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    for length in (700, 513, 512, 2):
        torch.testing.assert_close(llm.score(ids[:length]), chosen[: length - 1], atol=1e-4, rtol=0)
    assert llm.score(ids[:1]).shape == (0,)
    with pytest.raises(ValueError, match="0 tokens"):
        llm.score([])


def test_run_stats_have_the_names_that_bench_prints(llm: LLM) -> None:
    llm.engine.forget()
    outputs = llm.generate(["a", "bc"], GREEDY)
    stats = llm.run_stats([output.stats for output in outputs], 1e9).as_dict()
    assert stats.pop("speculation") is None  # without a draft
    assert (
        list(stats)
        == (
            "prompt_tokens new_tokens decode_tok_s prefill_tok_s ttft_s itl_p50_ms itl_p99_ms "
            "bytes_per_token bandwidth_gb_s bandwidth_fraction peak_memory_bytes load_s compile_s "
            "num_ranks"
        ).split()
    )
    assert stats["prompt_tokens"] == 5 and stats["new_tokens"] == 40 and stats["compile_s"] == 0
    for name, value in stats.items():
        assert math.isfinite(value) and (value > 0 or name == "compile_s"), name
    # Two rows share each step's weights; halfway the used cache is 2.5 + 10 tokens a row.
    weights = sum(p.nbytes for n, p in llm.model.named_parameters() if n != "embed.weight")
    assert stats["bytes_per_token"] == pytest.approx(weights / 2 + 256 * 12.5, abs=256)
    assert stats["bandwidth_gb_s"] == stats["bandwidth_fraction"]
    assert json.loads(json.dumps(outputs[0].stats.as_dict()))["new_tokens"] == 20
    nothing = llm.run_stats([]).as_dict()
    assert nothing["new_tokens"] == 0 and nothing["ttft_s"] is None


def test_prompts_that_are_read_together_count_their_time_once(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of eight rows once counted the time of all eight: an eighth of the true rate."""
    ticks = iter(range(10_000))
    monkeypatch.setattr("gptfast.engine.perf_counter", lambda: float(next(ticks)))
    llm.engine.forget()
    outputs = llm.generate([[65] * 10] * 8, replace(GREEDY, max_new_tokens=2))
    requests = [output.stats for output in outputs]
    started = [request.started_at or 0.0 for request in requests]
    read_s = max(request.token_times[0] for request in requests) - min(started)
    assert llm.run_stats(requests).as_dict()["prefill_tok_s"] == pytest.approx(80 / read_s)


# --- how it is built ---


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("auto", torch.float32),
        ("fp32", torch.float32),
        ("float32", torch.float32),
        ("bf16", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("fp16", torch.float16),
        ("float16", torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtypes_by_all_their_names(
    tmp_path: Path, dtype: str | torch.dtype, expected: torch.dtype
) -> None:
    llm = LLM(write_random_model(tmp_path), device="cpu", dtype=dtype, max_seq_len=64)
    assert llm.model.embed.weight.dtype == expected
    assert llm.engine.runner.cache.layers[0].keys.dtype == expected
    [output] = llm.generate([[1, 2, 3]], replace(GREEDY, max_new_tokens=3))
    assert len(output.token_ids) == 3
    assert llm.logits([1, 2]).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8' is unknown"),
        ({"device": "abacus"}, "device 'abacus' is unknown"),
        ({"device": "cuda:99"}, "is not there"),
        ({"quant": "int5"}, "quantization 'int5' is unknown; use int8, int4"),
        ({"max_seq_len": 0}, r"max_seq_len is 0; this model allows 1 to 1024"),
        ({"max_seq_len": 1025}, r"max_seq_len is 1025; this model allows 1 to 1024"),
        ({"batch_size": 0}, r"batch size\) is 0; at least 1"),
        ({"batch_size": -1}, r"batch size\) is -1; at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    """Before the weights are read, which may take minutes."""

    def unread(parameters: Any) -> Any:
        raise AssertionError("weights were read first")

    with pytest.raises(ValueError, match=message):
        LLM(write_random_model(tmp_path), **{"device": "cpu", "progress": unread} | options)


def test_the_rows_grow_with_the_prompts_unless_they_are_given(tmp_path: Path) -> None:
    folder = write_random_model(tmp_path)
    params = replace(GREEDY, max_new_tokens=2)
    llm = LLM(folder, device="cpu")
    assert llm.engine.num_rows == 1
    for num_prompts, num_rows in ((1, 1), (3, 3), (2, 3), (20, 8)):
        assert len(llm.generate([[1, 2]] * num_prompts, params)) == num_prompts
        assert llm.engine.num_rows == num_rows
    assert LLM(folder, device="cpu").generate([1], replace(params, n=4))[3].finish_reason
    fixed = LLM(folder, device="cpu", batch_size=2, max_seq_len=32)
    fixed.generate([[1, 2]] * 5, params)
    assert (fixed.engine.num_rows, fixed.engine.max_seq_len) == (2, 32)


# --- a real model that nobody here trained ---


@pytest.fixture(scope="module")
def golden(shared_data: Path) -> list[dict[str, Any]]:
    path = shared_data / "checkpoints" / "stories260K-golden" / "golden_greedy.json"
    return json.loads(path.read_text())["cases"]


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Callable[[int | None], LLM]:
    folder = shared_data / "checkpoints" / "stories260K-hf"
    return lambda rows: LLM(folder, device="cpu", dtype="fp32", batch_size=rows)


def golden_params(case: dict[str, Any]) -> SamplingParams:
    return replace(GREEDY, max_new_tokens=len(case["token_ids"]) - len(case["prompt_ids"]))


@pytest.mark.parametrize("num_rows", [1, 3, 6])
def test_golden_stories(
    stories: Callable[[int], LLM], golden: list[dict[str, Any]], num_rows: int
) -> None:
    """Six published continuations, token for token, alone and together."""
    llm = stories(num_rows)
    assert [llm.encode(case["prompt"]) for case in golden] == [c["prompt_ids"] for c in golden]
    outputs = llm.generate([case["prompt"] for case in golden], list(map(golden_params, golden)))
    for output, case in zip(outputs, golden, strict=True):
        assert [*case["prompt_ids"], *output.token_ids] == case["token_ids"]
        assert case["prompt"] + output.text == case["text"]


def test_golden_logits(stories: Callable[[int], LLM], shared_data: Path) -> None:
    path = shared_data / "checkpoints" / "stories260K-golden" / "golden_logits_first32.npz"
    with np.load(path) as arrays:
        ids, expected = arrays["token_ids"].tolist(), torch.from_numpy(arrays["logits"])
    torch.testing.assert_close(stories(1).logits(ids), expected, atol=1e-4, rtol=0)


@pytest.mark.slow
def test_golden_likelihood(stories: Callable[[int], LLM], shared_data: Path) -> None:
    """BOS and the first 511 tokens of each story, scored by teacher forcing."""
    llm = stories(1)
    assert llm.tokenizer is not None
    text = (shared_data / "text" / "tinystories.txt").read_text()
    scores = [
        llm.score(llm.tokenizer.encode(story.strip(), bos=True)[:512])
        for story in text.split("<|endoftext|>")
        if story.strip()
    ]
    assert -torch.cat(scores).mean().item() == pytest.approx(1.506, abs=0.002)
