"""Candidates: what is sampled and how likely it was, a prompt prefilled once, and the first end with nothing behind it."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from architectures import build
from peft import LoraConfig, get_peft_model
from test_ends import EOM, EOS, EOT, PAD, byte_tokenizer, tiny

from gem.config import EvalArguments, RolloutArguments, ScoreArguments, check
from gem.data import Example
from gem.ends import Ends
from gem.evaluate import Evaluation
from gem.generators import Completion, TransformersGenerator, _Sampler, draw_completions, generate
from gem.head import ensure_fused
from gem.positions import _warn_of_long_rows
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
    spoken = [[Completion(answer, "stop")] for answer in said]
    rows = [Example("", [5], [*ids("2+2 #### 4"), end]) for end in (EOS, EOT, EOS, EOS, EOT)]
    arguments = RolloutArguments(stop=["\nUser 2:"])
    run = Evaluation(
        ending, tokenizer, rows, arguments, ScoreArguments(), EvalArguments(), generator=lambda *_, **__: spoken
    )
    found = run(ending)
    assert run.expected == ["4"] * 5
    assert [c["correct"] for c in run.completions] == ["true", "true", "true", "false", "false"]
    assert found["truncated"] == pytest.approx(2 / 5) and found["accuracy_sampled"] == pytest.approx(3 / 5)


# --- what any backend returns -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completions", "message"),
    [
        ([[[5], [5]]], r"generator must return 2 completions for each of 2 prompts, got \[2\]"),
        ([[[5], [5]], [[6]]], r"generator must return 2 completions for each of 2 prompts, got \[2, 1\]"),
        ([[[5], []], [[5], [6]]], r"generator must return non-empty lists of token ids, got '\[\]'"),
        ([[[5], "text"], [[5], [6]]], "generator must return non-empty lists of token ids, got 'text'"),
        (
            [[[5], torch.tensor([5])], [[5], [6]]],
            r"generator must return non-empty lists of token ids, got 'tensor\(\[5\]\)'",
        ),
    ],
)
def test_what_a_generator_returns_is_checked(completions: Any, message: str) -> None:
    drawn = [[Completion(ids, "stop") for ids in group] for group in completions]
    with pytest.raises(ValueError, match=message):
        draw_completions(lambda *_, **__: drawn, [[5], [6]], 2, Ends(frozenset({EOS})), byte_tokenizer())


def test_its_log_probs_are_counted() -> None:
    with pytest.raises(ValueError, match="generator must return a log-prob for each of 2 tokens, got 1"):
        drawn = [[Completion([5, 6], "stop", [-1.0])]]
        draw_completions(lambda *_, **__: drawn, [[5]], 1, Ends(frozenset({EOS})), byte_tokenizer())


def test_what_a_generator_returns_is_cut_behind_its_end() -> None:
    drawn = [[Completion([5, EOS, 7], "length", [-1.0, -2.0, -3.0])], [Completion([5, 6], "stop")]]
    ends, tokenizer = Ends(frozenset({EOS})), byte_tokenizer()
    found = draw_completions(lambda *_, **__: drawn, [[5], [6]], 1, ends, tokenizer)
    assert found == [[Completion([5, EOS], "stop", [-1.0, -2.0])], [Completion([5, 6], "length")]]
    unasked: Any = lambda *_, **__: pytest.fail("called without prompts")  # noqa: E731
    assert draw_completions(unasked, [], 3, ends, tokenizer) == []
    assert draw_completions(unasked, [[5], [6]], 0, ends, tokenizer) == [[], []]


def test_a_model_that_gives_no_probabilities(model: Any) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.get_input_embeddings().weight[5] = float("nan")
    with pytest.raises(
        Diverged, match="the model gives probabilities that are not finite for one of 2 prompts, the first"
    ):
        generate(broken, byte_tokenizer(), [[7, 4], [7, 5]], RolloutArguments(max_new_tokens=3))


# --- a prompt is prefilled once ---------------------------------------------------------------------------------------

GROUPS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16], [30, 31], [20, 21, 22, 23, 24, 25, 26]]
ATTENTION = ("llama", "gpt2", "opt", "bloom", "falcon", "phi3", "deepseek-v3", "mistral", "gemma2", "gemma3", "gpt-oss",
             "mixtral", "qwen3-moe")  # fmt: skip
OTHERS = ("mamba", "falcon-h1", "recurrent-gemma", "qwen2-vl", "llava")  # states, or positions, beside keys and values


def logit_rounding(largest: float, layers: int = 2, width: int = 48) -> float:
    """Return what rounding may change in a log-prob: that of seven products a layer, which add up as independent errors."""
    return 2 * 7 * layers * width**0.5 * 2.0**-24 * largest


def copies(generator: TransformersGenerator, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[list[Completion]]:
    """Return what a generator gives that sends every copy of a prompt through the model."""
    with monkeypatch.context() as patched:
        patched.setattr(_Sampler, "_prefill", lambda *_: None)
        torch.manual_seed(3)
        return generator(GROUPS, 3, **options)


def changed(model: Any, how: str) -> Any:
    """Return the model as it is, with trained adapters, or with the fused head."""
    if how == "peft":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    if how == "fused":
        ensure_fused(model)
    return model


@pytest.mark.parametrize(
    ("name", "how"),
    [*((name, "") for name in (*ATTENTION, *OTHERS)), ("llama", "peft"), ("llama", "fused"), ("gemma2", "fused")],
)
@pytest.mark.parametrize("greedy", [True, False])
def test_a_prompt_is_prefilled_once_and_the_same_is_sampled(
    name: str, how: str, greedy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens that pass through the model are counted: P (T - 1) + n P steps where the cache holds all, else n P (T - 1)."""
    model, seen = changed(build(name), how), 0
    arguments = RolloutArguments(max_new_tokens=10, rollout_batch_size=7, temperature=1.5, top_p=0.98)
    generator = TransformersGenerator(model, byte_tokenizer(), arguments)
    theirs = copies(generator, monkeypatch, greedy=greedy)

    def count(module: Any, inputs: Any) -> None:
        nonlocal seen
        seen += inputs[0].numel()

    handle = model.get_input_embeddings().register_forward_pre_hook(count)
    torch.manual_seed(3)
    found = generator(GROUPS, 3, greedy=greedy)
    handle.remove()
    for group, same in zip(found, theirs, strict=True):
        assert [c.ids for c in group] == [c.ids for c in same] and [c.finish for c in group] == [c.finish for c in same]
        for ours, other in zip(group, same, strict=True):
            assert ours.logprobs == pytest.approx(other.logprobs, abs=logit_rounding(20))
    assert greedy or any(a.ids != b.ids for group in found for a, b in pairwise(group))
    batches = [(2, 7, [1, 2]), (1, 12, [0])]  # prompts and their padded length: whole groups, the shortest first
    steps = [max(len(c.ids) for i in rows for c in found[i]) for _, _, rows in batches]
    expected = [3 * p * n + p * (t - 1) for (p, t, _), n in zip(batches, steps, strict=True)]
    again = [2 * p * (t - 1) for p, t, _ in batches]  # copies of what stands before the last token
    if name in OTHERS:  # in older versions of transformers some are found out only by what their cache holds
        assert sum(expected) + sum(again) <= seen <= sum(expected) + 1.5 * sum(again)
    else:
        assert seen == sum(expected)


def test_a_group_larger_than_a_batch_is_prefilled_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = RolloutArguments(max_new_tokens=3, rollout_batch_size=4)
    generator, shapes, generate_all = TransformersGenerator(model, byte_tokenizer(), arguments), [], model.generate

    def watched(**inputs: Any) -> Any:
        shapes.append(tuple(inputs["input_ids"].shape))
        return generate_all(**inputs)

    monkeypatch.setattr(model, "generate", watched)
    torch.manual_seed(5)
    found = generator([[5, 6, 7]], 10)
    assert shapes == [(1, 2), (4, 3), (4, 3), (2, 3)]
    with monkeypatch.context() as patched:
        patched.setattr(_Sampler, "_prefill", lambda *_: None)
        torch.manual_seed(5)
        assert [c.ids for c in generator([[5, 6, 7]], 10)[0]] == [c.ids for c in found[0]]
    del shapes[:]
    assert len(generator([[5], [6, 7, 8]], 2)) == 2 and shapes == [(4, 3)]  # nothing stands before the one token
    del shapes[:]
    generator([[5, 6], [7, 8]])
    assert shapes == [(2, 2)]


# --- log-probs of the sampler -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
def test_log_probs_are_those_of_the_untempered_model(name: str, greedy: bool) -> None:
    """However they were sampled, the log-probs are those of a forward of the model in fp64, up to rounding."""
    model, tokenizer = build(name), byte_tokenizer()
    arguments = RolloutArguments(max_new_tokens=8, temperature=0.5, top_p=0.7, stop=["!"])
    found = TransformersGenerator(model, tokenizer, arguments)(GROUPS, 4, greedy=greedy)
    exact = copy.deepcopy(model).double()
    for prompt, group in zip(GROUPS, found, strict=True):
        for ids, finish, logprobs in group:
            assert logprobs is not None and len(logprobs) == len(ids)
            assert finish == ("stop" if ids[-1] in (2, EOS) or 0 in ids else "length")
            with torch.no_grad():
                logits = exact(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double()
            expected = logits.log_softmax(1).gather(1, torch.tensor(ids)[:, None]).squeeze(1)
            assert logprobs == pytest.approx(expected.tolist(), abs=logit_rounding(float(logits.abs().max())))
