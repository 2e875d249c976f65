"""Only the assistant's text is trained on, for chat templates x conversations x kinds of tokenizer.

The judge derives what a template writes around a content from renderings with marker words, independently of gem. It reads the
tokens of an example back and finds each of the assistant's words in its place, or names the fault.
"""

from __future__ import annotations

import functools
import json
import re
import tempfile
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import pytest
from chat_templates import TEMPLATES, TOKENIZERS, ChatTemplate, end_ids

from gem.data import Example, encode_records, load_records
from gem.ends import Ends

Message = dict[str, Any]


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


_SYSTEM = {"role": "system", "content": "Be short and kind."}
_ASK = _user("Why does the cat sleep in spring?")
_AGAIN = _user("And the tree?")
_MARKERS = f'You said: "{_ASK["content"]}"\nuser: no\nAssistant: yes\n\n### Response:\n[INST] <|im_sep [/INST] USER:'

_SPECIAL = ("<|im_end|>", "</s>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>")
_TOOL = {"type": "function", "function": {"name": "rain", "description": "Is there rain?", "parameters": {}}}

CONVERSATIONS: dict[str, dict[str, Any]] = {
    "single": {"prompt": [_ASK], "chosen": [_assistant("The rain makes it so.")], "rejected": [_assistant("No.")]},
    "system": {
        "prompt": [_SYSTEM, _ASK],
        "chosen": [_assistant("Some water is in the tree.")],
        "rejected": [_assistant("two and two")],
    },
    "turns in the prompt": {
        "prompt": [_ASK, _assistant("<think>rain?</think>It is the rain."), _AGAIN],
        "chosen": [_assistant("the tree sleeps, too.")],
        "rejected": [_assistant("it is the rain.")],
    },
    "system, then turns": {
        "prompt": [_SYSTEM, _ASK],
        "chosen": [_assistant("Some rain."), _AGAIN, _assistant("Some water.")],
        "rejected": [_assistant("two and two")],
    },
    "turns in the completion": {
        "prompt": [_ASK],
        "chosen": [_assistant("The rain is it."), _AGAIN, _assistant("It is two trees."), _user("Thanks!")],
        "rejected": [_assistant("No answer."), _user("But why?"), _assistant("Because."), _ASK, _assistant("No!")],
    },
    "reasoning": {
        "prompt": [_ASK],
        "chosen": [_assistant("<think>\nSome rain, the cat.\n</think>\n\nIt is the rain.")],
        "rejected": [_assistant("<think>cats</think>No."), _AGAIN, _assistant("<think>\ntrees\n</think>\n\nYes.")],
    },
    "blanks": {
        "prompt": [_ASK],
        "chosen": [_assistant("\n\n  The rain.\n\nAnd the cat. \n")],
        "rejected": [_assistant(" No\n"), _user(" And the tree? "), _assistant("\tYes.  ")],
    },
    "other scripts": {
        "prompt": [_user("¿Por qué? 为什么 🙂")],
        "chosen": [_assistant("é e\u0301 ü — 因为下雨 👩‍👩‍👧 café\u0300 नमस्ते")],
        "rejected": [_assistant("🙂"), _user("ß"), _assistant("ﬁ Å \u202eא")],
    },
    "signs": {
        "prompt": [_ASK],
        "chosen": [_assistant("cat▁tree ▁ is [UNK] <unk> <0x0A>")],
        "rejected": [_assistant("a\u00a0tree\u3000is\u200b it\r\nthe\x0bcat \t .")],
    },
    "markers": {"prompt": [_ASK], "chosen": [_assistant(_MARKERS)], "rejected": [_assistant(_ASK["content"])]},
    "special tokens": {
        "prompt": [_ASK],
        "chosen": [_assistant("It ends " + " or ".join(_SPECIAL) + " here.")],
        "rejected": [_assistant("<s>No<|end|>\n")],
    },
    "options": {
        "prompt": [_SYSTEM, _ASK, _assistant("It is the rain."), _AGAIN],
        "chosen": [_assistant("Two trees.")],
        "rejected": [_assistant("No.")],
        "tools": [_TOOL],
        "chat_template_kwargs": {"enable_thinking": False, "date_string": "1 May 2025", "reasoning_effort": "low"},
    },
    "unfinished": {
        "prompt": [_ASK, _assistant("It is the")],
        "chosen": [_assistant(" rain, and the spring.")],
        "rejected": [_assistant(" cat.")],
    },
    "unfinished, then more": {
        "prompt": [_ASK, _assistant("It is the")],
        "chosen": [_assistant(" rain."), _AGAIN, _assistant("It is, too.")],
        "rejected": [_assistant(" cat."), _AGAIN, _assistant("No.")],
    },
}


# --- the judge --------------------------------------------------------------------------------------------------------


class RefusedError(Exception):
    """The template refuses the conversation."""


class Turn(NamedTuple):
    """Places in the text of a conversation: [at, after) is content; the labels begin in [first, at] and end in [need, last]."""

    first: int
    at: int
    after: int
    need: int
    last: int


class Expected(NamedTuple):
    text: str
    turns: list[Turn]


@functools.cache
def _tokenizer(template: str, kind: str) -> Any:
    return TOKENIZERS[kind](TEMPLATES[template])


@functools.cache
def expected(conversation: str, name: str, template: str) -> Expected:
    """Return the text of a conversation, with the assistant's contents as they are and the rest as the template writes it.

    Raises:
        RefusedError: the template refuses the conversation.
    """
    spec, tokenizer, record = TEMPLATES[template], _tokenizer(template, "byte-level"), CONVERSATIONS[conversation]
    prompt, completion = record["prompt"], record[name]
    options = {"tools": record.get("tools"), **record.get("chat_template_kwargs", {})}

    def render(messages: list[Message], generate: bool = False) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate, **options))

    started = prompt[-1]["content"] if prompt[-1]["role"] == "assistant" else ""
    head = prompt[:-1] if started else prompt
    messages = [*head, {**completion[0], "content": started + completion[0]["content"]}, *completion[1:]]
    while messages[-1]["role"] != "assistant":
        messages.pop()
    try:
        render(messages)
    except jinja2.TemplateError as error:
        raise RefusedError(str(error)) from None
    said = [k for k in range(len(head), len(messages)) if messages[k]["role"] == "assistant"]
    marks = _marks(messages, said, render)
    marked = [{**m, "content": marks.get(k, m["content"])} for k, m in enumerate(messages)]
    # Mark the other roles' words too: the text between two markers is then the template's alone.
    bare = [{**m, "content": f"Heron{k}x"} if k >= len(head) - 1 and k not in said else m for k, m in enumerate(marked)]
    text, between = render(marked), re.split(r"Heron\d+x|" + "|".join(map(re.escape, marks.values())), render(bare))
    turns, whole, done = [], "", 0
    for k in said:
        place = text.index(marks[k])
        before, behind = between[k - len(head) + 1], between[k - len(head) + 2]
        assert text[:place].endswith(before) and text[place + len(marks[k]) :].startswith(behind)
        begun = render(marked[:k], True)
        asked = next((i for i, pair in enumerate(zip(begun, text, strict=False)) if len({*pair}) > 1), len(begun))
        whole += text[done:place]
        at = len(whole)
        first = at - place + max(place - len(before), min(place, asked))
        content = messages[k]["content"]
        whole, done = whole + content, place + len(marks[k])
        opening = re.search(r"<think>\s*$", begun)
        if (
            turns and opening and asked == len(begun) and content.startswith(opening.group())
        ):  # the prompt has it already
            first = at = at + len(opening.group())
        ended = re.search("|".join(map(re.escape, spec.special)), behind)
        last = len(whole) + (ended.end() if ended else len(behind) - len(behind.lstrip()))
        turns.append(Turn(first, at, len(whole), last if ended else len(whole), last))
    whole += text[done:]
    return _opened(Expected(whole, turns), render(head, True), started)


def _marks(messages: list[Message], said: list[int], render: Any) -> dict[int, str]:
    """Return a marker word for each content.

    The word stands behind a word of reasoning if the content has some, because a template may put an empty block before a
    content without reasoning. A template that drops reasoning gets none.
    """
    plain = {k: f"Kestrel{k}x" for k in said}
    shaped = {k: f"<think>\nWren{k}x\n</think>\n\n{plain[k]}" for k in said if "</think>" in messages[k]["content"]}
    text = render([{**m, "content": {**plain, **shaped}.get(k, m["content"])} for k, m in enumerate(messages)])
    return {**plain, **{k: mark for k, mark in shaped.items() if mark in text}}


def _opened(meant: Expected, begun: str, started: str) -> Expected:
    """Return the first turn if the prompt holds the start of its text: a message's, or the generation prompt's."""
    (text, (turn, *others)), shift = meant, 0
    if started:
        turn = turn._replace(first=turn.at + len(started), at=turn.at + len(started))
    elif text.startswith(begun):
        turn = turn._replace(first=len(begun), at=max(turn.at, len(begun)))
    elif (tag := re.search(r"<think>\s*$", begun)) and text.startswith(begun[: tag.start()] + "<think>"):
        # Both open the reasoning; the generation prompt uses its own blanks behind the tag.
        behind = turn.at + len("<think>")
        behind += len(text[behind:]) - len(text[behind:].lstrip())
        text, shift = begun + text[behind:], len(begun) - behind
        turn = Turn(len(begun), len(begun), *(place + shift for place in turn[2:]))
    return Expected(text, [turn, *(Turn(*(place + shift for place in other)) for other in others)])


def faults(example: Any, conversation: str, template: str, kind: str) -> dict[str, str]:
    """Return the faults in the tokens of an example, by completion; {} if there are none."""
    found = {}
    for name in ("chosen", "rejected"):
        ids, given = getattr(example, f"{name}_ids"), getattr(example, f"{name}_given")
        try:
            meant = expected(conversation, name, template)
        except RefusedError as error:
            found[name] = f"the template refuses it: {error}"
            continue
        if why := _fault(example.prompt_ids, ids, given, meant, TEMPLATES[template], _tokenizer(template, kind), kind):
            found[name] = why
    return found


def _fault(
    prompt_ids: list[int], ids: list[int], given: Any, meant: Expected, spec: ChatTemplate, tokenizer: Any, kind: str
) -> str:
    ends = end_ids(spec, tokenizer)
    if not ids or ids[-1] not in ends:
        return "the last label is no end"
    if len(prompt_ids) > 1 and prompt_ids[0] == prompt_ids[1] == tokenizer.bos_token_id:
        return "two beginnings of sequence"
    pieces, done = [(False, list(prompt_ids))], 0
    for at, others in [*given, (len(ids), [])]:
        pieces += [(True, ids[done:at]), (False, list(others))]
        done = at
    runs = [piece for learnt, piece in pieces if learnt]
    if len(runs) != len(meant.turns):
        return f"{len(runs)} runs of labels for {len(meant.turns)} turns"
    if any(end in run[:-1] for run in runs for end in ends):
        return "an end inside of a turn"
    try:
        spans = _spans(pieces, meant, spec, tokenizer, kind)
    except ValueError:
        try:  # an end behind the text, if the template writes none
            pieces[-2] = (True, pieces[-2][1][:-1])
            spans = _spans(pieces, meant, spec, tokenizer, kind)
        except ValueError as error:
            return str(error)
        if re.search("|".join(map(re.escape, spec.ends)), meant.text[meant.turns[-1].after :]):
            return "an end beside the template's own"
        meant = Expected(meant.text, [*meant.turns[:-1], meant.turns[-1]._replace(need=meant.turns[-1].after)])
    loose = kind.startswith("wordpiece")  # WordPiece drops blanks
    for turn, (start, end) in zip(meant.turns, spans, strict=True):
        labels, said = meant.text[start:end], meant.text[turn.at : turn.after]
        if start > turn.at and not (loose and not meant.text[turn.at : start].strip()):
            return f"the labels miss the beginning of {said!r}: {labels!r}"
        if end < turn.need and not (loose and not meant.text[end : turn.need].strip()):
            return f"the labels miss the end of {said!r}: {labels!r}"
        if start < turn.first:
            return f"labels before the turn: {meant.text[start : turn.first]!r}"
        if end > turn.last:
            return f"labels behind the turn: {meant.text[turn.last : end]!r}"
    return ""


def _spans(
    pieces: list[tuple[bool, list[int]]], meant: Expected, spec: ChatTemplate, tokenizer: Any, kind: str
) -> list[tuple[int, int]]:
    """Return [start, end) in the text of each run of labels."""

    def decode(n: int) -> str:
        ids = [token for _, piece in pieces[:n] for token in piece]
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    came = decode(len(pieces))
    places = _walk(came, meant, spec, tokenizer, kind)
    spans = []
    for n, (learnt, _) in enumerate(pieces):
        before, behind = decode(n), decode(n + 1)
        if not came.startswith(behind):
            raise ValueError(f"a character is cut in two: {behind[-20:]!r}")
        if learnt:
            own = [place for place in places[len(before) : len(behind)] if place >= 0]
            spans.append((own[0], own[-1] + 1) if own else (0, 0))
    return spans


def _walk(came: str, meant: Expected, spec: ChatTemplate, tokenizer: Any, kind: str) -> list[int]:
    """Return the place in the text of each decoded character; -1 for a blank that the tokenizer added.

    In text that is only read, a tokenizer may make its usual changes: SentencePiece puts a blank behind a special token, some
    special tokens take the blanks behind them, WordPiece drops blanks (and capitals or accents). Trained text allows none.

    Raises:
        ValueError: a decoded word differs from the text's.
    """
    loose, at, places = kind.startswith("wordpiece"), 0, []
    said = {place for turn in meant.turns for place in range(turn.at, turn.after)}
    came = came.lower() if kind == "wordpiece-lower" else came  # all but the special tokens are
    plain = [(c, place) for place, whole in _characters(meant.text, kind) for c in whole]
    added = "|".join(re.escape(str(token)) for token in tokenizer.added_tokens_decoder.values())
    if kind.startswith("sentencepiece"):  # the decoder maps the sign to a blank, also in the names of special tokens
        added = re.sub("▁", " ", added)
        plain = [(" " if c == "▁" and i not in said else c, i) for c, i in plain]
    behind = {0}
    if kind in ("sentencepiece", "byte-level-blank"):
        behind |= {found.end() for found in re.finditer(added, came)}
    eaten = {found.end() for found in re.finditer("|".join(map(re.escape, spec.swallow)) or "(?!)", came)}
    for j, c in enumerate(came):
        # Blanks that the tokenizer added or dropped in text that is only read.
        while at < len(plain) and plain[at][0].isspace() and plain[at][1] not in said and j in eaten:
            at += 1
        while at < len(plain) and plain[at][0].isspace() and plain[at][0] != c and loose:
            at += 1
        if at < len(plain) and plain[at][0] == c:
            places.append(plain[at][1] if not (loose and c.isspace()) else -1)
            at += 1
        elif c.isspace() and (loose or (c == " " and j in behind and not (at < len(plain) and plain[at][1] in said))):
            places.append(-1)
        else:
            words = "".join(c for c, _ in plain[at : at + 20])
            raise ValueError(
                f"another text came: {came[j : j + 20]!r} for {words!r} behind {came[max(0, j - 20) : j]!r}"
            )
    return places


def _characters(text: str, kind: str) -> list[tuple[int, str]]:
    """Return (place, characters) of a text as a tokenizer of the kind writes it."""
    if kind == "wordpiece-lower":
        plain = (unicodedata.normalize("NFD", c.lower()) for c in text)
        return [
            (place, "".join(c for c in some if unicodedata.category(c) != "Mn")) for place, some in enumerate(plain)
        ]
    if kind == "byte-level-composed":  # an accent joins the letter before it
        letters = re.finditer(r".[\u0300-\u036f]*", text, re.DOTALL)
        return [(found.start(), unicodedata.normalize("NFC", found[0])) for found in letters]
    return list(enumerate(text))


# --- gem's encoding ---------------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """The result for one conversation: the example, or the message of the ValueError that refuses it."""

    example: Example | None
    refused: str = ""


@functools.cache
def _outcome(template: str, kind: str, conversation: str) -> Outcome:
    return _encoded(TEMPLATES[template], _tokenizer(template, kind), conversation)


def _encoded(spec: ChatTemplate, tokenizer: Any, conversation: str) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        rows.write_text(json.dumps(CONVERSATIONS[conversation]) + "\n", encoding="utf-8")
        try:
            (example,) = encode_records(
                load_records(str(rows), need=("chosen", "rejected")),
                tokenizer,
                prompt_template="{prompt}",
                max_length=4096,
                ends=Ends(end_ids(spec, tokenizer)),
            )
        except ValueError as error:
            return Outcome(None, str(error).replace(folder, ""))
    return Outcome(example)


_REFUSAL = r"/rows\.jsonl, line 1: .{20,}"  # names the row, and a cause


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_is_learnt_is_what_the_assistant_says(kind: str, template: str) -> None:
    wrong = {}
    for name in CONVERSATIONS:
        example, refused = _outcome(template, kind, name)
        if example is None:
            if not re.fullmatch(_REFUSAL, refused, re.DOTALL):
                wrong[name] = f"refused without a row or a cause: {refused!r}"
        elif found := faults(example, name, template, kind):
            wrong[name] = str(found)
    assert not wrong


# Expected refusals by cause. With a tokenizer that can write any text, only the template's own refusals remain.
_CAUSES = {
    "the chat template must take the conversation": "refused by the template",
    "the chat template must render the prompt as a prefix": "another prompt in the whole",
    "a completion must not hold an end": "an end inside",
    "a completion must not hold a beginning": "an end inside",
    "the tokenizer must give": "lost by the tokenizer",
}
_BY_TEMPLATE = {
    *((name, turns) for name in ("gemma", "mistral-v1") for turns in ("system", "system, then turns", "options")),
    ("mistral-v3", "system, then turns"),
}
_HOLD_ENDS = {name for name, spec in TEMPLATES.items() if {*spec.ends, spec.eos, spec.bos} & {*_SPECIAL, "<s>"}}


@pytest.mark.parametrize("kind", [kind for kind in TOKENIZERS if kind.startswith("byte-level")])
def test_nothing_is_refused_that_a_template_and_a_tokenizer_can_write(kind: str) -> None:
    refused = {(t, c) for t in TEMPLATES for c in CONVERSATIONS if _outcome(t, kind, c).refused}
    assert refused == _BY_TEMPLATE | {(name, "special tokens") for name in _HOLD_ENDS}


_SHARED = {"refused by the template": 6, "another prompt in the whole": 1, "an end inside": 26}
_REFUSED: dict[str, dict[str, int]] = {
    "byte-level": _SHARED,
    "byte-level-blank": _SHARED,
    "byte-level-composed": _SHARED,
    "sentencepiece": {**_SHARED, "lost by the tokenizer": len(TEMPLATES)},  # the sign that it writes a blank as
    "sentencepiece-first": {**_SHARED, "lost by the tokenizer": len(TEMPLATES)},
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_refusals_by_cause(kind: str) -> None:
    refused = [_outcome(t, kind, c).refused for t in TEMPLATES for c in CONVERSATIONS]
    found = Counter(next((cause for text, cause in _CAUSES.items() if text in why), why) for why in refused if why)
    if kind in _REFUSED:
        assert found == _REFUSED[kind]
    else:  # WordPiece restores few words and blanks
        assert set(found) <= set(_CAUSES.values()) and refused.count("") >= len(TEMPLATES) // 2


_WRONG = {
    "in capitals": ("m.content | upper", "single"),
    "twice": ("m.content + m.content", "single"),
    "cut": ("m.content[:3]", "single"),
    "the last word alone": ("m.content.split(' ')[-1][:1]", "single"),
    "not at all": ("''", "single"),
    "not the answers": ("(m.content if m.role != 'assistant' else 'yes')", "turns in the completion"),
    "not the system": ("(m.content if m.role != 'system' else '')", "system"),
    "not the user": ("(m.content if m.role != 'user' else 'hi')", "single"),
    "not the user's second turn": ("(m.content if loop.index0 != 1 else '')", "turns in the prompt"),
    "not the second answer": ("(m.content if loop.index0 != 3 else '')", "turns in the completion"),
    "of another type": ("(m.content + 1)", "single"),
    "a filter that is not there": ("m.content | shorter", "single"),
    "a field that is not there": ("m.parts[0].text", "single"),
}


@pytest.mark.parametrize("what", _WRONG)
def test_a_template_that_changes_what_is_said_is_refused(what: str) -> None:
    written, conversation = _WRONG[what]
    spec = TEMPLATES["chatml"]
    spec = replace(spec, template=spec.template.replace("m.content", written))
    example, refused = _encoded(spec, TOKENIZERS["byte-level"](spec), conversation)
    assert example is None and re.fullmatch(_REFUSAL, refused, re.DOTALL) and "the chat template" in refused


# --- the judge finds what is wrong ------------------------------------------------------------------------------------


class _Made(NamedTuple):
    prompt_ids: list[int]
    chosen_ids: list[int]
    chosen_given: list[tuple[int, list[int]]]
    rejected_ids: list[int]
    rejected_given: list[tuple[int, list[int]]]


def _made(conversation: str, template: str, kind: str = "byte-level") -> _Made:
    """Build an example by hand, piece by piece; it is right if the pieces can be tokenised one by one."""
    spec, tokenizer = TEMPLATES[template], _tokenizer(template, kind)
    sides: list[Any] = []
    for name in ("chosen", "rejected"):
        text, turns = expected(conversation, name, template)
        ids: list[int] = []
        given, done = [], 0
        for n, turn in enumerate(turns):
            start = turn.first if n else turns[0].first
            others = tokenizer(text[done:start], add_special_tokens=False)["input_ids"]
            if n:
                given.append((len(ids), others))
            else:
                prompt_ids = others
            ids += tokenizer(text[start : turn.last], add_special_tokens=False)["input_ids"]
            done = turn.last
        if ids[-1] not in end_ids(spec, tokenizer):
            ids.append(tokenizer.eos_token_id)
        sides += [ids, given]
    return _Made(prompt_ids, *sides)


@pytest.mark.parametrize("conversation", ["single", "turns in the completion", "blanks", "unfinished", "other scripts"])
@pytest.mark.parametrize(
    "template", ["chatml", "llama-3", "vicuna", "plain", "qwen-3", "deepseek-v3", "tulu", "open-end"]
)
def test_the_judge_takes_what_is_right(template: str, conversation: str) -> None:
    assert faults(_made(conversation, template), conversation, template, "byte-level") == {}


def _planted(right: _Made, name: str, tokenizer: Any) -> _Made:
    """Return the example with one fault planted."""

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    chosen, given = right.chosen_ids, right.chosen_given
    cut = given[0][0]
    moved = {
        "one label too many": {"chosen_ids": chosen + ids("\n")},
        "the header learnt": {"prompt_ids": right.prompt_ids[:-1], "chosen_ids": right.prompt_ids[-1:] + chosen,
                              "chosen_given": [(at + 1, other) for at, other in given]},
        "a word lost": {"chosen_ids": chosen[: cut - 4] + chosen[cut - 3 :],
                        "chosen_given": [(at - 1, other) for at, other in given]},
        "a word moved": {"chosen_ids": [chosen[1], chosen[0], *chosen[2:]]},
        "a word of the first turn in the prompt": {"prompt_ids": right.prompt_ids + chosen[:2], "chosen_ids": chosen[2:],
                                                   "chosen_given": [(at - 2, other) for at, other in given]},
        "a blank added": {"chosen_ids": ids(" ") + chosen, "chosen_given": [(at + 1, other) for at, other in given]},
        "a line break added behind": {"chosen_ids": [*chosen[:-1], *ids("\n"), chosen[-1]]},
        "two beginnings": {"prompt_ids": [tokenizer.bos_token_id, *right.prompt_ids]},
        "no beginning": {"prompt_ids": right.prompt_ids[1:]},
        "the user's turn learnt": {"chosen_ids": chosen[:cut] + given[0][1] + chosen[cut:], "chosen_given": []},
        "a word of the user's learnt": {"chosen_ids": chosen[:cut] + given[0][1][:3] + chosen[cut:],
                                        "chosen_given": [(cut + 3, given[0][1][3:])]},
        "the user's turn left out": {"chosen_given": [(cut, [])]},
        "the last turn left out": {"chosen_ids": chosen[:cut], "chosen_given": []},
        "no end": {"chosen_ids": chosen[:-1]},
        "no end of the first turn": {"chosen_ids": chosen[: cut - 1] + chosen[cut:],
                                     "chosen_given": [(cut - 1, chosen[cut - 1 : cut] + given[0][1])]},
        "an end inside": {"chosen_ids": [chosen[0], chosen[-1], *chosen[1:]],
                          "chosen_given": [(at + 1, other) for at, other in given]},
        "two ends": {"chosen_ids": [*chosen, chosen[-1]]},
        "another completion": {"chosen_ids": right.rejected_ids, "chosen_given": right.rejected_given},
    }[name]  # fmt: skip
    return right._replace(**moved)


_PLANTED = {
    "one label too many": "no end",
    "the header learnt": "before the turn",
    "a word lost": "another text",
    "a word moved": "another text",
    "a word of the first turn in the prompt": "miss the beginning",
    "a blank added": "another text",
    "a line break added behind": "another text",
    "two beginnings": "two beginnings",
    "no beginning": "another text",
    "the user's turn learnt": "runs of labels",
    "a word of the user's learnt": "an end inside|behind the turn",
    "the user's turn left out": "another text",
    "the last turn left out": "runs of labels",
    "no end": "no end",
    "no end of the first turn": "miss the end",
    "an end inside": "an end inside",
    "two ends": "an end inside",
    "another completion": "runs of labels",
}


@pytest.mark.parametrize("fault", _PLANTED)
@pytest.mark.parametrize("template", ["llama-3", "gemma-3", "vicuna", "deepseek-v3"])
def test_the_judge_finds_a_planted_fault(template: str, fault: str) -> None:
    conversation = "turns in the completion"
    wrong = _planted(_made(conversation, template), fault, _tokenizer(template, "byte-level"))
    assert re.search(_PLANTED[fault], faults(wrong, conversation, template, "byte-level")["chosen"])


@pytest.mark.parametrize(
    ("kind", "template", "conversation", "came"),
    [
        ("sentencepiece", "chatml", "single", "' The rain"),
        ("sentencepiece", "phi-4", "single", "' The rain"),
        ("sentencepiece-first", "llama-3", "turns in the completion", "' The rain"),
        ("sentencepiece-first", "deepseek-v3", "single", "' The rain"),
        ("byte-level-blank", "granite", "single", "' The rain"),
        ("byte-level-blank", "qwen-2.5", "system", "' Some water"),
        ("wordpiece", "chatml", "other scripts", "'\\[UNK\\]"),
        ("wordpiece-lower", "tulu", "other scripts", r"'\[unk\]"),
    ],
)
def test_the_judge_finds_what_a_tokenizer_does(kind: str, template: str, conversation: str, came: str) -> None:
    """A piece tokenised alone starts with a blank of the tokenizer's; an unknown sign or word is lost."""
    found = faults(_made(conversation, template, kind), conversation, template, kind)
    assert re.search(f"another text came: {came}", found["chosen"])
