"""Chat templates: messages to the text, or the token ids, that a model was tuned on.

Templates come from strangers' checkpoints, so they render in jinja2's immutable sandbox. What a
message says is data: control tokens written in it reach the model as text, never as control ids.
Knows nothing of models, caches or turns.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gptfast.tokenizer import Tokenizer
from gptfast.tokenizer.vocabulary import read_json, read_text

Message = Mapping[str, Any]


def find_template(folder: Path) -> str | None:
    """The chat template of a checkpoint folder, None where there is none.

    In the order of transformers: chat_template.jinja, chat_template.json, tokenizer_config.json,
    whose value may be a list of named templates, of which "default" is taken.
    """
    folder = Path(folder)
    if (path := folder / "chat_template.jinja").is_file():
        return read_text(path)
    for path in (folder / "chat_template.json", folder / "tokenizer_config.json"):
        value = read_json(path).get("chat_template")
        entries = value if isinstance(value, list) else [{"name": "default", "template": value}]
        for entry in entries:
            match entry:
                case {"name": "default", "template": str(template)}:
                    return template
        if value is not None:
            raise ValueError(
                f"{path}: chat_template is neither a string nor a list of templates with their "
                'names, one of them "default"; put the template into chat_template.jinja'
            )
    return None


def render(
    template: str,
    messages: Sequence[Message],
    *,
    bos_token: str | None,
    eos_token: str | None,
    add_generation_prompt: bool = True,
    **extra: Any,
) -> str:
    """The text of a conversation. `extra` are further variables of the template: tools, documents,
    enable_thinking. ValueError, with the template's own words, where it refuses the messages."""
    variables = _variables(bos_token, eos_token, add_generation_prompt, extra)
    return _Template(template).render(messages=list(messages), **variables)


def encode_chat(
    tokenizer: Tokenizer,
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    **extra: Any,
) -> list[int]:
    """The ids of a conversation: control tokens that the template writes become control ids,
    the same strings inside messages (and tools, documents) stay text.

    To tell the two apart, those inside messages are rendered as stand-ins, single characters.
    """
    compiled = _Template(template)
    bos_token, eos_token = tokenizer.bos_token, tokenizer.eos_token
    fixed = _variables(bos_token, eos_token, add_generation_prompt, {})
    data = {"messages": list(messages), **extra}
    plain = compiled.render(**fixed | data)
    control = _Control(tokenizer, avoid=[template, plain, *_strings(data)])
    if not control.occurs_in(data):
        return tokenizer.encode(plain, bos=False, control=True)
    # Some templates look for markup in messages (Qwen's for `</think>`); a stand-in would blind
    # them, which shows in the text. Then only what no reader ever sees is replaced.
    for hide in (control.hide_in_data, control.hide_invisible):
        rendered = compiled.render(**fixed | hide(data))
        if control.restored(rendered) == plain:
            break
    return tokenizer.encode(rendered, bos=False, control=True, literals=control.stand_for)


def _variables(
    bos_token: str | None,
    eos_token: str | None,
    add_generation_prompt: bool,
    extra: Mapping[str, Any],
) -> dict[str, Any]:
    """What templates of the hub expect to be defined; a token that is None must not be, because
    they would print it."""
    named = {"bos_token": bos_token, "eos_token": eos_token}
    return {
        "add_generation_prompt": add_generation_prompt,
        "tools": None,
        "documents": None,
        **{name: token for name, token in named.items() if token is not None},
        **extra,
    }


class _Control:
    """Replaces control tokens inside message data by characters that occur nowhere else."""

    def __init__(self, tokenizer: Tokenizer, avoid: list[str]) -> None:
        names = sorted(tokenizer.control_tokens, key=len, reverse=True)
        hidden = [name for name in names if tokenizer.control_tokens[name] in tokenizer.hidden_ids]
        self._any = _pattern(names)
        self._invisible = _pattern(hidden)
        used = set().union(*avoid)
        private = (chr(code) for code in range(0xF0000, 0x10FFFE) if chr(code) not in used)
        self._stand_ins = dict(zip(names, private, strict=False))
        self.stand_for = {char: name for name, char in self._stand_ins.items()}

    def restored(self, rendered: str) -> str:
        return rendered.translate({ord(char): name for char, name in self.stand_for.items()})

    def occurs_in(self, data: Any) -> bool:
        return any(self._any.search(text) for text in _strings(data))

    def hide_in_data(self, data: dict[str, Any]) -> dict[str, Any]:
        """Every control token, but of the assistant's own words only what decoding hides: it wrote
        its `<tool_call>` as a token, and should read it again as one."""
        messages = [
            self._replaced(message, self._invisible)
            if message.get("role") == "assistant"
            else self._replaced(message, self._any)
            for message in data["messages"]
        ]
        return self._replaced(data | {"messages": []}, self._any) | {"messages": messages}

    def hide_invisible(self, data: dict[str, Any]) -> dict[str, Any]:
        return self._replaced(data, self._invisible)

    def _replaced(self, value: Any, pattern: re.Pattern[str]) -> Any:
        return _map_strings(
            value, lambda text: pattern.sub(lambda match: self._stand_ins[match.group()], text)
        )


def _pattern(names: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")  # (?!) never matches


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """The same data with every string in it changed, keys too."""
    match value:
        case str():
            return change(value)
        case Mapping():
            return {
                _map_strings(key, change): _map_strings(inner, change)
                for key, inner in value.items()
            }
        case list() | tuple():
            return [_map_strings(inner, change) for inner in value]
    return value


def _strings(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case Mapping():
            for key, inner in value.items():
                yield from (*_strings(key), *_strings(inner))
        case list() | tuple():
            for inner in value:
                yield from _strings(inner)


class _Template:
    """A compiled template, in the dialect that transformers defined."""

    def __init__(self, source: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        now = datetime.now()  # one time for all renderings of a conversation
        environment.globals["strftime_now"] = now.strftime
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            where = (
                f" in line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            )
            raise ValueError(f"the chat template has an error{where}: {error}") from error

    def render(self, **variables: Any) -> str:
        try:
            return self._template.render(**variables)
        except _Refused as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error
        except Exception as error:  # a template is a program, and fails in as many ways
            raise ValueError(
                f"the chat template failed on these messages: {type(error).__name__}: {error}"
            ) from error


class _Refused(jinja2.TemplateError):
    """The template called raise_exception."""


def _raise_exception(message: str) -> None:
    raise _Refused(message)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it for instances

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja's own filter escapes HTML, which no model was tuned on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
