"""LoRA adapters (2106.09685) in PEFT's folders, merged into the weights of a checkpoint as they are
read: W + scale * B A in float32.

Works on the tensor names of the files, before anything is fused or reordered. What an adapter asks
for and is not done here is refused by name, and every tensor of it must find its place.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptfast.checkpoint import Checkpoint, parameter_shapes
from gptfast.tensor_files import TensorFiles, Tensors, read_json, some

# Key of adapter_config.json -> the values under which its tensors mean what is computed here.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "lora_bias": (False,),
    "use_qalora": (False,),
    # These change the base weights too, in ways that the adapter does not hold.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal", "mica"),
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    # These are no sum of matrices.
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (None, False),
}
# Other people's beginnings of names, which differ between the files of one model.
BEGINNINGS = r"((model|language_model|transformer|gpt_neox)\.)+"
PREFIX = "base_model.model."


def merge(
    checkpoint: Checkpoint, raw: Mapping[str, Any], folders: Sequence[Path]
) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of a checkpoint of published names with the adapters in `folders` merged in that
    order, and its config.json. Where only one of a tied embedding and head is changed, both are
    there and config.json unties them.
    """
    sources, shapes = checkpoint.sources, parameter_shapes(checkpoint.config)
    transposed = {
        name
        for ours, source in sources.items()
        if source.transposed
        for name in source.all_names(shapes[ours])
    }
    adapters = [Adapter(folder) for folder in folders]
    tensors = checkpoint.tensors
    if not checkpoint.config.tied_head:
        return MergedTensors(tensors, adapters, transposed), dict(raw)
    [embed] = sources["embed.weight"].names
    head = checkpoint.family.sources("head.weight")[0].names[0]
    stored = [name for name in tensors.names if _core(name) == _core(head)]
    copies = {} if stored else {head: embed}
    merged = MergedTensors(tensors, adapters, transposed, copies)
    head = stored[0] if stored else head
    if not {embed, head} & merged.steps.keys():
        return merged, dict(raw)
    same = torch.equal(merged.tensor(embed).float(), merged.tensor(head).float())
    return merged, dict(raw) if same else _untied(raw)


def _untied(raw: Mapping[str, Any]) -> dict[str, Any]:
    untied = {**raw, "tie_word_embeddings": False}
    if isinstance(raw.get("text_config"), Mapping):
        untied["text_config"] = {**raw["text_config"], "tie_word_embeddings": False}
    return untied


@dataclass
class Change:
    """What an adapter does to one tensor: A, B and magnitude are names in it. `is_table`: an
    embedding, whose A and B are stored transposed.
    """

    module: str
    is_table: bool = False
    parts: dict[str, str] = field(default_factory=dict)


class Adapter:
    """A folder with adapter_config.json and adapter_model.safetensors, checked by itself."""

    def __init__(self, folder: Path) -> None:
        path = folder / "adapter_config.json"
        if not path.is_file():
            raise ValueError(f"{folder}: there is no adapter_config.json; a PEFT adapter has one")
        weights = folder / "adapter_model.safetensors"
        if not weights.is_file():
            raise ValueError(
                f"{folder}: there is no adapter_model.safetensors; save the adapter with "
                "safe_serialization=True"
            )
        self.folder, self.config = folder, read_json(path)
        for key, values in NEUTRAL.items():
            if key in self.config and self.config[key] not in values:
                raise ValueError(
                    f"{path}: {key} = {self.config[key]!r} is not supported "
                    f"(supported: {', '.join(map(repr, values))})"
                )
        self.tensors = TensorFiles(folder, [weights])
        self.changes: dict[str, Change] = {}  # by the name of the weight, as PEFT calls it
        self.replaced: dict[str, str] = {}  # their tensor -> ours that takes its place
        unknown = [name for name in sorted(self.tensors.names) if not self._sort_in(name)]
        if unknown:
            raise ValueError(f"{folder}: tensors that are no part of a LoRA: {some(unknown)}")
        if not (self.changes or self.replaced):
            raise ValueError(f"{weights}: there are no tensors; save the adapter again")
        for change in self.changes.values():
            self._check(change)

    def _sort_in(self, name: str) -> bool:
        if not name.startswith(PREFIX):
            return False
        inner = name.removeprefix(PREFIX)
        if match := re.fullmatch(
            r"(.+)\.lora_(?:(embedding)_)?(A|B|magnitude_vector)(\.default)?(\.weight)?", inner
        ):
            module, table, part = match[1], match[2], match[3]
            change = self.changes.setdefault(f"{module}.weight", Change(module))
            change.is_table |= table is not None
            change.parts[part] = name
            return True
        if "lora_" in inner:
            return False
        inner = re.sub(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)", "", inner)
        self.replaced[inner] = name
        return True

    def _check(self, change: Change) -> None:
        where = f"{self.folder}: {change.module}"
        if missing := {"A", "B"} - change.parts.keys():
            raise ValueError(f"{where} has no lora_{'/'.join(sorted(missing))}")
        shapes = {part: self.tensors.shape(name) for part, name in change.parts.items()}
        if any(len(shapes[part]) != 2 for part in "AB"):
            raise ValueError(f"{where}: A and B are {shapes}; matrices are needed")
        if change.is_table and "magnitude_vector" in change.parts:
            raise ValueError(f"{where}: use_dora of an embedding is not supported")
        magnitude = shapes.get("magnitude_vector", ())
        if self.config.get("use_dora") and not magnitude:
            raise ValueError(f"{where}: use_dora is set, and there is no lora_magnitude_vector")
        if magnitude and math.prod(magnitude) != shapes["B"][0]:
            raise ValueError(f"{where}: {shapes} do not fit together; save the adapter again")
        rank, found = self._rank(change.module), shapes["A"]
        if found[0] != rank or self.tensors.shape(change.parts["B"])[-1] != rank:
            raise ValueError(f"{where} has rank {found[0]}; adapter_config.json says {rank}")

    def _rank(self, module: str) -> float:
        return self._of_module("rank_pattern", "r", module)

    def scale(self, module: str) -> float:
        """Of B A: alpha / r, or alpha / sqrt(r) with use_rslora (2312.03732)."""
        alpha, rank = self._of_module("alpha_pattern", "lora_alpha", module), self._rank(module)
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _of_module(self, patterns: str, key: str, module: str) -> float:
        """A number of adapter_config.json, which a pattern may set for some modules."""
        path, value = self.folder / "adapter_config.json", self.config.get(key)
        by_pattern = self.config.get(patterns) or {}
        try:
            for pattern, special in dict(by_pattern).items():
                if re.match(rf"(.*\.)?({pattern})$", module):
                    key, value = patterns, special
                    break
        except (re.error, ValueError, TypeError) as error:
            raise ValueError(f"{path}: {patterns} = {by_pattern!r}: {error}") from None
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            found = self.config.get(key)
            raise ValueError(f"{path}: {key} = {found!r}; positive numbers are needed")
        return value

    def check_shape(self, change: Change, shape: tuple[int, ...], transposed: bool) -> None:
        """ValueError where B A does not fit a weight of `shape`, before anything is computed."""
        rows, columns = (self.tensors.shape(change.parts[part]) for part in "BA")
        needed = shape[::-1] if transposed or change.is_table else shape
        if (rows[0], columns[1]) != needed:
            raise ValueError(
                f"{self.folder}: {change.module}: B A has shape {[rows[0], columns[1]]}; the "
                f"weight is {list(needed)}"
            )

    def applied(self, weight: Tensor, change: Change, transposed: bool) -> Tensor:
        """weight [out, in] ([in, out] where `transposed`, [vocabulary, dim] of a table) in float32
        -> the same with the change merged.
        """
        a, b = (self.tensors.tensor(change.parts[part]).float() for part in "AB")
        delta = self.scale(change.module) * (b @ a)
        turned = transposed or change.is_table
        weight = (weight.t() if turned else weight) + delta
        if "magnitude_vector" in change.parts:  # DoRA, 2402.09353
            magnitude = self.tensors.tensor(change.parts["magnitude_vector"]).float()
            weight = weight * (magnitude.flatten() / weight.norm(dim=1)).unsqueeze(1)
        return weight.t() if turned else weight


class MergedTensors:
    """`base` with adapters merged; `transposed` are its tensors that are stored [in, out], `copies`
    names that are to be there too: name -> the tensor of `base` it begins as.
    """

    def __init__(
        self,
        base: Tensors,
        adapters: Sequence[Adapter],
        transposed: set[str],
        copies: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.base, self.transposed = base.folder, base, transposed
        self.copies = dict(copies or {})
        self.steps: dict[str, list[tuple[Adapter, Change | str]]] = {}
        by_core = {_core(name): name for name in self.names}
        for adapter in adapters:
            self._place(adapter, by_core)

    def _place(self, adapter: Adapter, by_core: Mapping[str, str]) -> None:
        steps: dict[str, Change | str] = {**adapter.replaced}
        homeless = []
        for name, step in [*steps.items(), *adapter.changes.items()]:
            if _core(name) not in by_core:
                homeless += [step] if isinstance(step, str) else sorted(step.parts.values())
                continue
            theirs = by_core[_core(name)]
            self.steps.setdefault(theirs, []).append((adapter, step))
            if isinstance(step, Change):
                adapter.check_shape(step, self.shape(theirs), theirs in self.transposed)
        if homeless:
            raise ValueError(
                f"{adapter.folder}: tensors that the model has no place for: {some(homeless)}"
            )

    @property
    def names(self) -> set[str]:
        return self.base.names | self.copies.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(self.copies.get(name, name))

    def dtype(self, name: str) -> str:
        """Of the base; what is merged comes in float32."""
        return self.base.dtype(self.copies.get(name, name))

    def tensor(self, name: str) -> Tensor:
        with self.reader() as read:
            return read(name)

    @contextmanager
    def reader(self) -> Iterator[Callable[[str], Tensor]]:
        with self.base.reader() as read_base:

            def read(name: str) -> Tensor:
                tensor = read_base(self.copies.get(name, name))
                for adapter, step in self.steps.get(name, []):
                    if isinstance(step, Change):
                        tensor = adapter.applied(tensor.float(), step, name in self.transposed)
                    else:
                        tensor = self._replacement(adapter, step, tensor)
                return tensor

            yield read

    def _replacement(self, adapter: Adapter, name: str, tensor: Tensor) -> Tensor:
        found = adapter.tensors.tensor(name)
        if found.shape != tensor.shape:
            raise ValueError(
                f"{adapter.folder}: {name} has shape {list(found.shape)}; the model's tensor is "
                f"{list(tensor.shape)}"
            )
        return found


def _core(name: str) -> str:
    """A tensor's name without what files put before it."""
    return re.sub(f"^{BEGINNINGS}", "", name)
