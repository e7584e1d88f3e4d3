"""What each rank of a group holds of a model: heads, hidden units, experts, rows of the vocabulary.

Knows the facts of a model and the names of our parameters; knows no files. Weights that make heads
and hidden units are cut along their rows, those that read them along their columns, so that each
rank's part of a layer ends in a sum over all ranks (Megatron-LM, 1909.08053). What is not named
here is held whole by every rank: norms, routers, latent projections, learned positions.
"""

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from types import MappingProxyType

import torch
from torch import Tensor

from gptfast.config import ModelConfig
from gptfast.parallel import Group
from quantize.formats import Format

Formats = Mapping[str, Format]  # by module
NO_FORMATS: Formats = MappingProxyType({})


@dataclass(frozen=True)
class Shard:
    """What a rank holds of a parameter; None: all of that dimension.

    `entries`: of the first dimension, where experts or heads are stacked. `rows`: a range of each
    of the `parts` that stand one below the other and have so many rows; rows are dimension
    `rows_dim`. `columns`: of the last dimension. `is_elsewhere`: another rank has it, here are
    zeros.
    """

    entries: range | None = None
    parts: tuple[int, ...] = ()
    rows: tuple[range, ...] | None = None
    rows_dim: int = -2
    columns: range | None = None
    is_elsewhere: bool = False

    def part(self, number: int) -> "Shard":
        """Of one of the parts."""
        if self.rows is None:
            return self
        return replace(self, parts=(self.parts[number],), rows=(self.rows[number],))

    @property
    def row_ranges(self) -> list[range]:
        """Rows, counted through all parts."""
        assert self.rows is not None
        starts = accumulate(self.parts, initial=0)
        return [
            range(start + rows.start, start + rows.stop)
            for start, rows in zip(starts, self.rows, strict=False)
        ]

    @property
    def row_numbers(self) -> Tensor:
        """The same, one by one."""
        return torch.cat([torch.arange(rows.start, rows.stop) for rows in self.row_ranges])

    def indices(self, num_dims: int) -> Iterator[tuple[slice, ...]]:
        """Where it lies in a parameter of that many dimensions, a range of rows after the other."""
        for rows in [None] if self.rows is None else self.row_ranges:
            cuts = (0, self.entries), (num_dims + self.rows_dim, rows), (num_dims - 1, self.columns)
            found = {dim: slice(cut.start, cut.stop) for dim, cut in cuts if cut is not None}
            yield tuple(found.get(dim, slice(None)) for dim in range(max(found, default=-1) + 1))

    def in_groups(self, size: int) -> "Shard":
        """Of a tensor that has one number for so many columns: of all groups that it touches."""
        if self.columns is None:
            return self
        return replace(
            self, columns=range(self.columns.start // size, -(-self.columns.stop // size))
        )

    def block(self, num_dims: int) -> range | None:
        """Of the first dimension, where it is all that is cut, into one range; None elsewhere."""
        indices = list(self.indices(num_dims))
        if len(indices) > 1 or len(indices[0]) != 1:
            return None
        [[cut]] = indices
        return range(cut.start, cut.stop)


WHOLE = Shard()


# -- the facts of a rank --


def local_config(config: ModelConfig, group: Group) -> ModelConfig:
    """The facts of one rank's share: its heads and hidden units. The width of the stream, the
    vocabulary and the number of experts are those of the whole model.

    ValueError where the ranks cannot have equally much, with the numbers of ranks that can.
    """
    if group.is_alone:
        return config
    if problem := _problem(config, group.size, group.by_expert):
        raise ValueError(f"{group.size} ranks cannot share {problem}; {_who_can(config, group)}")
    size, heads = group.size, group.share(config.num_heads)
    num_kv_heads = len(_kv_heads(config, group)) if config.latent is None else len(heads)
    experts = config.experts
    if experts is not None:
        shared = experts.shared_hidden_dim // size
        hidden = experts.hidden_dim if group.by_expert else experts.hidden_dim // size
        experts = replace(experts, hidden_dim=hidden, shared_hidden_dim=shared)
    return replace(
        config,
        num_heads=len(heads),
        num_kv_heads=num_kv_heads,
        hidden_dim=config.hidden_dim // size if _has_dense_layers(config) else config.hidden_dim,
        alibi=config.alibi[heads.start : heads.stop],
        experts=experts,
    )


def possible_sizes(
    config: ModelConfig,
    most: int = 64,
    by_expert: bool = False,
    formats: Formats = NO_FORMATS,
) -> list[int]:
    """The numbers of ranks, from 2 to `most`, that can share a model, of which modules are stored
    in `formats`.
    """
    groups = [Group(0, size, by_expert) for size in range(2, most + 1)]
    return [
        group.size
        for group in groups
        if not _problem(config, group.size, by_expert) and not _uncut(config, formats, group)
    ]


def _problem(config: ModelConfig, size: int, by_expert: bool) -> str:
    """What so many ranks cannot share, "" where they can share all."""
    counts = {"query heads": config.num_heads}
    if _has_dense_layers(config):
        counts["hidden units of an MLP"] = config.hidden_dim
    if (experts := config.experts) is not None:
        if by_expert:
            counts["experts"] = experts.num_experts
        else:
            counts["hidden units of an expert"] = experts.hidden_dim
        if experts.shared_hidden_dim:
            counts["hidden units of the shared expert"] = experts.shared_hidden_dim
    for what, count in counts.items():
        if count % size:
            return f"{count:,} {what} evenly"
    kv_heads = config.num_kv_heads
    if config.latent is None and kv_heads % size and size % kv_heads:
        return f"{kv_heads:,} key/value heads evenly, nor have one each"
    if config.vocab_size < size:
        return f"a vocabulary of {config.vocab_size:,}"
    return ""


def _has_dense_layers(config: ModelConfig) -> bool:
    return not all(map(config.has_experts, range(config.num_layers)))


def _kv_heads(config: ModelConfig, group: Group) -> range:
    """This rank's key/value heads: those of its query heads. Where there are fewer than ranks,
    neighbours have the same one.
    """
    if group.size <= config.num_kv_heads:
        return group.share(config.num_kv_heads)
    head = group.rank * config.num_kv_heads // group.size
    return range(head, head + 1)


def _who_can(config: ModelConfig, group: Group, formats: Formats = NO_FORMATS) -> str:
    """For people, the numbers of ranks that can share a model."""
    sizes = possible_sizes(config, by_expert=group.by_expert, formats=formats)
    who = "only a single process can"
    if sizes:
        *others, last = map(str, sizes)
        who = f"{', '.join(others)}{' or ' * bool(others)}{last} ranks can"
    otherwise = possible_sizes(config, by_expert=not group.by_expert, formats=formats)
    if group.size in otherwise:
        how = "without" if group.by_expert else "with"
        who += f", or {group.size} {how} whole experts on each (expert_parallel)"
    return who


# -- the numbers of a rank --


def shard_of(name: str, config: ModelConfig, group: Group) -> Shard:
    """What this rank holds of our parameter `name`. `config`: of the whole model."""
    if group.is_alone:
        return WHOLE
    place = name.split(".", 2)[2] if name.startswith("blocks.") else name
    module, _, leaf = place.rpartition(".")
    if module in ("embed", "head"):
        return _rows([(config.vocab_size, group.share(config.vocab_size), 1)], leaf)
    if module.startswith("attention") or module == "":
        return _attention(place, config, group)
    return _mlp(module, leaf, config, group)


Cut = tuple[int, range, int]  # of so many things these, each of so many rows


def _rows(cuts: list[Cut], leaf: str) -> Shard:
    return Shard(
        parts=tuple(count * each for count, _, each in cuts),
        rows=tuple(range(held.start * each, held.stop * each) for _, held, each in cuts),
        rows_dim=-1 if leaf in ("bias", "sinks") else -2,
    )


def _columns(cut: Cut, leaf: str, group: Group) -> Shard:
    """Of a weight; its bias is added once."""
    _, held, each = cut
    if leaf == "bias":
        return WHOLE if group.rank == 0 else Shard(is_elsewhere=True)
    return Shard(columns=range(held.start * each, held.stop * each))


def _attention(place: str, config: ModelConfig, group: Group) -> Shard:
    part, _, leaf = place.removeprefix("attention.").partition(".")
    leaf = leaf or part
    latent, dim = config.latent, config.head_dim
    heads = (config.num_heads, group.share(config.num_heads))
    if part == "sinks":
        return _rows([(*heads, 1)], leaf)
    if part == "out":
        return _columns((*heads, dim if latent is None else latent.value_dim), leaf, group)
    if latent is not None:
        rows = {"q": latent.nope_dim + latent.rope_dim, "kv_b": latent.nope_dim + latent.value_dim}
        return _rows([(*heads, rows[part])], leaf) if part in rows else WHOLE
    kv_heads = (config.num_kv_heads, _kv_heads(config, group))
    if part == "qkv":
        return _rows([(*heads, dim), (*kv_heads, dim), (*kv_heads, dim)], leaf)
    if part in ("q_norm", "k_norm") and config.qk_norm in ("heads", "all"):
        normed = heads if part == "q_norm" else kv_heads
        if config.qk_norm == "heads":
            return Shard(entries=normed[1])
        return replace(_rows([(*normed, dim)], leaf), rows_dim=-1)  # one vector
    return WHOLE


def _mlp(module: str, leaf: str, config: ModelConfig, group: Group) -> Shard:
    experts = config.experts
    part = module.removeprefix("mlp.")
    if part in ("gate_up", "up", "down"):
        units = config.hidden_dim
    elif experts is not None and part in ("expert_gate_up", "expert_down"):
        if group.by_expert:
            return Shard(entries=group.share(experts.num_experts))
        units = experts.hidden_dim
    elif experts is not None and part in ("shared.gate_up", "shared.down"):
        units = experts.shared_hidden_dim
    else:
        return WHOLE
    cut = (units, group.share(units), 1)
    if part.endswith("down"):
        return _columns(cut, leaf, group)
    return _rows([cut] * (2 if part.endswith("gate_up") else 1), leaf)


# -- what is stored quantized --


def check_groups(
    config: ModelConfig,
    formats: Formats,
    group: Group,
    ordered: Container[str] = (),
) -> None:
    """ValueError where a weight that is stored in one of `formats` (by module) cannot be cut: its
    columns only between groups, and not where they are `ordered`.
    """
    for module in formats:
        if module in ordered and _columns_of(module, config, group) is not None:
            raise ValueError(why_not_ordered(module))
    if module := _uncut(config, formats, group):
        num_columns = len(_columns_of(module, config, group) or ())
        raise ValueError(
            f"{group.size} ranks would have {num_columns:,} columns each of {module}, which is "
            f"stored in groups of {_step(formats[module])}, and these cannot be cut; "
            f"{_who_can(config, group, formats)}, or plain weights (--quant none)"
        )


def why_not_ordered(module: str) -> str:
    """Says that the columns of a weight cannot be cut."""
    return (
        f"the columns of {module} are stored in an order of their own (desc_act), so that ranks "
        "cannot share them; use --quant none, which makes them plain, or quantize without it"
    )


def _uncut(config: ModelConfig, formats: Formats, group: Group) -> str:
    """The first module whose groups of columns lie in two ranks, "" where there is none."""
    for module, form in formats.items():
        columns = _columns_of(module, config, group)
        if columns is not None and len(columns) % _step(form):
            return module
    return ""


def _columns_of(module: str, config: ModelConfig, group: Group) -> range | None:
    return shard_of(f"{module}.weight", config, group).columns


def _step(form: Format) -> int:
    """Columns that cannot be parted from each other."""
    return form.group_size or (2 if form.in_nibbles else 1)
