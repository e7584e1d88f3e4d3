"""Which parts of a model are quantized, in which format, and the exchange of its modules.

Knows a Transformer's modules and the formats of `quantize`; knows no files.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from gptfast.model import Transformer
from quantize.formats import Format, QuantizedWeight
from quantize.grouped import GroupedLinear, PackedGroupedLinear
from quantize.linear import QuantizedEmbedding, QuantizedGroupedLinear, QuantizedLinear
from quantize.packed import PackedLinear
from quantize.packing import why_no_kernel
from quantize.rounding import round_to_nearest

# A single row of weights: nothing to save.
NEVER = ("*.shared_gate",)
PLAIN = "none"
WHOLE_ROW = -1  # as a group size


@dataclass(frozen=True)
class QuantPlan:
    """The formats of the linears in blocks, of the head and of the embedding (None: plain).
    `exclude`: patterns of modules that stay plain, such as "blocks.0.*" or "mlp.down".
    """

    body: Format
    head: Format | None = None
    embedding: Format | None = None
    exclude: tuple[str, ...] = ()

    def format_of(self, name: str) -> Format | None:
        """Of a linear, the head or the embedding, by the name of its module."""
        if any(_matches(name, pattern) for pattern in (*NEVER, *self.exclude)):
            return None
        if name in ("head", "embed"):
            return self.head if name == "head" else self.embedding
        return self.body

    def formats(self, model: Transformer) -> dict[str, Format]:
        """Module -> format, for all that are quantized; ValueError for what cannot be."""
        names = quantizable(model)
        for pattern in self.exclude:
            if not any(_matches(name, pattern) for name in names):
                raise ValueError(
                    f"no part of the model is called {pattern!r}; parts are "
                    f"{', '.join(names[:4])}, ..., head; * stands for anything"
                )
        found = {name: form for name in names if (form := self.format_of(name)) is not None}
        if not found:
            raise ValueError("nothing is left to quantize; exclude less")
        if model.config.tied_head and "embed" in found and "head" not in found:
            raise ValueError(
                "the head shares the embedding, which is to be quantized; give the head a format"
            )
        return found

    @property
    def names(self) -> list[str | None]:
        """What `of_names` reads: body, head, embedding, patterns."""
        forms = (self.body, self.head, self.embedding)
        return [*(None if form is None else form.name for form in forms), *self.exclude]

    @staticmethod
    def of_names(names: Sequence[str | None]) -> "QuantPlan":
        forms = [None if name is None else Format.parse(name) for name in names[:3]]
        assert forms[0] is not None
        return QuantPlan(forms[0], forms[1], forms[2], tuple(filter(None, names[3:])))

    @property
    def name(self) -> str:
        """For people: int4-g32, head int8."""
        parts = [self.body.name]
        if self.head != self.body:
            parts.append(f"head {self.head.name if self.head else 'plain'}")
        if self.embedding is not None:
            parts.append(f"embedding {self.embedding.name}")
        if self.exclude:
            parts.append(f"without {' '.join(self.exclude)}")
        return ", ".join(parts)


def quant_plan(
    quant: str,
    group_size: int | None = None,
    head: str | None = None,
    embedding: str | None = None,
    exclude: Sequence[str] = (),
) -> QuantPlan:
    """The plan of names as the command line has them. `group_size` -1: the whole row, as in GPTQ's
    settings. `head` None: int8, where the body has fewer bits, else as the body; "none": plain.
    ValueError for what there is not.
    """
    if not isinstance(quant, str):
        raise ValueError(f"quant is {quant!r}; the name of a format is needed, such as int4")
    body = Format.parse(quant)
    if group_size is not None:
        size = None if group_size == WHOLE_ROW else group_size
        if ("-g" in quant or "-row" in quant) and size != body.group_size:
            raise ValueError(f"{quant} names its group size; leave out the other, {group_size}")
        if body.kind == "mxfp4" and size != body.group_size:
            raise ValueError(f"mxfp4 has groups of {body.group_size}; leave out the group size")
        body = replace(body, group_size=size)
    head_format: Format | None
    if head is None:
        head_format = body if body.bits == 8 else Format("int", 8, dynamic=body.dynamic)
    else:
        head_format = None if head == PLAIN else Format.parse(head)
    embedding_format = None if embedding in (None, PLAIN) else Format.parse(str(embedding))
    if embedding_format is not None and embedding_format.dynamic:
        raise ValueError("an embedding is looked up: it has no activations to round")
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    return QuantPlan(body, head_format, embedding_format, patterns)


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


def quantizable(model: Transformer) -> list[str]:
    """Modules that a plan may speak of, in the order of the model."""
    kinds = (nn.Linear, GroupedLinear, QuantizedLinear, QuantizedGroupedLinear)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    return ["embed", *names]


def put(model: nn.Module, name: str, part: nn.Module | nn.Parameter) -> None:
    """Exchanges the module or parameter `name`."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, part)


def put_quantized(
    model: Transformer, name: str, weight: QuantizedWeight, dtype: torch.dtype
) -> None:
    """A quantized module in the place of a plain one, with its bias. `dtype`: of activations."""
    old = model.get_submodule(name)
    model.formats[name] = weight.format
    if name == "embed":
        put(model, name, QuantizedEmbedding(weight, dtype))
    elif isinstance(old, GroupedLinear | QuantizedGroupedLinear):
        put(model, name, QuantizedGroupedLinear(weight, old.bias))
    else:
        assert isinstance(old, nn.Linear | QuantizedLinear)
        put(model, name, QuantizedLinear(weight, old.bias))


def rounded(
    weights: Iterable[tuple[str, Tensor | QuantizedWeight]],
    formats: Mapping[str, Format],
    tied_head: bool,
    where: str = "",
    search: bool = True,
) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
    """Parameters by name as they come, the weights of the modules `formats` rounded to them. A tied
    head among these comes before the embedding that it is made of.
    """
    for name, weight in weights:
        module = name.removesuffix(".weight")
        made = [module] if module in formats else []
        if module == "embed" and tied_head and "head" in formats:
            made.insert(0, "head")
        if isinstance(weight, Tensor):
            for each in made:
                stored = round_to_nearest(weight, formats[each], search=search, name=where + name)
                yield f"{each}.weight", stored
        if module not in formats or not isinstance(weight, Tensor):
            yield name, weight


def fill(
    model: Transformer,
    weights: Iterable[tuple[str, Tensor | QuantizedWeight]],
    dtype: torch.dtype,
) -> None:
    """Gives a model on the meta device its parameters; `dtype` is that of activations."""
    for name, weight in weights:
        if isinstance(weight, QuantizedWeight):
            put_quantized(model, name.removesuffix(".weight"), weight, dtype)
        else:
            put(model, name, nn.Parameter(weight, requires_grad=False))


def running_notes(model: Transformer) -> list[str]:
    """What a user should know of how the quantized parts of a loaded model run."""
    modules = [(form, model.get_submodule(name)) for name, form in model.formats.items()]
    plain = (nn.Linear, GroupedLinear, PackedLinear, PackedGroupedLinear)
    twins = (QuantizedLinear, QuantizedGroupedLinear)
    notes = []
    for form in dict.fromkeys(form for form, module in modules if isinstance(module, plain)):
        dtype = str(model.dtype).removeprefix("torch.")
        notes.append(
            f"{form.name} runs on CUDA devices from 8.9 on; here its weights were turned into "
            f"{dtype} while loading"
        )
    why = why_no_kernel(model.device, model.dtype)
    for form in dict.fromkeys(form for form, module in modules if isinstance(module, twins)):
        notes.append(
            f"{form.name} has no kernel here ({why}): each product dequantizes its weight, which "
            "is slow"
        )
    return notes
