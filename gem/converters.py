"""Convert one row of a public format to the fields of a record: which answer is chosen, and which is rejected.

    by_index("prompt", "response_0", "response_1", "better_response_id")(row) -> {"prompt": ..., "chosen": ..., "rejected": ...}

A converter takes a row without its absent fields. gem.formats lists the converter of each format.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from gem.messages import conversation, from_json, rows_of, text_prefix
from gem.problems import BadRecord, Minor, shown

Row = dict[str, Any]
Convert = Callable[[Row], Row]

# Anthropic's transcripts: "\n\nHuman: ...\n\nAssistant: ...", the first two line breaks often stripped.
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")


# --- which of two is better -------------------------------------------------------------------------------------------


def tie(detail: str) -> BadRecord:
    """Return the error for a row that prefers neither answer."""
    return Minor("a tie: neither answer is the better one", detail)


def _field(row: Row, name: str) -> Any:
    if name not in row:
        raise BadRecord(f"expected a record with {name!r}", f"the fields {sorted(row)}")
    return row[name]


def number(row: Row, name: str) -> float:
    """Return a column as a number; it may hold the number as text.

    Raises:
        BadRecord: the column is absent or holds anything else.
    """
    value = _field(row, name)
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if math.isnan(found):  # every comparison with NaN is silently false
        raise BadRecord(f"{name!r} must be a number", shown(value))
    return found


def rated_alike(row: Row, one: str, other: str) -> bool:
    """True if both columns hold the same number; a missing column or a value that is no number gives False."""
    try:
        return float(row[one]) == float(row[other])
    except (KeyError, TypeError, ValueError, OverflowError):
        return False


def _pair(prompt: Any, first: Any, second: Any, lead: float, why: str) -> Row:
    """Return the record of a pair; the first answer is better by `lead`, and a lead of 0 is a tie."""
    if not lead:
        raise tie(why)
    chosen, rejected = (first, second) if lead > 0 else (second, first)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def by_index(prompt: str, first: str, second: str, by: str, *, first_is: int = 0) -> Convert:
    """Return a converter for a column with the number of the better answer: first_is, or the other of 0 and 1."""

    def convert(row: Row) -> Row:
        better = number(row, by)
        if better not in (0, 1):
            raise BadRecord(f"{by!r} must be 0 or 1", shown(row[by]))
        lead = 1 if better == first_is else -1
        return _pair(row.get(prompt), _field(row, first), _field(row, second), lead, "")

    return convert


def by_strength(prompt: str, first: str, second: str, by: str) -> Convert:
    """Return a converter for a column that is negative if the first answer is better and positive if the second is."""

    def convert(row: Row) -> Row:
        strength = number(row, by)
        return _pair(row.get(prompt), _field(row, first), _field(row, second), -strength, f"{by} = {shown(row[by])}")

    return convert


def _ranked(prompt: Any, answers: Sequence[tuple[float, Any]], why: str) -> Row:
    """Return the record of the best and the worst of (score, answer)."""
    if len(answers) < 2:
        raise BadRecord("expected at least two answers", str(len(answers)))
    ordered = sorted(answers, key=lambda item: -item[0])
    (high, best), (low, worst) = ordered[0], ordered[-1]
    return _pair(prompt, best, worst, high - low, why)


def _items(row: Row, name: str) -> list[Row]:
    """Return a column of objects; it may be a list, a table, or JSON text of either."""
    value = from_json(_field(row, name), name)
    value = rows_of(value) if isinstance(value, dict) else value
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise BadRecord(f"{name!r} must be a list of objects", shown(value))
    return value


def _values(row: Row, name: str) -> list[Any]:
    """Return a column of values; it may be a list, JSON text of one, or a single value."""
    value = _field(row, name)
    parsed = from_json(value, name) if isinstance(value, str) and value.lstrip().startswith("[") else value
    return parsed if isinstance(parsed, list) else [value]


# --- converters -------------------------------------------------------------------------------------------------------


def renamed(**names: str) -> Convert:
    """Return a converter that renames columns, ours = theirs; for "a|b" it takes the first that is present."""

    def convert(row: Row) -> Row:
        return {ours: next((row[t] for t in theirs.split("|") if t in row), None) for ours, theirs in names.items()}

    return convert


def standard(row: Row) -> Row:
    """Keep our own names, which are TRL's; `completion` becomes chosen."""
    raw: Row = {name: row[name] for name in ("prompt", "chosen", "rejected", "candidates") if name in row}
    if "chosen" not in raw and "completion" in row:
        raw["chosen"] = row["completion"]
    return raw


def labelled(by: str, convert: Convert) -> Convert:
    """Return a converter for single answers with a verdict; only the good ones can be trained on."""

    def labelled(row: Row) -> Row:
        if _field(row, by) not in (True, "True", "true", "1"):
            raise BadRecord("the answer is labelled as bad, and stands alone", f"{by} = {shown(row[by])}")
        return convert(row)

    return labelled


def implicit(row: Row) -> Row:
    """Split the common prefix of two texts off as the prompt, as TRL does; gem.shapes does so for conversations."""
    raw = standard(row)
    chosen, rejected = (conversation(raw[name], name) if name in raw else None for name in ("chosen", "rejected"))
    if "prompt" in raw or not isinstance(chosen, str) or not isinstance(rejected, str):
        return raw
    end = text_prefix(chosen, rejected)
    if chosen == rejected:
        raise BadRecord("chosen and rejected must not be the same", shown(chosen))
    if not chosen[:end].strip():
        raise BadRecord(
            "chosen and rejected must begin with the same prompt", f"{shown(chosen, 40)} and {shown(rejected, 40)}"
        )
    return {"prompt": chosen[:end], "chosen": chosen[end:], "rejected": rejected[end:]}


def beside_conversation(row: Row) -> Row:
    """Take the conversation column as the prompt, unless it already ends with an answer and so is a copy of chosen."""
    name = next((n for n in ("conversations", "trajectory", "messages") if n in row), "conversations")
    turns = from_json(_field(row, name), name)
    last = turns[-1] if isinstance(turns, list) and turns and isinstance(turns[-1], dict) else {}
    answered = last.get("role", last.get("from")) in ("assistant", "gpt")
    sides = {side: from_json(row[side], side) for side in ("chosen", "rejected") if _is_message(row.get(side))}
    return {**standard(row), **sides, **({} if answered else {"prompt": turns})}


def _is_message(value: object) -> bool:
    """True if a text looks like the JSON of a single message; text tables of this format hold messages that way."""
    return isinstance(value, str) and re.match(r'\s*\{\s*"(from|role|value|content)":', value) is not None


def alpaca(chosen: str, rejected: str = "") -> Convert:
    """Return a converter whose prompt is the turns of history, then instruction and input.

    chosen and rejected name the columns of the answers.
    """

    def convert(row: Row) -> Row:
        texts = [_field(row, "instruction"), next((row[n] for n in ("input", "context") if n in row), "")]
        if not all(isinstance(text, str) for text in texts):
            raise BadRecord("'instruction' and 'input' must be text", shown(texts))
        prompt: Any = "\n".join(text for text in texts if text.strip())
        answer = next((row[name] for name in chosen.split("|") if name in row), None)
        both = {"chosen": answer, "rejected": row[rejected]} if rejected in row else {"chosen": answer}
        if isinstance(answer, list) and len(answer) == 2 and all(isinstance(a, str) for a in answer):
            both = {"chosen": answer[0], "rejected": answer[1]}  # an older form of pairs: [better, worse]
        history = _values(row, "history") if "history" in row else []
        if not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
            raise BadRecord("'history' must be a list of pairs of question and answer", shown(history))
        turns = [_turn(i, text) for pair in history for i, text in enumerate(pair)]
        return {"prompt": [*turns, _turn(0, prompt)] if turns else prompt, **both}

    return convert


def _turn(number: int, text: Any) -> Row:
    return {"role": ("user", "assistant")[number % 2], "content": text}


def openai(row: Row) -> Row:
    """Take the request as the prompt and the preferred output as chosen."""
    request = from_json(_field(row, "input"), "input")
    if not isinstance(request, dict):
        raise BadRecord("'input' must be an object with messages", shown(request))
    tools = {"tools": request["tools"]} if request.get("tools") else {}
    return {"prompt": request.get("messages"), "chosen": row.get("preferred_output"),
            "rejected": row.get("non_preferred_output"), **tools}  # fmt: skip


def webgpt(row: Row) -> Row:
    """Compare two answers by their scores, which sum to 0."""
    question = _field(row, "question")
    if isinstance(question, str) and question.startswith('{"'):
        question = from_json(question, "question")
    if isinstance(question, dict):
        question = question.get("full_text")
    lead = number(row, "score_0") - number(row, "score_1")
    return _pair(
        question, _field(row, "answer_0"), _field(row, "answer_1"), lead, f"score_0 = score_1 = {row['score_0']}"
    )


def arena(row: Row) -> Row:
    """Compare two conversations by the name of the winner."""
    winner = str(_field(row, "winner"))
    lead = {"model_a": 1, "model_b": -1}.get(winner, 0)
    if not lead and "tie" not in winner:
        raise BadRecord("'winner' must be model_a, model_b or a tie", shown(winner))
    pair = _pair(None, _field(row, "conversation_a"), _field(row, "conversation_b"), lead, f"winner = {shown(winner)}")
    return {"chosen": pair["chosen"], "rejected": pair["rejected"]}


def arena_columns(row: Row) -> Row:
    """Build conversations from lists of texts; three columns name the winner."""
    prompts = _values(row, "prompt")
    lead = number(row, "winner_model_a") - number(row, "winner_model_b")
    pair = _pair(None, _values(row, "response_a"), _values(row, "response_b"), lead, "winner_tie")
    if len(prompts) == 1:
        return {"prompt": prompts[0], **{name: pair[name][0] for name in ("chosen", "rejected") if pair[name]}}
    return {
        name: [_turn(i, text) for turn in zip(prompts, pair[name], strict=False) for i, text in enumerate(turn)]
        for name in ("chosen", "rejected")
    }


def nectar(row: Row) -> Row:
    """Rank the answers by their rank, 1 the best; the prompt may be a transcript."""
    answers = [(-number(item, "rank"), item.get("answer")) for item in _items(row, "answers")]
    prompt = _field(row, "prompt")
    prompt = _open(prompt) if is_transcript(prompt) else prompt
    return _ranked(prompt, answers, "all of the same rank")


def ultrafeedback(row: Row) -> Row:
    """Rank the completions by their overall score."""
    answers = [(number(item, "overall_score"), item.get("response")) for item in _items(row, "completions")]
    return _ranked(_field(row, "instruction"), answers, "all of the same overall_score")


def rated(row: Row) -> Row:
    """Rank the generations by the ratings, one for each."""
    answers, ratings = _values(row, "generations"), _values(row, "ratings")
    if len(answers) != len(ratings):
        raise BadRecord("'generations' and 'ratings' must be as many", f"{len(answers)} and {len(ratings)}")
    scores = [number({"ratings": rating}, "ratings") for rating in ratings]
    return _ranked(row.get("instruction"), list(zip(scores, answers, strict=True)), "all of the same rating")


def orca(row: Row) -> Row:
    """Read a question with two answers; some sets mark ties in `status`."""
    if row.get("status") == "tie":
        raise tie("status = tie")
    return renamed(prompt="question|input|query", chosen="chosen", rejected="rejected")(row)


# --- transcripts ------------------------------------------------------------------------------------------------------


def is_transcript(value: object) -> bool:
    """True if a value is text with alternating Human and Assistant turns."""
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def transcripts(row: Row) -> Row:
    """Parse chosen, rejected and the prompt, if present, into messages; a single answer stays text."""
    raw: Row = {}
    for name in ("prompt", "chosen", "rejected"):
        if is_transcript(row.get(name)):
            raw[name] = _open(row[name]) if name == "prompt" else _transcript(row[name])
        elif name in row:
            raw[name] = row[name].strip() if isinstance(row[name], str) else row[name]
    return raw


def _transcript(text: str) -> list[Row]:
    pieces = _SPEAKER.split("\n\n" + text.lstrip())[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": text.strip()}
        for speaker, text in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def _open(text: str) -> list[Row]:
    """Return the turns of a prompt, without a trailing assistant turn that is still empty."""
    turns = _transcript(text)
    return turns if turns[-1]["content"] else turns[:-1]
