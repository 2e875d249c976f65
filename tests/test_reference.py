"""Reference log-probs: those of the model before training, whichever way they come, computed once, where they are read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from test_one_pass import moved, with_lora
from test_trainer import EOS, examples, groups_of, make_trainer, tiny_model
from torch import nn

from gem import score as scoring
from gem.config import LossArguments, RankArguments, RolloutArguments, ScoreArguments
from gem.data import Example
from gem.group import Group, Member
from gem.head import ensure_fused
from gem.pipeline import GroupMaker, pair_group
from gem.reference import AdapterOff, FromFile, Frozen, Reference, reference_for
from gem.score import token_stats
from gem.tasks import build_tokenizer

EVERY = LossArguments(loss="listwise_dpo")


def everyone(_: Member) -> bool:
    return True


def groups(n: int = 4) -> list[Group]:
    """Return groups of two candidates and a human pair, of different lengths, without log-probs."""
    found = []
    for i, example in enumerate(examples(n)):
        group = pair_group(example)
        drawn = [[5, 6 + i, EOS], [7] * (1 + i) + [EOS]]
        group.members = [*(Member("candidate", ids, sampled=True) for ids in drawn), *group.members]
        found.append(group)
    return found


def expected(model: Any, group: Group) -> list[list[float]]:
    """Return the log-probs of a group's members, one at a time through the model's own logits."""
    found = []
    for member in group.members:
        ids = torch.tensor([group.prompt_ids + member.ids])
        with torch.no_grad():
            logprob = model.eval()(ids).logits[0, len(group.prompt_ids) - 1 : -1].log_softmax(-1)
        found.append(logprob.gather(1, torch.tensor(member.ids)[:, None])[:, 0].tolist())
    return found


def check(reference: Reference, before: Any) -> None:
    found = groups()
    reference.fill(found, everyone)
    for group in found:
        for member, logprobs in zip(group.members, expected(before, group), strict=True):
            assert member.logprobs == pytest.approx(logprobs, abs=1e-5)


def with_head(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "lm_head"]))


def with_saved_module(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))


@pytest.mark.parametrize("adapted", [with_lora, with_head, with_saved_module])
def test_adapters_off_is_the_model_before_training(adapted: Any) -> None:
    base = tiny_model()
    model: Any = adapted(copy.deepcopy(base))
    frozen = next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)
    reference = AdapterOff(model)
    moved(model.train())
    check(reference, base)
    assert model.training and not frozen.requires_grad  # peft would have switched it on
    assert any(p.requires_grad for p in model.parameters())
    found = groups()
    changed = [expected(model, group) for group in found]
    reference.fill(found, everyone)
    assert all(
        m.logprobs != pytest.approx(own)
        for g, c in zip(found, changed, strict=True)
        for m, own in zip(g.members, c, strict=True)
    )


def test_adapters_off_in_a_mixture_of_experts() -> None:
    base = build("mixtral", vocab_size=17)
    model = with_lora(copy.deepcopy(base))
    reference = AdapterOff(model)
    moved(model)
    check(reference, base)


def test_a_frozen_model_stays_where_it_was() -> None:
    policy = tiny_model()
    before = copy.deepcopy(policy)
    reference = reference_for(policy, EVERY, ScoreArguments())
    assert isinstance(reference, Frozen) and reference.policy is policy
    assert not any(p.requires_grad for p in reference.model.parameters())
    moved(policy)
    check(reference, before)


def test_a_given_model_is_left_as_it_is() -> None:
    given = tiny_model().train()
    maker = GroupMaker(tiny_model(), build_tokenizer(), RolloutArguments(), ScoreArguments(), RankArguments(), given)
    assert isinstance(maker.reference, Frozen)
    check(maker.reference, copy.deepcopy(given))
    assert given.training and all(p.requires_grad for p in given.parameters())


def test_adapters_that_are_trained_already_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"model must have adapters that change nothing yet for AdapterOff, got some that do"
    ):
        AdapterOff(moved(with_lora(tiny_model())))


def test_more_than_adapters_is_refused() -> None:
    model = with_lora(tiny_model())
    model.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"model must train its adapters alone for AdapterOff, got base_model.model.lm_head.weight"
    ):
        AdapterOff(model)


def test_a_model_without_adapters_is_refused() -> None:
    with pytest.raises(TypeError, match="model must be a peft model for AdapterOff, got LlamaForCausalLM"):
        AdapterOff(tiny_model())


def test_trained_embeddings_of_special_tokens_are_refused() -> None:
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, EOS])
    model: Any = get_peft_model(tiny_model(), adapters)  # type: ignore[arg-type]
    assert isinstance(AdapterOff(model), AdapterOff)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "trainable_tokens_delta" in n)[1].add_(1.0)
    with pytest.raises(ValueError, match="adapters that change nothing yet"):
        AdapterOff(model)


def test_adapters_that_cannot_be_switched_off_cost_a_copy(caplog: pytest.LogCaptureFixture) -> None:
    model = moved(with_lora(tiny_model()))
    before = copy.deepcopy(model)
    reference = reference_for(model, EVERY, ScoreArguments())
    assert isinstance(reference, Frozen) and "the reference is a copy of the model" in caplog.text
    moved(model)
    check(reference, before)


def test_the_copy_of_a_model_that_was_trained_in_mixed_precision_is_its_own(tmp_path: Path) -> None:
    """accelerate has put a function around the forward, which a copy shares with the model that is trained on."""
    model = tiny_model()
    make_trainer(tmp_path, LossArguments(loss="sft"), model=model, args={"bf16": True, "max_steps": 1}).train()
    reference = reference_for(model, EVERY, ScoreArguments())
    before = tiny_model()
    before.load_state_dict(model.state_dict())
    moved(model)
    check(reference, before)  # type: ignore[arg-type]


# --- what is computed, and how often -----------------------------------------------------------------------------------


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of sequences of each pass of a reference."""
    seen: list[int] = []
    own = scoring._batch_stats

    def counted(*arguments: Any) -> Any:
        found = own(*arguments)
        seen.append(len(found))
        return found

    monkeypatch.setattr(scoring, "_batch_stats", counted)
    return seen


def test_human_answers_are_computed_once(forwards: list[int]) -> None:
    reference = Frozen(tiny_model())
    first, second = groups(3), groups(3)
    reference.fill(first, everyone)
    assert forwards == [2, 2, 2, 6]  # the pairs, then the candidates
    del forwards[:]
    reference.fill(second, everyone)
    assert forwards == [6]
    assert [m.logprobs for g in first for m in g.members] == [m.logprobs for g in second for m in g.members]


@pytest.fixture
def rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probs whose last bits depend on what else is in the batch, as on a GPU."""
    own = scoring._batch_stats

    def rounded(*arguments: Any) -> Any:
        found = own(*arguments)
        batch = 1e-6 * sum(len(stats.logprob) for stats in found)
        return [stats._replace(logprob=stats.logprob + batch) for stats in found]

    monkeypatch.setattr(scoring, "_batch_stats", rounded)


def test_the_bits_of_a_batch_depend_on_its_members(rounding: None) -> None:
    """The control of the next two tests: without a cache they would fail."""
    together, alone, reference = groups(6), groups(6), Frozen(tiny_model())
    reference.recurring = False
    reference.fill(together, everyone)
    for group in alone:
        reference.fill([group], everyone)
    assert together[0].members[2].logprobs != alone[0].members[2].logprobs


def test_human_answers_have_the_same_bits_whenever_they_are_computed(rounding: None) -> None:
    """A resumed run computes them in another step, beside other groups."""
    together, later = groups(6), groups(6)
    Frozen(tiny_model()).fill(together, everyone)
    reference = Frozen(tiny_model())
    for group in reversed(later):
        reference.fill([group], everyone)
    for a, b in zip(together, later, strict=True):
        assert [m.logprobs for m in a.members[2:]] == [m.logprobs for m in b.members[2:]]


def test_an_answer_of_two_pairs_has_the_bits_of_each_pair(rounding: None) -> None:
    """What one pair was computed beside must not reach the other: a resumed run meets them in another order."""
    rows = [Example("", [1, 7], [8, 9, EOS], rejected) for rejected in ([5, EOS], [5, 6, 7, 8, 9, 10, EOS])]
    forth, back = [pair_group(row) for row in rows], [pair_group(row) for row in rows]
    Frozen(tiny_model()).fill(forth, everyone)
    Frozen(tiny_model()).fill(back[::-1], everyone)
    assert [[m.logprobs for m in g.members] for g in forth] == [[m.logprobs for m in g.members] for g in back]


@pytest.mark.parametrize(("args", "passes"), [({"max_steps": 2}, [8]), ({"max_steps": 3}, [2, 2, 2, 2])])
def test_pairs_that_come_once_go_with_the_rest(
    args: Any, passes: list[int], forwards: list[int], tmp_path: Path
) -> None:
    """8 records in steps of 4: the third step is the second round."""
    model, loss = tiny_model(), LossArguments(loss="dpo")
    reference = reference_for(model, loss, ScoreArguments())
    rollout = RolloutArguments(group_size=0)
    maker = GroupMaker(model, build_tokenizer(), rollout, ScoreArguments(), RankArguments(), reference)
    trainer = make_trainer(tmp_path, loss, model=model, data=examples(8), make_groups=maker, args=args)
    trainer.get_batch_samples(iter([examples(8)[:4]]), 1, torch.device("cpu"))
    assert forwards == passes


def test_another_prompt_or_turn_is_another_answer(forwards: list[int]) -> None:
    reference = Frozen(tiny_model())
    rows = [Example("", [1, 7], [8, 9, EOS]), Example("", [1, 6], [8, 9, EOS])]
    rows.append(Example("", [1, 7], [8, 9, EOS], chosen_given=[(1, [5])]))
    found = [pair_group(row) for row in rows]
    reference.fill(found, everyone)
    assert forwards == [1, 1, 1] and len({tuple(g.members[0].logprobs) for g in found}) == 3


def test_known_log_probs_are_kept(forwards: list[int]) -> None:
    found = groups(1)
    found[0].members[0].logprobs = [-1.0] * 3
    Frozen(tiny_model()).fill(found, lambda m: m.role == "candidate")
    assert found[0].members[0].logprobs == [-1.0] * 3 and forwards == [1]
    assert found[0].members[2].logprobs == []


@pytest.mark.parametrize(
    ("loss", "roles"),
    [
        (LossArguments(), {"candidate", "chosen", "rejected"}),
        (LossArguments(kl_weight=0.0), {"chosen", "rejected"}),
        (LossArguments(taper=False), {"candidate"}),
        (LossArguments(kl_weight=0.0, taper=False), set()),
        (LossArguments(loss="dpo"), {"chosen", "rejected"}),
        (LossArguments(loss="ipo"), {"chosen", "rejected"}),
        (LossArguments(loss="pro"), set()),
        (LossArguments(loss="sft"), set()),
        (LossArguments(loss="listwise_dpo"), {"candidate", "chosen", "rejected"}),
    ],
)
def test_a_training_computes_what_its_loss_reads(loss: LossArguments, roles: set[str], tmp_path: Path) -> None:
    model = tiny_model()
    reference = reference_for(model, loss, ScoreArguments())
    assert (reference is None) == (not roles)
    rollout = RolloutArguments(group_size=2, max_new_tokens=4)
    maker = GroupMaker(model, build_tokenizer(), rollout, ScoreArguments(), RankArguments(), reference)
    trainer = make_trainer(tmp_path, loss, model=model, data=examples(4), make_groups=maker)
    (batch,), items = trainer.get_batch_samples(iter([examples(4)]), 1, torch.device("cpu"))
    members = [member for group in batch["groups"] for member in group.members]
    assert {member.role for member in members if member.logprobs} == roles
    assert torch.isfinite(trainer.compute_loss(model, batch, num_items_in_batch=items))


def test_candidates_of_a_record_are_off_policy(tmp_path: Path) -> None:
    """`taper` reads their reference log-probs without any KL."""
    model, loss = tiny_model(), LossArguments(kl_weight=0.0)
    rows = [Example("", [1, 7], [3, 4, EOS], [3, 8, EOS], candidate_ids=[[5, EOS], [6, 6, EOS]])]
    reference = reference_for(model, loss, ScoreArguments())
    maker = GroupMaker(model, build_tokenizer(), RolloutArguments(), ScoreArguments(), RankArguments(), reference)
    trainer = make_trainer(tmp_path, loss, model=model, data=rows, make_groups=maker)
    (batch,), _ = trainer.get_batch_samples(iter([rows]), 1, torch.device("cpu"))
    assert all(member.logprobs for member in batch["groups"][0].members)


def test_a_score_with_the_reference_needs_one() -> None:
    loss, model = LossArguments(kl_weight=0.0, taper=False), tiny_model()
    assert reference_for(model, loss, ScoreArguments()) is None
    assert isinstance(reference_for(model, loss, ScoreArguments(score_with="reference")), Frozen)


def test_a_lora_run_never_copies_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_lora(tiny_model())
    own = copy.deepcopy

    def watched(value: Any, *more: Any) -> Any:
        assert not isinstance(value, nn.Module), "a model was copied"
        return own(value, *more)

    monkeypatch.setattr(copy, "deepcopy", watched)
    loss, score = LossArguments(), ScoreArguments(score_with="reference")
    reference = reference_for(model, loss, score)
    assert isinstance(reference, AdapterOff)
    rollout = RolloutArguments(group_size=3, max_new_tokens=6)
    maker = GroupMaker(model, build_tokenizer(), rollout, score, RankArguments(), reference)
    trainer = make_trainer(tmp_path, loss, model=model, data=examples(8), make_groups=maker)
    trainer.train()
    logged = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert logged[0] == pytest.approx(0, abs=1e-6) and logged[-1] > 1e-5


# --- the groups' own ---------------------------------------------------------------------------------------------------


def test_a_file_must_bring_them(tmp_path: Path) -> None:
    model = tiny_model()
    found = groups_of(model, 4)
    FromFile().fill(found, everyone)
    found[2].members[1].logprobs = [-1.0]
    message = (
        r"groups must bring a reference log-prob for each token, got 1 for 4 tokens of the chosen answer of a group"
    )
    with pytest.raises(ValueError, match=message):
        FromFile().fill(found, everyone)
    FromFile().fill(found, lambda m: m.role == "candidate")
    trainer = make_trainer(tmp_path, LossArguments(loss="dpo"), model=model, data=found)
    with pytest.raises(ValueError, match=message):
        trainer.train()


def test_scores_of_the_reference_and_its_log_probs_are_one_pass() -> None:
    policy, frozen = tiny_model(), moved(tiny_model())
    ensure_fused(frozen)
    score = ScoreArguments(score_with="reference")
    maker = GroupMaker(
        policy, build_tokenizer(), RolloutArguments(group_size=2, max_new_tokens=4), score, RankArguments(), frozen
    )
    (found,) = maker(examples(1))
    sequences = [found.sequence(member) for member in found.members]
    for member, stats in zip(found.members, token_stats(frozen, sequences, batch_tokens=8192), strict=True):
        assert member.logprobs == stats.logprob.tolist() and member.entropies == stats.entropy.tolist()


def test_unread_log_probs_of_a_wrong_length_shift_nothing(tmp_path: Path) -> None:
    """dpo reads those of the pair alone."""
    model, found = tiny_model(), []
    for wrong in (False, True):
        group = groups_of(model, 1)
        if wrong:
            group[0].members[0].logprobs.append(-9.0)
        trainer = make_trainer(tmp_path, LossArguments(loss="dpo"), model=model, data=group)
        (batch,), items = trainer.get_batch_samples(iter([group]), 1, torch.device("cpu"))
        found.append(float(trainer.compute_loss(model, batch, num_items_in_batch=items)))
    assert found[0] == found[1]


def test_a_reference_that_does_not_run_cannot_score() -> None:
    score = ScoreArguments(score_with="reference")
    maker = GroupMaker(tiny_model(), build_tokenizer(), RolloutArguments(), score, RankArguments(), FromFile())
    with pytest.raises(
        ValueError, match="reference must be AdapterOff, Frozen or a model with score_with=reference, got FromFile"
    ):
        maker(examples(1))
