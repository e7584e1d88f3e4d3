"""Chat templates: messages to the text, or the token ids, that a model was tuned on.

What a message says is data: control tokens written in it reach the model as text, never as control
ids. Knows nothing of models, caches or turns; template.py renders, sandbox.py and limits.py bound
what a stranger's template may do.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from gptfast.chat.limits import Limits
from gptfast.chat.template import Template, clock
from gptfast.tokenizer import Tokenizer
from gptfast.tokenizer.vocabulary import read_json, read_text

__all__ = ["ChatTemplate", "Limits", "Message", "find_template"]

Message = Mapping[str, Any]
DEFAULT, WITH_TOOLS = "default", "tool_use"
# Names that a message's thoughts go by. Templates read the first; gpt-oss's reads the second.
THOUGHTS = ("reasoning_content", "thinking", "reasoning")
TAG = "CONTINUE_FINAL_MESSAGE_TAG "


def find_template(folder: Path) -> "ChatTemplate | None":
    """The chat template of a checkpoint folder with its named variants, None where there is none.

    In the order of transformers: chat_template.jinja and additional_chat_templates/NAME.jinja,
    chat_template.json, tokenizer_config.json, whose value may be a list of named templates.
    """
    folder = Path(folder)
    sources = {
        path.stem: read_text(path)
        for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))
    }
    if (path := folder / "chat_template.jinja").is_file():
        sources[DEFAULT] = read_text(path)
    if sources:
        return ChatTemplate(sources)
    for path in (folder / "chat_template.json", folder / "tokenizer_config.json"):
        match read_json(path).get("chat_template"):
            case None:
                continue
            case str(source):
                return ChatTemplate(source)
            case [*entries] if entries and all(map(_is_named, entries)):
                return ChatTemplate({entry["name"]: entry["template"] for entry in entries})
        raise ValueError(
            f"{path}: chat_template is neither a string nor a list of templates with their "
            "names; put the template into chat_template.jinja"
        )
    return None


def _is_named(entry: Any) -> bool:
    match entry:
        case {"name": str(), "template": str()}:
            return True
    return False


class ChatTemplate:
    """The template of a model, or several by name, each compiled once; threads may share it.

    In all methods `extra` are further variables of the template (enable_thinking), and `name`
    chooses among named templates; without it "tool_use" serves where tools are given, else
    "default", as in transformers.
    """

    def __init__(self, sources: str | Mapping[str, str], limits: Limits | None = None) -> None:
        self.sources = {DEFAULT: sources} if isinstance(sources, str) else dict(sources)
        self._limits = limits or Limits()
        self._compiled: dict[str, Template] = {}

    def render(
        self,
        messages: Sequence[Message],
        *,
        special_tokens: Mapping[str, str] | None = None,
        name: str | None = None,
        **extra: Any,
    ) -> str:
        """The text of a conversation. `special_tokens` are variables like bos_token. ValueError,
        with the template's own words, where it refuses the messages."""
        conversation = _Conversation.of(messages, extra)
        fixed = _fixed_variables(special_tokens or {})
        return conversation.rendered(self._choose(name, conversation.data), fixed)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        *,
        name: str | None = None,
        **extra: Any,
    ) -> list[int]:
        """The ids of a conversation: control tokens that the template writes become control ids,
        the same strings inside messages (and tools, documents) stay text.

        To tell the two apart, those inside messages are rendered as stand-ins, single characters.
        """
        conversation = _Conversation.of(messages, extra)
        template = self._choose(name, conversation.data)
        fixed = _fixed_variables(tokenizer.special_tokens)
        plain = conversation.rendered(template, fixed)
        control = _Control(tokenizer, avoid=[template.source, plain, *_strings(conversation.data)])
        if not control.occurs_in(conversation.data):
            return tokenizer.encode(plain, bos=False, control=True)
        # Some templates look for markup in messages (Qwen's for `</think>`); a stand-in would blind
        # them, which shows in the text. Then only what no reader ever sees is replaced.
        for hide in (control.hide_in_data, control.hide_invisible):
            hidden = _Conversation(hide(conversation.data), conversation.continues)
            rendered = hidden.rendered(template, fixed)
            if control.restored(rendered) == plain:
                break
        return tokenizer.encode(rendered, bos=False, control=True, literals=control.stand_for)

    def _choose(self, name: str | None, data: Mapping[str, Any]) -> Template:
        if name is None:
            with_tools = data["tools"] is not None and WITH_TOOLS in self.sources
            name = WITH_TOOLS if with_tools else DEFAULT
        if name not in self.sources:
            names = ", ".join(sorted(self.sources))
            raise ValueError(f"the model has no chat template named {name!r}; it has: {names}")
        if name not in self._compiled:
            self._compiled[name] = Template(self.sources[name], self._limits)
        return self._compiled[name]


def _fixed_variables(special_tokens: Mapping[str, str]) -> dict[str, Any]:
    """A token that is None must not be defined: templates would print it."""
    named = {name: token for name, token in special_tokens.items() if token is not None}
    return {"strftime_now": clock(datetime.now()), **named}


@dataclass(frozen=True)
class _Conversation:
    """All that a template is told by its caller, in plain JSON types: its own copy."""

    data: dict[str, Any]
    continues: bool  # the answer goes on with the last message

    @classmethod
    def of(cls, messages: Sequence[Message], extra: Mapping[str, Any]) -> "_Conversation":
        """Messages as transformers hands them on: keys without a value are left out, thoughts go by
        each of their names."""
        data = {"tools": None, "documents": None, "add_generation_prompt": True, **extra}
        data = {"messages": list(messages), **data}
        continues = bool(data.pop("continue_final_message", False))
        if not data["messages"]:
            raise ValueError("the conversation is empty; give at least one message")
        for key in ("messages", "tools", "documents"):
            for item in data[key] or ():
                if not isinstance(item, Mapping):
                    raise ValueError(
                        f"{key} are dictionaries, found {type(item).__name__}; "
                        "a tool is given as its JSON schema"
                    )
        data = _plain(data)
        data["messages"] = [_with_thoughts(message) for message in data["messages"]]
        if continues:
            data["add_generation_prompt"] = False
        return cls(data, continues)

    def rendered(self, template: Template, fixed: Mapping[str, Any]) -> str:
        if not self.continues:
            return template.render({**fixed, **self.data})
        *earlier, last = self.data["messages"]
        content = last.get("content")
        if not isinstance(content, str):
            raise ValueError("the last message has no text to continue")
        tagged = [*earlier, last | {"content": content + TAG}]
        text = template.render({**fixed, **self.data, "messages": tagged})
        before, found, after = text.rpartition(TAG.strip())
        if not found or content.strip() not in before:
            raise ValueError("the chat template does not show the last message, to be continued")
        # Where the template trims messages, what it trimmed is not continued either.
        return before if after.startswith(TAG[len(TAG.strip()) :]) else before.rstrip()


def _with_thoughts(message: dict[str, Any]) -> dict[str, Any]:
    message = {key: value for key, value in message.items() if value is not None}
    for name in THOUGHTS:
        if name in message:
            first, second, _ = THOUGHTS
            return {second: message[name], **message, first: message[name]}
    return message


def _plain(value: Any) -> Any:
    """A copy in JSON's types: other objects have methods of which no sandbox knows what they do."""
    match value:
        case None | bool():
            return value
        case str():
            return str.__str__(value)
        case int():
            return int.__int__(value)
        case float():
            return float.__float__(value)
        case Mapping():
            return {_plain(key): _plain(inner) for key, inner in value.items()}
        case list():
            return [_plain(inner) for inner in value]
        case tuple():
            return tuple(_plain(inner) for inner in value)
    return f"<{type(value).__name__}>"


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
        case dict():
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
        case dict():
            for key, inner in value.items():
                yield from (*_strings(key), *_strings(inner))
        case list() | tuple():
            for inner in value:
                yield from _strings(inner)
