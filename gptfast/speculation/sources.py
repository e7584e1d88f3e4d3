"""From what a user calls a draft to a Draft: ngram, layers:N, a format, or a model by its name."""

import copy
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Literal

import torch
from torch import nn

from gptfast.cached import cached_model
from gptfast.checkpoint import Checkpoint, Progress, inspect
from gptfast.hub import find_model
from gptfast.joint import load_model
from gptfast.loading import check_plan
from gptfast.model import Transformer
from gptfast.parallel import ALONE, Group
from gptfast.quantization import PLAIN, QuantPlan, quant_plan
from gptfast.speculation.drafts import Draft
from gptfast.together import together
from gptfast.tokenizer import Tokenizer, load_tokenizer
from quantize.formats import Format

NGRAM = "ngram"
# What is meant for one of ours and is none: a hub id of such a name has an owner.
UNKNOWN = r"|none|(ngram|layers?|int\d|fp\d|mxfp\d)[^/]*"
TRIAL_LENGTH = 16  # steps


@dataclass(frozen=True)
class DraftSource:
    """A draft that has been checked; `load` reads its weights, where it has any of its own."""

    name: str
    kind: Literal["ngram", "layers", "format", "model"]
    num_layers: int = 0
    checkpoint: Checkpoint | None = None
    plan: QuantPlan | str | None = None

    def load(
        self, target: Transformer, dtype: str | torch.dtype = "auto", progress: Progress = iter
    ) -> Draft:
        """The draft of `target`, on its device. MemoryError where it does not fit."""
        if self.kind == "ngram":
            return Draft(self.name, None)
        if self.kind == "layers":
            model = _first_layers(target.group, target, self.num_layers)
            return Draft(self.name, model, shares_cache=True)
        assert self.checkpoint is not None
        if self.kind == "model":
            return Draft(self.name, self._own_model(target, dtype, progress))
        group, source = target.group, self.checkpoint
        model = load_model(group, source, target.dtype, target.device, progress, self.plan)
        _share(group, model, target)
        return Draft(self.name, model, shares_cache=True)

    def _own_model(
        self, target: Transformer, dtype: str | torch.dtype, progress: Progress
    ) -> Transformer:
        """Of several ranks, on rank 0 alone or on all of them: whichever is faster."""
        assert self.checkpoint is not None
        found = []
        groups = (ALONE,) if target.group.is_alone else (ALONE, target.group)
        for group in groups:
            try:
                found.append(
                    load_model(group, self.checkpoint, dtype, target.device, progress, self.plan)
                )
            except (ValueError, MemoryError):
                if not found and group == groups[-1]:
                    raise
        return found[0] if len(found) == 1 else fastest(found)


def find_draft(
    name: str | Path,
    source: Checkpoint,
    tokenizer: Tokenizer | None,
    quant: QuantPlan | str | None = None,
    draft_quant: QuantPlan | str | None = None,
) -> DraftSource:
    """The draft called `name` for the target `source`, which is loaded with `quant`; `draft_quant`
    is for a model's weights. ValueError where there is none such, or it cannot draft for this
    target.
    """
    found = _find_own(str(name), source, quant)
    if found is not None:
        if draft_quant is not None:
            raise ValueError(f"draft {name!r} has no weights of its own to round to another format")
        return found
    if re.fullmatch(UNKNOWN, str(name), re.IGNORECASE) and not os.path.isdir(name):
        raise ValueError(
            f"draft {str(name)!r} is unknown; it may be {NGRAM}, layers:N, a format such as int4, "
            "or a model: a folder, a hub id or a bundled name"
        )
    if isinstance(draft_quant, str) and draft_quant != PLAIN:
        draft_quant = quant_plan(draft_quant)
    folder = find_model(name)
    checkpoint = inspect(folder)
    check_plan(checkpoint, draft_quant)
    sizes = source.config.vocab_size, checkpoint.config.vocab_size
    reason = why_other_tokens(tokenizer, load_tokenizer(folder), *sizes)
    if reason is not None:
        raise ValueError(
            f"{folder.name} cannot draft for {source.folder.name}: {reason}; the draft must be of "
            "the same tokenizer"
        )
    return DraftSource(folder.name, "model", 0, checkpoint, draft_quant)


def _find_own(name: str, source: Checkpoint, quant: QuantPlan | str | None) -> DraftSource | None:
    """The drafts that a target makes of itself; None where `name` is none of them."""
    if name == NGRAM:
        return DraftSource(name, "ngram")
    if (match := re.fullmatch(r"layers:(\d+)", name)) is not None:
        number, most = int(match[1]), source.config.num_layers - 1
        if not 1 <= number <= most:
            raise ValueError(
                f"draft {name!r}: {source.folder.name} has {most + 1} layers, so its first 1 to "
                f"{most} can draft"
            )
        return DraftSource(name, "layers", number)
    try:
        Format.parse(name)
    except ValueError:
        return None
    plan = quant_plan(name)
    if isinstance(quant, QuantPlan) and quant.body == plan.body:
        raise ValueError(f"draft {name!r} would be the target itself; choose a coarser format")
    check_plan(source, plan)
    return DraftSource(name, "format", 0, source, plan)


def why_other_tokens(
    target: Tokenizer | None, draft: Tokenizer | None, target_size: int, draft_size: int
) -> str | None:
    """Why ids of one do not mean what they mean to the other; None where they do. Sizes are those
    of the models' vocabularies, which decide where a tokenizer is not known.
    """
    if target is None or draft is None:
        if target_size == draft_size:
            return None
        return f"it has a vocabulary of {draft_size} tokens, and the target one of {target_size}"
    for token_id in range(max(target.vocab_size, draft.vocab_size)):
        ours, theirs = target.token_bytes(token_id), draft.token_bytes(token_id)
        if ours != theirs:
            return f"its token {token_id} is {theirs!r}, and the target's {ours!r}"
    if target.control_tokens != draft.control_tokens:
        differing = sorted(set(target.control_tokens.items()) ^ set(draft.control_tokens.items()))
        return f"their control tokens differ in {differing[0][0]!r}"
    return None


def fastest(models: Sequence[Transformer]) -> Transformer:
    """Of models that say the same, the one that decodes fastest: medians of rounds in turns."""
    runs = [cached_model(model.group, model, 1, TRIAL_LENGTH) for model in models]
    times: list[list[float]] = [[] for _ in runs]
    with torch.no_grad():
        for place in range(TRIAL_LENGTH):
            for run, each in zip(runs, times, strict=True):
                start = perf_counter()
                run.set_bound(place + 1)
                token = torch.zeros(1, 1, dtype=torch.int64, device=run.device)
                _, best = run(token, token + place, needs_logits=False)
                token.copy_(token if best is None else best)
                if run.device.type == "cuda":
                    torch.cuda.synchronize(run.device)
                each.append(perf_counter() - start)
    return min(zip(models, times, strict=True), key=lambda pair: median(pair[1]))[0]


@together
def _first_layers(group: Group, target: Transformer, number: int) -> Transformer:
    """The model that leaves after its first layers. All its parts are the target's."""
    model = copy.copy(target)
    model._modules = dict(target._modules)
    model.blocks = nn.ModuleList(target.blocks[:number])
    model.rope_of = target.rope_of[:number]
    return model


@together
def _share(group: Group, model: Transformer, target: Transformer) -> None:
    """Takes from the target what is the same there: the embedding, a head of the same format."""
    if model.formats.get("embed") == target.formats.get("embed"):
        model.embed, model.positions = target.embed, target.positions
    if model.formats.get("head") == target.formats.get("head"):
        model.head = target.head
