"""Metrics against hand values and scipy, and a whole evaluation of a tiny model."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import pytest
import torch
from scipy.stats import mannwhitneyu
from transformers import LlamaConfig, LlamaForCausalLM

from gem.config import EvalArguments, RolloutArguments, ScoreArguments
from gem.data import Example
from gem.evaluate import Evaluation, auroc, majority, pair_auroc, preference_accuracy
from gem.generators import Completion, Generator
from gem.groups import Group, Member
from gem.score import token_stats
from gem.tasks import build_tokenizer

EOS = 2

# --- auroc, preference ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "positive", "expected"),
    [
        ([1, 2, 3, 4], [False, False, True, True], 1.0),
        ([1, 2, 3, 4], [True, True, False, False], 0.0),
        ([1, 2, 3, 4], [False, True, False, True], 0.75),
        ([5, 5, 5], [True, False, True], 0.5),
        ([1, 2, 2, 3], [False, False, True, True], 0.875),
        ([-1e300, 1e300], [False, True], 1.0),
        ([0.1 + 0.2, 0.3], [True, False], 1.0),  # float64: not a tie
    ],
)
def test_auroc_by_hand(scores: list[float], positive: list[bool], expected: float) -> None:
    assert auroc(scores, positive) == expected


@pytest.mark.parametrize("distinct", [2, 5, 10_000])
def test_auroc_is_mann_whitney(distinct: int) -> None:
    rng = random.Random(distinct)
    for _ in range(20):
        n = rng.randint(2, 60)
        scores = [float(rng.randrange(distinct)) for _ in range(n)]
        positive = [True, False] + [rng.random() < 0.3 for _ in range(n - 2)]
        up, down = ([s for s, y in zip(scores, positive, strict=True) if y is side] for side in (True, False))
        expected = mannwhitneyu(up, down).statistic / (len(up) * len(down))
        assert auroc(scores, positive) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("positive", [[], [True, True], [False]])
def test_auroc_of_one_class_is_not_a_number(positive: list[bool]) -> None:
    assert math.isnan(auroc([0.5] * len(positive), positive))


def test_preference_accuracy() -> None:
    assert preference_accuracy(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [-1.0, -3.0]])) == 0.625
    assert preference_accuracy(torch.tensor([[0.0, 0.0]])) == 0.5
    assert math.isnan(preference_accuracy(torch.empty(0, 2)))


def test_pair_auroc() -> None:
    def pair(chosen: float, rejected: float) -> Group:
        members = [Member("candidate", [1], score=99.0), Member("rejected", [1], score=rejected)]
        return Group("", [1], [*members, Member("chosen", [1], score=chosen)])

    lonely = Group("", [1], [Member("chosen", [1], score=1.0)])
    assert pair_auroc([pair(1, 0), pair(0, 1), pair(1, 1), pair(math.nan, 0), pair(0, math.nan), lonely]) == 0.5
    assert pair_auroc([pair(1, 0), pair(2, 0), pair(0, 1)]) == pytest.approx(2 / 3)
    assert math.isnan(pair_auroc([lonely])) and math.isnan(pair_auroc([]))


# --- a whole evaluation -----------------------------------------------------------------------------------------------


def tiny_model(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=EOS, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def ids_of(text: str) -> list[int]:
    ids: list[int] = build_tokenizer()(text, add_special_tokens=False)["input_ids"]
    return ids


def examples(n: int = 12) -> list[Example]:
    rows = []
    for i in range(n):
        chosen, rejected = f"{i}+1={i + 1} #### {i + 1}", f"#### {i}"
        prompt = f"{i}+1="
        rows.append(Example(prompt, [1, *ids_of(prompt)], [*ids_of(chosen), EOS], [*ids_of(rejected), EOS]))
    return rows


def evaluation(
    model: Any, rows: list[Example] | None = None, generator: Generator | None = None, **changes: Any
) -> Evaluation:
    rollout = RolloutArguments(max_new_tokens=6)
    rows = examples() if rows is None else rows
    return Evaluation(model, build_tokenizer(), rows, rollout, ScoreArguments(), EvalArguments(**changes), generator)


SHARES = {"preference_sum", "preference_token", "preference_reference", "preference_length", "accuracy_greedy",
          "accuracy_sampled", "accuracy_majority", "auroc", "truncated"}  # fmt: skip
DOCUMENTED = SHARES | {"final_entropy", "branch_entropy", "length"}


def test_metrics_are_the_documented_ones() -> None:
    model = tiny_model()
    found = evaluation(model, eval_samples=8)(model)
    assert found.keys() <= DOCUMENTED and found.keys() >= DOCUMENTED - {"auroc"}
    for name in DOCUMENTED:
        assert Evaluation.__doc__ is not None and name.removeprefix("preference") in Evaluation.__doc__
    assert all(type(value) is float and math.isfinite(value) for value in found.values())
    assert all(0 <= found[name] <= 1 for name in SHARES & found.keys())
    assert found["preference_reference"] == 0.5  # the model against itself: ties
    assert found["preference_length"] == 1.0 and 1 <= found["length"] <= 6


def test_same_seed_same_numbers() -> None:
    model = tiny_model().train()
    results = []
    for seed in (3, 3, 4):
        run = evaluation(model, eval_samples=4)
        torch.manual_seed(seed)
        results.append((run(model), run.completions))
        assert model.training
    assert results[0] == results[1] and results[0][0] != results[2][0]
    assert results[0][1] == results[2][1]  # greedy completions do not depend on the seed


def test_preferences_by_hand() -> None:
    reference, model = tiny_model(0), tiny_model(1)
    rows = examples()
    found = evaluation(reference, rows, eval_samples=0)(model)

    def logprob(m: Any, prompt: list[int], completion: list[int]) -> float:
        with torch.no_grad():
            logits = m(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        return float(logits.double().log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum())

    wins = {"sum": 0, "token": 0, "reference": 0}
    for e in rows:
        (mc, mr), (rc, rr) = (
            [logprob(m, e.prompt_ids, ids) for ids in (e.chosen_ids, e.rejected_ids)] for m in (model, reference)
        )
        wins["sum"] += mc > mr
        wins["token"] += mc / len(e.chosen_ids) > mr / len(e.rejected_ids)
        wins["reference"] += mc - rc > mr - rr
    assert {k: found[f"preference_{k}"] for k in wins} == pytest.approx({k: v / len(rows) for k, v in wins.items()})
    assert 0 < found["preference_reference"] < 1  # not at a limit, where the test would be weak


def speaking(*texts: str) -> Generator:
    """Return a generator that gives these completions to the prompts in turn; "..." at the end of a text: cut off."""

    def generate(prompts: Any, n: int = 1, **_: Any) -> list[list[Completion]]:
        said = [texts[i % len(texts)] for i in range(len(prompts))]
        ids = [ids_of(t[:-3]) if t.endswith("...") else [*ids_of(t), EOS] for t in said]
        return [[Completion(answer, "stop")] * n for answer in ids]

    return generate


def test_accuracy_compares_final_answers() -> None:
    generator = speaking("#### 1", "0 #### 1", "#### 1...", "#### 10", "1=", " #### 1 ", "####")
    model = tiny_model()
    run = evaluation(model, [examples(1)[0]] * 7, generator)
    found = run(model)
    assert [c["correct"] for c in run.completions] == ["true", "true", "false", "false", "true", "true", "false"]
    assert found["accuracy_greedy"] == found["accuracy_sampled"] == pytest.approx(4 / 7)
    assert found["truncated"] == pytest.approx(1 / 7)
    expected = {"prompt": "0+1=", "completion": "0 #### 1", "expected": "1", "correct": "true"}
    assert run.completions[1] == expected


def test_a_chosen_answer_that_says_nothing_is_matched_by_nothing() -> None:
    model = tiny_model()
    row = Example("", [1], [*ids_of("####"), EOS])
    found = evaluation(model, [row], speaking("####"), eval_samples=3)(model)
    assert found["accuracy_greedy"] == found["accuracy_sampled"] == found["accuracy_majority"] == 0


def test_what_cannot_be_had_is_absent() -> None:
    generator = speaking("#### 1")
    model = tiny_model()
    alone = [Example(e.prompt, e.prompt_ids, e.chosen_ids) for e in examples(1)]
    found = evaluation(model, alone, generator)(model)
    assert found.keys() == {"accuracy_greedy", "accuracy_sampled", "truncated", "length", "final_entropy",
                            "branch_entropy"}  # fmt: skip
    assert evaluation(model, alone, generator, eval_samples=0)(model) == {"accuracy_greedy": 1.0}


def voting(*texts: str) -> Generator:
    """Return a generator that gives these completions to every prompt; "..." at the end of a text: cut off."""

    def generate(prompts: Any, n: int = 1, **_: Any) -> list[list[Completion]]:
        drawn = [speaking(text)(prompts) for text in texts[:n]]
        return [[completions[0] for completions in own] for own in zip(*drawn, strict=True)]

    return generate


@pytest.mark.parametrize(
    ("texts", "first", "second"),
    [
        (("#### 1", "#### 2", "#### 1"), 1.0, 0.0),
        (("#### 2", "#### 2", "#### 1"), 0.0, 1.0),
        (("#### 2", "#### 1", "#### 3"), 1 / 3, 1 / 3),
        (("#### 2", "#### 1", "#### 2", "#### 1"), 1 / 2, 1 / 2),
        (("#### 2...", "#### 1", "#### 2..."), 1.0, 0.0),  # what was cut off does not vote
        (("####", "#### 1", "####"), 1.0, 0.0),  # nor does what gives no answer
        (("#### 1...", "#### 1...", "####"), 0.0, 0.0),
    ],
)
def test_the_majority_of_the_samples(texts: tuple[str, ...], first: float, second: float) -> None:
    """Of two questions, whose answers are 1 and 2."""
    model = tiny_model()
    found = evaluation(model, examples(2), voting(*texts), eval_samples=len(texts))(model)
    assert found["accuracy_majority"] == pytest.approx((first + second) / 2)


def test_every_question_has_its_own_majority() -> None:
    """The samples of a question are its texts in turn: 1, 1, 2 for the first, 2, 3, 2 for the second."""
    drawn = voting("#### 1", "#### 1", "#### 2"), voting("#### 2", "#### 3", "#### 2")

    def generate(prompts: Any, n: int = 1, **_: Any) -> list[list[Completion]]:
        return [own([prompt], n)[0] for own, prompt in zip(drawn, prompts, strict=True)]

    found = evaluation(model := tiny_model(), examples(2), generate, eval_samples=3)(model)
    assert found["accuracy_majority"] == 1 and found["accuracy_sampled"] == pytest.approx(2 / 3)


def test_two_samples_have_no_majority() -> None:
    model = tiny_model()
    found = evaluation(model, examples(2), voting("#### 1", "#### 1"), eval_samples=2)(model)
    assert "accuracy_majority" not in found and found["accuracy_sampled"] == 0.5


def test_majority() -> None:
    assert majority(["a", "b", "a"], "a") == 1 and majority(["a", "b", "a"], "b") == 0
    assert majority(["a", "b", "a", "b", "c"], "b") == 0.5
    assert majority([], "a") == majority([""], "") == 0
    assert majority(["", "", "a"], "a") == 1


def several_turns(e: Example) -> Example:
    """Return the example with a question and an answer put before its answer."""
    before, question = [*ids_of("1+1=2"), EOS], [1, *ids_of("7+7=")]
    chosen = [*before, *e.chosen_ids]
    return Example(e.prompt, e.prompt_ids, chosen, e.rejected_ids, chosen_given=[(len(before), question)])


def test_a_preference_of_several_turns_has_no_task_accuracy() -> None:
    generator = speaking("#### 3")
    model, rows = tiny_model(), examples(6)
    mixed = [several_turns(e) if i % 2 else e for i, e in enumerate(rows)]
    run = evaluation(model, mixed, generator)
    found = run(model)
    assert [c["prompt"] for c in run.completions] == ["0+1=", "2+1=", "4+1="]
    assert found["accuracy_greedy"] == pytest.approx(1 / 3)
    assert len(run.reference) == 6 and found["preference_sum"] * 6 == int(found["preference_sum"] * 6)
    e = mixed[1]
    (at, question) = e.chosen_given[0]
    ids = [*e.prompt_ids, *e.chosen_ids[:at], *question, *e.chosen_ids[at:]]
    with torch.no_grad():
        logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    places = [*range(len(e.prompt_ids), len(e.prompt_ids) + at), *range(len(ids) - len(e.chosen_ids) + at, len(ids))]
    assert float(run.reference[1, 0]) == pytest.approx(sum(float(logp[i - 1, ids[i]]) for i in places), abs=1e-4)
    found = evaluation(model, [several_turns(e) for e in rows])(model)
    assert found.keys() == {"preference_sum", "preference_token", "preference_reference", "preference_length"}


def test_candidates_are_of_the_prompt_that_is_sampled_from() -> None:
    asked = []

    def generate(prompts: Any, n: int = 1, **_: Any) -> list[list[Completion]]:
        asked.append((prompts, n))
        return [[Completion([*ids_of("#### 1"), EOS], "stop")] * n] * len(prompts)

    e = examples(1)[0]
    steps = [*e.prompt_ids, 5, 6]
    rows = [e, Example(e.prompt, e.prompt_ids, e.chosen_ids, sampling_prompt_ids=steps)]
    evaluation(model := tiny_model(), rows, generate, eval_samples=3)(model)
    assert asked == [([e.prompt_ids, steps], 1), ([e.prompt_ids, steps], 3)]


def test_limits() -> None:
    model = tiny_model()
    assert len(evaluation(model, eval_limit=5).examples) == 5
    assert len(evaluation(model, eval_limit=0).examples) == 12
    many = evaluation(model, examples(25), eval_samples=0)
    many(model)
    assert len(many.completions) == 20


# --- what is known is not computed again ------------------------------------------------------------------------------


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the sequences that go through the model for the pairs, from now on."""
    seen: list[int] = []

    def stats(model: Any, sequences: Any, **more: Any) -> Any:
        seen.append(len(sequences))
        return token_stats(model, sequences, **more)

    monkeypatch.setattr("gem.evaluate.token_stats", stats)
    return seen


def test_the_pairs_of_the_start_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the first call on other weights; and the numbers are those of a pass."""
    model = tiny_model()
    run = evaluation(model, eval_samples=0)
    seen = counting(monkeypatch)
    known = run(model)
    assert run(copy.deepcopy(model)) == known and seen == []
    run._start = None
    assert run(model) == known and seen == [24]
    assert known["preference_reference"] == 0.5

    run = evaluation(model, eval_samples=0)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    seen.clear()
    assert run(model)["preference_sum"] == evaluation(model, eval_samples=0)(model)["preference_sum"]
    assert seen == [24, 24]  # of this model, and of the reference of the second evaluation
    hashed: list[Any] = []
    monkeypatch.setattr("gem.evaluate.state_hash", hashed.append)
    run(model)
    assert not hashed  # training does not come back to the start


def test_the_pairs_of_the_start_are_those_of_its_adapters_and_buffers() -> None:
    """The weights are the same, and what the model computes is not."""
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))  # type: ignore[arg-type]
    run, alone = evaluation(model, eval_samples=0), evaluation(model.eval(), eval_samples=0)
    alone._start = None
    with model.disable_adapter():
        assert run(model) == alone(model) and run._start is None

    plain = tiny_model()
    run, alone = evaluation(plain, eval_samples=0), evaluation(plain, eval_samples=0)
    alone._start = None
    plain.model.rotary_emb.inv_freq.mul_(3)
    assert run(plain) == alone(plain) and run._start is None


def test_without_pairs_nothing_is_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gem.evaluate.state_hash", None)
    model = tiny_model()
    alone = [Example(e.prompt, e.prompt_ids, e.chosen_ids) for e in examples(2)]
    assert "accuracy_greedy" in evaluation(model, alone)(model)
