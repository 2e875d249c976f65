"""The methods of the demo and the evidence: what each trains on, what it spends, and that it trains."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
from trl import RewardTrainer  # type: ignore[attr-defined]

from gem.config import LossArguments, RankArguments, RolloutArguments, ScoreArguments
from gem.data import Example, encode_records
from gem.group import Group, Member
from gem.integrations.rloo import Sampled, majority_reward, model_reward, perfect_reward, train_rloo
from gem.methods import METHODS, Budget, Method, ShuffledScores, best_and_worst, filled, train_method, voted_group
from gem.pipeline import GroupMaker
from gem.stops import Diverged
from gem.tasks import build_model, build_tokenizer

TOKENIZER = build_tokenizer()
BUDGET = Budget(steps=2, prompts=3, group_size=4, max_new_tokens=12)
RECORDS = [
    {"prompt": f"{a}+{b}=", "chosen": f"{a}+{b}={a + b} #### {a + b}", "rejected": f"#### {a + b + 1}"}
    for a, b in ((1, 2), (3, 4), (5, 2), (6, 1), (7, 2), (2, 6), (8, 1))
]
ANSWERS = {record["prompt"]: str(eval(record["prompt"][:-1])) for record in RECORDS}
EXAMPLES = encode_records(RECORDS, TOKENIZER, prompt_template="{prompt}", max_length=64)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that knows some of the answers."""
    torch.manual_seed(0)
    budget, folder = replace(BUDGET, steps=25, prompts=len(EXAMPLES)), tmp_path_factory.mktemp("start")
    settings = {"seed": 0, "rate": 3e-3, "budget": budget, "disable_tqdm": True}
    return train_method(METHODS["SFT"], build_model(TOKENIZER), TOKENIZER, EXAMPLES, [], folder, **settings).model


def run(name: str | Method, start: Any, folder: Path, **changes: Any) -> Any:
    method = METHODS[name] if isinstance(name, str) else name
    settings = {"seed": 0, "rate": 1e-3, "budget": BUDGET, "answers": ANSWERS, "disable_tqdm": True, **changes}
    return train_method(method, start, TOKENIZER, EXAMPLES[:2], EXAMPLES[2:], folder, **settings)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_a_copy_within_the_budget(name: str, start: Any, tmp_path: Path) -> None:
    before = [p.clone() for p in start.parameters()]
    trained = run(name, start, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, start.parameters(), strict=True))
    steps = [entry for entry in trained.history if "loss" in entry]
    models = 2 if name == "reward model + RLOO" else 1
    assert trained.spent["optimizer_steps"] == models * BUDGET.steps and len(steps) == BUDGET.steps
    assert any(not torch.equal(a, b) for a, b in zip(before, trained.model.parameters(), strict=True))
    most = BUDGET.steps * BUDGET.prompts * BUDGET.group_size * BUDGET.max_new_tokens
    samples = METHODS[name].kind != "pairs" or METHODS[name].candidates
    assert (0 < trained.spent["sampled_tokens"] <= most) if samples else trained.spent["sampled_tokens"] == 0


@pytest.mark.parametrize("name", ["GEM + agreement", "RFT", "RLOO majority"])
def test_a_seed_determines_the_weights(name: str, start: Any, tmp_path: Path) -> None:
    one, same, other = (run(name, start, tmp_path / str(i), seed=seed).model for i, seed in enumerate((1, 1, 2)))
    assert torch.equal(one.lm_head.weight, same.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, other.lm_head.weight)


def test_human_answers_of_the_prompts_are_not_read(start: Any, tmp_path: Path) -> None:
    changed = [replace(e, chosen_ids=[9, 9, 2], rejected_ids=[8, 2]) for e in EXAMPLES[2:]]
    for name in ("GEM", "RFT"):
        settings = {"seed": 0, "rate": 1e-3, "budget": BUDGET, "disable_tqdm": True}
        models = [
            train_method(METHODS[name], start, TOKENIZER, EXAMPLES[:2], prompts, tmp_path, **settings).model
            for prompts in (EXAMPLES[2:], changed)
        ]
        assert torch.equal(models[0].lm_head.weight, models[1].lm_head.weight), name


def test_without_pairs_or_answers_there_is_an_error(start: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pairs must hold at least one"):
        train_method(METHODS["SFT"], start, TOKENIZER, [], EXAMPLES, tmp_path, seed=0, rate=1e-3, budget=BUDGET)
    with pytest.raises(ValueError, match="answers must be given"):
        run("perfect reward", start, tmp_path, answers=None)


# --- what they train on -----------------------------------------------------------------------------------------------


def group(*answers: str, **changes: Any) -> Group:
    members = [Member("candidate", [i + 3], answer=answer) for i, answer in enumerate(answers)]
    return Group("1+2=", [1], members, **changes)


def test_the_vote_takes_the_first_candidate_of_the_most_frequent_answer() -> None:
    winner = voted_group(group("7", "3", "3", "7", "3"))
    assert winner is not None
    assert [(m.role, m.ids, m.answer) for m in winner.members] == [("chosen", [4], "3")]
    tied = voted_group(group("7", "3", "3", "7"))
    assert tied is not None and tied.members[0].ids == [3]  # of equals, the answer that came first


def test_nothing_wins_the_vote_without_two_equal_answers() -> None:
    assert voted_group(group("1", "2", "", "")) is None
    cut = group("3", "3", "4")
    cut.members[0].truncated = True
    assert voted_group(cut) is None


def test_dpo_gets_the_best_and_the_worst_of_the_ranking() -> None:
    ranked = group("1", "2", "3", "4")
    for member, mean in zip(ranked.members, (0.5, math.nan, -1.0, 0.7), strict=True):
        member.rank_mean = mean
    duel = best_and_worst(ranked)
    assert duel is not None and [(m.role, m.answer) for m in duel.members] == [("chosen", "4"), ("rejected", "3")]
    ranked.kept = False
    assert best_and_worst(ranked) is None


def test_items_repeat_in_order() -> None:
    assert filled([1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]
    assert filled([1, 2, 3], 2) == [1, 2, 3]


def test_random_scores_are_those_of_the_group_in_another_order(start: Any) -> None:
    rollout = RolloutArguments(group_size=4, max_new_tokens=12)
    plain, shuffled = (
        kind(start, TOKENIZER, rollout, ScoreArguments(), RankArguments()) for kind in (GroupMaker, ShuffledScores)
    )
    groups = plain.draw(EXAMPLES)

    def scores(maker: GroupMaker, role: str) -> list[list[str]]:
        maker.weigh(groups)
        return [[str(m.score) for m in g.members if (m.role == "candidate") == (role == "candidate")] for g in groups]

    own, others = scores(plain, "candidate"), scores(shuffled, "candidate")
    assert own != others and [sorted(s) for s in own] == [sorted(s) for s in others]
    assert scores(plain, "human") == scores(shuffled, "human")


# --- TRL ----------------------------------------------------------------------------------------------------------------


def test_rewards_of_answers() -> None:
    sampled = [Sampled([], answer) for answer in ("4", "", "3", "3", "")]
    assert majority_reward(EXAMPLES[0], sampled) == [0, 0, 1, 1, 0]
    assert majority_reward(EXAMPLES[0], [Sampled([], "")] * 2) == [0, 0]
    assert perfect_reward({"1+2=": "4"})(EXAMPLES[0], sampled) == [1, 0, 0, 0, 0]


def trl_settings(folder: Path, steps: int) -> dict[str, Any]:
    """Return settings of TrainingArguments for one of TRL's trainers."""
    kept = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    return {"output_dir": str(folder), "max_steps": steps, "learning_rate": 1e-3, **kept}


def test_rloo_gets_the_examples_and_counts_their_tokens(start: Any, tmp_path: Path) -> None:
    asked: list[tuple[str, int]] = []
    lengths: list[int] = []

    def reward(example: Example, completions: Any) -> list[float]:
        asked.append((example.prompt, len(completions)))
        lengths.extend(len(c.ids) for c in completions)
        return [0.0] * len(completions)

    model = copy.deepcopy(start)
    _, tokens = train_rloo(
        model, start, TOKENIZER, EXAMPLES, reward, ["####"], BUDGET, trl_settings(tmp_path, BUDGET.steps)
    )
    assert len(asked) == BUDGET.steps * BUDGET.prompts and {n for _, n in asked} == {BUDGET.group_size}
    assert {prompt for prompt, _ in asked} <= {e.prompt for e in EXAMPLES}
    assert tokens == sum(lengths)


def test_rloo_refuses_prompts_that_trl_would_tokenize_otherwise(start: Any, tmp_path: Path) -> None:
    odd = replace(EXAMPLES[0], prompt_ids=[*EXAMPLES[0].prompt_ids, 5])
    with pytest.raises(ValueError, match="prompt_ids of every prompt"):
        train_rloo(start, start, TOKENIZER, [odd], majority_reward, ["####"], BUDGET, {"output_dir": str(tmp_path)})


def with_adapters(model: Any) -> Any:
    """Return a copy under LoRA adapters that are not zero."""
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=8, target_modules="all-linear"))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    return adapted


@pytest.mark.parametrize("name", ["GEM", "DPO", "RLOO majority", "reward model + RLOO"])
def test_a_method_trains_the_adapters_of_a_start(name: str, start: Any, tmp_path: Path) -> None:
    adapted = with_adapters(start)
    before = {key: value.clone() for key, value in adapted.state_dict().items()}
    after = run(name, adapted, tmp_path).model.state_dict()
    assert all(torch.equal(value, adapted.state_dict()[key]) for key, value in before.items())
    assert {key for key in before if not torch.equal(before[key], after[key])} == {k for k in before if "lora_" in k}


@pytest.mark.parametrize("name", ["GEM", "SFT", "DPO + SFT", "RFT", "RLOO majority"])
def test_micro_batches_and_checkpointing_change_the_rounding_alone(name: str, start: Any, tmp_path: Path) -> None:
    budget = replace(BUDGET, prompts=4, steps=1)
    whole = run(name, start, tmp_path / "whole", budget=budget)
    parts = run(name, start, tmp_path / "parts", budget=replace(budget, micro_batch=2), gradient_checkpointing=True)
    steps = [next(entry for entry in trained.history if "loss" in entry) for trained in (whole, parts)]
    assert steps[0]["grad_norm"] == pytest.approx(steps[1]["grad_norm"], rel=1e-4)
    assert whole.spent["sampled_tokens"] == parts.spent["sampled_tokens"]
    with pytest.raises(ValueError, match="micro_batch must divide the prompts of a step, 4, got 3"):
        replace(budget, micro_batch=3)


def test_a_copy_shares_what_is_not_trained(start: Any, tmp_path: Path) -> None:
    adapted = with_adapters(start)
    trained = run("SFT", adapted, tmp_path).model
    own = dict(adapted.named_parameters())
    assert {name for name, p in trained.named_parameters() if p is own[name]} == {n for n in own if "lora_" not in n}
    full = run("SFT", start, tmp_path / "full").model
    assert not {id(p) for p in full.parameters()} & {id(p) for p in start.parameters()}


def test_a_reward_that_is_not_finite_is_a_divergence(start: Any, tmp_path: Path) -> None:
    """TRL would make an advantage of 0 of it, and the run would count as one that learnt nothing."""
    model, inside = copy.deepcopy(start), []

    def reward(example: Example, completions: Any) -> list[float]:
        inside.append(Path(model.config._name_or_path))
        assert (inside[0] / "config.json").is_file()  # the reference, while it is needed
        return [math.nan] * len(completions)

    with pytest.raises(Diverged, match=r"rewards of a prompt must be finite, got \[nan, nan, nan, nan\]"):
        train_rloo(model, start, TOKENIZER, EXAMPLES, reward, ["####"], BUDGET, trl_settings(tmp_path, 1))
    assert inside[0].parent == tmp_path and not inside[0].exists()


def test_a_reward_model_sees_the_end_of_an_answer(start: Any, tmp_path: Path) -> None:
    """Where padding is the end, as in Llama 3 without a pad token, transformers would read the token before it."""
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    reward = model_reward(start, tokenizer, EXAMPLES[:2], replace(BUDGET, prompts=2), trl_settings(tmp_path, 2))
    answer = EXAMPLES[0].chosen_ids
    ended, cut = reward(EXAMPLES[0], [Sampled(answer, ""), Sampled(answer[:-1], "")])
    assert answer[-1] == tokenizer.eos_token_id and ended != cut
    assert tokenizer.pad_token == tokenizer.eos_token


def test_the_head_of_a_reward_model_is_float32(start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = []
    real = RewardTrainer.train
    monkeypatch.setattr(RewardTrainer, "train", lambda self: (real(self), heads.append(self.model.score.weight.dtype)))
    half = copy.deepcopy(start).to(torch.bfloat16)
    reward = model_reward(half, TOKENIZER, EXAMPLES[:2], replace(BUDGET, prompts=2), trl_settings(tmp_path, 2))
    assert heads == [torch.float32] and math.isfinite(*reward(EXAMPLES[0], [Sampled(EXAMPLES[0].chosen_ids, "")]))


@pytest.mark.parametrize("lora", [False, True])
def test_the_reward_model_learns_the_pairs(lora: bool, start: Any, tmp_path: Path) -> None:
    start = with_adapters(start) if lora else start
    budget = replace(BUDGET, prompts=8, micro_batch=4)
    reward = model_reward(start, TOKENIZER, filled(EXAMPLES, 160), budget, trl_settings(tmp_path, 20))
    for e in EXAMPLES:
        chosen, rejected = reward(e, [Sampled(e.chosen_ids, ""), Sampled(e.rejected_ids, "")])
        assert chosen > rejected + 0.5


def test_dpo_with_sft_differs_from_dpo_by_its_term_alone() -> None:
    assert (
        METHODS["DPO"].loss
        == replace(METHODS["DPO + SFT"].loss, sft_weight=0.0)
        == LossArguments(loss="dpo", sft_weight=0)
    )
    assert METHODS["GEM"] == Method("online", LossArguments(), RankArguments())
