"""One chat template, compiled: messages to text, in the dialect that transformers defined.

Templates come from strangers' checkpoints: they render in jinja2's immutable sandbox, within
limits of size and time. Knows nothing of tokenizers.
"""

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from gptfast.chat.limits import Limits, Meter, TooMuch
from gptfast.chat.sandbox import SHORT, Sandbox

MAX_SOURCE = 1 << 20  # characters; published templates have up to 30,000
MAX_REASON = 500


class Template:
    """A compiled template; immutable, so threads may share it. ValueError where it has an error."""

    def __init__(self, source: str, limits: Limits = Limits()) -> None:  # noqa: B008 - frozen
        if len(source) > MAX_SOURCE:
            raise ValueError(
                f"the chat template has {len(source):,} characters; at most {MAX_SOURCE:,} are read"
            )
        self.source, self._limits = source, limits
        self._environment = Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        self._environment.globals["raise_exception"] = _raise_exception
        meter = Meter(limits, exempt=SHORT)
        try:
            with self._environment.metered(meter):
                self._template = self._environment.from_string(source)
        except (Exception, TooMuch) as error:  # deep nesting makes Python's own compiler give up
            line = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else None
            where = f" in line {line}" if line else ""
            raise ValueError(f"the chat template has an error{where}: {_reason(error)}") from error

    def render(self, variables: Mapping[str, Any]) -> str:
        """The text. ValueError, with the template's own words, where it refuses the messages, and
        where it fails or costs more than a conversation can need."""
        try:
            meter = Meter(self._limits, variables, exempt=SHORT)
            with self._environment.metered(meter):
                return self._template.render(variables)
        except TooMuch as error:
            raise ValueError(f"the chat template misbehaves: it {error}") from None
        except _Refused as error:
            raise ValueError(
                f"the chat template refuses these messages: {_reason(error)}"
            ) from error
        except Exception as error:  # a template is a program, and fails in as many ways
            raise ValueError(
                "the chat template failed on these messages: "
                f"{type(error).__name__}: {_reason(error)}"
            ) from error


def clock(now: datetime) -> Callable[[str], str]:
    """What templates call strftime_now. A time given once is the same in every rendering."""

    def strftime_now(form: str) -> str:
        if len(form) > MAX_REASON:  # what a format becomes may be 256 times as long
            raise ValueError(f"strftime_now with a format of {len(form)} characters")
        return now.strftime(form)

    return strftime_now


def _reason(error: BaseException) -> str:
    """In one line of a readable length: some of these words are the template's."""
    words = " ".join(str(error).split())
    return words if len(words) <= MAX_REASON else words[:MAX_REASON] + "..."


class _Refused(jinja2.TemplateError):
    """The template called raise_exception."""


def _raise_exception(message: str) -> None:
    raise _Refused(str(message))


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it for instances

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)
