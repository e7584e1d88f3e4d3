"""Readers of config.json: small functions from a parsed file to one fact.

A key that is absent means what transformers takes then. A value that makes no sense is a ValueError
that names the key.
"""

from collections.abc import Callable, Mapping
from typing import Any

from gptfast.config import Activation

Raw = Mapping[str, Any]  # a parsed config.json
Fact = Callable[[Raw], Any]

# Beyond these a file describes no model: layers are gone through one by one before any weight is
# looked at, and sizes are reckoned with as floats.
MOST, MOST_LAYERS = 2**40, 10_000


def size(*keys: str, default: int | None = None) -> Fact:
    """The first of `keys` that is there and not null, else the default; KeyError of the first where
    there is none.
    """

    def read(raw: Raw) -> int:
        for key in keys:
            value = raw.get(key)
            if value is not None:
                if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                    raise ValueError(
                        f"config.json: {key} = {value!r}; a positive whole number is needed"
                    )
                if value > (most := MOST_LAYERS if "layer" in key else MOST):
                    raise ValueError(f"config.json: {key} = {value!r}; at most {most} is supported")
                return value
        if default is None:
            raise KeyError(keys[0])
        return default

    return read


def optional(key: str, default: Any) -> Fact:
    """The value of `key`; where it is absent or null, what transformers takes then."""
    return lambda raw: default if raw.get(key) is None else raw[key]


def constant(value: Any) -> Fact:
    return lambda raw: value


def flag(key: str, default: bool) -> Fact:
    """True or false; where `key` is absent the default, and null is false, as in transformers."""

    def read(raw: Raw) -> bool:
        value = raw.get(key, default)
        if not (value is None or isinstance(value, bool)):
            raise ValueError(f"config.json: {key} = {value!r}; true or false is needed")
        return bool(value)

    return read


def count(key: str, default: int) -> Fact:
    """A whole number of layers or parts; null and 0 mean none."""
    return lambda raw: 0 if raw.get(key, default) in (None, 0) else size(key, default=default)(raw)


def whole_numbers(key: str) -> Fact:
    """A list of whole numbers as a tuple; None where it is absent or null."""

    def read(raw: Raw) -> tuple[int, ...] | None:
        values = raw.get(key)
        if values is None:
            return None
        if not isinstance(values, list) or not all(isinstance(value, int) for value in values):
            raise ValueError(f"config.json: {key} = {values!r}; a list of whole numbers is needed")
        return tuple(values)

    return read


def number(key: str, default: float | None) -> Fact:
    """A number, or null where the default is."""

    def read(raw: Raw) -> float | None:
        value = raw.get(key, default)
        if value is None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 3e38:
            raise ValueError(f"config.json: {key} = {value!r}; a number is needed")
        return float(value)

    return read


def positive(key: str, default: float | None) -> Fact:
    """A number above zero."""

    def read(raw: Raw) -> float | None:
        value = number(key, default)(raw)
        if value is not None and value <= 0:
            raise ValueError(f"config.json: {key} = {raw[key]!r}; a positive number is needed")
        return value

    return read


def cap(key: str, default: float | None) -> Fact:
    """A number of which null means none, even where the default is one."""
    return lambda raw: None if key in raw and raw[key] is None else number(key, default)(raw)


def quotient(dim: tuple[str, ...], heads: tuple[str, ...]) -> Fact:
    """The size of a head, of which `heads` fill `dim`."""

    def read(raw: Raw) -> int:
        width, num_heads = size(*dim)(raw), size(*heads)(raw)
        if width % num_heads:
            [of, by] = (
                next(key for key in keys if raw.get(key) is not None) for keys in (dim, heads)
            )
            raise ValueError(f"config.json: {of} {width} is not a multiple of {by} {num_heads}")
        return width // num_heads

    return read


def kv_heads(default: int) -> Fact:
    """Key/value heads: `default` where config.json is silent, one for each query head where it says
    null.
    """
    read = size("num_key_value_heads", "num_attention_heads")
    return lambda raw: read(raw) if "num_key_value_heads" in raw else default


def head_dim(raw: Raw) -> int:
    if raw.get("head_dim") is not None:
        return size("head_dim")(raw)
    return quotient(("hidden_size",), ("num_attention_heads",))(raw)


ACTIVATION_NAMES: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


def activation(key: str, default: str) -> Fact:
    def read(raw: Raw) -> Activation:
        name = default if raw.get(key) is None else raw[key]
        if not isinstance(name, str) or name not in ACTIVATION_NAMES:
            raise ValueError(
                f"config.json: {key} = {name!r} is not supported "
                f"(supported: {', '.join(ACTIVATION_NAMES)})"
            )
        return ACTIVATION_NAMES[name]

    return read
