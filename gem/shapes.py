"""Bring the shapes of preference records into one: a prompt, and completions that continue it.

    shape({"chosen": [user, assistant], "rejected": [user, other]}, need=("chosen", "rejected"))
    -> {"prompt": [user], "chosen": [assistant], "rejected": [other]}

Conversations may repeat the prompt, hold it alone, or stand beside its plain text; they may end with a turn that is not the
assistant's, or answer different prompts. Shapes that TRL reads are read as TRL reads them; a record that cannot be trained on
is refused with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gem.messages import (
    Conversation,
    Message,
    check_text,
    content_of,
    conversation,
    from_json,
    has_content,
    prefix,
    same,
)
from gem.messages import template_options as read_template_options
from gem.messages import tools as read_tools
from gem.problems import BadRecord, shown

Record = dict[str, Any]
_SYSTEM = ("system", "developer")
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")


def shape(raw: Record, need: Sequence[str], fields: Sequence[str] = ()) -> tuple[Record, list[str]]:
    """Return the record as prompt, chosen, rejected, candidates, system, tools and chat_template_kwargs, and notes on it.

    Args:
        raw: the same fields as in the data; None is absent.
        need: fields that must be present beside the prompt.
        fields: the columns of the row, for the message.

    Returns:
        "prompt": text or messages; "chosen", "rejected", each of "candidates", if present: text, or messages that begin
        and end with the assistant's turn (if the prompt is messages); "tools", "chat_template_kwargs" if present;
        "system": the system message for a text prompt. The notes are texts for Problems.note.

    Raises:
        BadRecord: a record that cannot be used.
    """
    raw = {name: value for name, value in raw.items() if value is not None}
    for name in need:
        if name not in raw and name != "prompt":  # the conversations may contain the prompt
            raise _missing(name, fields or sorted(raw))
    for name in _MEDIA:
        if raw.get(name):
            raise BadRecord(f"{name!r} must be absent: only text is learnt", shown(raw[name]))
    notes: list[str] = []
    prompt = conversation(raw["prompt"], "prompt") if "prompt" in raw else None
    names, sides = _sides(raw, notes)
    if any(isinstance(side, list) for side in sides) or isinstance(prompt, list):
        prompt, sides = _chat(prompt, sides, notes)
    if prompt is None:
        raise _missing("prompt", fields or sorted(raw))
    record: Record = {"prompt": prompt}
    for name, side in zip(names, sides, strict=True):
        if name == "candidates":
            record.setdefault(name, []).append(side)
        else:
            record[name] = side
    _check_pair(record, notes)
    return _with_extras(record, raw, notes), notes


def _missing(name: str, fields: Sequence[str]) -> BadRecord:
    return BadRecord(f"expected a record with {name!r}", f"the fields {list(fields)}")


def _sides(raw: Record, notes: list[str]) -> tuple[list[str], list[Conversation]]:
    """Return the names and values of the completions; messages are cut after the assistant's last turn."""
    found: list[tuple[str, Any]] = [(name, raw[name]) for name in ("chosen", "rejected") if name in raw]
    candidates = raw.get("candidates", [])
    if isinstance(candidates, str) and candidates.lstrip().startswith("["):
        candidates = from_json(candidates, "candidates")
    if not isinstance(candidates, list) or not all(isinstance(c, str | list | dict) for c in candidates):
        raise BadRecord("'candidates' must be a list of texts or of chat messages", shown(candidates))
    found += [("candidates", candidate) for candidate in candidates]
    return [name for name, _ in found], [_finished(conversation(value, name), name, notes) for name, value in found]


def _masks(message: Message) -> list[str]:
    """Return the fields of a message that make other trainers leave it out of the loss."""
    off = [key for key in ("weight", "train", "training", "loss", "loss_mask", "loss_weight") if key in message]
    on = [key for key in ("mask", "masked") if message.get(key) in (1, True)]
    return [f"{key}={message[key]}" for key in [*(k for k in off if message[k] in (0, False)), *on]]


def _finished(side: Conversation, name: str, notes: list[str]) -> Conversation:
    if isinstance(side, str):
        return side
    masked = next((key for message in side if message["role"] == "assistant" for key in _masks(message)), None)
    if masked is not None:
        raise BadRecord(
            f"{name!r} must not have turns of the assistant that are left out of learning: each is learnt", masked
        )
    turns = len(side)
    while turns and side[turns - 1]["role"] != "assistant":
        turns -= 1
    if not turns:
        raise BadRecord(f"{name!r} must have a turn of the assistant", f"turns of {[m['role'] for m in side]}")
    if turns < len(side):
        notes.append(f"the last turn is the {side[-1]['role']}'s: it is not learnt")
    if not has_content(side[turns - 1]):
        raise BadRecord(f"{name!r} must be text or chat messages, not empty", shown(side[turns - 1]["content"]))
    return side[:turns]


# --- where the prompt ends --------------------------------------------------------------------------------------------


def _chat(
    prompt: Conversation | None, sides: list[Conversation], notes: list[str]
) -> tuple[list[Message] | None, list[Conversation]]:
    """Return the prompt as messages, and the rest of each side that continues it."""
    whole = [side for side in sides if isinstance(side, list)]
    if not isinstance(prompt, list):
        prompt, cut = _prompt_within(prompt, whole, notes)
        sides = [side[cut:] if isinstance(side, list) and side[0]["role"] != "assistant" else side for side in sides]
    elif whole:
        prompt, sides = _prompt_repeated(prompt, sides)
    for side in sides:
        if isinstance(side, list) and side[0]["role"] != "assistant":
            raise BadRecord("the completions must answer the same prompt", f"one that goes on with {_briefly(side[0])}")
    if not any(map(has_content, [message for message in prompt if message["role"] == "user"] or prompt)):
        raise BadRecord("'prompt' must be text or chat messages, not empty", shown(content_of(prompt)))
    return prompt, sides


def _prompt_within(text: str | None, whole: list[list[Message]], notes: list[str]) -> tuple[list[Message], int]:
    """Return the common turns of conversations before their answers, and their number; else the plain text as a turn."""
    full = [side for side in whole if side[0]["role"] != "assistant"]
    if not full:
        if text is None:
            raise BadRecord("a conversation must begin with a turn before the assistant's", _briefly(whole[0][0]))
        return [{"role": "user", "content": text}], 0
    answers = [i for i, message in enumerate(full[0]) if message["role"] == "assistant"]
    cut = prefix(full) if len(full) > 1 else answers[0]
    while cut and full[0][cut - 1]["role"] == "assistant":  # sampling must answer a user or a tool
        cut -= 1
    if not cut or any(side[cut]["role"] != "assistant" for side in full):
        ways = "; ".join(_briefly(side[cut]) for side in full[:2])
        raise BadRecord("the completions must answer the same prompt", f"ones that go on with {ways}")
    prompt = full[0][:cut]
    last = prompt[-1]["content"].strip()
    if text is not None and not any(message["role"] == "user" for message in prompt):
        prompt = [*prompt, {"role": "user", "content": text}]
    elif text is not None and last not in text and text.strip() not in last:
        notes.append("the conversations have another prompt than the text beside them: theirs is used")
    return prompt, cut


def _prompt_repeated(prompt: list[Message], sides: list[Conversation]) -> tuple[list[Message], list[Conversation]]:
    """Return the prompt, and the sides without their repetition of it."""
    whole = [side for side in sides if isinstance(side, list)]
    first = whole[0][0]
    if first["role"] in _SYSTEM and prompt[0]["role"] not in _SYSTEM and all(same(side[:1], [first]) for side in whole):
        prompt = [first, *prompt]  # only the repetition has the system message
    sides = [_without(prompt, side) if isinstance(side, list) else side for side in sides]
    if prompt[-1]["role"] not in ("user", "tool") and all(isinstance(side, list) for side in sides):
        rest = [side for side in sides if isinstance(side, list)]
        cut = prefix(rest) if len(rest) > 1 else len(rest[0])
        cut = next((i for i in range(cut) if rest[0][i]["role"] == "assistant"), cut)
        prompt, sides = [*prompt, *rest[0][:cut]], [side[cut:] for side in rest]
    return prompt, sides


def _without(prompt: list[Message], side: list[Message]) -> list[Message]:
    """Return a side without its first messages that repeat the last ones of the prompt."""
    for length in range(min(len(prompt), len(side) - 1), 0, -1):
        if same(prompt[-length:], side[:length]):
            return side[length:]
    return side


def _briefly(message: Message) -> str:
    return f"the {message['role']}'s {shown(message['content'], 40)}"


# --- the whole record -------------------------------------------------------------------------------------------------


def _check_pair(record: Record, notes: list[str]) -> None:
    pair = [_answer(record[name]) for name in ("chosen", "rejected") if name in record]
    if len(pair) < 2:
        return
    if same(pair[0], pair[1]):
        raise BadRecord("chosen and rejected must not be the same", shown(content_of(pair[0])))
    prompt = record["prompt"]
    if isinstance(prompt, str) and all(isinstance(side, str) and side.startswith(prompt) for side in pair):
        notes.append("chosen and rejected begin with the text of the prompt: it is learnt with them")


def _answer(side: Conversation) -> Conversation:
    """Return a single plain turn of the assistant as its text."""
    return side[0]["content"] if isinstance(side, list) and len(side) == 1 and len(content_of(side)[0]) == 2 else side


def _with_extras(record: Record, raw: Record, notes: list[str]) -> Record:
    """Add the system prompt, the tools and the options of the template to the record."""
    prompt, system = record["prompt"], raw.get("system", "")
    if not isinstance(system, str):
        raise BadRecord("'system' must be text", shown(system))
    if system.strip():
        check_text(system, "system")
        if isinstance(prompt, str):
            record["system"] = system
        elif prompt[0]["role"] not in _SYSTEM:
            record["prompt"] = [{"role": "system", "content": system}, *prompt]
        elif prompt[0]["content"] != system:
            notes.append("the conversation has a system message of its own: it is used, not the column's")
    if found := read_tools(raw.get("tools")):
        record["tools"] = found
    if options := read_template_options(raw.get("chat_template_kwargs")):
        record["chat_template_kwargs"] = options
    return record
