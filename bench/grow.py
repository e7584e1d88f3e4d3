"""Grows a small trained Llama to the shape of a large one: the same function, the bytes and the
arithmetic of the large. So a speculation can be timed at real sizes with real acceptance.

    python bench/grow.py storyteller tinyllama-1.1b /tmp/grown/target --check
    python bench/grow.py storyteller-draft 60m /tmp/grown/draft --check

Letters: d the small width, D the wide one, x [d] the small stream, y [D] the wide one. Every
weight of the small model is kept bit by bit, but for powers of two; what is added are random
numbers of about its size whose products cancel or meet a zero. Nothing is stored sparse: a dense
kernel reads and multiplies all bytes, and `Grown.zeros` says how few of them are zeros.

- *The stream* is D/d units of d numbers. y = (2x, x, .., x, c, c): 1 + (D/d - 4) copies of x and
  three units of constants. So sum(y²) = (4 + D/d - 4) sum(x²) + C, and the mean over D is that
  over d: the norm's rms is unchanged where eps gives up C/D. Norm weights (w/2, -w, w, -w, ...)
  turn the copies into n, -n, n, -n, ..., where n is what the small norm gives. An odd last copy
  has the norm weight 0, and any weights behind it; the halves of the constants become g, -g.
- *What reads the stream* (queries, keys, values, gate, up, head) has random columns, equal in
  the two units of a pair: R n - R n = 0, in any format that rounds a unit by itself or a row as a
  whole. In a row of the small model the first pair is (W, 0) instead: W n. A row of a value or an
  up projection that is added has nothing but such pairs: it is 0, up to the rounding of sums.
  Queries, keys and gates that are added are free: every number is random.
- *What writes the stream* (embedding, out, down) has the small row for each copy, so that copies
  stay equal to the bit, and random columns for heads and units that are added, whose values are 0.
  Rows of the constants are 0 where a small head or unit would be heard, else random, and equal in
  both halves: what rounding adds to them would else be read, and written again, larger.
- *Heads*: a small head of H numbers lies in one of mH: rotated pair i in place m i, which turns
  at the same frequency. Scores keep the small scale, and that is why model_type is granite, a
  llama that says its own `attention_multiplier`. Query heads of a group repeat, and `out` has
  the fraction 1, 1/2, 1/4, ... of its columns for each. Further key/value heads have random
  queries and keys, and values 0.
- *Layers*: the first N of L hold the first N l/L of the l small ones, rounded down, so that drafts
  of the first layers know no more than in the small model. The others change nothing.
- *Vocabulary*: a row of the head that is added reads the constants, all with one sign. Its logit is
  always negative, and below -FLOOR for every rms met among random tokens: its probability is 0.

ValueError where a shape has no room for this (`python bench/grow.py --help` names the shapes).
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from gptfast.checkpoint import Checkpoint, inspect, read_config
from gptfast.config import ModelConfig
from gptfast.families import find_family, model_config
from gptfast.hub import find_model
from gptfast.loading import load, read_parameters
from gptfast.model import Transformer, fused_rows
from gptfast.new_folder import companions
from gptfast.shapes import BLOCK_SIZE, SHAPES, shape_config
from gptfast.shards import Stored, write_tensors

FLOOR = 200.0  # no logit of an added token is above minus this
SPARE_UNITS = 3  # of the stream, with constants: what doubling a copy frees
EPS_SHARE = 0.75  # of the small eps that the constants stand for
READ_LEVEL = 0.5  # of the constants behind the last norm, beside numbers around 1
SAMPLE_TOKENS = 256
# Sizes of drafts, where no published model has them (and SHAPES a name).
DRAFT_SHAPES: dict[str, dict[str, int]] = {
    "60m": {
        "hidden_size": 512,
        "num_hidden_layers": 9,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 1408,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
}
ALIASES = {"160m": "llama-160m"}
Raw = Mapping[str, Any]


@dataclass(frozen=True)
class Grown:
    """What was written: the config.json, how many numbers, and how many of them are zeros."""

    raw: dict[str, Any]
    num_parameters: int
    num_zeros: int

    @property
    def zeros(self) -> float:
        return self.num_zeros / self.num_parameters


def grow(small: Path, shape: Raw, folder: Path, seed: int = 0) -> Grown:
    """Writes a Hugging Face folder with the model of the folder `small` in the sizes `shape` (as in
    a config.json), and its tokenizer. One parameter after the other is in memory.
    """
    checkpoint = inspect(small)
    growth = Growth(checkpoint, shape, seed)
    config, family = growth.config, find_family(growth.raw)
    with torch.device("meta"):
        model = Transformer(config)
    places = {name: family.sources(name)[0] for name, _ in model.named_parameters()}
    stored = {
        theirs: Stored(checkpoint.dtype, size)
        for name, parameter in model.named_parameters()
        for theirs, size in places[name]
        .shapes(tuple(parameter.shape), fused_rows(config, name))
        .items()
    }
    num_zeros = 0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal num_zeros
        for name, tensor in growth.parameters():
            num_zeros += tensor.numel() - int(tensor.count_nonzero())
            yield from places[name].write(tensor, config, fused_rows(config, name))

    folder.mkdir(parents=True, exist_ok=True)
    for path in companions(small):
        shutil.copyfile(path, folder / path.name)
    write_tensors(folder, stored, tensors())
    (folder / "config.json").write_text(json.dumps(growth.raw, indent=2) + "\n")
    return Grown(growth.raw, config.num_parameters, num_zeros)


def grown_shape(name: str, vocab_size: int | None = None) -> dict[str, Any]:
    """The sizes of a shape: one of SHAPES, or of drafts; ValueError for what cannot be grown to."""
    if name in DRAFT_SHAPES:
        raw: dict[str, Any] = dict(DRAFT_SHAPES[name])
    else:
        raw = shape_config(ALIASES.get(name, name))
        if raw["model_type"] != "llama" or raw.get("tie_word_embeddings"):
            fits = [n for n, s in SHAPES.items() if s["model_type"] == "llama"]
            fits = [n for n in fits if not SHAPES[n]["tie_word_embeddings"]]
            raise ValueError(
                f"shape {name} is no Llama with a head of its own; use one of: "
                f"{', '.join([*DRAFT_SHAPES, *fits])}"
            )
    return raw if vocab_size is None else {**raw, "vocab_size": vocab_size}


class Growth:
    """The wide model's facts and parameters, made of the small one's."""

    def __init__(self, small: Checkpoint, shape: Raw, seed: int) -> None:
        self.small, raw_small = small.config, read_config(small.folder)[1]
        if small.is_quantized or raw_small["model_type"] != "llama" or self.small.qkv_bias:
            raise ValueError(f"{small.folder} is no plain Llama without biases: it cannot be grown")
        with torch.device("meta"):
            empty = Transformer(small.config)
        read = read_parameters(small, empty, small.dtype, torch.device("cpu"))
        self.weights = {name: weight for name, weight in read if isinstance(weight, Tensor)}
        self.numbers = Numbers(small.dtype, seed)
        self.stream = Stream(self.small, shape["hidden_size"], self.numbers)
        sizes = (
            "hidden_size num_hidden_layers num_attention_heads num_key_value_heads "
            "intermediate_size vocab_size max_position_embeddings"
        ).split()
        kept = "hidden_act bos_token_id eos_token_id rope_theta torch_dtype".split()
        self.raw: dict[str, Any] = {
            "architectures": ["GraniteForCausalLM"],
            "model_type": "granite",
            **{key: raw_small[key] for key in kept if key in raw_small},
            **{key: shape[key] for key in sizes},
            **({"head_dim": shape["head_dim"]} if "head_dim" in shape else {}),
            "rms_norm_eps": self.stream.eps,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
            "attention_multiplier": self.small.attention_scale or self.small.head_dim**-0.5,
        }
        self.config = model_config(self.raw)
        self.heads = Heads(self.small, self.config)
        self._check()
        self.median_rms, self.largest_rms = _stream_sizes(small)

    def _check(self) -> None:
        small, wide = self.small, self.config
        for what in ("num_layers", "hidden_dim", "vocab_size"):
            if getattr(wide, what) < getattr(small, what):
                raise ValueError(
                    f"{what} is {getattr(wide, what)}, and the small model has "
                    f"{getattr(small, what)}: it cannot shrink"
                )

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values of the wide model's parameters."""
        small, wide = self.small, self.config
        yield "embed.weight", self._embedding()
        count = small.num_layers
        places = {-(-(i + 1) * wide.num_layers // count) - 1: i for i in range(count)}
        nearest = 0
        for layer in range(wide.num_layers):
            is_real = layer in places
            nearest = places.get(layer, nearest)
            for name, tensor in self._block(f"blocks.{nearest}.", is_real):
                yield f"blocks.{layer}.{name}", tensor
        gain = READ_LEVEL * self.median_rms / self.stream.level
        yield "norm.weight", self.stream.norm(self.weights["norm.weight"], gain)
        yield "head.weight", self._head(gain)

    def _embedding(self) -> Tensor:
        table = self.weights["embed.weight"]
        more = self.numbers.like(table, self.config.vocab_size - len(table), self.small.dim)
        return self.stream.embedding(torch.cat((table, more)))

    def _head(self, gain: float) -> Tensor:
        """[V, D]: rows of the small head, and rows that read the constants only."""
        small = self.weights.get("head.weight", self.weights["embed.weight"])
        added = self.config.vocab_size - len(small)
        size = self.stream.noise(small)
        rows = self.stream.read(None, added, size)
        heard = 2 * float(self.stream.constants.float().sum()) * gain / self.largest_rms
        # Between 1 and 2 times what the floor needs.
        places = self.numbers.draw(added, self.stream.num_constants, 3**-0.5).abs()
        places = (1 + places) * (FLOOR / heard)
        start = self.stream.num_copies * self.small.dim
        rows[:, start : start + self.stream.num_constants] = -places
        rows[:, start + self.stream.num_constants :] = places
        return torch.cat((self.stream.read(small, len(small), size), rows))

    def _block(self, place: str, is_real: bool) -> Iterator[tuple[str, Tensor]]:
        """The parameters of one block, those of the small block `place` in it where `is_real`."""
        for name in ("attention_norm.weight", "mlp_norm.weight"):
            weight = self.weights[place + name]
            yield name, self.stream.norm(weight, float(weight.float().mean()))
        weights = {
            name: self.weights[f"{place}{name}.weight"]
            for name in ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
        }
        yield "attention.qkv.weight", self._qkv(weights["attention.qkv"], is_real)
        yield "attention.out.weight", self._out(weights["attention.out"], is_real)
        yield "mlp.gate_up.weight", self._gate_up(weights["mlp.gate_up"], is_real)
        yield "mlp.down.weight", self._down(weights["mlp.down"], is_real)

    def _qkv(self, small: Tensor, is_real: bool) -> Tensor:
        """Every row of the small model stands where its head and pair are, once or more."""
        heads, size = self.heads, self.stream.noise(small)
        num_q, num_kv = self.small.num_heads, self.small.num_kv_heads
        rows = small.split([n * self.small.head_dim for n in (num_q, num_kv, num_kv)])
        q = self.numbers.draw(self.config.num_heads * self.config.head_dim, self.stream.wide, size)
        kv_rows = self.config.num_kv_heads * self.config.head_dim
        k = self.numbers.draw(kv_rows, self.stream.wide, size)
        v = self.stream.read(None, kv_rows, size)
        if not is_real:
            return torch.cat((q, k, v))
        turned = heads.turned_places
        straight = torch.arange(self.small.head_dim)
        for wide, head in enumerate(heads.query_of):
            if head is not None:
                self._put_head(q, wide, turned, rows[0], head, size)
        for wide, head in enumerate(heads.kv_of):
            if head is not None:
                whole = slice(wide * self.config.head_dim, (wide + 1) * self.config.head_dim)
                k[whole] = self.stream.read(None, self.config.head_dim, size)
                self._put_head(k, wide, turned, rows[1], head, size)
                self._put_head(v, wide, straight, rows[2], head, size)
        return torch.cat((q, k, v))

    def _put_head(
        self, target: Tensor, wide: int, places: Tensor, rows: Tensor, head: int, size: float
    ) -> None:
        """The rows of small head `head` to the `places` of head `wide`."""
        dim = self.small.head_dim
        signal = rows[head * dim : (head + 1) * dim]
        target[wide * self.config.head_dim + places] = self.stream.read(signal, dim, size)

    def _out(self, small: Tensor, is_real: bool) -> Tensor:
        columns = self.config.num_heads * self.config.head_dim
        base = self.numbers.like(small, self.small.dim, columns)
        spare = self.numbers.like(small, self.stream.num_constants, columns)
        if is_real:
            dim = self.small.head_dim
            for wide, head in enumerate(self.heads.query_of):
                if head is not None:
                    start = wide * self.config.head_dim
                    signal = small[:, head * dim : (head + 1) * dim] * self.heads.share
                    base[:, start : start + dim] = signal
                    spare[:, start : start + dim] = 0
        return self.stream.write(base, spare)

    def _gate_up(self, small: Tensor, is_real: bool) -> Tensor:
        size, hidden = self.stream.noise(small), self.config.hidden_dim
        gate = self.numbers.draw(hidden, self.stream.wide, size)
        up = self.stream.read(None, hidden, size)
        if is_real:
            for target, signal in zip((gate, up), small.chunk(2), strict=True):
                target[: len(signal)] = self.stream.read(signal, len(signal), size)
        return torch.cat((gate, up))

    def _down(self, small: Tensor, is_real: bool) -> Tensor:
        base = self.numbers.like(small, self.small.dim, self.config.hidden_dim)
        spare = self.numbers.like(small, self.stream.num_constants, self.config.hidden_dim)
        if is_real:
            base[:, : small.size(1)] = small
            spare[:, : small.size(1)] = 0
        return self.stream.write(base, spare)


class Stream:
    """Where the small stream stands in the wide one (see the module): matrices that read it and
    write it.
    """

    def __init__(self, small: ModelConfig, wide: int, numbers: "Numbers") -> None:
        units, rest = divmod(wide, small.dim)
        if rest or units < SPARE_UNITS + 2 or small.dim % 2:
            raise ValueError(
                f"a stream of {small.dim} cannot become one of {wide}: a multiple is needed, and "
                f"{SPARE_UNITS + 2} times as much at least"
            )
        self.small, self.wide, self.numbers = small.dim, wide, numbers
        self.num_copies = units - SPARE_UNITS
        self.num_constants = SPARE_UNITS * small.dim // 2  # each stands there twice
        self.level = (EPS_SHARE * small.norm_eps * wide / (2 * self.num_constants)) ** 0.5
        places = numbers.draw(1, self.num_constants, 3**-0.5)[0]
        self.constants = self.level * (1 + places / 2)  # half as much to 1.5 times as much
        square = 2 * float(self.constants.double().square().sum())
        self.eps = small.norm_eps - square / wide

    def noise(self, small: Tensor) -> float:
        """Root mean square of numbers for a row of so many more columns than `small`."""
        return _rms(small) * (small.size(1) / self.wide) ** 0.5

    def embedding(self, rows: Tensor) -> Tensor:
        """[V, d] -> [V, D]."""
        constants = self.constants.repeat(2).expand(len(rows), -1)
        return torch.cat((2 * rows, rows.repeat(1, self.num_copies - 1), constants), dim=1)

    def norm(self, weight: Tensor, gain: float) -> Tensor:
        """[d] -> [D]; `gain` is the weight of the constants."""
        parts = [weight / 2, *(weight * (-1) ** copy for copy in range(1, self.num_copies))]
        if self.num_copies % 2:
            parts[-1] = torch.zeros_like(weight)
        spare = weight.new_full((self.num_constants,), gain)
        return torch.cat((*parts, spare, -spare))

    def read(self, signal: Tensor | None, num_rows: int, size: float) -> Tensor:
        """[N, D]: rows that give what `signal` [N, d] gives of the small normed stream; 0 without
        one.
        """
        rows = self.numbers.draw(num_rows, self.wide, size)
        end, paired = self.num_copies * self.small, self.num_copies // 2 * 2
        copies = rows[:, :end].view(num_rows, self.num_copies, self.small)
        copies[:, 1:paired:2] = copies[:, 0:paired:2]
        rows[:, end + self.num_constants :] = rows[:, end : end + self.num_constants]
        if signal is not None:
            copies[:, 0], copies[:, 1] = signal, 0
        return rows

    def write(self, base: Tensor, spare: Tensor) -> Tensor:
        """[d, K] for every copy and [3d/2, K] for the constants -> [D, K]."""
        return torch.cat((2 * base, base.repeat(self.num_copies - 1, 1), spare, spare))


class Heads:
    """Which small head each wide one holds (None: none), and which `share` of it a query head
    gives to the sum.
    """

    def __init__(self, small: ModelConfig, wide: ModelConfig) -> None:
        group = wide.num_heads // wide.num_kv_heads
        small_group = small.num_heads // small.num_kv_heads
        repeats = max(1, group // small_group)  # of a query head in its group
        splits = max(1, small_group // group)  # key/value heads for one small one
        fits = group * splits == small_group * repeats and repeats.bit_count() == 1
        if wide.head_dim % small.head_dim or not fits:
            raise ValueError(
                f"{small_group} heads of {small.head_dim} to a key/value head cannot become "
                f"{group} of {wide.head_dim}: a multiple of the size and a power of two of the "
                "heads are needed"
            )
        used = small.num_kv_heads * splits
        if wide.num_kv_heads < used:
            raise ValueError(f"{used} key/value heads are needed, found {wide.num_kv_heads}")
        self.share = 1.0 / repeats
        self.kv_of = [kv // splits if kv < used else None for kv in range(wide.num_kv_heads)]
        self.query_of = [
            # The small heads of a group one after the other, again and again.
            (kv // splits) * small_group + kv % splits * group + place % small_group
            if kv < used
            else None
            for kv in range(wide.num_kv_heads)
            for place in range(group)
        ]
        step, half = wide.head_dim // small.head_dim, torch.arange(small.head_dim // 2)
        self.turned_places = torch.cat((half * step, half * step + wide.head_dim // 2))


class Numbers:
    """Random numbers, evenly spread: none is much larger than the others, which would coarsen the
    scale of a quantized row. One block of them is repeated, as in gptfast/shapes.py.
    """

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        block = torch.rand(BLOCK_SIZE, generator=self._generator) * 2 - 1
        self._block, self._dtype = block * 3**0.5, dtype

    def draw(self, num_rows: int, num_columns: int, size: float) -> Tensor:
        """[N, K], of the root mean square `size`."""
        start = int(torch.randint(BLOCK_SIZE, (), generator=self._generator))
        block = (self._block.roll(start) * size).to(self._dtype)
        count = num_rows * num_columns
        return block.repeat(-(-count // BLOCK_SIZE))[:count].view(num_rows, num_columns)

    def like(self, small: Tensor, num_rows: int, num_columns: int) -> Tensor:
        """[N, K], as large as the numbers of `small` would be with so many columns."""
        return self.draw(num_rows, num_columns, _rms(small) * (small.size(1) / num_columns) ** 0.5)


def _rms(weight: Tensor) -> float:
    return float(weight.float().square().mean().sqrt())


def _stream_sizes(small: Checkpoint) -> tuple[float, float]:
    """Median and largest rms of what the small model's last norm reads, of random tokens."""
    model = load(small, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    num_tokens = min(SAMPLE_TOKENS, small.config.max_seq_len)
    tokens = torch.randint(small.config.vocab_size, (1, num_tokens), generator=generator)
    tokens[0, 0] = small.config.bos_token_id or 0
    with torch.no_grad():
        x = model.hidden(tokens, torch.arange(num_tokens).unsqueeze(0))
    sizes = x.square().mean(-1).sqrt()
    return float(sizes.median()), float(sizes.max())


@dataclass(frozen=True)
class Comparison:
    """A grown model beside its small one on the same tokens. `logit_error`: the largest difference
    of their logits; `logit_size`: the largest logit; `added_logit`: the largest of an added token;
    `equal`: the share of places where both have the same most likely token.
    """

    logit_error: float
    logit_size: float
    added_logit: float
    equal: float


def compare(small: Path, grown: Path, tokens: Tensor, dtype: torch.dtype) -> Comparison:
    """Both models in `dtype` on tokens [B, T] of the small vocabulary."""
    ours, theirs = (_logits(folder, tokens, dtype) for folder in (small, grown))
    theirs, added = theirs.split([ours.size(-1), theirs.size(-1) - ours.size(-1)], dim=-1)
    return Comparison(
        float((ours - theirs).abs().max()),
        float(ours.abs().max()),
        float(added.max()) if added.numel() else float("-inf"),
        float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
    )


@torch.no_grad()
def _logits(folder: Path, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    model = load(folder, dtype, torch.device("cpu"))
    return model(tokens, torch.arange(tokens.size(1)).expand(tokens.shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("small", help="folder, hub id or bundled name")
    parser.add_argument("shape", help=f"{', '.join([*DRAFT_SHAPES, *ALIASES, *SHAPES])}")
    parser.add_argument("out", type=Path)
    parser.add_argument("--vocab-size", type=int, help="of a draft: as the target has it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="compare logits, in fp32 and bf16")
    args = parser.parse_args()
    try:
        small = find_model(args.small)
        grown = grow(small, grown_shape(args.shape, args.vocab_size), args.out, args.seed)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{args.out}: {grown.num_parameters:,} numbers, {grown.zeros:.2%} of them zeros")
    if args.check:
        tokens = sample_tokens(small)
        for dtype in (torch.float32, torch.bfloat16):
            found = compare(small, args.out, tokens, dtype)
            print(
                f"{dtype}: logits up to {found.logit_size:.2f} differ by {found.logit_error:.1e} "
                f"at most, {found.equal:.2%} of greedy tokens are equal, "
                f"the largest added logit is {found.added_logit:.0f}"
            )


def sample_tokens(small: Path) -> Tensor:
    """[2, T]: two random texts, for comparing."""
    config, _ = read_config(small)
    generator = torch.Generator().manual_seed(1)
    length = min(SAMPLE_TOKENS, config.max_seq_len)
    return torch.randint(config.vocab_size, (2, length), generator=generator)


if __name__ == "__main__":
    main()
