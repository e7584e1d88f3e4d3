"""What a chat template may cost. Knows nothing of jinja or of chats.

A template is a stranger's program. A Meter bounds one run of it: each value that the program makes
is weighed, all of them together have a budget, and each of its lines looks at the clock. This works
in any thread and on any platform, because nothing outside the thread is needed.

What it cannot do: interrupt a single operation of the interpreter. So whoever holds a Meter asks it
before each operation whose result can be larger than its operands; all others are about linear in
their operands, and those are bounded.
"""

import sys
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from contextlib import contextmanager
from dataclasses import dataclass
from time import thread_time
from types import FrameType
from typing import Any

EVENTS_PER_LOOK = 16  # thread_time is a system call, 0.3 us; a line of a template costs as much
MAX_FRAMES = 800
ITEM = 8  # what a place in a list weighs, beside what stands there
MAX_BITS = 128  # of an integer

TraceFunction = Callable[[FrameType, str, Any], Any]


@dataclass(frozen=True)
class Limits:
    """Sizes are characters, and 8 for each item of a list. The larger the conversation is, the more
    is allowed: `size` and `total` grow with it."""

    seconds: float = 2.0  # of this thread's CPU, so that a busy machine makes no difference
    size: int = 1 << 22  # of one value, the rendered chat among them; a million tokens or so
    size_per_given: int = 4
    total: int = 1 << 25  # of all values made on the way
    total_per_given: int = 64
    depth: int = 100  # of lists in lists, and of macros that call macros


class TooMuch(BaseException):
    """The template costs more than it may. Not an Exception, so that no library in between takes
    it for one of the template's own errors."""


class Meter:
    """Bounds one run of one program, in one thread. `given` is the data that the program gets,
    `exempt` are files whose lines need no watching, because each call there is short."""

    def __init__(self, limits: Limits, given: Any = None, exempt: Iterable[str] = ()) -> None:
        self._limits = limits
        self._exempt = {__file__, *exempt}
        # By id: weight, depth, and the container itself, which keeps its id from being used again.
        self._known: dict[int, tuple[int, int, Any]] = {}
        self._max_size, self._max_depth = sys.maxsize, sys.maxsize
        weight = self.weight(given)
        self._max_size = limits.size + limits.size_per_given * weight
        self._max_depth = limits.depth + self._measure(given)[1]
        self._left = limits.total + limits.total_per_given * weight
        self._calls = 0

    # -- sizes --

    def weight(self, value: Any) -> int:
        """Characters and items in a value, counted as often as printing it would."""
        return self._measure(value)[0]

    def afford(self, size: int) -> None:
        """Asked before a value of this size is made."""
        if size > self._max_size:
            raise TooMuch(f"makes a text or list of more than {self._max_size:,} characters")

    def afford_all(self, operands: Iterable[Any]) -> None:
        """Asked before an operation that reads these."""
        self.afford(sum(map(self.weight, operands)))

    def spend(self, size: int) -> None:
        self.afford(size)
        self._left -= size
        if self._left < 0:
            raise TooMuch("makes more texts and lists than a conversation needs")

    def kept(self, value: Any) -> Any:
        """The value that the program has made, paid for."""
        if isinstance(value, str):
            self.spend(len(value))
            return value
        weight, _, cost = self._measure(value)
        self.afford(weight)
        self.spend(cost)
        return value

    def _measure(self, value: Any) -> tuple[int, int, int]:
        """Weight, depth, and the memory that is new: a container seen before costs no more."""
        if isinstance(value, str | bytes):
            return len(value), 0, len(value)
        if isinstance(value, int):
            if value.bit_length() > MAX_BITS and self._max_size < sys.maxsize:
                raise TooMuch(f"makes a number of more than {MAX_BITS} bits")
            return ITEM, 0, ITEM
        if isinstance(value, KeysView | ValuesView | ItemsView):
            value = getattr(value, "mapping", ())
        if not isinstance(value, list | tuple | set | frozenset | Mapping):
            return ITEM, 0, ITEM
        if (known := self._known.get(id(value))) is not None:
            return known[0], known[1], ITEM
        weight, depth, cost = self._measure_items(value)
        self._known[id(value)] = weight, depth, value
        return weight, depth, cost

    def _measure_items(self, value: Any) -> tuple[int, int, int]:
        weight = depth = cost = 0
        for items in (value, value.values()) if isinstance(value, Mapping) else (value,):
            for item in items:
                inner, below, new = self._measure(item)
                weight, depth, cost = weight + ITEM + inner, max(depth, below), cost + ITEM + new
        if depth >= self._max_depth:
            raise TooMuch(f"nests lists more than {self._limits.depth} deep")
        return weight, depth + 1, cost

    # -- time --

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within, each line of Python that this thread runs looks at the clock.

        A debugger or a coverage tool sees nothing of these lines and everything after them.
        """
        before = sys.gettrace()
        sys.settrace(self._watcher())
        try:
            yield
        finally:
            sys.settrace(before)

    def enter(self) -> None:
        """Before a call that the program makes: a macro may call itself, though not for ever."""
        self._calls += 1
        if self._calls > self._limits.depth:
            raise TooMuch(f"has macros that call each other more than {self._limits.depth} deep")

    def leave(self) -> None:
        self._calls -= 1

    def _watcher(self) -> TraceFunction:
        """What sys.settrace calls for each line; closures, because it is called very often."""
        deadline = thread_time() + self._limits.seconds
        num_events = num_frames = 0

        def entered(frame: FrameType, event: str, argument: Any) -> TraceFunction | None:
            nonlocal num_frames
            if frame.f_code.co_filename in self._exempt:
                return None
            num_frames += 1
            # Far below where C would run out of its stack, should someone have raised the limit.
            if num_frames > MAX_FRAMES:
                raise TooMuch(f"nests expressions or blocks more than {MAX_FRAMES} calls deep")
            return watched(frame, event, argument)

        def watched(frame: FrameType, event: str, argument: Any) -> TraceFunction:
            nonlocal num_events, num_frames
            num_events += 1
            if event == "return":
                num_frames -= 1
            if num_events % EVENTS_PER_LOOK == 0 and thread_time() > deadline:
                raise TooMuch(f"runs for more than {self._limits.seconds:g} seconds")
            return watched

        return entered
