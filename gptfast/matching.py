"""Which tensors of a checkpoint's files our parameters come from.

Knows names; reads no numbers.
"""

import re
from collections.abc import Mapping
from typing import Any

from gptfast.families import Family, language_part
from gptfast.model import Transformer
from gptfast.quantized_files import QuantizedFiles
from gptfast.sources import Source
from gptfast.stored import order_name, part_names
from gptfast.tensor_files import Tensors, some
from quantize.formats import Format

# The same model is published under several beginnings of its names: (ours to expect, theirs).
RENAMES = (
    ("", ""),
    ("transformer.", ""),
    ("model.", ""),
    ("", "model."),
    ("", "language_model."),
    ("model.", "model.language_model."),
    ("model.", "language_model."),
    ("gpt_neox.", ""),
)
# Buffers that old files carry along: they follow from config.json.
BUFFERS = r"(.*\.)?(rotary_emb\.inv_freq|(attn|attention)\.(bias|masked_bias|causal_mask))"


class Matching:
    """Finds for each of our parameters the tensors in the files that it comes from. `own_formats`:
    module -> format, where the files have our own names; None where they have others'.
    """

    def __init__(
        self,
        model: Transformer,
        raw: Mapping[str, Any],
        family: Family,
        tensors: Tensors,
        own_formats: Mapping[str, Format] | None,
    ) -> None:
        self.model, self.raw, self.folder = model, raw, tensors.folder
        self.tensors = tensors
        self.names = tensors.names  # once: a mixture of experts has 100,000
        self.shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        self.head: tuple[Source, ...] = ()
        self.wanted: dict[str, tuple[Source, ...]]
        self.parts: set[str] = set()
        if own_formats is not None:
            self.wanted = {name: (Source((name,)),) for name in self.shapes}
            self.parts = {n for m, form in own_formats.items() for n in part_names(m, form)}
            self.parts |= {order_name(module) for module in own_formats} & self.names
        else:
            self.wanted = {name: family.sources(name) for name in self.shapes}
            self.head = family.sources("head.weight")
        self.expected, self.found = max(RENAMES, key=self._num_found)

    def match(self) -> tuple[dict[str, Source], str]:
        """Our parameter -> its source under the names of the files, and what is left out in words;
        ValueError for anything missing or extra.
        """
        sources, missing = {}, []
        for name, alternatives in self.wanted.items():
            for source in (source.renamed(self.stored) for source in alternatives):
                if all(n in self.names for n in source.all_names(self.shapes[name])):
                    sources[name] = source
                    break
            else:
                names = alternatives[0].renamed(self.stored).all_names(self.shapes[name])
                missing += [n for n in names if n not in self.names]
        missing += self.parts - self.names - set(missing)
        if missing:
            raise ValueError(f"{self.folder}: missing tensors: {some(sorted(missing))}")
        used = {n for name, source in sources.items() for n in source.all_names(self.shapes[name])}
        used |= self.parts
        return sources, self._left_out(self.names - used)

    def stored(self, name: str) -> str:
        """`name` as the files spell it: the head may stand outside of the beginning that all others
        share.
        """
        changed = renamed(name, self.expected, self.found)
        probe = changed.replace("{e}", "0")
        return changed if probe in self.names else name

    def _num_found(self, rename: tuple[str, str]) -> int:
        names = (sources[0].names[0].replace("{e}", "0") for sources in self.wanted.values())
        return sum(renamed(name, *rename) in self.names for name in names)

    def _left_out(self, unused: set[str]) -> str:
        tied = {self.stored(head.names[0]) for head in self.head if self.model.config.tied_head}
        unused = {n for n in unused - tied if not re.fullmatch(BUFFERS, n)}
        if isinstance(self.tensors, QuantizedFiles):
            unused = {name for name in unused if not self.tensors.is_spare_bias(name)}
        beside = {name for name in unused if self._is_beside(name)}
        if extra := sorted(unused - beside):
            raise ValueError(
                f"{self.folder}: tensors that a {self.model.config.model_type!r} model "
                f"with this config.json has no place for: {some(extra)}"
            )
        parts = sorted({name.removeprefix("model.").split(".")[0] for name in beside})
        return f"{len(beside)} tensors of {some(parts)}" if beside else ""

    def _is_beside(self, name: str) -> bool:
        """Parts of a multimodal model, and layers that predict tokens further ahead."""
        if language_part(self.raw) is not self.raw:
            return not name.startswith((self.found or "model.", "lm_head."))
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        ahead = self.raw.get("num_nextn_predict_layers") or 0
        return bool(ahead and layer and int(layer[1]) >= self.model.config.num_layers)


def renamed(name: str, expected: str, found: str) -> str:
    """`name` with another beginning, by an entry of RENAMES."""
    return found + name.removeprefix(expected) if name.startswith(expected) else name
