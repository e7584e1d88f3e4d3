"""Family: what one model_type is, as data; and small helpers that spell tensor names."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gptfast.families.readers import Fact
from gptfast.sources import Names, Order, Source


@dataclass(frozen=True)
class Family:
    """`facts`: ModelConfig field -> reader of config.json. `requires`: key -> the values under
    which those facts are the whole truth. `names`: our parameter -> where its numbers stand.
    `examples` and `special` are for people.
    """

    examples: str
    special: str
    facts: Mapping[str, Fact]
    names: Names
    requires: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def sources(self, name: str) -> tuple[Source, ...]:
        """Where our parameter `name` may stand: one of these, in the usual order of preference.
        KeyError where the family has no such part.
        """
        pieces = name.split(".")
        if pieces[0] != "blocks":
            return self.names[name]
        template = ".".join((pieces[0], "{i}", *pieces[2:]))
        return tuple(
            source.renamed(lambda theirs: theirs.replace("{i}", pieces[1]))
            for source in self.names[template]
        )


def one(*names: str, **layout: Any) -> tuple[Source, ...]:
    """A parameter with one place."""
    return (Source(names, **layout),)


def layer_names(
    prefix: str,
    modules: Mapping[str, str | tuple[str, ...]],
    *,
    transposed: tuple[str, ...] = (),
    order: Mapping[str, Order] | None = None,
) -> dict[str, tuple[Source, ...]]:
    """Weights and biases of modules of a layer: ours -> theirs, all under `prefix`. Modules named
    in `transposed` store their weight [in, out]; `order` gives rows their order.
    """
    names = {}
    for ours, theirs in modules.items():
        sources = (theirs,) if isinstance(theirs, str) else theirs
        for kind in ("weight", "bias"):
            names[f"blocks.{{i}}.{ours}.{kind}"] = one(
                *(f"{prefix}.{source}.{kind}" for source in sources),
                transposed=ours in transposed and kind == "weight",
                order=(order or {}).get(ours),
            )
    return names


def model_names(embed: str, norm: str, head: str = "lm_head") -> dict[str, tuple[Source, ...]]:
    """What is not in a layer: embedding, last norm, head."""
    return {
        "embed.weight": one(f"{embed}.weight"),
        **{f"norm.{kind}": one(f"{norm}.{kind}") for kind in ("weight", "bias")},
        **{f"head.{kind}": one(f"{head}.{kind}") for kind in ("weight", "bias")},
    }
