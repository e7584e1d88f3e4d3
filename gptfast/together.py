"""Functions that every rank of a group runs when rank 0 calls them, with the same arguments:
loading a model, making a cache. Rare calls, so they go as JSON; what they make is known by a number
afterwards.
"""

import functools
import importlib
import json
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from gptfast.parallel import AGREED, Group, Op

Function = TypeVar("Function", bound=Callable[..., Any])

# What the ranks have made together, by number. Others than rank 0 hold it until that has let it go,
# and calls a function again.
_numbers: "weakref.WeakKeyDictionary[Any, int]" = weakref.WeakKeyDictionary()
_held: dict[int, Any] = {}
_released: list[int] = []
_count = 0


def together(function: Function) -> Function:
    """`function(group, ...)` for every rank: where rank 0 calls it, the others call it too. An
    error of one is raised on all, if it is AGREED.

    Arguments are what JSON holds, and what such functions have returned; keyword arguments are for
    rank 0 alone.
    """

    @functools.wraps(function)
    def call(group: Group, *arguments: Any, **own: Any) -> Any:
        if group.is_alone:
            return function(group, *arguments, **own)
        with group.unbroken():
            if group.leads:
                while _released:
                    group.send(Op.FREE, _released.pop())
                written = [{"made": n} if (n := number_of(a)) else a for a in arguments]
                name = function.__module__, function.__name__
                group.send_text(Op.CALL, json.dumps([*name, group.by_expert, written]))
            result = group.agree(lambda: function(group, *arguments, **own))
            return result if isinstance(result, int | float | str | None) else known(group, result)

    return call  # type: ignore[return-value]


def number_of(made: Any) -> int:
    """Of something that the ranks have made together; 0 of other things."""
    try:
        return _numbers.get(made, 0)
    except TypeError:  # a list, say
        return 0


def known(group: Group, made: Any) -> Any:
    """Gives its number to what every rank has just made."""
    global _count
    _count += 1
    _numbers[made] = _count
    if group.leads:
        weakref.finalize(made, _released.append, _count).atexit = False
    else:
        _held[_count] = made
    return made


# -- on ranks other than 0 --


def answer(group: Group, length: int) -> None:
    """Runs a function that rank 0 has called. Its errors are rank 0's to tell."""
    module, name, by_expert, written = json.loads(group.receive_text(length))
    function = getattr(importlib.import_module(module), name)
    arguments = [_held[a["made"]] if isinstance(a, dict) and "made" in a else a for a in written]
    with suppress(*AGREED):
        function(replace(group, by_expert=by_expert), *arguments)


def made(number: int) -> Any:
    """What has this number."""
    return _held[number]


def free(number: int) -> None:
    _held.pop(number, None)
