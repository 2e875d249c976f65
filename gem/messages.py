"""Normalise chat messages of public data for a chat template; anything that is not understood is refused by name.

conversation("2", "chosen")                                           -> "2"
conversation([{"from": "human", "value": "1+1"}], "prompt")           -> [{"role": "user", "content": "1+1"}]
conversation([{"role": "user", "content": [{"type": "text", "text": "1+1"}]}], "prompt")      -> the same
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from gem.problems import BadRecord, shown

Message = dict[str, Any]
Conversation = str | list[Message]

ROLES = ("system", "developer", "user", "assistant", "tool")
# The names of the roles in ShareGPT, OpenAssistant, Gemma, Llama 3, Glaive and Hermes.
_ROLE = {
    **dict.fromkeys(("human", "prompter", "question", "instruction"), "user"),
    **dict.fromkeys(("gpt", "bot", "model", "ai", "chatgpt", "chatbot", "answer", "response"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    "system_prompt": "system",
    **{name: name for name in ROLES},
}
_CALLS = ("function_call", "tool_call")  # roles whose content is the call itself
_ROLE_KEYS = ("role", "from", "author", "speaker")
_CONTENT_KEYS = ("content", "value", "text")
REASONING = ("reasoning_content", "reasoning", "thinking")
# The fields that make up a message; others only describe it (token counts, languages, ids of its source).
_CONTENT_FIELDS = ("role", "content", "tool_calls", "tool_call_id", "name", *REASONING)


def conversation(value: object, name: str) -> Conversation:
    """Return text unchanged, or messages as dicts with "role", "content" (str) and their other fields that are not None.

    JSON text of messages, a single message and a table of messages ({"role": [...], "content": [...]}) count as messages too.

    Raises:
        BadRecord: anything else; the message gives `name` and the value.
    """
    if isinstance(value, str):
        messages = _json_messages(value)
        if messages is None:
            return check_text(value, name)
        value = messages
    if isinstance(value, dict):
        value = rows_of(value)
    if not isinstance(value, list | tuple) or not value or not all(isinstance(item, dict) for item in value):
        if isinstance(value, list | tuple) and value and all(isinstance(item, list | tuple) for item in value):
            raise BadRecord(f"{name!r} must be one conversation", f"a list of {len(value)}")
        raise BadRecord(f"{name!r} must be text or chat messages, not empty", shown(value))
    return [_message(item, name) for item in value]


def check_text(value: object, name: str) -> str:
    """Return `value` itself if it is text that is not blank.

    Raises:
        BadRecord: no text, blank text, or text with half a surrogate pair, which no tokenizer takes.
    """
    if not isinstance(value, str) or not value.strip():
        raise BadRecord(f"{name!r} must be text or chat messages, not empty", shown(value))
    return _whole(value, name)


def same(one: Conversation, other: Conversation) -> bool:
    """True if two conversations have the same content; fields that only describe a message do not count."""
    return bool(content_of(one) == content_of(other))


def content_of(value: Conversation) -> Any:
    """Return the content of a conversation in a form that can be compared."""
    if isinstance(value, str):
        return value
    return [{key: message[key] for key in _CONTENT_FIELDS if key in message} for message in value]


def has_content(message: Message) -> bool:
    """True if a message has words, reasoning or a tool call."""
    return bool(message["content"].strip() or message.get("tool_calls") or any(map(message.get, REASONING)))


def tools(value: object) -> list[dict[str, Any]]:
    """Return tool definitions from a list of objects or JSON text of one; empty if there are none.

    Raises:
        BadRecord: anything else.
    """
    items = from_json(value, "tools")
    items = items if isinstance(items, list) else [items] if items else []
    items = [from_json(item, "tools") for item in items]
    if not all(isinstance(item, dict) for item in items):
        raise BadRecord("'tools' must be a list of tools or JSON text of one", shown(value))
    return items


def template_options(value: object) -> dict[str, Any]:
    """Return chat_template_kwargs from an object or JSON text of one, without entries that are None.

    Raises:
        BadRecord: anything else.
    """
    options = from_json(value, "chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise BadRecord("'chat_template_kwargs' must be an object or JSON text of one", shown(value))
    return {name: option for name, option in options.items() if option is not None}


def from_json(value: object, name: str) -> Any:
    """Return `value`, parsed if it is text: tables of text (csv) cannot hold a list in another way.

    Raises:
        BadRecord: text that is not JSON.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):  # ValueError: also a number with too many digits
        raise BadRecord(f"{name!r} must be a list or object, or JSON text of one", shown(value)) from None


def _json_messages(text: str) -> list[Any] | None:
    """Return the messages that a text holds as JSON; None if it is anything else, JSON or not."""
    if not text.lstrip().startswith("["):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # ValueError: also a number with too many digits
        return None
    return value if isinstance(value, list) and value and all(map(_looks_like_a_message, value)) else None


def _looks_like_a_message(item: object) -> bool:
    if not isinstance(item, dict):
        return False
    role = item.get("role", item.get("from"))
    return _role(role) is not None and bool({"content", "value", "tool_calls"} & item.keys())


def _role(name: object) -> str | None:
    return _ROLE.get(_plain(name)) if isinstance(name, str) else None


def _plain(role: str) -> str:
    return role.strip().lower().replace("-", "_")


def rows_of(table: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of a table of columns, as some readers give a list of structs; a single message gives a list of it."""
    columns = list(table.values())
    if columns and all(isinstance(column, list) for column in columns) and len(set(map(len, columns))) == 1:
        return [dict(zip(table, row, strict=True)) for row in zip(*columns, strict=True)]
    return [table]


def _message(item: dict[str, Any], name: str) -> Message:
    item = {key: value for key, value in item.items() if value is not None}
    role_key = next((key for key in _ROLE_KEYS if key in item), None)
    content_key = next((key for key in _CONTENT_KEYS if key in item), None)
    author = item[role_key] if role_key else None
    author = author.get("role") if isinstance(author, dict) else author  # {"author": {"role": ...}}
    if not isinstance(author, str):
        raise BadRecord(f"{name!r} must be chat messages with role and content", shown(item))
    role = _role(author)
    if role is None:
        raise BadRecord(f"{name!r} must have roles of {', '.join(ROLES)}", shown(author))
    rest = {key: value for key, value in item.items() if key not in (role_key, content_key)}
    if _plain(author) in _CALLS and content_key:
        rest["function_call"], content_key = item[content_key], None
    rest |= _calls(rest, name)
    rest.pop("function_call", None)
    if content_key is None and "tool_calls" not in rest:
        raise BadRecord(f"{name!r} must be chat messages with role and content", shown(item))
    content = _content(item[content_key], name) if content_key else ""
    for key in REASONING:
        if key in rest:
            rest[key] = _content(rest[key], name)
    return {"role": role, "content": content, **rest}


def _content(value: object, name: str) -> str:
    parts = value if isinstance(value, list) else [value]
    if not all(isinstance(part, str | dict) for part in parts):
        raise BadRecord(f"{name!r} must be chat messages with text as content", shown(value))
    texts: list[str] = []
    for part in parts:
        if isinstance(part, dict):
            kind = part.get("type") or "text"
            if kind not in ("text", "input_text", "output_text") or not isinstance(part.get("text"), str):
                raise BadRecord(f"{name!r} must be text: only text is learnt", f"a part of type {kind!r}")
            part = part["text"]
        texts.append(str(part))
    return _whole("".join(texts), name)


def _whole(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRecord(f"{name!r} must be text without half a surrogate pair", shown(text)) from None
    return text


def _calls(message: dict[str, Any], name: str) -> dict[str, Any]:
    """Return {"tool_calls": [...]} of a message, or {}; templates read no other form of a call."""
    calls = from_json(message.get("tool_calls"), name) or []
    single = from_json(message.get("function_call"), name)
    if single and not calls:
        calls = [{"type": "function", "function": call} for call in (single if isinstance(single, list) else [single])]
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRecord(f"{name!r} must have tool_calls that are a list of objects", shown(calls))
    if any(not isinstance(call.get("function", call), dict) for call in calls):
        raise BadRecord(f"{name!r} must have tool_calls that are a list of objects", shown(calls))
    message.pop("tool_calls", None)  # an empty list goes too: templates test for the key
    return {"tool_calls": [_with_arguments(call) for call in calls]} if calls else {}


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """Return the call without empty fields and with its arguments as an object, which templates write as JSON.

    OpenAI's own format has the arguments as text. A null among the arguments is kept as an argument.
    """
    call = {key: value for key, value in call.items() if value is not None}
    function = call.get("function")
    if not isinstance(function, dict):
        return call
    function = {key: value for key, value in function.items() if value is not None}
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except ValueError:
            arguments = None
    return {**call, "function": {**function, "arguments": arguments} if isinstance(arguments, dict) else function}


def text_prefix(one: str, other: str) -> int:
    """Return the length of the common prefix of two texts by TRL's rule.

    A blank before the difference belongs to the difference, and each text keeps at least one character.
    """
    end = min(len(one), len(other)) - 1
    for i in range(end):
        if one[i] != other[i]:
            end = i
            break
    return end - 1 if end and one[end - 1] == " " and one[end] != other[end] else end


def prefix(sides: Sequence[list[Message]]) -> int:
    """Return the number of messages with which all sides start; each side keeps at least one."""
    first = content_of(sides[0])
    end = min(map(len, sides)) - 1
    for side in sides[1:]:
        other = content_of(side)
        end = next((i for i in range(end) if first[i] != other[i]), end)
    return end
