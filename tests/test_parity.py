"""Every family against transformers on the tiny random models of family_cases.py: prefill, cached
decode past the window, rows of different lengths, greedy text, rounding and compilation.

Wherever lengths do not change the rotation, transformers' full pass without a cache is the oracle.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from family_cases import (
    CASES,
    VOCAB,
    WINDOW,
    cases_of,
    randomise,
    raw_config,
    write_checkpoint,
)
from safetensors.torch import load_file, save_file
from test_engine import run
from torch import Tensor

from gptfast.cache import KVCache
from gptfast.config import ExpertsConfig
from gptfast.engine import Engine
from gptfast.experts import Experts, Router
from gptfast.families import FAMILIES, model_config
from gptfast.loading import load
from gptfast.model import Transformer
from gptfast.sampling import SamplingParams, sample

transformers = pytest.importorskip("transformers", reason="transformers is the oracle here")

LENGTH = 46  # of the texts read; the contexts hold 64
PROMPT = 12  # more than twice the window
PIECES = (3, 8, 16)  # shorter than a window, longer, and one that swallows the prompt


@dataclass
class Pair:
    """The same weights in our decoder and in transformers'."""

    folder: Path
    ours: Transformer
    theirs: Any
    seen: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def expected(self, ids: Sequence[int]) -> Tensor:
        """Their logits [T, V] of one pass over `ids`, without a cache."""
        key = tuple(ids)
        if key not in self.seen:
            self.seen[key] = self.theirs(torch.tensor([ids]), use_cache=False).logits[0]
        return self.seen[key]


def load_theirs(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    # Falcon's eager attention adds ALiBi twice, in the mask and to the scores; the other, like
    # Falcon's authors, once.
    alibi_falcon = json.loads((folder / "config.json").read_text()).get("alibi", False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation="sdpa" if alibi_falcon else "eager",
        experts_implementation="eager",
    )
    return model.eval()


def make_pair(folder: Path, name: str) -> Pair:
    write_checkpoint(folder, name)
    return Pair(folder, load(folder, torch.float32), load_theirs(folder))


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def random_ids(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (count,), generator=generator).tolist()


def assert_equal_logits(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-4, of logits that are apart by more than ones."""
    assert (theirs.amax(-1) - theirs.amin(-1)).min() > 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def uncached(model: Transformer, ids: Sequence[int]) -> Tensor:
    return model(torch.tensor([ids]), torch.arange(len(ids)).unsqueeze(0))[0]


def prefill(model: Transformer, cache: KVCache, row: int, ids: Sequence[int], piece: int) -> Tensor:
    """Reads a prompt into a row, the last piece padded with the spare slot -> logits [T, V]."""
    cache.lengths[row] = len(ids)
    logits = []
    for start in range(0, len(ids), piece):
        part = ids[start : start + piece]
        padding = piece - len(part)
        places = [*range(start, start + len(part)), *([cache.max_seq_len] * padding)]
        tokens = torch.tensor([[*part, *([0] * padding)]])
        logits.append(model(tokens, torch.tensor([places]), cache.row(row))[0, : len(part)])
    return torch.cat(logits)


def decode(model: Transformer, cache: KVCache, tokens: Sequence[int | None]) -> Tensor:
    """One token for every row (None: the row is idle) -> logits [B, V]."""
    active = torch.tensor([token is not None for token in tokens])
    cache.lengths.add_(active)
    positions = (cache.lengths - 1).where(active, cache.max_seq_len)
    ids = torch.tensor([token or 0 for token in tokens])
    return model(ids.unsqueeze(1), positions.unsqueeze(1), cache)[:, 0]


def cached(
    model: Transformer, ids: Sequence[int], prompt_length: int, piece: int, dtype: torch.dtype
) -> Tensor:
    """Logits [T, V] of a prompt read in pieces and of every later token alone."""
    cache = KVCache.allocate(model.config, 1, len(ids), dtype)
    logits = [prefill(model, cache, 0, ids[:prompt_length], piece)]
    logits += [decode(model, cache, [token]) for token in ids[prompt_length:]]
    return torch.cat(logits)


# -- logits --


def test_every_family_has_two_cases() -> None:
    assert {name.split("-")[0] for name in CASES} == set(FAMILIES)
    assert [model_type for model_type in FAMILIES if len(cases_of(model_type)) < 2] == []


@pytest.mark.parametrize("length", [1, PROMPT, LENGTH])
def test_uncached_pass(pair: Pair, length: int) -> None:
    ids = random_ids(length)
    assert_equal_logits(uncached(pair.ours, ids), pair.expected(ids))


@pytest.mark.parametrize("piece", PIECES)
def test_prefill_in_pieces(pair: Pair, piece: int) -> None:
    ids = random_ids(LENGTH)
    cache = KVCache.allocate(pair.ours.config, 1, LENGTH, torch.float32)
    assert_equal_logits(prefill(pair.ours, cache, 0, ids, piece), pair.expected(ids))


def test_cached_decode_past_the_window(pair: Pair) -> None:
    assert PROMPT > 2 * WINDOW
    ids = random_ids(LENGTH)
    ours = cached(pair.ours, ids, PROMPT, 8, torch.float32)
    assert_equal_logits(ours, pair.expected(ids))


def test_rows_of_different_lengths(pair: Pair) -> None:
    """Rows share a cache and its steps, an idle one among them; each is as it would be alone."""
    lengths, num_new = {0: 21, 1: PROMPT, 3: 30}, 8
    cache = KVCache.allocate(pair.ours.config, 4, LENGTH, torch.float32)
    ids = {row: random_ids(length + num_new, row) for row, length in lengths.items()}
    logits = {row: [prefill(pair.ours, cache, row, ids[row][:n], 8)] for row, n in lengths.items()}
    for step in range(num_new):
        tokens = [ids[row][lengths[row] + step] if row in lengths else None for row in range(4)]
        out = decode(pair.ours, cache, tokens)
        for row in lengths:
            logits[row].append(out[row : row + 1])
    for row in lengths:
        assert_equal_logits(torch.cat(logits[row]), pair.expected(ids[row]))


def test_two_prompts_in_one_step(pair: Pair) -> None:
    """Both rows are read at once, the shorter padded to the longer; so are the tokens after it."""
    ids = [random_ids(25, 1), random_ids(17, 2)]
    cache = KVCache.allocate(pair.ours.config, 2, 30, torch.float32)
    cache.lengths.copy_(torch.tensor([25, 17]))
    for start, stop in ((0, 19), (19, 25)):
        parts = [row[start:stop] for row in ids]
        tokens, places = torch.zeros(2, stop - start, dtype=torch.int64), []
        for row, part in enumerate(parts):
            tokens[row, : len(part)] = torch.tensor(part)
            padding = [30] * (stop - start - len(part))
            places.append([*range(start, start + len(part)), *padding])
        logits = pair.ours(tokens, torch.tensor(places), cache)
        assert logits.isfinite().all()
        for row, part in enumerate(parts):
            theirs = pair.expected(ids[row])[start : start + len(part)]
            if part:
                assert_equal_logits(logits[row, : len(part)], theirs)


def test_longrope_grows_in_the_middle_of_a_text(tmp_path: Path) -> None:
    """Keys that are cached keep their rotation when the text outgrows the original context, as with
    transformers' cache.
    """
    raw = raw_config("phi3-longrope-beyond-original") | {"original_max_position_embeddings": 16}
    write_checkpoint(tmp_path, "phi3-growing", raw)
    pair, ids = Pair(tmp_path, load(tmp_path, torch.float32), load_theirs(tmp_path)), random_ids(24)
    state = pair.theirs(torch.tensor([ids[:PROMPT]]), use_cache=True)
    theirs = [state.logits[0]]
    for token in ids[PROMPT:]:
        past = state.past_key_values
        state = pair.theirs(torch.tensor([[token]]), past_key_values=past, use_cache=True)
        theirs.append(state.logits[0])
    ours = cached(pair.ours, ids, PROMPT, 8, torch.float32)
    assert_equal_logits(ours, torch.cat(theirs))
    assert (ours - uncached(pair.ours, ids))[:PROMPT].abs().max() > 0.1


# Far beyond the context of the other tests: more than one piece of prompt, here with what changes,
# and a window that begins between two of them.
LONG: dict[str, dict[str, Any]] = {
    "mistral-window": {"sliding_window": 300},
    "gemma3_text-two-ropes-pattern": {"sliding_window": 300},
    "gpt_oss-sinks-yarn": {"sliding_window": 300},
    "deepseek_v3-groups-yarn": {},
    "bloom-6-heads-untied": {},
    "opt-tied": {},
}


@pytest.mark.parametrize("name", LONG)
def test_long_texts(name: str, tmp_path: Path) -> None:
    """530 prompt tokens are a largest piece and 18 more; 8 tokens are decoded after them."""
    size = "seq_length" if name.startswith("bloom") else "max_position_embeddings"
    write_checkpoint(tmp_path, name, raw_config(name) | LONG[name] | {size: 600})
    pair, ids = (
        Pair(tmp_path, load(tmp_path, torch.float32), load_theirs(tmp_path)),
        random_ids(538),
    )
    theirs = pair.expected(ids)
    assert_equal_logits(uncached(pair.ours, ids), theirs)
    assert_equal_logits(cached(pair.ours, ids, 530, 512, torch.float32), theirs)
    assert_equal_logits(torch.cat(list(Engine(pair.ours, 1, 600).all_logits(ids))), theirs)


# -- text --


def test_greedy_text(pair: Pair) -> None:
    """Three requests at once through two rows, 32 tokens each. If each token is the most likely one
    after all before it in their full pass, then so it is step by step.
    """
    greedy = SamplingParams(temperature=0, ignore_eos=True, max_new_tokens=32)
    prompts = [random_ids(PROMPT, 5), random_ids(20, 6), random_ids(9, 7)]
    results = run(Engine(pair.ours, 2, 64), *((prompt, greedy) for prompt in prompts))
    for prompt, result in zip(prompts, results, strict=True):
        assert len(result.token_ids) == 32
        logits = pair.expected(prompt + result.token_ids[:-1])[len(prompt) - 1 :]
        best = logits.topk(2).values
        assert (best[:, 0] - best[:, 1]).min() > 1e-4, "rounding could decide: choose other prompts"
        assert result.token_ids == logits.argmax(-1).tolist()


# -- rounding --


def test_bfloat16_rounds_no_worse_than_transformers(pair: Pair) -> None:
    """The distance from the float32 logits at most positions of 8 texts, without and with a cache.

    The median: where rounding changes the choice of an expert, the error is another one altogether,
    in transformers as here.
    """
    ours, theirs = load(pair.folder, torch.bfloat16), load_theirs(pair.folder, torch.bfloat16)
    texts = [random_ids(LENGTH, seed) for seed in range(8)]
    tokens = torch.tensor(texts)
    exact = pair.theirs(tokens, use_cache=False).logits
    outputs = [theirs(tokens, use_cache=False).logits]
    outputs.append(ours(tokens, torch.arange(LENGTH).expand(8, -1)))
    parts = [cached(ours, ids, LENGTH - 3, 16, torch.bfloat16) for ids in texts]
    outputs.append(torch.stack(parts))
    errors = [(x.float() - exact).abs().mean(-1).median().item() for x in outputs]
    assert 0 < errors[1] <= 1.5 * errors[0]
    assert 0 < errors[2] <= 1.5 * errors[0]


# -- compilation --


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[dict[str, Any]]]:
    """Sets the backend of torch.compile -> the options of every call from then on. The sampler, the
    same for every family, stays as it is.
    """

    def choose(backend: str) -> list[dict[str, Any]]:
        calls: list[dict[str, Any]] = []
        compile = torch.compile

        def keep(function: Any, **options: Any) -> Any:
            if function.__name__ == sample.__name__:
                return function
            calls.append(options)
            return compile(function, **(options | {"backend": backend}))

        monkeypatch.setattr(torch, "compile", keep)
        return calls

    return choose


def compiled_and_eager(pair: Pair, num_rows: int) -> tuple[list[Any], list[Any]]:
    """What two requests get of a compiled and of an eager engine."""
    params = SamplingParams(temperature=0, ignore_eos=True, max_new_tokens=8, logprobs=4)
    work = [(random_ids(PROMPT, 5), params), (random_ids(20, 6), params)]
    both = [run(Engine(pair.ours, num_rows, 64, compile=flag), *work) for flag in (True, False)]
    return both[0], both[1]


def assert_same_results(compiled: list[Any], eager: list[Any]) -> None:
    for ours, plain in zip(compiled, eager, strict=True):
        assert ours.token_ids == plain.token_ids and len(ours.token_ids) == 8
        for one, other in zip(ours.logprobs, plain.logprobs, strict=True):
            assert one.top == pytest.approx(other.top, abs=1e-4)


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(
            name, marks=() if name == cases_of(name.split("-")[0])[-1] else pytest.mark.slow
        )
        for name in CASES
    ],
    indirect=True,
)
def test_traces_without_a_break(
    pair: Pair,
    compiler: Callable[[str], list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prefill and decode of an engine, every block a whole graph: a break would be an error. With
    the blocks' own decode, that of devices without a fused step.

    A trace takes seconds: with -m 'not slow' one case of each family.
    """
    calls = compiler("aot_eager")
    monkeypatch.setattr("gptfast.cached.fused_step", lambda model, cache: None)
    assert_same_results(*compiled_and_eager(pair, num_rows=1))
    assert len(calls) >= 2 and all(options["fullgraph"] for options in calls)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "gemma2-softcaps-window",
        "qwen3_moe-normalised",
        "deepseek_v3-groups-yarn",
        "gpt_oss-sinks-yarn",
        "gpt_neox-parallel",
        "bloom-6-heads-untied",
    ],
)
def test_inductor_equals_eager(name: str, tmp_path: Path) -> None:
    assert_same_results(*compiled_and_eager(make_pair(tmp_path, name), num_rows=2))


# -- other spellings --


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_transformers_saves_loads(model_type: str, tmp_path: Path) -> None:
    """Today's config.json, whatever this release writes, means what the publisher's means."""
    ids = random_ids(30)
    for name in cases_of(model_type):
        folder = write_checkpoint(tmp_path / name, name)
        expected = uncached(load(folder, torch.float32), ids)
        load_theirs(folder).save_pretrained(folder)
        assert json.loads((folder / "config.json").read_text()) != raw_config(name)
        assert torch.equal(uncached(load(folder, torch.float32), ids), expected), name


def without(prefix: str) -> Callable[[str], str]:
    return lambda name: name.removeprefix(prefix)


# How names of published files differ from what transformers saves today, and the buffers that
# older releases wrote beside the weights.
PUBLISHED: dict[str, tuple[Callable[[str], str], dict[str, list[int]]]] = {
    "bloom-4-heads": (without("transformer."), {}),
    "gpt2-tied": (without("transformer."), {"h.0.attn.bias": [1, 1, 64, 64]}),
    "opt-tied": (without("model."), {}),
    "llama-gqa": (str, {"model.layers.0.self_attn.rotary_emb.inv_freq": [4]}),
    "gpt_neox-parallel": (
        str,
        {
            "gpt_neox.layers.0.attention.bias": [1, 1, 64, 64],
            "gpt_neox.layers.0.attention.masked_bias": [],
            "gpt_neox.layers.0.attention.rotary_emb.inv_freq": [1],
        },
    ),
    "gptj-partial-rotary": (
        str,
        {"transformer.h.0.attn.bias": [1, 1, 64, 64], "transformer.h.0.attn.masked_bias": []},
    ),
    "codegen-4-heads": (str, {"transformer.h.0.attn.causal_mask": [1, 1, 64, 64]}),
    "falcon-7b": (str, {"lm_head.weight": [96, 32]}),  # a copy of the embedding
    "stablelm-sequential-biases": (str, {"model.layers.0.self_attn.rotary_emb.inv_freq": [1]}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_spellings_of_names(name: str, tmp_path: Path) -> None:
    rename, buffers = PUBLISHED[name]
    write_checkpoint(tmp_path, name)
    ids, path = random_ids(30), tmp_path / "model.safetensors"
    expected = uncached(load(tmp_path, torch.float32), ids)
    tensors = {rename(key): tensor for key, tensor in load_file(path).items()}
    embedding = tensors.get("transformer.word_embeddings.weight", torch.empty(0))
    for key, shape in buffers.items():
        tensors[key] = embedding.clone() if key == "lm_head.weight" else torch.zeros(shape)
    save_file(tensors, path)
    assert torch.equal(uncached(load(tmp_path, torch.float32), ids), expected)


VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
# Their class, the text's case, and what stands beside the text in config.json.
NESTED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "gemma3_text-two-ropes-pattern",
        {
            "vision_config": VISION | {"model_type": "siglip_vision_model"},
            "mm_tokens_per_image": 4,
        },
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        "mistral-window",
        {
            "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8},
            "tie_word_embeddings": False,
        },
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        "llama-gqa",
        {
            "vision_config": VISION | {"model_type": "clip_vision_model", "projection_dim": 8},
            "tie_word_embeddings": False,
        },
    ),
}


@pytest.mark.parametrize("model_type", NESTED)
def test_the_language_part_of_a_multimodal_model(model_type: str, tmp_path: Path) -> None:
    class_name, case, beside = NESTED[model_type]
    raw = {"model_type": model_type, "text_config": raw_config(case)} | beside
    (tmp_path / "config.json").write_text(json.dumps(raw))
    build = getattr(transformers, class_name)
    theirs = build(transformers.AutoConfig.from_pretrained(tmp_path)).eval()
    randomise(theirs, f"gemma-{model_type}" if model_type == "gemma3" else model_type)
    theirs.save_pretrained(tmp_path)
    assert any("vision" in name for name in load_file(tmp_path / "model.safetensors"))
    theirs = build.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ids = random_ids(30)
    expected = theirs(torch.tensor([ids])).logits[0]
    for config in (json.loads((tmp_path / "config.json").read_text()), raw):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert_equal_logits(uncached(load(tmp_path, torch.float32), ids), expected)


# -- experts, by hand --

FOUR = [0.1, 0.2, 0.3, 0.4]  # scores of four experts


@pytest.mark.parametrize(
    ("scores", "facts", "expected"),
    [
        (FOUR, {"normalize": False}, {3: 0.4, 2: 0.3}),
        (FOUR, {"normalize": True}, {3: 4 / 7, 2: 3 / 7}),
        (FOUR, {"normalize": False, "scale": 2.0}, {3: 0.8, 2: 0.6}),
        # By its best expert the first group wins, by its best two the second.
        ([0.4, 0.04, 0.3, 0.26], {"normalize": False, "num_groups": 2}, {0: 0.4, 1: 0.04}),
        (
            [0.4, 0.04, 0.3, 0.26],
            {"normalize": True, "num_groups": 2, "group_score": "best_two"},
            {2: 30 / 56, 3: 26 / 56},
        ),
        # Both groups may be chosen from: the limit changes nothing.
        (FOUR, {"normalize": False, "num_groups": 2, "num_active_groups": 2}, {3: 0.4, 2: 0.3}),
    ],
)
def test_routing_by_hand(
    scores: list[float], facts: dict[str, Any], expected: dict[int, float]
) -> None:
    router = Router(4, ExpertsConfig(num_experts=4, num_active=2, hidden_dim=8, **facts))
    router.weight.copy_(torch.eye(4))
    weights, chosen = router(torch.tensor([scores]).log())
    found = dict(zip(chosen[0].tolist(), weights[0].tolist(), strict=True))
    assert found == pytest.approx(expected, abs=1e-6)


def test_a_correction_takes_part_in_the_choice_only() -> None:
    """Sigmoids 0.5, 0.75, 0.25, 0.9 and corrections that put the first and third in front."""
    facts = ExpertsConfig(
        num_experts=4, num_active=2, hidden_dim=8, score="sigmoid", correction_bias=True,
        normalize=True, scale=2.5,
    )  # fmt: skip
    router = Router(4, facts)
    assert router.correction is not None
    router.weight.copy_(torch.eye(4))
    router.correction.copy_(torch.tensor([0.6, 0.0, 0.8, -0.2]))
    weights, chosen = router(torch.tensor([[0.5, 0.75, 0.25, 0.9]]).logit())
    found = dict(zip(chosen[0].tolist(), weights[0].tolist(), strict=True))
    assert found == pytest.approx({0: 2.5 * 2 / 3, 2: 2.5 / 3}, abs=1e-5)


def test_a_bias_of_the_router_adds_to_its_scores() -> None:
    facts = ExpertsConfig(num_experts=3, num_active=1, hidden_dim=8, router_bias=True)
    router = Router(3, facts)
    assert router.bias is not None
    router.weight.copy_(torch.eye(3))
    router.bias.copy_(torch.tensor([0.0, 5.0, 0.0]))
    assert router(torch.tensor([[2.0, 0.0, 1.0]]))[1].tolist() == [[1]]


def test_experts_by_a_plain_loop() -> None:
    """Each token through each of its experts, one matrix after the other, and the shared one."""
    config = model_config(raw_config("qwen2_moe-shared-expert"))
    experts = Experts(config)
    generator = torch.Generator().manual_seed(1)
    for parameter in experts.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    x = torch.randn(7, config.dim, generator=generator)
    expected = []
    for token in x:
        scores = (experts.router.weight @ token).softmax(0)
        total = torch.zeros(config.dim)
        for index in sorted(range(8), key=lambda i: -float(scores[i]))[:3]:
            gate, up = (experts.expert_gate_up.weight[index] @ token).chunk(2)
            total += scores[index] * (experts.expert_down.weight[index] @ (F.silu(gate) * up))
        assert experts.shared is not None and experts.shared_gate is not None
        total += experts.shared_gate(token).sigmoid() * experts.shared(token)
        expected.append(total)
    torch.testing.assert_close(experts(x), torch.stack(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(experts(x[:1]), torch.stack(expected[:1]), rtol=1e-5, atol=1e-5)
    together = experts(x.view(1, 7, -1))
    assert together.shape == (1, 7, config.dim)
    torch.testing.assert_close(together[0], torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_a_window_as_long_as_the_context_still_has_its_own_rope(tmp_path: Path) -> None:
    """It hides nothing, but Gemma 3 turns its local layers at another base all the same."""
    name = next(name for name in CASES if name.startswith("gemma3_text-"))
    raw = raw_config(name) | {"sliding_window": 4096}
    write_checkpoint(tmp_path, name, raw)
    pair = Pair(tmp_path, load(tmp_path, torch.float32), load_theirs(tmp_path))
    ids = random_ids(LENGTH)
    assert_equal_logits(uncached(pair.ours, ids), pair.expected(ids))
    assert {block.attention.window for block in pair.ours.blocks} == {None}
