"""Calibrated quantization of a model, block by block: GPTQ and AWQ over what its linears really
read.

The inputs of a block come from blocks that are quantized already, so each makes up for the errors
before it. Only one block's statistics exist at a time. Knows a Transformer and the methods of
`quantize`; knows no files and no text.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gptfast.checkpoint import Progress
from gptfast.folding import Fold, apply_fold, find_folds
from gptfast.model import PACKED, Block, Transformer
from gptfast.quantization import QuantPlan, put_quantized
from gptfast.walk import Walk, stages
from quantize.awq import search_input_scales
from quantize.formats import Format, QuantizedWeight
from quantize.gptq import gptq
from quantize.hessian import HessianSum
from quantize.rounding import round_to_nearest

# An expert that saw fewer rows is rounded without a look at them: they are no sample of its input.
MIN_ROWS = 32

Weights = dict[str, QuantizedWeight]
Note = Callable[[str], None]


class Method(Protocol):
    """How the numbers of a block are found."""

    @property
    def name(self) -> str: ...

    @property
    def details(self) -> dict[str, Any]:
        """Its settings, for config.json and to tell runs apart."""

    def check(self, form: Format) -> None:
        """ValueError for a format whose numbers it cannot find."""

    def quantize(
        self, walk: Walk, layer: int, formats: Mapping[str, Format], note: Note
    ) -> Weights:
        """The weights of a block's linears, named within the block, which computes with them from
        then on.
        """

    def quantize_head(self, walk: Walk, form: Format) -> QuantizedWeight:
        """The head's, once the last block has been left behind."""


@torch.no_grad()
def quantize_model(
    model: Transformer,
    ids: Tensor,
    plan: QuantPlan,
    method: Method,
    note: Note = lambda line: None,
    progress: Progress = iter,
) -> None:
    """Quantizes a model of plain weights in place, from sequences `ids` [S, T]. `progress` may wrap
    the sequence of blocks; `note` hears what did not go as planned.
    """
    if any(isinstance(module, PACKED) for module in model.modules()):
        raise ValueError("the model's weights are packed for its device; quantize them before that")
    formats = plan.formats(model)
    for form in formats.values():
        method.check(form)
    found: Weights = {}
    walk = Walk(model, ids)
    for layer in progress(range(len(model.blocks))):
        wanted = of_block(formats, layer)
        weights = method.quantize(walk, layer, wanted, note)
        found |= {f"blocks.{layer}.{name}": weight for name, weight in weights.items()}
        walk.advance(layer)
    found |= quantize_ends(walk, formats, method)
    for name, weight in found.items():
        put_quantized(model, name, weight, model.dtype)


def of_block(formats: Mapping[str, Format], layer: int) -> dict[str, Format]:
    """The formats of a block's modules, named within the block."""
    start = f"blocks.{layer}."
    return {n.removeprefix(start): f for n, f in formats.items() if n.startswith(start)}


def statistics_bytes(block: nn.Module, formats: Mapping[str, Format]) -> int:
    """Of the sums over what all linears `formats` of a block read, each expert's its own."""
    assert isinstance(block, Block)
    size = 0
    for names in (names for stage in stages(block) for names in stage):
        if wanted := [name for name in names if name in formats]:
            *experts, _, width = block.get_submodule(wanted[0]).get_parameter("weight").shape
            size += math.prod(experts) * width * width * torch.float32.itemsize
    return size


def quantize_ends(walk: Walk, formats: Mapping[str, Format], method: Method) -> Weights:
    """Head and embedding, where they have a format. A head of 8 bits and an embedding are rounded
    each by itself: there is next to nothing to gain.
    """
    found, model = Weights(), walk.model
    if (form := formats.get("head")) is not None:
        if form.bits < 8:
            found["head"] = method.quantize_head(walk, form)
        else:
            found["head"] = round_to_nearest(model.head.weight, form, name="head.weight")
    if (form := formats.get("embed")) is not None:
        found["embed"] = round_to_nearest(model.embed.weight, form, name="embed.weight")
    return found


@dataclass(frozen=True)
class Gptq:
    """GPTQ (2210.17323): columns one after the other, each error made up for by those to come.

    In true order: a linear's inputs come from the block's earlier linears as they are stored. A
    block is run in parts for that, each time only as far as needed: twice in all.
    """

    act_order: bool = True
    damping: float = 0.01
    name = "gptq"

    @property
    def details(self) -> dict[str, Any]:
        return {"act_order": self.act_order, "damping": self.damping}

    def check(self, form: Format) -> None:
        if form.kind != "int":
            raise ValueError(f"gptq finds integers, not {form.name}; use rtn for it")
        if not 0 < self.damping < math.inf:
            raise ValueError(f"damping {self.damping} is not usable; 0.01 is usual")

    def quantize(
        self, walk: Walk, layer: int, formats: Mapping[str, Format], note: Note
    ) -> Weights:
        block, found = _block(walk, layer), Weights()
        for stage in stages(block):
            sharing = [[name for name in names if name in formats] for names in stage]
            sharing = [names for names in sharing if names]
            sums = [_Sums.of(block.get_submodule(names[0])) for names in sharing]
            if sums:
                first = [names[0] for names in sharing]
                walk.watch(layer, {n: s.add for n, s in zip(first, sums, strict=True)})
            for names in sharing:
                seen = sums.pop(0)
                for name in names:
                    tell = f"blocks.{layer}.{name}"
                    linear = block.get_submodule(name)
                    found[name] = self._find(linear, formats[name], seen, tell, note)
                    put_numbers(linear, found[name])
        return found

    def quantize_head(self, walk: Walk, form: Format) -> QuantizedWeight:
        return self._weight(walk.model.head.weight, _of_head(walk).each[0], form, "head")

    def _find(
        self, linear: nn.Module, form: Format, seen: "_Sums", tell: str, note: Note
    ) -> QuantizedWeight:
        weight = linear.get_parameter("weight")
        if weight.dim() == 2:
            return self._weight(weight, seen.each[0], form, tell)
        _note_unseen(seen.are_enough, tell, note)
        return QuantizedWeight.stack(
            [
                self._weight(one, each, form, tell)
                if is_enough
                else round_to_nearest(one, form, name=f"{tell}.weight")
                for one, each, is_enough in zip(weight, seen.each, seen.are_enough, strict=True)
            ]
        )

    def _weight(self, weight: Tensor, seen: HessianSum, form: Format, tell: str) -> QuantizedWeight:
        return gptq(weight, seen.hessian, form, **self.details, name=f"{tell}.weight")


@dataclass(frozen=True)
class Awq:
    """AWQ (2306.00978): channels that matter are scaled up before rounding, and down where they
    come from. Where nothing takes a scale (no norm before, an activation between) channels stay.
    """

    name = "awq"

    @property
    def details(self) -> dict[str, Any]:
        return {}

    def check(self, form: Format) -> None:
        """Any can be rounded to."""

    def quantize(
        self, walk: Walk, layer: int, formats: Mapping[str, Format], note: Note
    ) -> Weights:
        block, dtype = _block(walk, layer), walk.hidden[0].dtype
        seen = self._watch(walk, layer, formats)
        for name in formats:
            _widen(block.get_submodule(name))
        scales: dict[str, Tensor] = {}
        for fold in find_folds(block):
            if formats.keys() & set(fold.linears):
                scale = self._scale(block, fold, formats, seen, dtype)
                scale = apply_fold(block, fold, scale)
                scales |= dict.fromkeys(fold.linears, scale)
        found: Weights = {}
        for name, form in formats.items():
            linear = block.get_submodule(name)
            if len(seen[name].each) > 1:
                _note_unseen(seen[name].are_enough, f"blocks.{layer}.{name}", note)
            found[name] = _rounded(linear, form, seen[name], scales.get(name))
            put_numbers(linear, found[name], dtype)
        return found

    def _watch(self, walk: Walk, layer: int, formats: Mapping[str, Format]) -> dict[str, "_Sums"]:
        """What each linear reads, and what a mixture of experts reads as a whole ("mlp")."""
        block = _block(walk, layer)
        seen: dict[str, _Sums] = {}
        watchers = {}
        for names in (names for stage in stages(block) for names in stage):
            if wanted := [name for name in names if name in formats]:
                sums = _Sums.of(block.get_submodule(wanted[0]))
                seen |= dict.fromkeys(wanted, sums)
                watchers[wanted[0]] = sums.add
        if "mlp.expert_gate_up" in seen:
            seen["mlp"] = _Sums(walk.model.config.dim)
            watchers["mlp"] = seen["mlp"].add
        if watchers:
            walk.watch(layer, watchers)
        return seen

    def _scale(
        self,
        block: Block,
        fold: Fold,
        formats: Mapping[str, Format],
        seen: Mapping[str, "_Sums"],
        dtype: torch.dtype,
    ) -> Tensor:
        wanted = [name for name in fold.linears if name in formats]
        weights = [block.get_submodule(name).get_parameter("weight") for name in wanted]
        form = formats[wanted[0]]
        if fold.by_expert:
            [stacked], sums = weights, seen[wanted[0]]
            scale = torch.stack(
                [
                    _searched([one], each, form, None) if is_enough else torch.ones_like(one[0])
                    for one, each, is_enough in zip(
                        stacked, sums.each, sums.are_enough, strict=True
                    )
                ]
            )
        else:
            sums = seen["mlp" if "mlp.expert_gate_up" in wanted else wanted[0]]
            flat = [weight.flatten(0, -2) for weight in weights]
            scale = _searched(flat, sums.each[0], form, fold.tied)
        touched = {*fold.linears, fold.producer} - {None}
        if dtype != torch.float32 and (fold.is_kept or not touched <= formats.keys()):
            return scale.log2().round().exp2()
        return scale

    def quantize_head(self, walk: Walk, form: Format) -> QuantizedWeight:
        return _rounded(walk.model.head, form, _of_head(walk), None)


def _searched(
    weights: Sequence[Tensor], seen: HessianSum, form: Format, tied: Tensor | None
) -> Tensor:
    return search_input_scales(weights, seen.hessian, seen.mean_abs, form, tied)


def _widen(linear: nn.Module) -> None:
    """A weight that is about to be scaled and then rounded is rounded once only."""
    weight = linear.get_parameter("weight")
    linear.weight = nn.Parameter(weight.float(), requires_grad=False)


def _rounded(
    linear: nn.Module, form: Format, seen: "_Sums", scale: Tensor | None
) -> QuantizedWeight:
    """Rounded to nearest; the inputs are those seen, divided by `scale`."""
    weight = linear.get_parameter("weight")
    entries = weight if weight.dim() == 3 else weight.unsqueeze(0)
    each_has_own = scale is not None and scale.dim() == 2
    divisors = list(scale) if scale is not None and each_has_own else [scale] * len(entries)
    found = []
    for one, each, divisor, is_enough in zip(
        entries, seen.each, divisors, seen.are_enough, strict=True
    ):
        if not is_enough:
            found.append(round_to_nearest(one, form))
            continue
        hessian = each.hessian
        if divisor is not None:
            hessian = hessian / divisor / divisor.unsqueeze(1)
        found.append(_rounded_by_row(one, hessian, form))
    return QuantizedWeight.stack(found) if weight.dim() == 3 else found[0]


def _rounded_by_row(weight: Tensor, hessian: Tensor, form: Format) -> QuantizedWeight:
    """Each row with the scales of least error, or with those of least error where columns count by
    the mean square of their input: whichever serves its output better. (KL divergence of a small
    Llama at 4 bits, no channel scaled: 0.093 and 0.088, by the better of both 0.085.)
    """
    plain = round_to_nearest(weight, form)
    weighed = round_to_nearest(weight, form, importance=hessian.diagonal())

    def errors(stored: QuantizedWeight) -> Tensor:
        wrong = stored.dequantize() - weight
        return torch.linalg.vecdot(wrong @ hessian, wrong)  # [N]

    rows = (errors(weighed) < errors(plain)).nonzero().squeeze(1)
    for part, other in zip(plain.tensors.values(), weighed.tensors.values(), strict=True):
        # As bytes: not all that can be done with numbers can be done with 8-bit floats.
        part.view(torch.uint8)[rows] = other.view(torch.uint8)[rows]
    return plain


class _Sums:
    """Sums over the inputs of a linear, or of each expert's."""

    def __init__(self, width: int, num_experts: int | None = None) -> None:
        count = num_experts or 1
        self.each = [HessianSum(width) for _ in range(count)]

    @staticmethod
    def of(linear: nn.Module) -> "_Sums":
        *experts, _, width = linear.get_parameter("weight").shape
        return _Sums(width, *experts)

    @property
    def are_enough(self) -> list[bool]:
        """Whether an expert saw a sample of its inputs; a single linear saw what there is."""
        least = MIN_ROWS if len(self.each) > 1 else 1
        return [each.num_rows >= least for each in self.each]

    def add(self, x: Tensor, ends: Tensor | None = None) -> None:
        """The arguments of a linear, or of a grouped one."""
        rows = x.flatten(0, -2)
        start = 0
        for index, end in enumerate([len(rows)] if ends is None else ends.tolist()):
            if end > start:
                self.each[index].add(rows[start:end])
            start = end


def _of_head(walk: Walk) -> _Sums:
    seen = _Sums(walk.model.config.dim)
    for x in walk.hidden:
        seen.add(walk.model.norm(x))
    return seen


def _block(walk: Walk, layer: int) -> Block:
    block = walk.model.blocks[layer]
    assert isinstance(block, Block)
    return block


def put_numbers(
    linear: nn.Module, weight: QuantizedWeight, dtype: torch.dtype | None = None
) -> None:
    """A plain linear computes with the stored numbers from here on. (Dequantizing them for every
    batch would take as long as the batch.)
    """
    plain = linear.get_parameter("weight")
    numbers = weight.dequantize(dtype or plain.dtype)
    linear.weight = nn.Parameter(numbers, requires_grad=False)


def _note_unseen(enough: Sequence[bool], tell: str, note: Note) -> None:
    if missing := enough.count(False):
        note(
            f"{tell}: {missing} of {len(enough)} experts saw fewer than {MIN_ROWS} tokens and are "
            "rounded without calibration; more text helps"
        )
