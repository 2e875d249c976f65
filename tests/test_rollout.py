"""Candidates stop at the first end that the model, its tokenizer or the user names, with nothing behind it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from architectures import build
from test_ends import EOM, EOS, EOT, PAD, byte_tokenizer, tiny

from gem.config import EvalArguments, RolloutArguments, ScoreArguments, check
from gem.data import Example
from gem.ends import Ends
from gem.evaluate import Evaluation
from gem.head import ensure_fused
from gem.positions import _warn_of_long_rows
from gem.rollout import generate, sample_completions
from gem.score import token_stats
from gem.stops import Diverged

PROMPTS = [[5, 6], [7], [8, 9, 10, 11], [12, 13]]


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny(initializer_range=0.4)
    return model.eval()


def freely(model: Any, tokens: int = 12) -> list[list[int]]:
    """Return the model's greedy tokens for each prompt when nothing ends a completion."""
    options = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": None, "pad_token_id": 0}
    return [model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in PROMPTS]


# --- ids --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("which", "batch"), [((3,), 1), ((3,), 4), ((2, 5), 4), ((0, 4, 7), 2)])
def test_every_id_ends_as_in_transformers(model: Any, which: tuple[int, ...], batch: int) -> None:
    """The ends are tokens that the model generates, at a different place in each row."""
    said, ending = freely(model), copy.deepcopy(model)
    ids = [EOS, *(said[row % 4][place] for row, place in enumerate(which))]
    ending.generation_config.eos_token_id = ids
    arguments = RolloutArguments(max_new_tokens=12, rollout_batch_size=batch)
    found = generate(ending, byte_tokenizer(), PROMPTS, arguments, greedy=True)
    for prompt, row, whole in zip(PROMPTS, found, said, strict=True):
        theirs = ending.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12, pad_token_id=0)
        assert row == theirs[0, len(prompt) :].tolist() == whole[: len(row)]
    assert min(map(len, found)) < 12
    assert ending.generation_config.eos_token_id == ids  # as it was


def test_the_tokenizers_end_and_the_configs(model: Any) -> None:
    said, ending = freely(model), copy.deepcopy(model)
    ending.generation_config.eos_token_id = EOT
    tokenizer = byte_tokenizer(eos_token="<eom>")
    ending.lm_head.weight.data[EOM] += 2 * ending.lm_head.weight.data[said[0][2]]  # now generated in its place
    ((*row, last),) = generate(ending, tokenizer, PROMPTS[:1], RolloutArguments(max_new_tokens=12), greedy=True)
    assert last == EOM and row == said[0][: len(row)]


@pytest.mark.parametrize("pad", ["<eos>", "<eot>", "<pad>", None, "<new>"])
def test_any_padding(model: Any, pad: str | None) -> None:
    """Padding that is an end, a token of its own, absent, or an id without an embedding."""
    said, ending = freely(model), copy.deepcopy(model)
    ending.generation_config.eos_token_id = [EOS, EOT, said[0][2], said[1][4]]
    tokenizer = byte_tokenizer(pad_token=pad)
    if pad == "<new>":
        tokenizer.add_tokens([f"<{i}>" for i in range(9)])
        tokenizer.add_special_tokens({"pad_token": "<last>"})
        assert tokenizer.pad_token_id > ending.get_input_embeddings().weight.shape[0]
    arguments = RolloutArguments(max_new_tokens=12)
    found = generate(ending, tokenizer, PROMPTS, arguments, greedy=True)
    assert found == [generate(ending, tokenizer, [p], arguments, greedy=True)[0] for p in PROMPTS]
    assert found[0] == said[0][:3] and all(PAD not in row[:-1] for row in found)


# --- texts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("places", [[(0, 2, 4)], [(1, 5, 6)], [(0, 1, 3), (2, 6, 9)]])
@pytest.mark.parametrize("batch", [1, 4])
def test_stop_texts(model: Any, places: list[tuple[int, int, int]], batch: int) -> None:
    """Stop texts from free completions: each row ends with the first token that completes one."""
    said, tokenizer = freely(model), byte_tokenizer()
    stop = [tokenizer.decode(said[row][start:end]) for row, start, end in places]
    arguments = RolloutArguments(max_new_tokens=12, stop=stop, rollout_batch_size=batch)
    check(arguments)
    found = generate(model, tokenizer, PROMPTS, arguments, greedy=True)
    for row, whole in zip(found, said, strict=True):
        complete = [n for n in range(13) if any(text in tokenizer.decode(whole[:n]) for text in stop)]
        assert row == whole[: complete[0] if complete else 12]
    assert any(len(row) < 12 for row in found)


def test_a_stopped_sample_is_the_beginning_of_the_free_one(model: Any) -> None:
    """A stop text changes the length alone; the log-probabilities stay the model's."""
    tokenizer, prompts, free = byte_tokenizer(), [[5, 6]] * 6, RolloutArguments(max_new_tokens=10)
    torch.manual_seed(1)
    whole = generate(model, tokenizer, prompts, free)
    stop = [tokenizer.decode(whole[2][3:4])]
    torch.manual_seed(1)
    found = generate(model, tokenizer, prompts, RolloutArguments(max_new_tokens=10, stop=stop))
    assert all(row == other[: len(row)] for row, other in zip(found, whole, strict=True)) and len(found[2]) <= 4


def test_nothing_is_generated_behind_the_end(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a single row, the model generates no token beyond those kept."""
    said, tokenizer, widths = freely(model), byte_tokenizer(), []
    ending = copy.deepcopy(model)
    generate_all = ending.generate

    def watched(**inputs: Any) -> torch.Tensor:
        out: torch.Tensor = generate_all(**inputs)
        widths.append(out.shape[1])
        return out

    monkeypatch.setattr(ending, "generate", watched)
    ending.generation_config.eos_token_id = [EOS, said[0][5]]
    for stop, most in (([], 6), ([tokenizer.decode(said[0][:1])], 1), (["never"], 6)):
        arguments = RolloutArguments(max_new_tokens=12, stop=stop)
        (row,) = generate(ending, tokenizer, PROMPTS[:1], arguments, greedy=True)
        assert widths.pop() == len(PROMPTS[0]) + len(row) <= len(PROMPTS[0]) + most


@pytest.mark.parametrize("stop", [[""], ["a", ""], "a", [1]])
def test_what_is_no_list_of_texts(stop: Any) -> None:
    with pytest.raises(ValueError, match="stop must be a list of texts, none of them empty, got"):
        check(RolloutArguments(stop=stop))


# --- room -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "opt", "gptj"])
def test_a_model_without_room_generates_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models with a table of 64 positions: learnt, learnt with an offset, and precomputed."""
    model, tokenizer = build(name), byte_tokenizer()
    within = RolloutArguments(max_new_tokens=4)
    assert len(generate(model, tokenizer, [[5] * 60], within, greedy=True)[0]) <= 4
    monkeypatch.setattr(model, "generate", lambda **_: pytest.fail("generated"))
    with pytest.raises(
        ValueError,
        match=r"max_new_tokens=5 behind a prompt of 60 tokens must fit into the model's 64 positions, got a row of 65",
    ):
        generate(model, tokenizer, [[5], [5] * 60], RolloutArguments(max_new_tokens=5))
    ensure_fused(model)
    token_stats(model, [([5] * 32, [6] * 32)], batch_tokens=99)
    with pytest.raises(ValueError, match=r"max_length: .* must fit into the model's 64 positions, got a row of 65"):
        token_stats(model, [([5] * 20, [6] * 40, [(3, [7] * 5)])], batch_tokens=99)


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "bloom", "mamba"])
def test_a_model_that_goes_on_is_let(name: str, caplog: pytest.LogCaptureFixture) -> None:
    _warn_of_long_rows.cache_clear()
    model, arguments = build(name, max_position_embeddings=61), RolloutArguments(max_new_tokens=5)
    for _ in range(2):
        assert generate(model, byte_tokenizer(), [[5] * 60], arguments)
    told = [r.message for r in caplog.records if "max_position_embeddings=61" in r.message]
    assert len(told) == 1
    assert not generate(model, byte_tokenizer(), [], arguments)


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_an_evaluation_knows_every_end(model: Any) -> None:
    ending, tokenizer = copy.deepcopy(model), byte_tokenizer()
    ending.generation_config.eos_token_id = [EOS, EOT]

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text)["input_ids"]
        return found

    said = [[*ids("#### 4"), EOS], [*ids("#### 4"), EOT], ids("#### 4\nUser 2:"), ids("#### 4"), [*ids("#### 4"), EOM]]
    rows = [Example("", [5], [*ids("2+2 #### 4"), end]) for end in (EOS, EOT, EOS, EOS, EOT)]
    arguments = RolloutArguments(stop=["\nUser 2:"])
    run = Evaluation(
        ending, tokenizer, rows, arguments, ScoreArguments(), EvalArguments(), sampler=lambda *_, **__: said
    )
    found = run(ending)
    assert run.expected == ["4"] * 5
    assert [c["correct"] for c in run.completions] == ["true", "true", "true", "false", "false"]
    assert found["truncated"] == pytest.approx(2 / 5) and found["accuracy_sampled"] == pytest.approx(3 / 5)


@pytest.mark.parametrize(
    ("completions", "message"),
    [
        ([[5]], "sampler must return a completion for each of 2 prompts, got 1"),
        ([[5], []], r"sampler must return non-empty lists of token ids, got '\[\]'"),
        ([[5], "text"], "sampler must return non-empty lists of token ids, got 'text'"),
        ([[5], torch.tensor([5, 6])], r"sampler must return non-empty lists of token ids, got 'tensor\(\[5, 6\]\)'"),
    ],
)
def test_what_a_sampler_returns_is_checked(completions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_completions(lambda *_, **__: completions, [[5], [6]], Ends(frozenset({EOS})), byte_tokenizer())


def test_what_a_sampler_returns_is_cut_behind_its_end() -> None:
    sampled = [[5, EOS, 7], [5, 6]]
    ends, tokenizer = Ends(frozenset({EOS})), byte_tokenizer()
    assert sample_completions(lambda *_, **__: sampled, [[5], [6]], ends, tokenizer) == [[5, EOS], [5, 6]]
    assert sample_completions(lambda *_, **__: pytest.fail("called without prompts"), [], ends, tokenizer) == []


def test_a_model_that_gives_no_probabilities(model: Any) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_input_embeddings().weight[5] = float("nan")
    with pytest.raises(
        Diverged, match="the model gives probabilities that are not finite for one of 2 prompts, the first"
    ):
        generate(broken, byte_tokenizer(), [[7, 4], [7, 5]], RolloutArguments(max_new_tokens=3))
