"""Texts -> token ids: prompt and completion tokenised as one text, and checked against the record by decoding.

A tokenizer may put a blank before every text, merge a token across the end of the prompt, add a second beginning of sequence,
or not know a character. Prompt and completion are therefore tokenised as one text and cut where the prompt ends. A token across
the cut is replaced, as no model that reads the prompt can generate it. The result is decoded and compared with the record.
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
from gem.group import Given
from gem.problems import BadRecord, shown

# Hardly any token starts with one of these and reaches into the next text. Tokenised in front of a piece, an anchor keeps the
# tokenizer from starting the piece with a blank.
_ANCHORS = ("\n", "(", "x", "7")


class Encoded(NamedTuple):
    """The tokens of a completion."""

    ids: list[int]
    """the assistant's tokens, which are trained on"""
    given: Given
    """(at, tokens of other roles and of the template, which are read only) before ids[at]"""

    @property
    def length(self) -> int:
        return len(self.ids) + sum(len(others) for _, others in self.given)


class _Tokens(NamedTuple):
    """A tokenised text."""

    ids: list[int]
    spans: list[tuple[int, int]] | None
    """[start, end) of each token in the text; None for a slow tokenizer, which has no offsets"""


def encode_prompt(text: str, tokenizer: Any, *, special: bool) -> list[int]:
    """Return the tokens of a prompt as the model reads it, with at most one beginning of sequence.

    Args:
        text: the prompt, rendered.
        tokenizer: of transformers.
        special: True to let the tokenizer add its special tokens; False for a chat, whose template writes them.

    Raises:
        BadRecord: the tokens are empty, or the tokenizer fails on the text.
    """
    ids = _tokenise(text, tokenizer, special).ids
    if not ids:
        raise BadRecord("'prompt' must be at least one token", shown(text))
    return ids


def gives_back(text: str, ids: Sequence[int], tokenizer: Any) -> bool:
    """True if the tokens of a text decode to the text, apart from blanks and leading special tokens."""
    return _squeezed(text) in _squeezed(_decode(ids, tokenizer))


def encode_completion(
    prompt: str, prompt_ids: Sequence[int], parts: Sequence[Part], tokenizer: Any, ends: Ends, *, special: bool
) -> Encoded:
    """Return the tokens of a completion that follows the prompt's tokens; the last one is an end of sequence.

    Args:
        prompt, prompt_ids: the text and its tokens from encode_prompt.
        parts: the completion; prompt + parts is the whole text, and the last part is trained on.
        tokenizer: of transformers.
        ends: what ends a completion.
        special: as in encode_prompt.

    Raises:
        BadRecord: an end of sequence inside the completion, or text that the tokenizer does not decode to again.
    """
    tried = []
    for pieces in _ways(prompt, prompt_ids, parts, tokenizer, special):
        if _matches(prompt_ids, parts, pieces, tokenizer):
            return _joined(parts, pieces, tokenizer, ends)
        tried.append(pieces)
    # Some tokenizers decode a special token to another text than they read it from. Some cannot represent where a blank stands.
    named = [part._replace(text=_as_decoded(part.text, tokenizer)) for part in parts]
    for pieces in tried:
        if _matches(prompt_ids, named, pieces, tokenizer):
            return _joined(parts, pieces, tokenizer, ends)
    if _ignores_blanks(tokenizer) and _matches_alone(parts, tried[0], tokenizer):
        return _joined(parts, tried[0], tokenizer, ends)
    text = "".join(part.text for part in parts if part.learnt)
    came = _decode(_own(text, tokenizer), tokenizer)
    raise BadRecord("the tokenizer must give a completion back as it is", _difference(text, came))


def _ways(
    prompt: str, prompt_ids: Sequence[int], parts: Sequence[Part], tokenizer: Any, special: bool
) -> Iterator[list[list[int]]]:
    """Yield ways to tokenise the parts: cut out of the whole text, or with the trained parts made as inside a text or alone."""
    whole = prompt + "".join(part.text for part in parts)
    tokens = _tokenise(whole, tokenizer, special)
    if len(parts) == 1 and tokens.ids[: len(prompt_ids)] == list(prompt_ids):
        yield [tokens.ids[len(prompt_ids) :]]
    rest = []  # tokens for the parts that are only read
    if tokens.spans is not None:
        natural = _cut(whole, tokens, len(prompt), parts, tokenizer, _own)
        yield natural
        yield _mixed(parts, _cut(whole, tokens, len(prompt), parts, tokenizer, _inside), natural)
        rest.append(natural)
    inside = [_inside(part.text, tokenizer) for part in parts]
    rest.append(inside)
    own, named = ([make(part.text, tokenizer) for part in parts] for make in (_own, _apart))
    for others in rest:
        yield from (_mixed(parts, learnt, others) for learnt in (inside, own, named))


def _mixed(parts: Sequence[Part], learnt: Sequence[list[int]], others: Sequence[list[int]]) -> list[list[int]]:
    return [a if part.learnt else b for part, a, b in zip(parts, learnt, others, strict=True)]


def _cut(
    whole: str,
    tokens: _Tokens,
    start: int,
    parts: Sequence[Part],
    tokenizer: Any,
    make: Callable[[str, Any], list[int]],
) -> list[list[int]]:
    """Return the tokens of consecutive parts from `start` on; `make` tokenises the text of tokens that lie across an edge."""
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
            # Some special tokens take in the blanks beside them. Such a blank is dropped here, unless it is trained on.
            before, behind = (
                [] if not part.learnt and text.isspace() and tokens.ids[at] in swallow else make(text, tokenizer)
                for text, at in edges
            )
            pieces.append([*before, *tokens.ids[first : last + 1], *behind])
        start = end
    return pieces


def _matches(prompt_ids: Sequence[int], parts: Sequence[Part], pieces: Sequence[list[int]], tokenizer: Any) -> bool:
    """True if the tokens, behind the prompt's, decode to the parts; parts that are only read may differ in blanks."""
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
    """Return the added tokens of a tokenizer with their ids, and a pattern that finds them in a text."""
    known = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
    return known, any_of(known)


def _apart(text: str, tokenizer: Any) -> list[int]:
    """Return the tokens of a text; each stretch between added tokens is tokenised as inside another text."""
    known, pattern = _added(tokenizer)
    stretches, done = [], 0
    for found in pattern.finditer(text):
        stretches += [*_inside(text[done : found.start()], tokenizer), known[found.group()]]
        done = found.end()
    return [*stretches, *_inside(text[done:], tokenizer)]


def _as_decoded(text: str, tokenizer: Any) -> str:
    """Return the text with each added token replaced by what it decodes to."""
    known, pattern = _added(tokenizer)
    return pattern.sub(lambda match: _decode([known[match.group()]], tokenizer), text)


def _ignores_blanks(tokenizer: Any) -> bool:
    """True if the tokenizer drops blanks, as BERT's does, and so cannot represent one behind the prompt."""
    return "\n" not in _decode(_own("x\nx", tokenizer), tokenizer)


def _matches_alone(parts: Sequence[Part], pieces: Sequence[list[int]], tokenizer: Any) -> bool:
    """True if the tokens of each part that is trained on decode, by themselves, to its text without special tokens."""
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
    """Tokenise a text without the special tokens that the tokenizer would append.

    special: True to keep those that the tokenizer prepends, reduced to one beginning of sequence.
    """
    offsets = {"return_offsets_mapping": True} if _is_fast(tokenizer) else {}
    try:
        out = tokenizer(text, add_special_tokens=special, return_special_tokens_mask=True, **offsets)
    except Exception as error:  # tokenizers raises a bare Exception, for an unknown word without an unknown token, say
        raise BadRecord("the tokenizer must take the text", str(error) or repr(error)) from None
    ids, added = list(out["input_ids"]), list(out["special_tokens_mask"])
    if not special:
        added = [0] * len(ids)
    first, last = 0, len(ids)
    while last > first and added[last - 1]:
        last -= 1
    if last - first > 1 and added[0] and not added[1] and ids[0] == ids[1]:  # the text already starts with it
        first = 1
    spans = [(int(a), int(b)) for a, b in out["offset_mapping"]] if _is_fast(tokenizer) else None
    return _Tokens(ids[first:last], None if spans is None else _with_blanks(text, spans[first:last]))


def _with_blanks(text: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Widen each span by the blank before it, which some tokenizers leave out although the token holds it."""
    done, widened = 0, []
    for a, b in spans:
        widened.append((done if done < a and text[done:a].isspace() else a, b))
        done = max(done, b)
    return widened


def _own(text: str, tokenizer: Any) -> list[int]:
    """Return the tokens of a text tokenised alone."""
    return _tokenise(text, tokenizer, False).ids if text else []


def _inside(text: str, tokenizer: Any) -> list[int]:
    """Return the tokens of a text as they are inside another text."""
    for anchor in _ANCHORS if text else ():
        before, both = _own(anchor, tokenizer), _own(anchor + text, tokenizer)
        if both[: len(before)] == before:
            return both[len(before) :]
    return _own(text, tokenizer)


def _decode(ids: Sequence[int], tokenizer: Any) -> str:
    # Slow tokenizers put blanks around special tokens.
    return decode(ids, tokenizer, **({} if _is_fast(tokenizer) else {"spaces_between_special_tokens": False}))


def _is_fast(tokenizer: Any) -> bool:
    """True if the tokenizer gives the offsets of its tokens."""
    return bool(getattr(tokenizer, "is_fast", False))


def _canonical(text: str) -> str:
    """Return the text in Unicode's NFC form: many tokenizers normalise to one of several equivalent forms."""
    return unicodedata.normalize("NFC", text)


def _swallowing(tokenizer: Any) -> set[int]:
    """Return the ids of the special tokens that take in the blanks beside them."""
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.lstrip or token.rstrip}


def _without_spaces(text: str) -> str:
    return _canonical(text).replace(" ", "")


def _squeezed(text: str) -> str:
    return squeezed(_canonical(text))


def _difference(text: str, came: str) -> str:
    """Return both texts around the first character in which they differ, for a message."""
    at = common(text, came)
    return f"{shown(came[max(0, at - 10) : at + 20])} for {shown(text[max(0, at - 10) : at + 20])}"
