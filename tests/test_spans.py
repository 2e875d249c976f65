"""find_spans: the rules on text, and the map back to tokens with byte-level, SentencePiece-like and real tokenizers."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gem.spans import Spans, find_spans

MARKERS = ("####", "Final Answer:", "\\boxed{", "</think>")
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
EOS = "<eos>"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE without merges: every byte is a token."""
    vocab = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS)


def word_tokenizer(*texts: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words with their leading space, as SentencePiece's: the first one loses it when decoded."""
    split = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)}
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(sorted(words))}, unk_token="?"))
    core.pre_tokenizer = split
    core.decoder = decoders.Metaspace(prepend_scheme="always", split=True)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS)


def fallback_tokenizer(*texts: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with Llama's decoder: unknown characters are bytes, each decoded to a replacement until complete."""
    chars = sorted({c for c in "".join(texts).replace(" ", "▁") if ord(c) < 128 or c == "▁"} | {"▁"})
    vocab = {token: i for i, token in enumerate([f"<0x{b:02X}>" for b in range(256)] + chars)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=EOS)


def spans(tokenizer: PreTrainedTokenizerFast, text: str, last_tokens: int = 8) -> tuple[str, str, str]:
    """Return (branch, answer, rule), each span decoded alone."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    found = find_spans(ids, tokenizer, markers=MARKERS, last_tokens=last_tokens)
    assert 0 == found.branch[0] <= found.branch[1] <= found.answer[0] <= found.answer[1] <= len(ids)
    branch, answer = (str(tokenizer.decode(ids[slice(*span)])) for span in (found.branch, found.answer))
    return branch, answer, found.rule


@pytest.mark.parametrize(
    ("text", "branch", "answer", "rule"),
    [
        ("2 + 2 is 4.\n#### 4", "2 + 2 is 4.\n", "4", "marker"),
        ("2 + 2 is 4.\n#### 4 " + EOS + "\n" + EOS, "2 + 2 is 4.\n", "4", "marker"),
        ("#### 4", "", "4", "marker"),
        ("put it after ####: 1\n#### 2", "put it after ####: 1\n", "2", "marker"),
        ("a\n#### 2\n####", "a\n", "2", "marker"),  # the last one has no text after it
        ("a</think>\n\nb\nc", "a", "b\nc", "marker"),
        ("<think>a</think> so \\boxed{7}.", "<think>a</think> so ", "7", "marker"),
        ("so \\boxed{7}</think>", "so ", "7", "marker"),
        ("x \\boxed{ \\frac{1}{2} } as asked", "x ", "\\frac{1}{2}", "marker"),
        (
            "x \\boxed{\\left\\{ 1 \\right.} ok",
            "x ",
            "\\left\\{ 1 \\right.",
            "marker",
        ),  # an escaped brace opens nothing
        ("x \\boxed{12", "x ", "12", "marker"),  # never closed
        ("Final Answer: \\boxed{3}", "Final Answer: ", "3", "marker"),
        ("**Final Answer:** 3", "**", "** 3", "marker"),
        ("one\n\n two \n", "one\n\n ", "two", "last_line"),
        ("one\ntwo\n#### ", "one\n", "two", "last_line"),  # cut off at the marker
        ("0123456789", "01", "23456789", "last_tokens"),
        ("\n\n0123456789\n", "\n\n01", "23456789", "last_tokens"),  # a single line
        ("123", "", "123", "last_tokens"),
        ("", "", "", "last_tokens"),
        (EOS, "", "", "last_tokens"),
        (" \n####\n", "", "", "last_tokens"),
    ],
)
def test_rules(text: str, branch: str, answer: str, rule: str) -> None:
    assert spans(byte_tokenizer(), text) == (branch, answer, rule)


@pytest.mark.parametrize("answer", ["é", "日本", "😀😀", "a😀b", "5 – 7", "e\u0301"])
@pytest.mark.parametrize("branch", ["", "日本 😀", "\ufffd, "])
def test_characters_of_several_tokens_stay_whole(branch: str, answer: str) -> None:
    for text in (f"{branch}#### {answer}", f"{branch}\\boxed{{{answer}}} 日"):
        for tokenizer in (byte_tokenizer(), fallback_tokenizer(text)):
            assert spans(tokenizer, text) == (branch, answer, "marker")
    assert spans(byte_tokenizer(), f"x😀\n{answer}\n") == ("x😀\n", answer, "last_line")


def test_a_completion_that_ends_inside_a_character() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("x #### 日本").input_ids[:-1]
    assert find_spans(ids, tokenizer, markers=MARKERS, last_tokens=8) == Spans((0, 2), (7, 12), "marker")


def test_tokens_that_carry_their_space() -> None:
    text = "we add 2 and 2 Final Answer: it is 4"
    tokenizer = word_tokenizer(text)
    ids = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    assert find_spans(ids, tokenizer, markers=MARKERS, last_tokens=8) == Spans((0, 5), (7, 10), "marker")
    assert find_spans(ids, tokenizer, markers=(), last_tokens=3) == Spans((0, 7), (7, 10), "last_tokens")
    # A marker that starts at the word's text, not at its space.
    assert find_spans(ids, tokenizer, markers=("and 2",), last_tokens=3) == Spans((0, 3), (5, 10), "marker")


def test_a_token_that_reaches_over_a_border_is_the_answers() -> None:
    text = "so \\boxed{5}. done"  # one token: \boxed{5}.
    tokenizer = word_tokenizer(text)
    assert find_spans(tokenizer(text).input_ids, tokenizer, markers=MARKERS, last_tokens=8).answer == (1, 2)


def test_a_marker_that_is_a_special_token_is_seen() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["</think>"], special_tokens=True)
    assert spans(tokenizer, "a</think>4" + EOS) == ("a", "4", "marker")


def test_the_longest_marker_is_taken_whole() -> None:
    tokenizer = byte_tokenizer()
    found = find_spans(tokenizer("a #### 4").input_ids, tokenizer, markers=("##", "####"), last_tokens=8)
    assert found == Spans((0, 2), (7, 8), "marker")


def test_special_tokens_without_a_role_are_stripped() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|end|>"], special_tokens=True)
    assert spans(tokenizer, "a\n#### 4<|end|>\n") == ("a\n", "4", "marker")


def test_decodes_few_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("word " * 800 + "\n#### 72").input_ids
    decode = Mock(wraps=tokenizer.decode)
    monkeypatch.setattr(tokenizer, "decode", decode)
    find_spans(ids, tokenizer, markers=MARKERS, last_tokens=8)
    assert len(ids) > 4000 and decode.call_count < 3 * 13 + 5


@pytest.mark.parametrize("last_tokens", [1, 8])
def test_spans_of_every_prefix_are_in_order(last_tokens: int) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("a 日\nb </think> c\n#### 😀 \\boxed{日{x}} \\}" + EOS).input_ids
    for n in range(len(ids) + 1):
        branch, answer, rule = find_spans(ids[:n], tokenizer, markers=MARKERS, last_tokens=last_tokens)
        assert 0 == branch[0] <= branch[1] <= answer[0] <= answer[1] <= n
        assert answer[1] - answer[0] <= last_tokens or rule != "last_tokens"
        assert n == 0 or answer[1] > answer[0]


@pytest.mark.skipif(
    not (DATA / "tokenizer_gpt_neox.json").exists(), reason="the shared data is not beside the repository"
)
def test_real_tokenizer_on_real_solutions() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(DATA / "tokenizer_gpt_neox.json"))
    with (DATA / "gsm8k_train.jsonl").open(encoding="utf-8") as lines:
        for line in islice(lines, 100):
            completion = json.loads(line)["completion"]
            reasoning, answer = completion.rsplit("####", 1)
            assert spans(tokenizer, completion + "<|endoftext|>") == (reasoning, answer, "marker")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"markers": "####"}, TypeError, "sequence of strings, got the string '####'"),
        ({"markers": ("####", "")}, ValueError, "empty string"),
        ({"last_tokens": 0}, ValueError, "last_tokens must be >= 1, got 0"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"markers": MARKERS, "last_tokens": 8} | change
    with pytest.raises(error, match=message):
        find_spans([1], byte_tokenizer(), **arguments)
