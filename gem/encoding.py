"""Texts -> token ids: prompt and completion as one text, and proof that they say what the record says.

A tokenizer may put a blank before every text, merge a token across the end of the prompt, add a second beginning of sequence,
or not know a character. So prompt and completion are tokenised as one text and cut where the prompt ends; a token that lies
across the cut is made anew, as no model that is given the prompt can say it; and what comes out is decoded and compared.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

from gem.chat_template import any_of, common, squeezed
from gem.conversation import Part
from gem.decoding import decode
from gem.ends import Ends
from gem.groups import Given
from gem.problems import BadRecord, shown

# Texts that hardly any token reaches across from: in front of a piece, they keep a tokenizer from beginning it with a blank.
_ANCHORS = ("\n", "(", "x", "7")


class Encoded(NamedTuple):
    """Of a completion."""

    ids: list[int]
    """the tokens that the assistant says"""
    given: Given
    """(at, tokens that others say) before ids[at]"""

    @property
    def length(self) -> int:
        return len(self.ids) + sum(len(others) for _, others in self.given)


class _Tokens(NamedTuple):
    """A tokenised text."""

    ids: list[int]
    spans: list[tuple[int, int]] | None
    """[start, end) of each token in the text; None: the tokenizer is a slow one, and does not tell"""


def encode_prompt(text: str, tokenizer: Any, *, special: bool) -> list[int]:
    """The tokens of a prompt as the model is given it, with one beginning of sequence at most.

    Args:
        special: whether the tokenizer adds its special tokens; a chat template writes them itself.

    Raises:
        BadRecord: nothing is left of it, or the tokenizer does not take it.
    """
    ids = _tokenise(text, tokenizer, special).ids
    if not ids:
        raise BadRecord("'prompt' must be at least one token", shown(text))
    return ids


def gives_back(text: str, ids: Sequence[int], tokenizer: Any) -> bool:
    """Whether the tokens of a text say it, blanks and special tokens before it aside."""
    return _squeezed(text) in _squeezed(_decode(ids, tokenizer))


def encode_completion(
    prompt: str, prompt_ids: Sequence[int], parts: Sequence[Part], tokenizer: Any, ends: Ends, *, special: bool
) -> Encoded:
    """The tokens of a completion behind the prompt's; the last one is an end of sequence.

    Args:
        prompt, prompt_ids: as encode_prompt made them.
        parts: prompt + parts is the whole text; the last one is learnt.
        ends: what ends a completion.
        special: as for the prompt.

    Raises:
        BadRecord: an end of sequence inside of it, or text that the tokenizer does not give back.
    """
    tried = []
    for pieces in _ways(prompt, prompt_ids, parts, tokenizer, special):
        if _says(prompt_ids, parts, pieces, tokenizer):
            return _joined(parts, pieces, tokenizer, ends)
        tried.append(pieces)
    # Some tokenizers decode a special token otherwise than they write it; some cannot say where a blank stands.
    named = [part._replace(text=_as_decoded(part.text, tokenizer)) for part in parts]
    for pieces in tried:
        if _says(prompt_ids, named, pieces, tokenizer):
            return _joined(parts, pieces, tokenizer, ends)
    if _sees_words_alone(tokenizer) and _says_by_itself(parts, tried[0], tokenizer):
        return _joined(parts, tried[0], tokenizer, ends)
    text = "".join(part.text for part in parts if part.learnt)
    came = _decode(_own(text, tokenizer), tokenizer)
    raise BadRecord("the tokenizer must give a completion back as it is", _difference(text, came))


def _ways(
    prompt: str, prompt_ids: Sequence[int], parts: Sequence[Part], tokenizer: Any, special: bool
) -> Iterator[list[list[int]]]:
    """The tokens of each part: cut out of the whole text's; else what is learnt is made as inside of a text, or alone."""
    whole = prompt + "".join(part.text for part in parts)
    tokens = _tokenise(whole, tokenizer, special)
    if len(parts) == 1 and tokens.ids[: len(prompt_ids)] == list(prompt_ids):
        yield [tokens.ids[len(prompt_ids) :]]
    rest = []  # of what others say
    if tokens.spans is not None:
        natural = _cut(whole, tokens, len(prompt), parts, tokenizer, _own)
        yield natural
        yield _mixed(parts, _cut(whole, tokens, len(prompt), parts, tokenizer, _inside), natural)
        rest.append(natural)
    inside = [_inside(part.text, tokenizer) for part in parts]
    rest.append(inside)
    own, named = ([make(part.text, tokenizer) for part in parts] for make in (_own, _apart))
    for others in rest:
        yield from (_mixed(parts, said, others) for said in (inside, own, named))


def _mixed(parts: Sequence[Part], said: Sequence[list[int]], others: Sequence[list[int]]) -> list[list[int]]:
    return [a if part.learnt else b for part, a, b in zip(parts, said, others, strict=True)]


def _cut(
    whole: str,
    tokens: _Tokens,
    start: int,
    parts: Sequence[Part],
    tokenizer: Any,
    make: Callable[[str, Any], list[int]],
) -> list[list[int]]:
    """The tokens of each part, which follow one another from `start` on; those that lie across an edge are made anew."""
    spans = cast(list[tuple[int, int]], tokens.spans)
    swallow = _swallowing(tokenizer)
    pieces = []
    for part in parts:
        end = start + len(part.text)
        within = [i for i, (a, b) in enumerate(spans) if start <= a < b <= end]
        if not within:
            pieces.append(make(part.text, tokenizer))
        else:
            first, last = within[0], within[-1]
            edges = [(whole[start : spans[first][0]], first - 1), (whole[spans[last][1] : end], last + 1)]
            # A blank beside a special token that takes it in is part of that token; where it is said, it stays.
            before, behind = (
                [] if not part.learnt and text.isspace() and tokens.ids[at] in swallow else make(text, tokenizer)
                for text, at in edges
            )
            pieces.append([*before, *tokens.ids[first : last + 1], *behind])
        start = end
    return pieces


def _says(prompt_ids: Sequence[int], parts: Sequence[Part], pieces: Sequence[list[int]], tokenizer: Any) -> bool:
    """Whether the tokens, behind the prompt's, are the text of the parts; others may have blanks of a tokenizer."""
    ids = list(prompt_ids)
    before = _decode(ids, tokenizer)
    for part, piece in zip(parts, pieces, strict=True):
        ids += piece
        after = _decode(ids, tokenizer)
        came = after[len(before) :]
        plain = _canonical if part.learnt else _squeezed if _swallowing(tokenizer) else _without_spaces
        if not after.startswith(before) or plain(came) != plain(part.text):
            return False
        before = after
    return True


def _added(tokenizer: Any) -> tuple[dict[str, int], re.Pattern[str]]:
    """The added tokens of a tokenizer, and what finds them in a text."""
    known = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
    return known, any_of(known)


def _apart(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a text of which every stretch between added tokens is made as inside of another."""
    known, pattern = _added(tokenizer)
    stretches, done = [], 0
    for found in pattern.finditer(text):
        stretches += [*_inside(text[done : found.start()], tokenizer), known[found.group()]]
        done = found.end()
    return [*stretches, *_inside(text[done:], tokenizer)]


def _as_decoded(text: str, tokenizer: Any) -> str:
    """The text with its added tokens as decoding writes them."""
    known, pattern = _added(tokenizer)
    return pattern.sub(lambda match: _decode([known[match.group()]], tokenizer), text)


def _sees_words_alone(tokenizer: Any) -> bool:
    """Whether blanks are nothing to a tokenizer, as to BERT's: it cannot tell whether one stands behind the prompt."""
    return "\n" not in _decode(_own("x\nx", tokenizer), tokenizer)


def _says_by_itself(parts: Sequence[Part], pieces: Sequence[list[int]], tokenizer: Any) -> bool:
    """Whether the tokens of each part that is learnt are its text, special tokens aside."""
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    for part, piece in zip(parts, pieces, strict=True):
        words = part.text
        for token in special:
            words = words.replace(token, "")
        came = decode(piece, tokenizer, skip_special_tokens=True)
        if part.learnt and _canonical(came) != _canonical(words):
            return False
    return True


def _joined(parts: Sequence[Part], pieces: Sequence[list[int]], tokenizer: Any, ends: Ends) -> Encoded:
    ids: list[int] = []
    given: Given = []
    for part, piece in zip(parts, pieces, strict=True):
        if not part.learnt:
            given.append((len(ids), piece))
            continue
        inside = ends.ids.intersection(piece[:-1])
        if inside:
            names = [tokenizer.convert_ids_to_tokens(i) for i in sorted(inside)]
            raise BadRecord("a completion must not hold an end of sequence inside its text", str(names))
        ids += piece
    if not ids:
        raise BadRecord("a completion must not be empty")
    return Encoded(ids if ids[-1] in ends.ids else [*ids, tokenizer.eos_token_id], given)


def _tokenise(text: str, tokenizer: Any, special: bool) -> _Tokens:
    """special: with what the tokenizer puts before a text, one beginning of sequence at most; never with what it puts after."""
    asked = {"return_offsets_mapping": True} if _is_fast(tokenizer) else {}
    try:
        out = tokenizer(text, add_special_tokens=special, return_special_tokens_mask=True, **asked)
    except Exception as error:  # tokenizers raises a bare Exception, of a word without an unknown token, say
        raise BadRecord("the tokenizer must take the text", str(error) or repr(error)) from None
    ids, added = list(out["input_ids"]), list(out["special_tokens_mask"])
    if not special:
        added = [0] * len(ids)
    first, last = 0, len(ids)
    while last > first and added[last - 1]:
        last -= 1
    if last - first > 1 and added[0] and not added[1] and ids[0] == ids[1]:  # somebody has written it into the text
        first = 1
    spans = [(int(a), int(b)) for a, b in out["offset_mapping"]] if _is_fast(tokenizer) else None
    return _Tokens(ids[first:last], None if spans is None else _with_blanks(text, spans[first:last]))


def _with_blanks(text: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Some tokenizers leave the blank before a token out of its span, though the token holds it."""
    done, widened = 0, []
    for a, b in spans:
        widened.append((done if done < a and text[done:a].isspace() else a, b))
        done = max(done, b)
    return widened


def _own(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a text by itself."""
    return _tokenise(text, tokenizer, False).ids if text else []


def _inside(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a text as they are inside of another."""
    for anchor in _ANCHORS if text else ():
        before, both = _own(anchor, tokenizer), _own(anchor + text, tokenizer)
        if both[: len(before)] == before:
            return both[len(before) :]
    return _own(text, tokenizer)


def _decode(ids: Sequence[int], tokenizer: Any) -> str:
    # Slow tokenizers put blanks around special tokens.
    return decode(ids, tokenizer, **({} if _is_fast(tokenizer) else {"spaces_between_special_tokens": False}))


def _is_fast(tokenizer: Any) -> bool:
    """Whether it tells where its tokens stand in the text."""
    return bool(getattr(tokenizer, "is_fast", False))


def _canonical(text: str) -> str:
    """One of the ways to write a text that Unicode calls the same: many tokenizers choose one."""
    return unicodedata.normalize("NFC", text)


def _swallowing(tokenizer: Any) -> set[int]:
    """The special tokens that take in the blanks beside them."""
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.lstrip or token.rstrip}


def _without_spaces(text: str) -> str:
    return _canonical(text).replace(" ", "")


def _squeezed(text: str) -> str:
    return squeezed(_canonical(text))


def _difference(text: str, came: str) -> str:
    """Where the two part."""
    at = common(text, came)
    return f"{shown(came[max(0, at - 10) : at + 20])} for {shown(text[max(0, at - 10) : at + 20])}"
