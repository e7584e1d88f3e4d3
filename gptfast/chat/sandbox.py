"""jinja2's sandbox with a meter: every value that a template makes passes through it.

Three kinds of places make values: operators and literals (the code generator and call_binop),
calls (call) and filters (wrapped when the environment is made). Operations whose result can be
larger than their operands are checked before they run: PREDICTED, `*`, `**`, `%`, join, format.
"""

import json
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import update_wrapper, wraps
from typing import Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.filters import make_attrgetter
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace

from gptfast.chat.limits import ITEM, Meter, TooMuch

# `%5d`, `%(name)s`, `%.*f`: width and precision
PERCENT = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(\*|\d+)?(?:\.(\*|\d+)?)?")
MAX_PADDING = 9999  # of one formatted number
SCOPES = ("_loop_vars", "_block_vars")  # the sandbox hands these on with every call
MAX_SEARCH = 1 << 28  # steps of a search from the right, which compares naively
# Lines that need no watching: each call here is short, or calls what is watched.
SHORT = frozenset(
    module.__file__ or ""
    for module in (jinja2.environment, jinja2.runtime, jinja2.sandbox, sys.modules[__name__])
)


class _Weighing(CodeGenerator):
    """Compiles `[a, b]` to `environment.kept([a, b])`, and so all that makes a value without a call
    (binary operators are the sandbox's own business)."""

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._kept(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._kept(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._kept(super().visit_Tuple, node, frame)
        else:  # `for a, b in ...`
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._kept(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat((")
        for part in node.nodes:
            self.write("environment.finalize(context, ")
            self.visit(part, frame)
            self.write("), ")
        self.write("))")

    def _kept(self, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.kept(")
        visit(node, frame)
        self.write(")")


class Sandbox(ImmutableSandboxedEnvironment):
    """Renders within a Meter, one for each thread at a time, so threads may share it."""

    code_generator_class = _Weighing
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        # Nothing is computed while compiling: constants too would have to be paid for.
        super().__init__(optimized=False, finalize=self._finalized(), **options)
        self._local = threading.local()
        self.globals["namespace"] = _Namespace
        self.filters |= {"join": self._join, "sum": self._sum, "tojson": self._to_json}
        self.filters = {name: self._metered(name, made) for name, made in self.filters.items()}

    @property
    def meter(self) -> Meter:
        return self._local.meter

    @contextmanager
    def metered(self, meter: Meter) -> Iterator[None]:
        self._local.meter = meter
        try:
            with meter.running():
                yield
        finally:
            del self._local.meter

    # -- where values are made --

    def kept(self, value: Any) -> Any:
        return self.meter.kept(value)

    def concat(self, parts: Iterable[str]) -> str:  # type: ignore[override]
        """Joins what was rendered: of a template, a macro, a block, and `a ~ b`."""
        pieces, size = [], 0
        for part in parts:
            size += len(part)
            self.meter.afford(size)
            pieces.append(part)
        self.meter.spend(size)
        return "".join(pieces)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.meter.afford(self._size_of_binop(operator, left, right))
        return self.kept(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        self, meter = __self, __self.meter
        named = {name: value for name, value in kwargs.items() if name not in SCOPES}
        meter.afford_all((*args, *named.values()))
        owner = getattr(__obj, "__self__", None)
        name = getattr(__obj, "__name__", "")
        if isinstance(owner, str | bytes | int):
            if name == "join" and args:
                args = (self._joinable(owner, args[0]), *args[1:])
            elif name in PREDICTED:
                meter.afford(_predict(PREDICTED[name], owner, *args, **named))
        meter.enter()
        result = super().call(__context, __obj, *args, **kwargs)
        meter.leave()  # an exception ends the run
        return meter.kept(result)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        owner, name = value.__self__, value.__name__

        def formatted(*args: Any, **kwargs: Any) -> str:
            if name == "format_map":
                (mapping,) = args
                args, kwargs = (), mapping
            return type(owner)(_Formatter(self).vformat(owner, args, kwargs))

        return update_wrapper(formatted, value)

    def _finalized(self) -> Callable[[Context, Any], str]:
        @pass_context
        def finalize(context: Context, value: Any) -> str:
            """What is printed, as text; a text costs nothing until it is joined."""
            if isinstance(value, str):
                return value
            self.meter.afford(self.meter.weight(value))
            return self.kept(str(value))

        return finalize

    def _metered(self, name: str, made: Callable[..., Any]) -> Callable[..., Any]:
        """A filter, its result paid for. Some are lazy: what they yield is paid for where it is
        collected."""
        passed = 1 if hasattr(made, "jinja_pass_arg") else 0

        @wraps(made)
        def metered(*args: Any, **kwargs: Any) -> Any:
            meter = self.meter
            meter.afford_all((*args[passed:], *kwargs.values()))
            if name in FILTERS_PREDICTED:
                meter.afford(_predict(FILTERS_PREDICTED[name], *args[passed:], **kwargs))
            elif name == "format":
                meter.afford(_size_of_percent(meter, args[0], kwargs or args[1:]))
            return meter.kept(made(*args, **kwargs))

        return metered

    # -- sizes known only from the operands --

    def _size_of_binop(self, operator: str, left: Any, right: Any) -> int:
        meter = self.meter
        if operator == "*":
            number, other = (left, right) if isinstance(left, int) else (right, left)
            if isinstance(number, int) and isinstance(other, str | bytes | list | tuple):
                return max(number, 0) * meter.weight(other)  # 0 for what is empty
        whole = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and whole and left.bit_length() * right > 1024:
            raise TooMuch("raises a number to a power beyond 1024 bits")
        if operator == "%" and isinstance(left, str | bytes):
            return _size_of_percent(meter, left, right)
        return meter.weight(left) + meter.weight(right)

    def _joinable(self, separator: Any, values: Iterable[Any]) -> list[Any]:
        items = list(values)
        self.meter.afford(self.meter.weight(items) + len(separator) * len(items))
        return items

    # -- filters in whose place jinja's own, or Python's, would take sizes as they come --

    def _join(self, value: Any, d: str = "", attribute: str | int | None = None) -> str:
        items = list(value)
        if attribute is not None:
            items = list(map(make_attrgetter(self, attribute), items))
        texts = [self.finalize(None, item) for item in items]  # type: ignore[misc]
        return str(d).join(self._joinable(str(d), texts))

    def _sum(self, iterable: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
        getter = make_attrgetter(self, attribute) if attribute is not None else None
        for item in iterable:
            start = self.kept(start + (getter(item) if getter else item))
        return start

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """jinja's own filter escapes HTML, which no model was tuned on."""
        wide = indent if isinstance(indent, int) else len(indent or "")
        if wide > 64 or any(len(text) > 64 for text in separators or ()):
            raise TooMuch("writes JSON with more than 64 characters between two values")
        encoder = json.JSONEncoder(
            ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
        return self.concat(encoder.iterencode(value))


class _Namespace(Namespace):
    """Its attributes change after it was weighed, so it prints none of them."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Formatter(SandboxedFormatter):
    """str.format, field by field."""

    def __init__(self, environment: Sandbox) -> None:
        super().__init__(environment)
        self._meter = environment.meter

    def format_field(self, value: Any, format_spec: str) -> Any:
        numbers = re.findall(r"\d+", format_spec)
        if any(len(number) > 9 or int(number) > MAX_PADDING for number in numbers):
            raise TooMuch(f"pads a text to more than {MAX_PADDING} characters")
        self._meter.afford(self._meter.weight(value))
        return self._meter.kept(super().format_field(value, format_spec))


def _size_of_percent(meter: Meter, template: str | bytes, values: Any) -> int:
    """At most what `template % values` has."""
    text = template if isinstance(template, str) else str(template, "latin-1")
    padding = num_fields = 0
    for field in PERCENT.finditer(text):
        for number in field.groups(default="0"):
            if number == "*" or len(number) > 9 or int(number) > MAX_PADDING:
                raise TooMuch(f"pads a text to more than {MAX_PADDING} characters")
            padding += int(number)
        num_fields += 1
    times = max(num_fields, 1) if isinstance(values, dict) else 1
    return len(text) + padding + times * meter.weight(values)


def _replaced(text: Any, old: Any, new: Any, count: int | None = -1) -> int:
    text = str(text) if not isinstance(text, bytes) else text
    found = text.count(old) if old else len(text) + 1
    found = found if count is None or count < 0 else min(found, count)
    return len(text) + found * len(new)


def _searched(text: Any, sought: Any = None, *_: Any, **__: Any) -> int:
    if sought is not None and len(text) * len(sought) > MAX_SEARCH:
        raise TooMuch("searches a long text for a long text from its right")
    return 0


def _wider(text: Any, width: int = 8, *_: Any, **__: Any) -> int:
    return width


# method: at most how large its result is, from the text it belongs to and its arguments
PREDICTED: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _wider),
    **dict.fromkeys(("rfind", "rindex", "rsplit", "rpartition"), _searched),
    "expandtabs": lambda text, tabsize=8: len(text) * max(tabsize, 1),
    "replace": _replaced,
    "to_bytes": lambda number, length=1, *_, **__: length,
    "translate": lambda text, table, *_: len(text) * max([1, *map(_length, _values(table))]),
}
FILTERS_PREDICTED: dict[str, Callable[..., int]] = {
    "batch": lambda value, linecount, fill_with=None: ITEM * linecount,
    "center": lambda value, width=80: width,
    "indent": lambda s, width=4, *_, **__: len(s) * (1 + _length(width)),
    "list": lambda value: len(value) * (ITEM + 1) if isinstance(value, str) else 0,
    "replace": _replaced,
    "round": lambda value, precision=0, *_: 1000 * abs(precision),
    "slice": lambda value, slices, fill_with=None: 8 * ITEM * slices,
    "wordwrap": lambda s, width=79, break_long_words=True, wrapstring=None, *_, **__: (
        len(s) * (1 + len(wrapstring or "\n"))
    ),
}


def _predict(size: Callable[..., int], *args: Any, **kwargs: Any) -> int:
    """0 where the arguments do not fit: the operation itself will say so."""
    try:
        return size(*args, **kwargs)
    except (TypeError, ValueError, AttributeError):
        return 0


def _length(value: Any) -> int:
    """Of a text; of a number, as many."""
    return value if isinstance(value, int) else len(value or "")


def _values(table: Any) -> Iterable[Any]:
    values = table.values() if isinstance(table, dict) else table
    return [value for value in values if isinstance(value, str)]
