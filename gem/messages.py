"""Chat messages as public data writes them -> as a chat template takes them; what is not understood is refused by name.

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
# What the roles are called elsewhere: ShareGPT, OpenAssistant, Gemma, Llama 3, Glaive, Hermes.
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
# What a message says, and what only describes it (token counts, languages, ids of its source).
_SAID = ("role", "content", "tool_calls", "tool_call_id", "name", *REASONING)


def conversation(value: object, name: str) -> Conversation:
    """Text as it is, or a list of messages with "role" and "content" (str) and what else they had, None left out.

    JSON text of messages, one message alone and a table of messages ({"role": [...], "content": [...]}) are messages too.

    Raises:
        BadRecord: anything else; it names `name` and what came.
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
    """`value` itself.

    Raises:
        BadRecord: no text, blank text, or half a surrogate pair in it, which no tokenizer takes.
    """
    if not isinstance(value, str) or not value.strip():
        raise BadRecord(f"{name!r} must be text or chat messages, not empty", shown(value))
    return _whole(value, name)


def same(one: Conversation, other: Conversation) -> bool:
    """Whether two conversations say the same; what only describes a message does not count."""
    return bool(said(one) == said(other))


def said(value: Conversation) -> Any:
    """What a conversation says, to be compared."""
    if isinstance(value, str):
        return value
    return [{key: message[key] for key in _SAID if key in message} for message in value]


def speaks(message: Message) -> bool:
    """Whether a message says anything: words, reasoning or a call."""
    return bool(message["content"].strip() or message.get("tool_calls") or any(map(message.get, REASONING)))


def tools(value: object) -> list[dict[str, Any]]:
    """Tool definitions: a list of objects, or JSON text of one; empty where there are none.

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
    """chat_template_kwargs: an object, or JSON text of one; None left out.

    Raises:
        BadRecord: anything else.
    """
    options = from_json(value, "chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise BadRecord("'chat_template_kwargs' must be an object or JSON text of one", shown(value))
    return {name: option for name, option in options.items() if option is not None}


def from_json(value: object, name: str) -> Any:
    """`value`, parsed where it is text: tables of text (csv) have no other way to hold a list.

    Raises:
        BadRecord: text that is no JSON.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):  # of numbers with too many digits, too
        raise BadRecord(f"{name!r} must be a list or object, or JSON text of one", shown(value)) from None


def _json_messages(text: str) -> list[Any] | None:
    """The messages that a text is JSON of; None where it is anything else, JSON or not."""
    if not text.lstrip().startswith("["):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # of numbers with too many digits, too
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
    """Columns -> rows, as some readers hand a list of structs; a single message -> a list of it."""
    columns = list(table.values())
    if columns and all(isinstance(column, list) for column in columns) and len(set(map(len, columns))) == 1:
        return [dict(zip(table, row, strict=True)) for row in zip(*columns, strict=True)]
    return [table]


def _message(item: dict[str, Any], name: str) -> Message:
    item = {key: value for key, value in item.items() if value is not None}
    role_key = next((key for key in _ROLE_KEYS if key in item), None)
    content_key = next((key for key in _CONTENT_KEYS if key in item), None)
    given = item[role_key] if role_key else None
    given = given.get("role") if isinstance(given, dict) else given  # {"author": {"role": ...}}
    if not isinstance(given, str):
        raise BadRecord(f"{name!r} must be chat messages with role and content", shown(item))
    role = _role(given)
    if role is None:
        raise BadRecord(f"{name!r} must have roles of {', '.join(ROLES)}", shown(given))
    rest = {key: value for key, value in item.items() if key not in (role_key, content_key)}
    if _plain(given) in _CALLS and content_key:
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
    """{"tool_calls": [...]} of a message, or {}: a template takes no other form of a call."""
    calls = from_json(message.get("tool_calls"), name) or []
    single = from_json(message.get("function_call"), name)
    if single and not calls:
        calls = [{"type": "function", "function": call} for call in (single if isinstance(single, list) else [single])]
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRecord(f"{name!r} must have tool_calls that are a list of objects", shown(calls))
    if any(not isinstance(call.get("function", call), dict) for call in calls):
        raise BadRecord(f"{name!r} must have tool_calls that are a list of objects", shown(calls))
    message.pop("tool_calls", None)  # an empty list is none: templates test for the key
    return {"tool_calls": [_with_arguments(call) for call in calls]} if calls else {}


def _with_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """The call without its empty fields, and its arguments as an object, which templates write as JSON; OpenAI's own format has
    them as text. A null among the arguments is one."""
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
    """Characters that two texts begin with in common; a blank before the difference belongs to the difference, and each
    keeps at least one character (TRL's rule)."""
    end = min(len(one), len(other)) - 1
    for i in range(end):
        if one[i] != other[i]:
            end = i
            break
    return end - 1 if end and one[end - 1] == " " and one[end] != other[end] else end


def prefix(sides: Sequence[list[Message]]) -> int:
    """Messages that all sides begin with in common; each keeps at least one."""
    first = said(sides[0])
    end = min(map(len, sides)) - 1
    for side in sides[1:]:
        other = said(side)
        end = next((i for i in range(end) if first[i] != other[i]), end)
    return end
