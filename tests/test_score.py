"""Eq. 1 on a tiny model: statistics in any batching, spans at the right offsets in packed members, cut-offs, clips."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gem.config import RolloutArguments, ScoreArguments
from gem.ends import Ends
from gem.generators import generate
from gem.groups import Group, Member
from gem.head import ensure_fused, fuse_lm_head
from gem.health import group_health
from gem.score import flaw_of, score_groups, token_stats
from gem.tasks import build_tokenizer

EOS = 2
CONFIG = LlamaConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, bos_token_id=1, eos_token_id=EOS, pad_token_id=0, attention_dropout=0.5,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(CONFIG)
    for p in model.parameters():
        if p.ndim == 2:
            torch.nn.init.normal_(p, std=0.4)
    return model.eval()


def ids_of(text: str) -> list[int]:
    ids: list[int] = build_tokenizer()(text, add_special_tokens=False)["input_ids"]
    return ids


def alone(model: Any, prompt: list[int], completion: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probs and entropies by definition: one sequence, all logits, float64."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    logp = logits.double().log_softmax(-1)
    return logp.gather(1, torch.tensor(completion)[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


# --- token_stats ------------------------------------------------------------------------------------------------------

SEQUENCES = [
    ([1, 5, 6], [7, 8, 9, 10, EOS]),
    ([1], [EOS]),
    ([1, *range(3, 30)], [5, EOS]),
    ([1, 5], [39, 38, 37, 36, 35, 34, 33, 32, 31, EOS]),
    ([1, 5, 6], [7, 8, 9, 10, EOS]),
    ([1, 5], [6]),
]


@pytest.mark.parametrize("batch_tokens", [1, 12, 31, 10_000])
def test_token_stats_are_the_models_own(model: Any, batch_tokens: int) -> None:
    fuse_lm_head(model, temperature=2.0)  # scoring must ignore it
    stats = token_stats(model, SEQUENCES, batch_tokens=batch_tokens)
    assert len(stats) == len(SEQUENCES)
    for (prompt, completion), got in zip(SEQUENCES, stats, strict=True):
        logprob, entropy = alone(model, prompt, completion)
        torch.testing.assert_close(got.logprob.double(), logprob, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(got.entropy.double(), entropy, atol=2e-5, rtol=1e-5)
        assert not got.logprob.requires_grad


def test_batches_stay_within_their_tokens(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    forward = type(model.model).forward

    def watched(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        sizes.append(tuple(input_ids.shape))
        return forward(self, input_ids=input_ids, **kwargs)

    ensure_fused(model)
    monkeypatch.setattr(type(model.model), "forward", watched)
    token_stats(model, SEQUENCES, batch_tokens=24)
    assert sum(rows for rows, _ in sizes) == len(SEQUENCES)
    assert all(rows * width <= 24 or rows == 1 for rows, width in sizes)
    assert len(sizes) < len(SEQUENCES)


def test_token_stats_ignore_dropout_and_restore_the_mode(model: Any) -> None:
    ensure_fused(model)
    quiet = token_stats(model, SEQUENCES, batch_tokens=64)
    model.train()
    trained = token_stats(model, SEQUENCES, batch_tokens=64)
    assert model.training
    model.eval()
    assert all(torch.equal(a.logprob, b.logprob) for a, b in zip(quiet, trained, strict=True))
    assert token_stats(model, [], batch_tokens=64) == []


# --- score_groups -----------------------------------------------------------------------------------------------------

TEXTS = ["1+2=3 3+4=7 #### 7", "#### 12", "1+2 #### 3+4 #### 5"]  # no reasoning before the second's answer


def groups() -> list[Group]:
    """Return members of many lengths in two groups, so a wrong offset gives a wrong span."""
    members = [Member("candidate", [*ids_of(text), EOS]) for text in TEXTS]
    cut_off = Member("candidate", ids_of("1+2=3 #### 3"))
    human = [Member("chosen", [*ids_of("1+2=3 #### 3"), EOS]), Member("rejected", [*ids_of("#### 4"), EOS])]
    return [Group("", [1, *ids_of("1+2=")], [members[0], cut_off, members[1]]), Group("", [1], [members[2], *human])]


def scored(model: Any, reference: Any = None, **changes: Any) -> list[Group]:
    found = groups()
    for m in (model, reference):
        if m is not None:
            ensure_fused(m)
    score_groups(found, build_tokenizer(), model, reference, ScoreArguments(**changes))
    return found


def expected_score(
    member: Member, m: float = 0.1, branch_weight: float = 1.0, final_weight: float = 1.0
) -> tuple[float, float, float]:
    """Return (S, final entropy, branch entropy) of Eq. 1, computed with a list and a sort."""
    (b0, b1), (a0, a1) = member.branch_span, member.answer_span
    branch = sorted(member.entropies[b0:b1], reverse=True)
    count = max(1, math.ceil(m * len(branch))) if m < 1 else min(int(m), len(branch))
    final = sum(member.entropies[a0:a1]) / (a1 - a0)
    top = sum(branch[:count]) / len(branch[:count]) if branch else 0.0
    return branch_weight * top - final_weight * final, final, top


@pytest.mark.parametrize(
    "changes",
    [{}, {"top_m": 0.5}, {"top_m": 1.0}, {"top_m": 3.0}, {"top_m": 100}, {"branch_weight": 0.0}, {"final_weight": 0.0},
     {"branch_weight": 2.0, "final_weight": 0.5}, {"score_tokens": 1}],
    ids=str,
)  # fmt: skip
def test_spans_and_scores_of_packed_members(model: Any, changes: dict[str, Any]) -> None:
    found = scored(model, **changes)
    for group in found:
        for member in group.members:
            logprob, entropy = alone(model, group.prompt_ids, member.ids)
            torch.testing.assert_close(torch.tensor(member.entropies).double(), entropy, atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(torch.tensor(member.logprobs).double(), logprob, atol=2e-5, rtol=1e-5)
            options = {"m" if k == "top_m" else k: v for k, v in changes.items() if k != "score_tokens"}
            score, final, branch = expected_score(member, **options)
            assert member.final_entropy == pytest.approx(final, abs=1e-5)
            assert member.branch_entropy == pytest.approx(branch, abs=1e-5)
            if not member.truncated:
                assert member.score == pytest.approx(score, abs=1e-5)


def test_spans_name_the_text_that_they_should(model: Any) -> None:
    tokenizer = build_tokenizer()
    found = scored(model)
    texts = [
        (tokenizer.decode(m.ids[slice(*m.branch_span)]), tokenizer.decode(m.ids[slice(*m.answer_span)]), m.span_rule)
        for group in found
        for m in group.members
    ]
    assert texts == [
        ("1+2=3 3+4=7 ", "7", "marker"),
        ("1+2=3 ", "3", "marker"),
        ("", "12", "marker"),
        ("1+2 #### 3+4 ", "5", "marker"),
        ("1+2=3 ", "3", "marker"),
        ("", "4", "marker"),
    ]
    # No token is in both spans, and neither the marker nor the end of sequence in any.
    for member in (m for group in found for m in group.members):
        (b0, b1), (a0, a1) = member.branch_span, member.answer_span
        assert 0 <= b0 <= b1 < a0 < a1 <= len(member.ids) and EOS not in member.ids[a0:a1]
    assert found[0].members[0].completion == TEXTS[0]


def test_cut_off_member_has_no_score(model: Any) -> None:
    found = scored(model)
    assert [[m.truncated for m in group.members] for group in found] == [[False, True, False], [False] * 3]
    for member in (m for group in found for m in group.members):
        assert math.isnan(member.score) == member.truncated and math.isfinite(member.final_entropy)


def test_member_without_an_answer_has_no_score(model: Any) -> None:
    group = Group("", [1], [Member("candidate", [EOS]), Member("candidate", [*ids_of("1 ####"), EOS])])
    ensure_fused(model)
    score_groups([group], build_tokenizer(), model, None, ScoreArguments())
    silent, said = group.members
    assert math.isnan(silent.score) and math.isnan(silent.final_entropy) and silent.branch_entropy == 0
    assert math.isfinite(said.score)  # "1" is the answer, its marker announces nothing


def test_entropy_clip(model: Any) -> None:
    plain, clipped = scored(model, top_m=0.5), scored(model, top_m=0.5, entropy_clip=0.5)
    values = torch.tensor([x for group in plain for m in group.members for x in m.entropies])
    limit = float(values.quantile(0.5))
    assert (values > limit).any()
    for a, b in zip((m for g in plain for m in g.members), (m for g in clipped for m in g.members), strict=True):
        assert a.entropies == b.entropies  # the file shows the model's entropies; only Eq. 1 clips
        a.entropies = [min(x, limit) for x in a.entropies]
        score, final, branch = expected_score(a, m=0.5)
        assert (b.final_entropy, b.branch_entropy) == pytest.approx((final, branch), abs=1e-5)
        assert b.truncated or b.score == pytest.approx(score, abs=1e-5)


def test_reference_gives_the_logprobs_and_the_scorer_the_entropies(model: Any) -> None:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(0.5)
    both, of_model, of_other = scored(model, other), scored(model), scored(other)
    for b, m, o in zip(*([x for g in found for x in g.members] for found in (both, of_model, of_other)), strict=True):
        assert b.entropies == m.entropies and b.logprobs == o.logprobs
        assert b.logprobs != m.logprobs and b.entropies != o.entropies


# --- flaws, ends and turns ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("completion", "question", "flaw"),
    [
        ("", "What is 3+4?", "empty"),
        (" \n\t", "What is 3+4?", "empty"),
        ("\u200b\ufeff\u2028", "", "empty"),
        ("What is 3+4?", "What is 3+4?", "repeats the prompt"),
        ("what is 3 + 4", "What is 3+4?", "repeats the prompt"),
        ("What is 3+4? What is 3+4?\n\nWhat is 3+4?", "What is 3+4?", "repeats the prompt"),
        ("**What is 3+4**...", "What is 3+4?", "repeats the prompt"),
        ("3+4=3+4=", "3+4=", "repeats the prompt"),
        ("\u4f60\u597d\u5417\u4f60\u597d\u5417", "\u4f60\u597d\u5417\uff1f", "repeats the prompt"),
        ("What is 3+4? 7", "What is 3+4?", ""),
        ("7", "What is 3+4?", ""),
        ("34", "3+4=", ""),  # the words of a question in one
        ("3-4=", "3+4=", ""),
        ("What is", "What is 3+4?", ""),
        ("...", "What is 3+4?", ""),
        ("\U0001f642", "Smile?", ""),
        ("?!", "?!", ""),  # a question without a word says nothing
        ("anything", "", ""),
    ],
)
def test_flaws(completion: str, question: str, flaw: str) -> None:
    assert flaw_of(completion, question) == flaw


def test_a_flawed_candidate_has_no_score(model: Any) -> None:
    ensure_fused(model)
    said = ["12 #### 3", "1+2=", "1+2=1+2=", ""]
    candidates = [Member("candidate", [*ids_of(text), EOS]) for text in said]
    human = Member("chosen", [*ids_of("1+2="), EOS])  # a human answer is never flawed
    for group in (
        Group("User: 1+2= Assistant:", [1, *ids_of("1+2=")], [*candidates, human], question="1+2="),
        Group("1+2=", [1, *ids_of("1+2=")], [*candidates, human]),
    ):
        score_groups([group], build_tokenizer(), model, None, ScoreArguments())
        assert [m.flaw for m in group.members] == ["", "repeats the prompt", "repeats the prompt", "empty", ""]
        assert [math.isnan(m.score) for m in group.members] == [False, True, True, True, False]
        assert not any(m.truncated for m in group.members)
        assert group_health([group])["flawed"] == [0.0, 1.0, 1.0, 1.0]


def test_every_end_of_the_model_ends_a_member(model: Any) -> None:
    """Ends are ids of the generation config and the tokenizer, and stop texts; no span includes an end."""
    ending = copy.deepcopy(model)
    digit = ids_of("9")[0]
    ending.generation_config.eos_token_id = [EOS, digit]
    ensure_fused(ending)
    said = [*ids_of("1+2=3 #### 3")]
    members = [Member("candidate", ids) for ids in ([*said, EOS], [*said, digit], said, [*said, *ids_of(" +")])]
    group, tokenizer = Group("", [1], members), build_tokenizer()
    score_groups([group], tokenizer, ending, None, ScoreArguments())
    assert [m.truncated for m in members] == [False, False, True, True]
    assert len({m.answer_span for m in members[:3]}) == 1
    stop = tokenizer.decode(ids_of(" +"))
    score_groups([group], tokenizer, ending, None, ScoreArguments(), ends=Ends(frozenset({EOS}), (stop,)))
    assert [m.truncated for m in members] == [False, True, True, False]
    assert members[3].answer_span == members[0].answer_span and math.isfinite(members[3].score)


def test_a_member_of_several_turns_is_scored_by_its_last(model: Any) -> None:
    ensure_fused(model)
    first, last, user = [*ids_of("1+1=2 #### 2"), EOS], [*ids_of("2+2=4 #### 4"), EOS], [1, *ids_of("2+2=")]
    several = Member("chosen", [*first, *last], given=[(0, [1]), (len(first), user)])
    alone = Member("chosen", last)
    group = Group("", [1, *ids_of("1+1=")], [several, Member("rejected", first)])
    whole = Group("", [1, *ids_of("1+1="), 1, *first, *user], [alone])
    score_groups([group, whole], build_tokenizer(), model, None, ScoreArguments())
    n = len(first)
    assert len(several.logprobs) == len(several.entropies) == n + len(last)
    assert several.answer_span == (alone.answer_span[0] + n, alone.answer_span[1] + n)
    assert several.branch_span == (alone.branch_span[0] + n, alone.branch_span[1] + n)
    torch.testing.assert_close(torch.tensor(several.entropies[n:]), torch.tensor(alone.entropies))
    assert several.score == pytest.approx(alone.score, abs=1e-5) and not several.truncated


# --- generate ---------------------------------------------------------------------------------------------------------


def greedy_by_hand(model: Any, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch", [1, 2, 64])
def test_greedy_is_the_argmax_in_any_batching(model: Any, batch: int) -> None:
    prompts = [[1, 5, 6], [1], [1, *range(3, 20)], [1, 5, 6], [1, 7]]
    arguments = RolloutArguments(max_new_tokens=8, rollout_batch_size=batch)
    found = generate(model, build_tokenizer(), prompts, arguments, greedy=True)
    assert found == [greedy_by_hand(model, prompt, 8) for prompt in prompts]


def test_generation_settings_of_the_checkpoint_do_not_leak_in(model: Any) -> None:
    """Hub models ship repetition penalties and the like; Eq. 2 needs samples of the model itself."""
    shipped = copy.deepcopy(model)
    shipped.generation_config.update(repetition_penalty=5.0, min_new_tokens=8, no_repeat_ngram_size=1, min_p=0.9)
    arguments = RolloutArguments(max_new_tokens=8)
    prompts = [[1, 5, 6], [1], [1, 7]] * 4
    for greedy in (True, False):
        found = []
        for m in (model, shipped):
            torch.manual_seed(0)
            found.append(generate(m, build_tokenizer(), prompts, arguments, greedy=greedy))
        assert found[0] == found[1]


def test_samples_end_with_eos_or_are_cut_off(model: Any) -> None:
    ending = copy.deepcopy(model)
    ending.lm_head.weight.data[EOS] *= 3
    found = generate(ending, build_tokenizer(), [[1, 5]] * 200, RolloutArguments(max_new_tokens=4))
    assert all(ids.count(EOS) == (ids[-1] == EOS) and (ids[-1] == EOS or len(ids) == 4) for ids in found)
    assert {ids[-1] == EOS for ids in found} == {True, False} and min(map(len, found)) < 4
    assert generate(ending, build_tokenizer(), [], RolloutArguments()) == []


def test_sampling_follows_the_models_distribution(model: Any) -> None:
    n = 4000
    found = generate(model, build_tokenizer(), [[1, 5]] * n, RolloutArguments(max_new_tokens=1, rollout_batch_size=n))
    counts = torch.bincount(torch.tensor([ids[0] for ids in found]), minlength=40).double()
    with torch.no_grad():
        p = model(torch.tensor([[1, 5]])).logits[0, -1].double().softmax(-1)
    chi2 = ((counts - n * p).square() / (n * p)).sum()
    assert float(chi2) < 90  # 39 degrees of freedom: P(chi2 > 90) is below 1e-5
