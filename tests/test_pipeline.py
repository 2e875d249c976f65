"""Weights of groups from scores and the human pair, by hand where possible; and all of phase one on a tiny model."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gem.calibration import Calibration, Signals
from gem.config import PRESETS, RankArguments, RolloutArguments, ScoreArguments
from gem.data import Example
from gem.generators import Completion
from gem.groups import Group, Member, Role
from gem.pipeline import GroupMaker, pair_group, weigh, weight_groups
from gem.rank import bradley_terry_posterior
from gem.tasks import build_tokenizer

NAN = math.nan
EOS = 2
LITERAL = RankArguments(human_weight=0.0, reward="identity", weight_norm="none", filter_groups=False, calibrate=False)


def group(*scores: float, chosen: float | None = None, rejected: float | None = None) -> Group:
    """Return a group of distinct candidates with these scores, then the human pair with its scores."""
    members = [Member("candidate", [5 + i, EOS], score=s, truncated=math.isnan(s)) for i, s in enumerate(scores)]
    human: tuple[tuple[Role, float | None], ...] = (("chosen", chosen), ("rejected", rejected))
    members += [Member(role, [30 + i, EOS], score=s) for i, (role, s) in enumerate(human) if s is not None]
    return Group("", [1], members)


def weights(g: Group, arguments: RankArguments | None = None) -> list[float]:
    weight_groups([g], arguments or RankArguments())
    return [m.weight for m in g.members]


# --- Eq. 2 as printed -------------------------------------------------------------------------------------------------


def test_literal_weights_are_centred_scores() -> None:
    scores = [-0.5, 0.25, 1.0, -2.0, 0.3]
    mean = sum(scores) / 5
    got = weights(group(*scores, chosen=9.0, rejected=-9.0), LITERAL)
    assert got == pytest.approx([s - mean for s in scores] + [0.0, 0.0])


def test_preset_paper_is_literal() -> None:
    settings = {k: v for k, v in PRESETS["paper"].items() if hasattr(LITERAL, k)}
    assert RankArguments(**settings) == LITERAL


def test_literal_weights_keep_duplicates_and_outliers() -> None:
    g = group(0.0, 0.0, 0.1, 0.1, 0.2, -50.0)
    g.members[1].ids = g.members[0].ids
    mean = -49.6 / 6
    assert weights(g, LITERAL) == pytest.approx([s - mean for s in (0.0, 0.0, 0.1, 0.1, 0.2, -50.0)])
    assert g.kept


def test_groups_of_different_sizes_do_not_see_each_other() -> None:
    batch = [group(1.0, 2.0, 4.0), group(0.5, -0.5), group(0.1, 0.2, 0.7, chosen=1.0, rejected=0.0), group(3.0)]
    for arguments in (LITERAL, RankArguments()):
        together = [Group("", [1], [Member(m.role, m.ids, score=m.score) for m in g.members]) for g in batch]
        weight_groups(together, arguments)
        for g, t in zip(batch, together, strict=True):
            assert weights(g, arguments) == pytest.approx([m.weight for m in t.members], abs=1e-9)
            assert g.kept == t.kept


@pytest.mark.parametrize("norm", ["mass", "none", "std"])
@pytest.mark.parametrize("reward", ["identity", "softmax", "rank", "bt"])
def test_weights_sum_to_nothing_and_follow_the_scores(reward: str, norm: str) -> None:
    arguments = RankArguments(reward=reward, weight_norm=norm, human_weight=0.0)
    got = weights(group(-1.0, 0.5, 2.0, 0.0, 3.0), arguments)
    assert sum(got) == pytest.approx(0, abs=1e-6)
    assert sorted(range(5), key=lambda i: got[i]) == [0, 3, 1, 2, 4]
    if norm == "mass":
        assert sum(map(abs, got)) / 2 <= 1 + 1e-6


@pytest.mark.parametrize("reward", ["identity", "bt"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
def test_scores_of_any_size(scale: float, reward: str) -> None:
    """Scores as large as log-probs, or far below tau, give finite weights in the right order."""
    arguments = RankArguments(reward=reward, filter_groups=False)
    got = weights(group(*(scale * s for s in (-1.0, 0.5, 2.0)), chosen=scale, rejected=3 * scale), arguments)
    assert all(map(math.isfinite, got)) and got[0] < got[1] < got[2]


@pytest.mark.parametrize("human_weight", [1e-3, 4.0, 1e3, 1e6, 1e9])
def test_human_weight_of_any_size(human_weight: float) -> None:
    got = weights(group(-1.0, 0.5, 2.0, chosen=-5.0, rejected=5.0), RankArguments(human_weight=human_weight))
    assert all(map(math.isfinite, got))


# --- the human pair ---------------------------------------------------------------------------------------------------


def test_human_pair_lifts_the_chosen_above_the_rejected() -> None:
    """Even though the rejected answer has the higher score."""
    g = group(0.0, 0.1, 0.2, chosen=-0.3, rejected=0.3)
    got = weights(g, RankArguments(human_weight=8.0))
    assert g.kept and got[3] > 0 > got[4]
    assert g.members[3].rank_mean > g.members[4].rank_mean


def test_human_weight_zero_leaves_the_pair_out() -> None:
    with_pair, without = group(0.0, 1.0, 3.0, chosen=5.0, rejected=-5.0), group(0.0, 1.0, 3.0)
    arguments = RankArguments(human_weight=0.0)
    got = weights(with_pair, arguments)
    assert got[3:] == [0.0, 0.0] and got[:3] == pytest.approx(weights(without, arguments))
    assert math.isnan(with_pair.members[3].rank_mean)


def test_pair_without_scores_takes_part_by_its_observation() -> None:
    """The human preference alone ranks the pair, even if no candidate has a score."""
    for g in (group(0.0, 1.0, chosen=NAN, rejected=NAN), group(0.5, chosen=NAN, rejected=NAN)):
        got = weights(g, RankArguments(filter_groups=False))
        assert got[-2] > 0 > got[-1] and all(map(math.isfinite, got))


def test_without_a_rejected_answer_no_preference_is_observed() -> None:
    got = weights(group(0.0, 1.0, 3.0, chosen=1.0), RankArguments())
    assert got[3] == pytest.approx(got[1])  # the same score, and no preference between them
    assert got[0] < got[1] < got[2]
    literal = weights(group(0.0, 1.0, 3.0, chosen=1.0), LITERAL)
    assert literal == pytest.approx([-4 / 3, -1 / 3, 5 / 3, 0.0])


def test_group_without_humans_in_a_batch_with_them() -> None:
    batch = [group(0.0, 1.0, 3.0), group(0.0, 1.0, 3.0, chosen=0.0, rejected=0.0)]
    weight_groups(batch, RankArguments())
    assert [m.weight for m in batch[0].members] == pytest.approx(weights(group(0.0, 1.0, 3.0)))


# --- filters ----------------------------------------------------------------------------------------------------------


FILTERED = RankArguments(filter_members=True)


def test_copies_count_as_often_as_they_were_sampled() -> None:
    """Eq. 2 is an expectation over the policy's answers: a frequent one is there several times, with equal weights."""
    g, other = group(0.0, 1.0, 1.0, 3.0), group(0.0, 1.0, 1.0, 3.0)
    g.members[2].ids = list(g.members[1].ids)
    assert weights(g) == weights(other) and g.members[1].weight == g.members[2].weight


def test_duplicate_candidates_count_once_with_filter_members() -> None:
    g = group(0.0, 1.0, 1.0, 3.0, chosen=2.0, rejected=0.5)
    g.members[2].ids = list(g.members[1].ids)
    got = weights(g, FILTERED)
    assert got[2] == 0 and math.isnan(g.members[2].rank_mean)
    once = weights(group(0.0, 1.0, 3.0, chosen=2.0, rejected=0.5))
    assert [got[i] for i in (0, 1, 3, 4, 5)] == pytest.approx(once)


@pytest.mark.parametrize("human", ["chosen", "rejected"])
def test_a_candidate_that_repeats_a_human_answer_counts_once(human: Role) -> None:
    g = group(0.0, 1.0, 3.0, chosen=2.0, rejected=0.5)
    index = g.role(human)
    assert index is not None
    g.members[1].ids, g.members[1].score = list(g.members[index].ids), g.members[index].score
    assert weights(g, FILTERED)[1] == 0 != weights(g)[1]


def test_cut_off_members_weigh_nothing() -> None:
    for arguments in (LITERAL, RankArguments(human_weight=0.0)):
        got = weights(group(0.0, NAN, 3.0, NAN, 1.0), arguments)
        assert got[1] == got[3] == 0 and got[0] < 0 < got[2]


def test_low_outliers_are_trimmed() -> None:
    g = group(1.0, 1.2, 1.4, 1.6, 2.5, -40.0)
    got = weights(g, RankArguments(human_weight=0.0, filter_members=True))
    assert got[5] == 0 and got[0] < 0 < got[4]
    assert weights(g)[5] < -0.5  # as a rule the worst answer is pushed down most


@pytest.mark.parametrize("norm", ["mass", "none", "std"])
def test_groups_that_agree_are_dropped(norm: str) -> None:
    g = group(0.7, 0.7, 0.7 + 1e-6)
    assert weights(g, RankArguments(human_weight=0.0, weight_norm=norm)) == [0, 0, 0] and not g.kept
    near = group(0.7, 0.71, 0.72)  # they differ by less than the uncertainty of the ranking
    assert weights(near, RankArguments(human_weight=0.0, weight_norm=norm)) == [0, 0, 0] and not near.kept


def test_equal_scores_without_filter_weigh_nothing() -> None:
    for norm in ("mass", "none", "std"):
        arguments = RankArguments(human_weight=0.0, reward="identity", weight_norm=norm, filter_groups=False)
        assert weights(group(0.7, 0.7, 0.7), arguments) == [0, 0, 0]


@pytest.mark.parametrize("filter_groups", [True, False])
@pytest.mark.parametrize("reward", ["identity", "softmax", "rank", "bt"])
@pytest.mark.parametrize("scores", [(), (0.3,), (NAN, NAN, NAN), (NAN, 0.3)], ids=str)
def test_nothing_to_compare(scores: tuple[float, ...], reward: str, filter_groups: bool) -> None:
    arguments = RankArguments(human_weight=0.0, reward=reward, filter_groups=filter_groups)
    g = group(*scores, chosen=1.0, rejected=0.0)
    assert weights(g, arguments) == [0.0] * len(g.members) and not g.kept


def test_all_candidates_without_score_leave_the_pair() -> None:
    g = group(NAN, NAN, chosen=2.0, rejected=-2.0)
    got = weights(g)
    assert g.kept and got[:2] == [0, 0] and got[2] > 0 > got[3]


# --- agreement --------------------------------------------------------------------------------------------------------

AGREEMENT: dict[str, Any] = {"comparators": ["agreement"], "human_weight": 0.0}


def voting(answers: str, scores: Sequence[float] | None = None, pair: tuple[float, float] | None = None) -> Group:
    """Return a group of distinct candidates with these answers, a letter each ("-": none), and the pair with its scores."""
    scores = [0.3] * len(answers) if scores is None else scores
    g = group(*scores, chosen=pair and pair[0], rejected=pair and pair[1])
    for member, answer in zip(g.members, answers.ljust(len(g.members), "a"), strict=True):
        member.answer, member.truncated = answer.strip("-"), False
    return g


def posterior_of(g: Group, log_c: Sequence[float], weight: float, human_weight: float = 0.0) -> list[float]:
    """Return the mean of the posterior of S and of these scores of agreement, at the defaults."""
    scores = torch.tensor([[m.score for m in g.members], log_c], dtype=torch.float64)[:, None]
    pair: dict[str, Any] = {}
    if human_weight:
        pair = {name: torch.tensor([g.role(name)]) for name in ("chosen", "rejected")}  # type: ignore[arg-type]
    options: dict[str, Any] = {
        "tau": [0.5, 1.0],
        "weights": [1.0, weight],
        "prior_sd": 1.0,
        "human_weight": human_weight,
    }
    return bradley_terry_posterior(scores, steps=60, **options, **pair).mean[0].tolist()


def test_entropy_by_name_is_the_default() -> None:
    """And answers change nothing as long as nobody compares them."""
    g = voting("aabc", [0.0, 1.0, 0.4, 2.0], (0.5, 0.7))
    default = weights(g)
    assert [weights(g, RankArguments(comparators=[item])) for item in ("entropy", "entropy:1")] == [default] * 2
    for member in g.members:
        member.answer = ""
    assert weights(g) == default


def test_agreement_alone_is_the_log_of_the_votes() -> None:
    """As the prior grows wide; p_ij = c_i / (c_i + c_j)."""
    g = voting("aaabbc", [9.0, -9.0, 3.0, 0.0, 1.0, 5.0])
    got = weights(g, RankArguments(**AGREEMENT, prior_sd=1e4, weight_norm="none"))
    log_c = [math.log(c) for c in (3, 3, 3, 2, 2, 1)]
    assert got == pytest.approx([value - sum(log_c) / 6 for value in log_c], abs=1e-6)


def test_two_comparators_and_the_pair() -> None:
    g = voting("aabca", [0.0, 1.0, 0.4, 2.0, 0.6], (0.5, 0.7))
    weights(g, RankArguments(comparators=["agreement:2", "entropy"]))
    log_c = [math.log(c) if c else NAN for c in (3, 3, 1, 1, 3, 0, 0)]
    assert [m.rank_mean for m in g.members] == pytest.approx(posterior_of(g, log_c, 2.0, 4.0), abs=1e-9)


def test_copies_vote() -> None:
    """With filter_members, three copies of a text are one member of the ranking, with three votes against one."""
    g = voting("aaab")
    for copy in g.members[1:3]:
        copy.ids = list(g.members[0].ids)
    got = weights(g, RankArguments(**AGREEMENT, prior_sd=1e4, weight_norm="none", filter_members=True))
    assert got == pytest.approx([math.log(3) / 2, 0, 0, -math.log(3) / 2], abs=1e-6)
    kept = weights(g, RankArguments(**AGREEMENT))
    assert kept[0] == kept[1] == kept[2] > 0 > kept[3]


def test_outliers_of_s_vote() -> None:
    g = voting("abbbba", [1.0, 1.2, 1.4, 1.6, 2.5, -40.0])
    filtered = RankArguments(comparators=["entropy", "agreement"], human_weight=0.0, filter_members=True)
    assert weights(g, filtered)[5] == 0 and math.isnan(g.members[5].rank_mean)
    g.members.pop()
    log_c = [math.log(c) for c in (2, 4, 4, 4, 4)]
    assert [m.rank_mean for m in g.members] == pytest.approx(posterior_of(g, log_c, 1.0), abs=1e-9)
    alone = voting("abbbba", [1.0, 1.2, 1.4, 1.6, 2.5, -40.0])
    got = weights(alone, RankArguments(**AGREEMENT, filter_members=True))
    assert got[5] == got[0] < 0 < got[1]  # S is not read, and trims nobody


@pytest.mark.parametrize("change", [{"truncated": True}, {"flaw": "empty"}, {"answer": ""}])
def test_who_does_not_vote_is_not_compared(change: dict[str, Any]) -> None:
    g, without = voting("aabca"), voting("aabc")
    vars(g.members[4]).update(change)
    assert weights(g, RankArguments(**AGREEMENT)) == [*weights(without, RankArguments(**AGREEMENT)), 0.0]
    assert math.isnan(g.members[4].rank_mean)


def test_a_candidate_without_an_answer_is_compared_by_its_score() -> None:
    g = voting("aab-", [0.0, 1.0, 0.4, 2.0])
    weights(g, RankArguments(comparators=["entropy", "agreement"], human_weight=0.0))
    log_c = [math.log(2), math.log(2), 0.0, NAN]
    assert [m.rank_mean for m in g.members] == pytest.approx(posterior_of(g, log_c, 1.0), abs=1e-9)


def test_a_candidate_without_a_score_is_compared_by_its_answer() -> None:
    g = voting("aab", [NAN, NAN, NAN])
    got = weights(g, RankArguments(**AGREEMENT))
    assert g.kept and got[0] == pytest.approx(got[1]) and got[1] > 0 > got[2]
    both = weights(g, RankArguments(comparators=["entropy", "agreement"], human_weight=0.0))
    assert both == pytest.approx(got)


def test_humans_do_not_vote() -> None:
    """Their answer is that of a candidate each; the human preference alone ranks them where agreement is alone."""
    g = voting("aab", pair=(NAN, NAN))
    got = weights(g, RankArguments(comparators=["agreement"]))
    assert g.kept and got[3] > 0 > got[4] and g.members[3].rank_mean == pytest.approx(-g.members[4].rank_mean)
    alone = voting("aab")
    weights(alone, RankArguments(comparators=["agreement"]))
    assert [m.rank_mean for m in g.members[:3]] == pytest.approx([m.rank_mean for m in alone.members])


def test_a_strong_pair_wins_against_the_votes() -> None:
    """Also where its rejected answer has the better S, and no candidate votes for the chosen one."""
    g = voting("bbbbb", [0.1, 0.3, 0.2, 0.5, 0.4], (-1.0, 1.0))
    got = weights(g, RankArguments(comparators=["entropy", "agreement:5"], human_weight=1000.0))
    assert g.kept and got[5] > 0 > got[6] and g.members[5].rank_mean > g.members[6].rank_mean + 3


@pytest.mark.parametrize(
    ("answers", "pair", "comparators", "kept"),
    [
        ("aab", None, ["entropy"], False),  # equal S
        ("aab", None, ["entropy", "agreement"], True),
        ("aab", None, ["entropy", "agreement:0.001"], True),  # however little it weighs
        ("aaabb", None, ["agreement"], True),  # although the best leads by less than the ranking's uncertainty
        ("aabb", None, ["agreement"], False),
        ("aaaa", None, ["agreement"], False),
        ("abcd", None, ["entropy", "agreement"], False),
        ("----", None, ["agreement"], False),
        ("a---", None, ["agreement"], False),
        ("abcd", (NAN, NAN), ["agreement"], True),
        ("aaaa", (NAN, NAN), ["agreement"], True),  # the pair is ranked
        ("----", (NAN, NAN), ["agreement"], True),
    ],
)
def test_which_groups_agreement_keeps(
    answers: str, pair: tuple[float, float] | None, comparators: list[str], kept: bool
) -> None:
    g = voting(answers, pair=pair)
    got = weights(g, RankArguments(comparators=comparators))
    assert g.kept == kept == any(got)


def test_scores_that_differ_keep_no_group_that_agrees() -> None:
    """S is not read where agreement is alone."""
    g = voting("aaaa", [0.0, 1.0, 2.0, 5.0])
    assert weights(g, RankArguments(comparators=["agreement"], min_spread=0.0)) == [0.0] * 4 and not g.kept
    assert any(weights(g, RankArguments(comparators=["entropy", "agreement"]))) and g.kept


@pytest.mark.parametrize("filter_groups", [True, False])
@pytest.mark.parametrize(
    ("answers", "kept"), [("aabc", True), ("aabb", True), ("abcd", False), ("aaaa", False), ("aa--", False)]
)
def test_the_filter_of_agreement(answers: str, kept: bool, filter_groups: bool) -> None:
    """It asks the groups without a human pair, whatever compares them; a pair that takes no part is none."""
    scores = [0.0, 1.0, 2.0, 5.0]
    for arguments in (RankArguments(), RankArguments(human_weight=0.0, reward="identity")):
        arguments.agreement_filter, arguments.filter_groups = True, filter_groups
        g, one_sided = voting(answers, scores), voting(answers, scores, (0.5, 0.1))
        one_sided.members.pop()
        paired = voting(answers, scores, (0.5, 0.1))
        weight_groups([g, one_sided, paired], arguments)
        assert [g.kept, one_sided.kept, paired.kept] == [kept, kept, kept or arguments.human_weight > 0]
        assert any(m.weight for m in g.members) == kept


def test_copies_count_in_the_filter_of_agreement() -> None:
    g = voting("aabc", [0.0, 0.0, 2.0, 5.0])
    assert any(weights(g, RankArguments(agreement_filter=True)))
    g.members[1].ids = list(g.members[0].ids)
    assert any(weights(g, RankArguments(agreement_filter=True, filter_members=True))) and g.members[1].weight == 0


def test_agreement_is_no_reward_of_scores() -> None:
    with pytest.raises(ValueError, match="reward must be bt with the comparator agreement, .* got 'rank'"):
        weights(voting("aab"), RankArguments(comparators=["agreement"], reward="rank"))
    with pytest.raises(ValueError, match="comparators must be of entropy, agreement, .* got 'votes'"):
        weights(voting("aab"), RankArguments(comparators=["votes"]))


# --- phase one --------------------------------------------------------------------------------------------------------


def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=EOS, pad_token_id=0, initializer_range=0.4,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def examples() -> list[Example]:
    full = Example("1", [1, 8], [9, 10, EOS], [9, 11, EOS])
    own = Example("2", [1, 9, 8], [9, EOS], candidate_ids=[[7, EOS], [8, 8, EOS], [10, 10]])
    return [full, own, Example("3", [1], [])]


def make(seed: int = 0, reference: Any = None, policy: Any = None, **changes: Any) -> list[Group]:
    rollout = RolloutArguments(group_size=3, max_new_tokens=6)
    tokenizer = build_tokenizer()
    maker = GroupMaker(
        policy or model(), tokenizer, rollout, ScoreArguments(**changes), RankArguments(), reference=reference
    )
    torch.manual_seed(seed)
    return maker(examples())


def test_group_maker() -> None:
    found = make()
    assert [[m.role for m in g.members] for g in found] == [
        ["candidate"] * 3 + ["chosen", "rejected"],
        ["candidate"] * 3 + ["chosen"],
        ["candidate"] * 3,
    ]
    assert [m.ids for m in found[1].members] == [[7, EOS], [8, 8, EOS], [10, 10], [9, EOS]]
    assert [m.truncated for m in found[1].members] == [False, False, True, False]
    assert [g.prompt for g in found] == ["1", "2", "3"]
    for member in (m for g in found for m in g.members):
        assert len(member.logprobs) == len(member.entropies) == len(member.ids)
        assert math.isfinite(member.weight)
    assert make() == make() or str(make()) == str(make())  # NaN differs from itself
    assert str(make(1)) != str(make(2))


def test_reference_and_policy_each_do_their_part() -> None:
    policy, reference = model(), model()
    with torch.no_grad():
        reference.lm_head.weight.mul_(0.3)
    own, frozen = (make(policy=policy, reference=reference, score_with=s) for s in ("policy", "reference"))
    alone = make(policy=policy)
    for a, b, c in zip(*([m for g in found for m in g.members] for found in (own, frozen, alone)), strict=True):
        assert a.ids == b.ids == c.ids and a.logprobs == b.logprobs != c.logprobs  # of the reference
        assert a.entropies == c.entropies != b.entropies


def test_candidates_of_another_backend() -> None:
    """Any callable of the Generator protocol draws the candidates; only examples without their own are sampled."""
    asked: list[Any] = []

    def sample(
        prompts: Any, n: int = 1, *, greedy: bool = False, progress: str | None = None
    ) -> list[list[Completion]]:
        asked.append((prompts, n, greedy, progress))
        return [[Completion([9, 7 + n * i + j, EOS], "stop") for j in range(n)] for i in range(len(prompts))]

    rollout = RolloutArguments(group_size=2, max_new_tokens=6)
    maker = GroupMaker(model(), build_tokenizer(), rollout, ScoreArguments(), RankArguments(), generator=sample)
    found = maker(examples(), progress=True)
    assert asked == [([[1, 8], [1]], 2, False, "candidates")]
    drawn = [[m.ids for m in g.members if m.sampled] for g in found]
    assert drawn == [[[9, 7, EOS], [9, 8, EOS]], [], [[9, 9, EOS], [9, 10, EOS]]]
    assert all(math.isfinite(m.score) and m.logprobs for m in found[0].members[:2])


def test_drawn_members_have_their_answers() -> None:
    """Before they are weighed, as a training in one pass weighs each group alone with the entropies of its forward."""
    rank = RankArguments(comparators=["entropy", "agreement"], filter_groups=False)
    maker = GroupMaker(model(), build_tokenizer(), RolloutArguments(max_new_tokens=6), ScoreArguments(), rank)
    torch.manual_seed(0)
    found = maker([replace(e, candidate_ids=[[11, EOS], [8, 6, 11, EOS], [12, EOS], [11]]) for e in examples()])
    for g in found:
        assert g.votes[:4] == ["4", "4", "5", ""] and g.members[3].answer == "4"
        told = [m.weight for m in g.members]
        entropy = torch.tensor([h for m in g.members for h in m.entropies])
        weigh([g], entropy, ScoreArguments(), rank)
        assert [m.weight for m in g.members] == pytest.approx(told, abs=1e-6)
    log_c = [math.log(2), math.log(2), 0.0, NAN]
    assert [m.rank_mean for m in found[2].members] == pytest.approx(posterior_of(found[2], log_c, 1.0), nan_ok=True)


def test_pairs_alone() -> None:
    maker = GroupMaker(
        model(), build_tokenizer(), RolloutArguments(group_size=0), ScoreArguments(), RankArguments(human_weight=8.0)
    )
    (found,) = maker(examples()[:1])
    assert [m.role for m in found.members] == ["chosen", "rejected"]
    assert found.members[0].logprobs and math.isfinite(found.members[0].weight)


def test_pair_group() -> None:
    full, own, none = map(pair_group, examples())
    assert [m.role for m in full.members] == ["chosen", "rejected"] and [m.role for m in own.members] == ["chosen"]
    assert none.members == [] and full.prompt_ids == [1, 8]


def test_members_are_scored_under_their_own_prompt_and_behind_what_others_say() -> None:
    """A candidate is scored under the prompt that it was sampled from; a pair of several turns skips the user's turns."""
    given = [(2, [5, 4])]
    example = Example(
        "1", [1, 8], [7, EOS, 9, EOS], [8, EOS], chosen_given=given, question="1", sampling_prompt_ids=[1, 8, 6, 6]
    )
    policy = model()
    maker = GroupMaker(policy, build_tokenizer(), RolloutArguments(max_new_tokens=5), ScoreArguments(), RankArguments())
    torch.manual_seed(0)
    (found,) = maker([example])
    assert found.sampling_prompt_ids == [1, 8, 6, 6] and found.prompt_ids == [1, 8]
    for member in found.members:
        prompt = [1, 8] if member.role != "candidate" else [1, 8, 6, 6]
        ids, learnt = [*prompt, *member.ids], list(range(len(prompt), len(prompt) + len(member.ids)))
        if member.role == "chosen":
            assert member.given == given
            ids, learnt = [1, 8, 7, EOS, 5, 4, 9, EOS], [2, 3, 6, 7]
        with torch.no_grad():
            log_p = policy(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = [float(log_p[t - 1, ids[t]]) for t in learnt]
        assert member.logprobs == pytest.approx(expected, abs=1e-5)
    chosen = next(m for m in found.members if m.role == "chosen")
    assert chosen.branch_span[0] >= 2 and chosen.answer_span[0] >= 2  # of its last turn


def test_turns_of_others_tell_completions_apart() -> None:
    twins = group(2.0, -2.0, 1.0, -1.0, 1.5)
    for member, given in zip(twins.members, ([], [(1, [7])], [(1, [8])], [(0, [7])], [(1, [7])]), strict=True):
        member.ids, member.given = [5, EOS], given
    weight_groups([twins], FILTERED)
    assert [m.weight != 0 for m in twins.members] == [True, True, True, True, False]


# --- calibrated weights -----------------------------------------------------------------------------------------------


def with_terms(g: Group) -> Group:
    """Give the members entropies whose S is their score, at the weights 1 of Eq. 1."""
    for i, member in enumerate(g.members):
        member.final_entropy = 0.1 * i
        member.branch_entropy = member.score + member.final_entropy
    return g


def test_calibrated_weights_stand_for_those_of_eq1() -> None:
    scores = [0.3, -0.2, 1.0]
    trust = Signals(final=0.5, branch=-0.25, agreement=0.75)
    ours = with_terms(voting("aab", scores, (0.4, 0.1)))
    weight_groups([ours], RankArguments(comparators=["entropy", "agreement"]), trust)
    theirs = with_terms(voting("aab", scores, (0.4, 0.1)))
    s = [-0.25 * m.branch_entropy - 0.5 * m.final_entropy for m in theirs.members]
    log_c = [0.75 * x for x in (math.log(2), math.log(2), 0.0, NAN, NAN)]
    found = bradley_terry_posterior(
        torch.tensor([[s], [log_c]], dtype=torch.float64),
        tau=[0.5, 1.0],
        prior_sd=1.0,
        human_weight=4.0,
        chosen=torch.tensor([3]),
        rejected=torch.tensor([4]),
        steps=60,
    )
    assert [m.rank_mean for m in ours.members] == pytest.approx(found.mean[0].tolist(), abs=1e-9)
    assert [m.score for m in ours.members] == [*scores, 0.4, 0.1]  # S itself stays what it is


def test_full_trust_is_eq1() -> None:
    ours, theirs = (with_terms(voting("aab", [0.3, NAN, 1.0], (0.4, 0.1))) for _ in range(2))
    for comparators in (["entropy"], ["entropy", "agreement"]):
        weight_groups([ours], RankArguments(comparators=comparators), Signals(1.0, 1.0, 1.0))
        weight_groups([theirs], RankArguments(comparators=comparators))
        assert [m.weight for m in ours.members] == pytest.approx([m.weight for m in theirs.members])


def test_no_trust_leaves_nothing_to_rank_but_the_pair() -> None:
    g, paired = with_terms(group(2.0, 0.0, 1.0)), with_terms(group(2.0, 0.0, 1.0, chosen=0.5, rejected=0.4))
    weight_groups([g, paired], RankArguments(), Signals(0.0, 0.0, 0.0))
    assert [m.weight for m in g.members] == [0, 0, 0] and not g.kept
    chosen, rejected = paired.members[-2:]
    assert paired.kept and chosen.weight > 0.3 and rejected.weight < -0.3


def test_the_maker_learns_its_trust_from_the_pairs_alone(caplog: pytest.LogCaptureFixture) -> None:
    policy, tokenizer = model(), build_tokenizer()
    score = ScoreArguments(final_weight=0.5, branch_weight=2.0)
    settings = (policy, tokenizer, RolloutArguments(group_size=2, max_new_tokens=4), score, RankArguments())
    pairs = [e for e in examples() if e.has_pair]
    assert pairs and GroupMaker(*settings).weights is None
    expected = Calibration(GroupMaker(*settings)(pairs)).trust
    bare = replace(pairs[0], chosen_ids=[], rejected_ids=[])
    with caplog.at_level(logging.INFO):
        maker = GroupMaker(*settings, pairs=[bare, *pairs, bare])
        assert not caplog.text and maker.calibration is not None  # at the first use alone: not every method ranks
    assert maker.calibration.trust == expected != Signals(1, 1, 1)
    assert maker.weights == (0.5 * expected.final, 2 * expected.branch, 1)
    assert f"trust in S by {len(pairs)} human pairs: final term {expected.final:.2f}, branch term" in caplog.text
    torch.manual_seed(0)
    ours = maker.draw(pairs)
    maker.weigh(ours)
    for g in ours:
        trusted = [m.weight for m in g.members]
        weight_groups([g], RankArguments(), maker.weights)
        assert trusted == pytest.approx([m.weight for m in g.members])
