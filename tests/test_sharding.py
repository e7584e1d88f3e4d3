"""What each rank of a group holds: read one rank after the other in this process, and held against
the whole model, cut here once more by rules of its own. Ranks that are threads add up what they
have to the logits of the whole.
"""

import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from family_cases import CASES, raw_config, write_checkpoint
from safetensors.torch import load_file, save_file
from test_quantized_files import LAYOUTS
from tiny import LLAMA, llama_tensors, tiny_llama, write_folder
from torch import Tensor

from gptfast.checkpoint import inspect
from gptfast.config import ModelConfig
from gptfast.convert import convert
from gptfast.families import model_config
from gptfast.foreign.tensors import ForeignTensors
from gptfast.loading import check_memory, load, weight_bytes
from gptfast.model import Transformer
from gptfast.parallel import ALONE, Group
from gptfast.quantization import quant_plan
from gptfast.quantized_files import QuantizedFiles
from gptfast.sharding import check_groups, local_config, possible_sizes
from gptfast.tensor_files import TensorFiles
from quantize.formats import Format
from quantize.rounding import round_to_nearest

CPU = torch.device("cpu")


# -- the oracle: a whole weight cut by hand --


def share(x: Tensor, dim: int, rank: int, size: int) -> Tensor:
    """Equal parts; a vocabulary that does not divide gives the first ranks one more each."""
    return x.tensor_split(size, dim)[rank]


def heads_of(x: Tensor, num_heads: int, rank: int, size: int) -> Tensor:
    """The rows of a rank's heads; where there are more ranks than heads, neighbours have the same
    one.
    """
    by_head = x.unflatten(0, (num_heads, -1))
    by_head = by_head.repeat_interleave(max(1, size // num_heads), 0)
    return share(by_head, 0, rank, size).flatten(0, 1)


def cut(name: str, x: Tensor, config: ModelConfig, group: Group) -> Tensor:
    """Of a whole parameter what this rank should have."""
    rank, size = group.rank, group.size
    is_bias = name.endswith(".bias")
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if re.match(r"(embed|head)\.", name):
        return share(x, 0, rank, size)
    if ".attention.qkv." in name:
        q, k, v = x.split([n * config.head_dim for n in (heads, kv_heads, kv_heads)])
        k, v = (heads_of(part, kv_heads, rank, size) for part in (k, v))
        return torch.cat((heads_of(q, heads, rank, size), k, v))
    if re.search(r"attention\.(q\.weight|kv_b|sinks|slopes)$", name):
        return heads_of(x, heads, rank, size)
    if re.search(r"attention\.[qk]_norm\.", name) and config.qk_norm in ("heads", "all"):
        return heads_of(x, heads if "q_norm" in name else kv_heads, rank, size)
    if ".expert_" in name and group.by_expert:
        return share(x, 0, rank, size)
    if re.search(r"(attention\.out|down)\.", name):
        if is_bias:
            return x if rank == 0 else torch.zeros_like(x)
        return share(x, -1, rank, size)
    if re.search(r"(gate_up|mlp\.up)\.", name):
        dim = x.dim() - 1 if is_bias else x.dim() - 2
        parts = x.chunk(2, dim) if "gate_up" in name else (x,)
        return torch.cat([share(part, dim, rank, size) for part in parts], dim)
    return x


def numbers(model: Transformer) -> dict[str, Tensor]:
    """Every parameter in plain numbers, of whatever form its module has, and ALiBi's slopes."""
    found = {name: buffer for name, buffer in model.named_buffers() if name.endswith("slopes")}
    for name, module in model.named_modules():
        if hasattr(module, "dequantize"):
            found[f"{name}.weight"] = module.dequantize()
            if module.bias is not None:
                found[f"{name}.bias"] = module.bias
        else:
            own = module.named_parameters(name, recurse=False, remove_duplicate=False)
            found |= {key: parameter.detach() for key, parameter in own}
    return found


def every_rank(size: int, by_expert: bool = False) -> list[Group]:
    return [Group(rank, size, by_expert) for rank in range(size)]


def assert_shares(
    folder: Path, groups: list[Group], dtype: str = "fp32", quant: str | None = None
) -> list[Transformer]:
    """Loads the whole model and each rank of the groups, and compares; returns the ranks."""
    source = inspect(folder)
    whole, ranks = numbers(load(source, dtype, quant=quant)), []
    for group in groups:
        model = load(source, dtype, quant=quant, group=group)
        found = numbers(model)
        assert found.keys() == whole.keys()
        for name, tensor in whole.items():
            expected = cut(name, tensor, source.config, group)
            assert found[name].shape == expected.shape, (name, group)
            assert torch.equal(found[name], expected), (name, group)
        ranks.append(model)
    return ranks


# -- every kind of model --


@pytest.mark.parametrize("name", CASES)
def test_every_family(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path, name)
    config = model_config(raw_config(name), None)
    sizes = possible_sizes(config, most=4)
    assert sizes in ([2, 4], [2, 3])
    groups = [thread_ranks(size) for size in sizes]
    if config.experts is not None:
        groups.append(thread_ranks(2, by_expert=True))
    tokens = torch.randint(3, 90, (2, 12))
    expected = logits(load(folder, "fp32"), tokens)
    for ranks in groups:
        models = assert_shares(folder, ranks)
        with ThreadPoolExecutor(len(ranks), "", torch.set_num_threads, (1,)) as pool:
            found = list(pool.map(logits, models, [tokens] * len(ranks)))
        for each in found:
            assert torch.equal(each, found[0])
            assert torch.allclose(each, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@dataclass(frozen=True)
class ThreadRank(Group):
    """A rank that is a thread."""

    parts: list[Any] = field(default_factory=list)
    meeting: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))

    def all_gather(self, x: Tensor) -> Tensor:
        self.parts[self.rank] = x
        self.meeting.wait()
        found = torch.stack(self.parts)
        self.meeting.wait()
        return found

    def all_reduce(self, x: Tensor) -> Tensor:
        return self.all_gather(x).sum(0)


def thread_ranks(size: int, by_expert: bool = False) -> list[Group]:
    both: dict[str, Any] = {"parts": [None] * size, "meeting": threading.Barrier(size, timeout=60)}
    return [ThreadRank(rank, size, by_expert, **both) for rank in range(size)]


@torch.no_grad()
def logits(model: Transformer, tokens: Tensor) -> Tensor:
    """Of tokens [B, T] that follow each other from the first position on."""
    positions = torch.arange(tokens.size(1)).expand(tokens.shape)
    try:
        return model(tokens, positions)
    except Exception:
        if isinstance(model.group, ThreadRank):
            model.group.meeting.abort()  # the others need not wait for this one
        raise


# Experts one by one and stacked, latents, a norm for each head, queries beside keys, one KV head.
OWN = ["mixtral-top2", "gpt_oss-layer-types-today", "deepseek_v3-groups-yarn", "falcon-7b"]
OWN += ["stablelm-parallel-qk-norm", "gpt2-inner-relu", "codegen-8-heads-tied"]


@pytest.mark.parametrize("name", OWN)
def test_files_of_our_own_names(tmp_path: Path, name: str) -> None:
    convert(write_checkpoint(tmp_path / "published", name), tmp_path / "own")
    config = model_config(raw_config(name), None)
    groups = every_rank(max(possible_sizes(config)))
    if config.experts is not None:
        groups += every_rank(2, by_expert=True)
    assert_shares(tmp_path / "own", groups)


def test_quarters_of_a_projection_between_ranks(tmp_path: Path) -> None:
    """CodeGen's file has four parts, each with queries, values, keys; eight ranks have halves."""
    assert_shares(write_checkpoint(tmp_path, "codegen-8-heads-tied"), every_rank(8))


def test_bfloat16_in_its_packed_form(tmp_path: Path) -> None:
    """Shares pass through the threads' memory on their way."""
    assert_shares(tiny_llama(tmp_path, attention_bias=True, mlp_bias=True), every_rank(2), "bf16")


def test_a_vocabulary_that_does_not_divide(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, vocab_size=97)
    ranks = assert_shares(folder, every_rank(4))
    assert [len(rank.embed.weight) for rank in ranks] == [25, 24, 24, 24]


def test_a_rank_can_tell_its_neighbours_numbers_apart(tmp_path: Path) -> None:
    """Of the oracle: no two ranks have the same share of any weight that is cut."""
    first, second = (load(tiny_llama(tmp_path), group=group) for group in every_rank(2))
    for name, tensor in numbers(first).items():
        assert torch.equal(tensor, numbers(second)[name]) == ("norm" in name), name


# -- quantized --

FORMATS = ["int8", "int4-g32", "int4-g8-asym", "int4-row", "fp8", "fp8-g32", "mxfp4"]
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # two ranks cut it between groups of 32


@pytest.mark.parametrize("form", FORMATS)
def test_our_quantized_files(tmp_path: Path, form: str) -> None:
    plan = quant_plan(form, head=form, embedding=form)
    convert(tiny_llama(tmp_path / "plain", **WIDE, mlp_bias=True), tmp_path / "own", quant=plan)
    ranks = assert_shares(tmp_path / "own", every_rank(2))
    assert {f.name for rank in ranks for f in rank.formats.values()} == {form}
    assert_shares(tmp_path / "own", every_rank(4), quant="none")


@pytest.mark.parametrize("form", ["int8", "int4-g8-asym", "mxfp4"])
def test_our_quantized_experts(tmp_path: Path, form: str) -> None:
    raw = raw_config("mixtral-top2") | WIDE
    source = write_checkpoint(tmp_path / "plain", "mixtral-top2", raw)
    convert(source, tmp_path / "own", quant=quant_plan(form))
    assert_shares(tmp_path / "own", every_rank(2) + every_rank(2, by_expert=True))


def foreign(folder: Path, layout: str, **sizes: int) -> Path:
    """A tiny Llama in somebody else's layout of quantized weights."""
    settings, stored_as, _ = LAYOUTS[layout]
    raw = LLAMA | sizes | {"attention_bias": True, "quantization_config": settings}
    stored = {}
    for name, tensor in llama_tensors(raw).items():
        is_quantized = "proj." in name and name.endswith(".weight")
        parts = stored_as(tensor)[0] if is_quantized else {"weight": tensor}
        prefix = name.removesuffix(".weight")
        stored |= (
            {f"{prefix}.{part}": t for part, t in parts.items()}
            if len(parts) > 1
            else {name: tensor}
        )
    return write_folder(folder, raw, stored, num_shards=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_others(tmp_path: Path, layout: str) -> None:
    folder = foreign(tmp_path, layout, **WIDE)
    assert_shares(folder, every_rank(4), quant="none")
    if layout != "gptq-act":
        assert_shares(folder, every_rank(2))


def mxfp4_folder(folder: Path) -> Path:
    """gpt-oss as published, its experts in blocks of 32; two ranks have whole blocks."""
    name = "gpt_oss-sinks-yarn"
    raw = raw_config(name) | {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    write_checkpoint(folder, name, raw)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        num_experts, columns, rows = tensors.pop(name).shape
        shape = (num_experts, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(122, 126, shape, dtype=torch.uint8)
    return write_folder(folder, raw | {"quantization_config": {"quant_method": "mxfp4"}}, tensors)


def test_mxfp4_as_published(tmp_path: Path) -> None:
    folder = mxfp4_folder(tmp_path)
    assert_shares(folder, every_rank(2) + every_rank(4, by_expert=True))
    assert_shares(folder, every_rank(4), quant="none")  # cuts inside of blocks


@pytest.mark.parametrize("form", ["int8", "int4-g32", "int4-g64"])
def test_what_is_quantized_while_loading_is_cut_first(tmp_path: Path, form: str) -> None:
    """Groups that no cut parts are those of one process (but for the last bit of a scale, which the
    order of a sum decides). The scale of a row is that of a rank's columns.
    """
    source = inspect(tiny_llama(tmp_path, **WIDE, tie_word_embeddings=True))
    plan = quant_plan(form, head=form, embedding="int8")
    plain, whole = numbers(load(source)), numbers(load(source, quant=plan))
    parted = {"int4-g32": (), "int4-g64": ("out.weight",)}.get(form, ("out.weight", "down.weight"))
    for group in every_rank(2):
        found = numbers(load(source, quant=plan, group=group))
        assert found.keys() == whole.keys()
        for name, tensor in found.items():
            expected = cut(name, plain.get(name, plain["embed.weight"]), source.config, group)
            if "norm" not in name:
                given = plan.format_of(name.removesuffix(".weight"))
                assert given is not None
                expected = round_to_nearest(expected, given).dequantize()
            assert torch.equal(tensor, expected), name
            as_in_one = cut(name, whole[name], source.config, group)
            is_same = torch.allclose(tensor, as_in_one, rtol=1e-6, atol=0)
            assert is_same != name.endswith(parted), name


# -- what is read --


def bytes_read(folder: Path, groups: list[Group], dtype: str = "fp32") -> list[int]:
    counts = []
    for group in groups:
        source = inspect(folder)
        assert isinstance(source.tensors, TensorFiles | QuantizedFiles)
        before = source.tensors.bytes_read
        load(source, dtype, group=group)
        counts.append(source.tensors.bytes_read - before)
    return counts


def stored_bytes(folder: Path, *parts: str) -> int:
    """Of the tensors whose names have one of the parts in them."""
    tensors = load_file(folder / "model.safetensors")
    return sum(t.nbytes for n, t in tensors.items() if any(part in n for part in parts))


# What each rank reads, of a model of each way to store things.
REPLICATED = {
    "llama-gqa": ("norm",),
    "gpt2-inner-relu": ("ln_", "wpe"),
    "gpt_neox-parallel": ("norm",),  # queries, keys and values of a head beside each other
    "mixtral-top2": ("norm", "gate"),
    "gpt_oss-sinks-yarn": ("norm", "router"),  # gate and up in turn
    "deepseek_v2-lite": ("norm", "kv_a_proj", "mlp.gate.weight"),
    "codegen-4-heads": ("ln_",),
}


@pytest.mark.parametrize("is_own", [False, True])
@pytest.mark.parametrize("name", REPLICATED)
def test_each_rank_reads_its_share(tmp_path: Path, name: str, is_own: bool) -> None:
    """Together the ranks read everything once, and what all of them need once each."""
    folder = published = write_checkpoint(tmp_path / "published", name)
    if is_own:
        folder = tmp_path / "own"
        convert(published, folder)
    total, common = stored_bytes(published, ""), stored_bytes(published, *REPLICATED[name])
    assert bytes_read(folder, [ALONE]) == [total]
    groups = [every_rank(2)]
    if "mixtral" in name or "gpt_oss" in name:
        groups.append(every_rank(2, by_expert=True))
    for ranks in groups:
        counts = bytes_read(folder, ranks)
        assert sum(counts) == total + common
        assert counts[1] < total / 2 + common


@pytest.mark.parametrize("form", ["int4-g32", "int8"])
def test_each_rank_reads_its_share_of_quantized_files(tmp_path: Path, form: str) -> None:
    plan = quant_plan(form, head=form)
    convert(tiny_llama(tmp_path / "plain", **WIDE), tmp_path / "own", quant=plan)
    common = ["norm"] + ["out.scales", "down.scales"] * (form == "int8")
    total, common = stored_bytes(tmp_path / "own", ""), stored_bytes(tmp_path / "own", *common)
    assert sum(bytes_read(tmp_path / "own", every_rank(2))) == total + common


def test_blocks_of_a_mapped_tensor(tmp_path: Path) -> None:
    """Also where numbers do not lie at a multiple of their size, as a foreign tool may write."""
    rows = torch.randn(6, 3)
    save_file({"a": rows}, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    for padding in (0, 1):
        header = data[8 : 8 + size] + b" " * padding
        moved = len(header).to_bytes(8, "little") + header + data[8 + size :]
        (tmp_path / "model.safetensors").write_bytes(moved)
        files = TensorFiles(tmp_path)
        assert torch.equal(files.mapped("a", range(2, 5)), rows[2:5])
        assert files.bytes_read == 3 * 3 * 4
        assert torch.equal(files.mapped("a"), rows)


def test_files_are_read_ahead_once_on_a_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not where a host needs only a part of them."""
    calls: list[Path] = []
    monkeypatch.setattr("gptfast.loading.read_ahead", calls.append)
    source = inspect(tiny_llama(tmp_path))
    for group, expected in (
        (ALONE, 1),
        (Group(0, 2, local_rank=0, local_size=2), 1),
        (Group(1, 2, local_rank=1, local_size=2), 0),
        (Group(1, 2, local_rank=0, local_size=1), 0),
    ):
        calls.clear()
        load(source, group=group)
        assert len(calls) == expected


# -- memory --


@pytest.mark.parametrize("name", ["llama-biases-tied", "mixtral-top2", "deepseek_v2-groups"])
def test_bytes_of_a_rank(tmp_path: Path, name: str) -> None:
    source = inspect(write_checkpoint(tmp_path, name))
    for group in (*every_rank(2), *every_rank(4, by_expert=True)):
        model = load(source, "fp32", group=group)
        size = sum(parameter.nbytes for parameter in model.parameters())
        assert weight_bytes(source, torch.float32, CPU, group=group) == size


def test_too_little_memory_says_how_many_ranks_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = inspect(tiny_llama(tmp_path / "model", num_attention_heads=8, num_key_value_heads=8))
    sizes = {
        size: weight_bytes(source, torch.float32, CPU, group=Group(0, size)) for size in (2, 4, 8)
    }

    def check(free: int, device: torch.device, group: Group) -> str:
        for module in ("loading", "device"):
            monkeypatch.setattr(f"gptfast.{module}.free_memory", lambda _: free)
        try:
            check_memory(source, torch.float32, device, None, group)
        except MemoryError as error:
            return str(error).split(" weights in torch.float32")[1]
        return ""

    # Each rank has a device of its own ...
    cuda, pair = torch.device("cuda"), Group(1, 2, local_rank=1, local_size=2)
    assert check(sizes[2], cuda, pair) == ""
    found = check(sizes[2] - 1, cuda, pair)
    assert found.startswith(" on 2 ranks needs ") and found.endswith(
        "; 4 ranks would do, or use a smaller dtype or model"
    )
    assert "; 8 ranks would do" in check(sizes[4] - 1, cuda, pair)
    assert "; no number of ranks would do; use" in check(sizes[8] - 1, cuda, pair)
    # ... or shares the memory of the host.
    assert check(2 * sizes[2], CPU, pair) == ""
    found = check(2 * sizes[2] - 1, CPU, pair)
    assert found.startswith(" on 2 ranks, 2 on each host, needs ")
    assert "; 4 ranks, 2 on each host, would do, or" in found
    assert "ranks" not in check(1, CPU, ALONE)


# -- what cannot be shared --


def test_numbers_of_ranks_that_do_not_divide(tmp_path: Path) -> None:
    config = model_config(LLAMA, None)
    experts = model_config(raw_config("qwen2_moe-shared-expert"), None)
    assert experts.experts is not None
    by_16 = replace(config, num_heads=48, num_kv_heads=16)
    for facts, group, message in (
        (config, Group(1, 3), "3 ranks cannot share 4 query heads evenly; 2 or 4 ranks can"),
        (
            replace(config, hidden_dim=50),
            Group(0, 4),
            "4 ranks cannot share 50 hidden units of an MLP evenly; 2 ranks can",
        ),
        (
            replace(config, hidden_dim=51),
            Group(0, 2),
            "2 ranks cannot share 51 hidden units of an MLP evenly; only a single process can",
        ),
        (
            by_16,
            Group(0, 12),
            "12 ranks cannot share 16 key/value heads evenly, nor have one each; "
            "2, 4, 8, 16 or 48 ranks can",
        ),
        (
            replace(by_16, vocab_size=40),
            Group(0, 48),
            "48 ranks cannot share a vocabulary of 40; 2, 4, 8 or 16 ranks can",
        ),
        (
            replace(experts, experts=replace(experts.experts, hidden_dim=18)),
            Group(0, 4),
            "4 ranks cannot share 18 hidden units of an expert evenly; 2 ranks can, or 4 with "
            "whole experts on each (expert_parallel)",
        ),
        (
            replace(experts, experts=replace(experts.experts, num_experts=6)),
            Group(0, 4, by_expert=True),
            "4 ranks cannot share 6 experts evenly; 2 ranks can, or 4 without whole experts on "
            "each (expert_parallel)",
        ),
        (
            replace(experts, experts=replace(experts.experts, shared_hidden_dim=30)),
            Group(0, 4),
            "4 ranks cannot share 30 hidden units of the shared expert evenly; 2 ranks can",
        ),
    ):
        with pytest.raises(ValueError) as error:
            local_config(facts, group)
        assert str(error.value) == message
    folder = tiny_llama(tmp_path / "model")
    with pytest.raises(ValueError, match=r"^model: 3 ranks cannot share 4 query heads"):
        load(folder, group=Group(2, 3))


def test_sizes_without_use_need_not_divide() -> None:
    """Every layer of this one has experts, none an MLP of `hidden_dim` units."""
    config = replace(model_config(raw_config("mixtral-top2"), None), hidden_dim=17)
    assert local_config(config, Group(0, 2)).hidden_dim == 17
    latent = replace(model_config(raw_config("deepseek_v2-lite"), None), num_kv_heads=1)
    assert local_config(latent, Group(0, 4)).num_kv_heads == 1


def test_groups_that_cannot_be_cut(tmp_path: Path) -> None:
    """Ranks would have 24 columns of 48, and a scale is of 16."""
    folder = foreign(tmp_path / "model", "gptq")
    with pytest.raises(ValueError) as error:
        load(folder, group=Group(0, 2))
    assert str(error.value) == (
        "model: 2 ranks would have 24 columns each of blocks.0.mlp.down, which is stored in groups "
        "of 16, and these cannot be cut; only a single process can, or plain weights (--quant none)"
    )
    assert_shares(folder, every_rank(2), quant="none")


def test_groups_that_fewer_ranks_can_cut(tmp_path: Path) -> None:
    for form, columns in (("int4-g32", 16), ("mxfp4", 16)):
        own = tmp_path / form
        convert(tiny_llama(tmp_path / "plain", **WIDE), own, quant=quant_plan(form))
        with pytest.raises(
            ValueError, match=f"{columns} columns each of blocks.0.attention.out.*; 2 ranks can"
        ):
            load(own, group=Group(0, 4))
    experts = inspect(mxfp4_folder(tmp_path / "experts"))
    with pytest.raises(
        ValueError, match=r"16 columns each of .*down.*; 2 ranks can, or 4 with whole"
    ):
        load(experts, group=Group(3, 4))
    config = replace(model_config(LLAMA, None), hidden_dim=50)
    with pytest.raises(ValueError, match=r"25 columns each of blocks.0.mlp.down.* groups of 2,"):
        check_groups(config, {"blocks.0.mlp.down": Format.parse("int4-row")}, Group(0, 2))
    check_groups(config, {"blocks.0.mlp.down": Format.parse("int8")}, Group(0, 2))


def test_columns_in_an_order_of_their_own(tmp_path: Path) -> None:
    """As GPTQ's desc_act makes them; in others' files and in ours."""
    folder = foreign(tmp_path / "foreign", "gptq-act", **WIDE)
    convert(folder, tmp_path / "own")
    for each, module in ((folder, "o_proj.weight"), (tmp_path / "own", "blocks.0.attention.out")):
        with pytest.raises(ValueError, match=rf"{module} are stored in an order .* --quant none"):
            load(each, group=Group(0, 2))
        assert_shares(each, every_rank(2), quant="none")


def test_only_safetensors_are_read_in_shares(tmp_path: Path) -> None:
    source = inspect(tiny_llama(tmp_path))
    source = replace(source, tensors=ForeignTensors(tmp_path, llama_tensors(LLAMA)))
    with pytest.raises(ValueError, match="shares of safetensors only; gptfast convert"):
        load(source, group=Group(0, 2))


def test_a_stored_head_that_is_not_the_tied_one(tmp_path: Path) -> None:
    """The rank that has the row finds it, and the others need not read theirs."""
    raw = LLAMA | {"tie_word_embeddings": True}
    tensors = llama_tensors(raw)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    assert_shares(write_folder(tmp_path, raw, tensors), every_rank(2))
    tensors["lm_head.weight"][-1] += 1
    write_folder(tmp_path, raw, tensors)
    load(tmp_path, group=Group(0, 2))
    with pytest.raises(ValueError, match="differs from"):
        load(tmp_path, group=Group(1, 2))
