"""Trust in what ranks the candidates: by hand, followed in a training, saved with it, and the same on every process."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_trainer import Stop, examples, make_trainer, tiny_model

from gem.calibration import WINDOW, Calibration, Signals, order_of_candidates, order_of_pair, orders, trust_in
from gem.checkpoints import newest_checkpoint
from gem.config import LossArguments, RankArguments, RolloutArguments, ScoreArguments
from gem.group import Group, Member, Role
from gem.pipeline import GroupMaker
from gem.run_files import CALIBRATION_FILE, MANIFEST_FILE, read_object
from gem.tasks import build_tokenizer
from gem.trainer import GEMTrainer

NAN = math.nan


def member(role: Role, final: float, branch: float, answer: str = "", score: float = 0.0) -> Member:
    terms = {"final_entropy": final, "branch_entropy": branch, "score": score}
    return Member(role, [5], answer=answer, span_rule="marker", **terms)  # type: ignore[arg-type]


def group(*candidates: tuple[float, float, str], chosen: tuple[float, float, str], prompt: str = "2+2=") -> Group:
    """Return a group of candidates, each with its two entropies and its answer, and a human pair."""
    members = [member("candidate", *c) for c in candidates]
    return Group(prompt, [1], [*members, member("chosen", *chosen), member("rejected", 0.5, 0.5, "9")])


# --- by hand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "trust"),
    [
        ([], 1),
        ([NAN], 1),  # the prompt tells nothing
        ([1], 1),
        ([-1], 0),
        ([0], 0.5),
        ([1, 1, 1, NAN, 1], 1),
        ([-1] * 3, -0.5),
        ([-1] * 15, -7 / 8),
        ([1, -1] * 8, 1 / 17),
        ([1] * 4 + [-1] * 3, 1 / 4),
        ([0.5, -0.5, 0.5], 3 / 8),  # ordered rightly in part: h = 0.75 + 0.25 + 0.75
    ],
)
def test_trust_by_hand(found: list[float], trust: float) -> None:
    assert trust_in(found) == pytest.approx(trust, abs=1e-12)


def test_trust_falls_with_every_prompt_that_contradicts() -> None:
    values = [trust_in([-1.0] * n) for n in range(60)]
    assert values == sorted(values, reverse=True) and values[0] == 1 and values[-1] > -1


def test_the_order_of_a_pair() -> None:
    """The better answer is surer at its end, and has more choices on its way."""
    assert order_of_pair(group(chosen=(0.2, 0.9, ""))) == pytest.approx((1, 1, NAN), nan_ok=True)
    assert order_of_pair(group(chosen=(0.9, 0.5, ""))) == pytest.approx((-1, 0, NAN), nan_ok=True)
    unscored = group(chosen=(0.2, 0.9, ""))
    unscored.members[-1].score = NAN
    assert all(map(math.isnan, order_of_pair(unscored)))


def test_the_order_of_candidates() -> None:
    g = group(
        (0.1, 0.3, "4"), (0.4, 0.6, "5"), (0.2, 0.2, "5"), (0.3, 0.2, "4"), (0.0, 0.9, "6"), chosen=(9.0, 9.0, "4")
    )
    # final, the lower the better: 0.1 beats 0.4 and 0.2; 0.3 beats 0.4. Branch: 0.3 beats 0.2; 0.2 ties. Votes 2, 2, 1.
    expected = Signals(final=(1 + 1 - 1 + 1 - 1 - 1) / 6, branch=(-1 + 1 - 1 - 1 + 0 - 1) / 6, agreement=2 / 6)
    assert order_of_candidates(g) == pytest.approx(expected)
    assert orders([g]) == [("2+2=", order_of_candidates(g))]


@pytest.mark.parametrize("change", [{"truncated": True}, {"flaw": "empty"}, {"answer": ""}, {"score": NAN}])
def test_a_candidate_that_cannot_be_judged_does_not_count(change: dict[str, Any]) -> None:
    g, without = (group(*c, chosen=(9, 9, "4")) for c in ([(0.1, 0.3, "4"), (0.4, 0.6, "5"), (0.0, 0.9, "5")],
                                                          [(0.1, 0.3, "4"), (0.4, 0.6, "5")]))  # fmt: skip
    vars(g.members[2]).update(change)
    found, expected = order_of_candidates(g), order_of_candidates(without)
    assert found is not None and expected is not None and found[:2] == expected[:2]


def test_agreement_is_not_judged_where_no_two_share_an_answer() -> None:
    order = order_of_candidates(group((0.1, 0.3, "4"), (0.4, 0.6, "5"), (0.2, 0.2, "6"), chosen=(9, 9, "4")))
    assert order == pytest.approx((1, 0, NAN), nan_ok=True)


def test_nothing_is_learnt_where_all_are_right_or_all_wrong() -> None:
    for answers in ("44", "55", ""):
        g = group(*((0.1, 0.2, answer) for answer in answers), chosen=(0.1, 0.2, "4"))
        assert order_of_candidates(g) is None and orders([g]) == []
    free_text = group((0.1, 0.2, "a poem"), (0.3, 0.4, "a song"), chosen=(0.1, 0.2, ""))
    assert order_of_candidates(free_text) is None
    assert orders([Group("", [1], [member("candidate", 0.1, 0.2, "4")])]) == []


@pytest.mark.parametrize("change", [{"span_rule": "last_line"}, {"truncated": True}, {"given": [(1, [5])]}])
def test_an_answer_that_is_none_to_compare_with_judges_nobody(change: dict[str, Any]) -> None:
    """The last line of free text, a cut answer, the answer of a later turn."""
    g = group((0.1, 0.3, "4"), (0.4, 0.6, "5"), chosen=(9, 9, "4"))
    assert order_of_candidates(g) is not None
    vars(g.members[-2]).update(change)
    assert order_of_candidates(g) is None


# --- what it follows --------------------------------------------------------------------------------------------------


def pairs(n: int, right: bool = True) -> list[Group]:
    return [group(chosen=(0.2, 0.9, "") if right else (0.9, 0.2, ""), prompt=str(i)) for i in range(n)]


def test_the_latest_order_of_a_prompt_counts() -> None:
    calibration = Calibration(pairs(3))
    assert calibration.trust == (1, 1, 1)
    calibration.follow([("1", Signals(-1.0, 0.0, 0.5))])
    assert calibration.trust == pytest.approx((2 * 3 / 4 - 1, 2 * 3.5 / 4 - 1, 2 * 1.75 / 2 - 1))
    calibration.follow([("1", Signals(1.0, 1.0, 1.0))])
    assert calibration.trust == (1, 1, 1)


def test_several_orders_of_a_prompt_count_as_their_mean() -> None:
    calibration = Calibration([*pairs(1), *pairs(1), *pairs(1), *pairs(1, right=False)])
    assert calibration.trust.final == pytest.approx(trust_in([0.5]))
    calibration.follow([("0", Signals(1.0, NAN, 0.0)), ("0", Signals(0.5, NAN, NAN))])
    assert calibration.trust == pytest.approx((trust_in([0.75]), 1, trust_in([0.0])))
    assert Calibration([]).trust == (1, 1, 1)


def test_only_the_last_prompts_count() -> None:
    calibration = Calibration(pairs(WINDOW + 50, right=False))
    assert calibration.trust.final == pytest.approx(2 / (WINDOW + 1) - 1)
    calibration.follow((f"new {i}", Signals(1.0, 1.0, 1.0)) for i in range(WINDOW))
    assert calibration.trust == (1, 1, 1)


def checkpoint(folder: Path) -> tuple[Any, Any, Path]:
    (folder / "checkpoint-3").mkdir()
    args = SimpleNamespace(output_dir=str(folder), should_save=True, save_only_model=False)
    return args, SimpleNamespace(global_step=3), folder / "checkpoint-3"


def test_a_checkpoint_keeps_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    calibration, other = Calibration(pairs(3)), Calibration(pairs(3))
    calibration.follow([("1", Signals(-0.5, 0.25, 1 / 3))])
    args, state, folder = checkpoint(tmp_path)
    calibration.on_save(args, state, None)  # type: ignore[arg-type]
    other.restart(folder)
    assert other.trust == calibration.trust and "NaN" not in (folder / CALIBRATION_FILE).read_text()
    for following in (calibration, other):
        following.follow([("0", Signals(0.1, 0.2, 0.3))])
    assert other.trust == calibration.trust
    other.restart(None)
    assert other.trust == (1, 1, 1) and not caplog.text
    (folder / CALIBRATION_FILE).unlink()
    other.restart(folder)
    assert other.trust == (1, 1, 1) and f"has no {CALIBRATION_FILE}" in caplog.text


# --- in a training ----------------------------------------------------------------------------------------------------


def online(folder: Path, stop: int = 6) -> GEMTrainer:
    """Return the training of a model whose candidates come with the records: one of them is the chosen answer."""
    model = tiny_model()
    rank = RankArguments(comparators=["entropy", "agreement"], filter_groups=False)
    data = [
        replace(
            example,
            prompt=str(i),
            candidate_ids=[[8, 5, 8, *example.chosen_ids], [5, 3, 4, 14, 2], [6, 5, 3, 4, 14, 2]],
        )
        for i, example in enumerate(examples(12))
    ]
    reference = copy.deepcopy(model).requires_grad_(False)
    maker = GroupMaker(model, build_tokenizer(), RolloutArguments(), ScoreArguments(), rank, reference, pairs=data)
    args = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "learning_rate": 0.02}
    return make_trainer(
        folder, LossArguments(), model=model, data=data, make_groups=maker, callbacks=[Stop(stop)], args=args
    )


def test_a_run_follows_its_candidates_and_goes_on_exactly(tmp_path: Path) -> None:
    whole = online(tmp_path / "whole")
    whole.train()
    log = [entry for entry in whole.state.log_history if "loss" in entry]
    assert log[0]["trust_agreement"] == 1 > log[-1]["trust_agreement"]  # the two wrong answers agree
    assert len({entry["trust_final"] for entry in log}) > 1
    for stop in (2, 5, 6):
        again = online(tmp_path / "cut", stop)
        again.train(resume_from_checkpoint=newest_checkpoint(tmp_path / "cut"))
    assert [entry for entry in again.state.log_history if "loss" in entry] == log
    weights = [torch.cat([p.detach().flatten() for p in t.model.parameters()]) for t in (whole, again)]  # type: ignore[union-attr]
    assert torch.equal(*weights)
    at = newest_checkpoint(tmp_path / "cut")
    assert at and CALIBRATION_FILE in read_object(Path(at) / MANIFEST_FILE)["files"]
    again.train()  # from the beginning
    assert again.state.log_history[0]["trust_final"] == log[0]["trust_final"]
