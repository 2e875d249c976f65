"""`--unlabeled`: prompts without human answers beside human pairs, in `score`, in `train`, in the losses and in the log."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_cli import refused, run, write_files
from test_trainer import EOS, groups_of, make_trainer, tiny_model

from gem.config import DataArguments, LossArguments, RankArguments, RolloutArguments, ScoreArguments, UnlabeledArguments
from gem.data import Example
from gem.ends import ends_of
from gem.group import Group, Member
from gem.groups import check_learnable, load_groups, read_header
from gem.guard import scored_pairs
from gem.health import Health, group_health
from gem.mixing import mix, mix_by_pair, read_unlabeled
from gem.pipeline import GroupMaker
from gem.reference import reference_for
from gem.results import load_run
from gem.tasks import build_tokenizer

MODEL = ["--model", "cfg/config.json", "--tokenizer", "tok"]
SAMPLED = ["--group_size", "2", "--max_new_tokens", "4"]
SCORE = [
    "score",
    *MODEL,
    "--data",
    "pairs.jsonl",
    "--unlabeled",
    "prompts.jsonl",
    *SAMPLED,
    "--rollout_batch_size",
    "6",
]
SCORE += ["--device", "cpu", "--filter_groups", "false"]  # 8 groups with a pair, 5 without, in batches of 3
TRAIN = ["train", *MODEL, "--use_cpu", "true", "--disable_tqdm", "true", "--per_device_train_batch_size", "4"]
ONLINE = [*TRAIN, "--data", "pairs.jsonl", "--unlabeled", "prompts.jsonl", *SAMPLED, "--filter_groups", "false"]
PROMPTS = [{"prompt": f"{i}+{i + 1}="} for i in range(1, 6)]


def write(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model, a tokenizer, eight pairs and five prompts, without waiting for the disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda number: None)
    write("prompts.jsonl", PROMPTS)
    return write_files(tmp_path)


@pytest.fixture
def whole(files: Path, capsys: pytest.CaptureFixture[str]) -> bytes:
    """The groups file of an uninterrupted run."""
    status, out, err = run(capsys, *SCORE, "--output", "whole.jsonl")
    assert status == 0, err
    assert "13 groups (5 without a human pair), " in out and " kept, in whole.jsonl; S orders " in out
    assert out.endswith(" of 8 human pairs rightly (fewer than 10 pairs are too few to tell)\n")
    return Path("whole.jsonl").read_bytes()


# --- the mix ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labeled", "unlabeled", "share", "expected"),
    [
        ("ab", "1234", 0.5, "abab1234"),
        ("abc", "1234567", 0.5, "abcabca1234567"),
        ("abcd", "12", 0.5, "abcd12"),
        ("ab", "12", 0.75, "ab12"),
        ("ab", "12", 0.25, "ababab12"),
        ("a", "123456789", 0.9, "a123456789"),
        ("a", "123456789", 0.6, "aaaaaa123456789"),
        ("abc", "12", 1.0, "abc12"),
        ("", "12", 0.5, "12"),
        ("abc", "", 0.5, "abc"),
        ("", "", 0.5, ""),
        ("abcde", "1", 0.01, "abcde" * 19 + "abcd1"),
    ],
)
def test_the_mix_by_hand(labeled: str, unlabeled: str, share: float, expected: str) -> None:
    assert "".join(mix(labeled, unlabeled, share)) == expected


def test_the_mix_has_its_share_and_every_item() -> None:
    rng = random.Random(0)
    for _ in range(500):
        labeled = [f"a{i}" for i in range(rng.randint(1, 40))]
        unlabeled = [f"b{i}" for i in range(rng.randint(1, 40))]
        share = rng.uniform(0.01, 1)
        mixed = mix(labeled, unlabeled, share)
        ours = mixed[: len(mixed) - len(unlabeled)]
        assert mixed[len(ours) :] == unlabeled
        assert ours == [labeled[i % len(labeled)] for i in range(len(ours))] and len(ours) >= len(labeled)
        assert len(unlabeled) - share * len(mixed) <= 0.5
        assert (
            len(ours) == len(labeled) or abs(len(unlabeled) - share * len(mixed)) <= 0.5
        )  # no more than needed repeat


@pytest.mark.parametrize("share", [-0.1, 0, 1.5, math.nan])
def test_a_share_that_is_none(share: float) -> None:
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got"):
        mix("ab", "12", share)


def test_half_a_pair_is_no_pair(caplog: pytest.LogCaptureFixture) -> None:
    pair, half, none = Example("", [1], [3], [4]), Example("", [1], [3]), Example("", [1], [])
    with caplog.at_level(logging.INFO):
        assert mix_by_pair([half, pair, none], 0.5) == [pair, pair, half, none]
    assert "training on 4 groups: 2 with a human pair (of 1), 2 without (of 2)" in caplog.text
    caplog.clear()
    assert mix_by_pair([pair, pair], 0.5) == [pair, pair] and not caplog.text


# --- score ------------------------------------------------------------------------------------------------------------


def test_score_writes_the_pairs_and_then_the_prompts(whole: bytes) -> None:
    groups = load_groups(Path("whole.jsonl"))
    assert [group.prompt for group in groups] == [f"{i}+{i}=" for i in range(1, 9)] + [r["prompt"] for r in PROMPTS]
    roles = [[member.role for member in group.members] for group in groups]
    assert roles == [["candidate", "candidate", "chosen", "rejected"]] * 8 + [["candidate", "candidate"]] * 5
    assert all(abs(sum(m.weight for m in group.members)) < 1e-6 for group in groups)
    header = read_header(Path("whole.jsonl")) or {}
    assert header["unlabeled"]["name"] == "prompts.jsonl" and len(header["unlabeled"]["hash"]) == 16
    assert "unlabeled" not in header["settings"] and "unlabeled_share" not in header["settings"]


def test_score_goes_on_where_it_was_cut(whole: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    lines = whole.replace(b"true ", b"false", 1).splitlines(keepends=True)
    for there in (1, 4, 8, 10, 12, 14):
        Path("cut.jsonl").write_bytes(b"".join(lines[:there]))
        if there == 10:
            assert "--data pairs.jsonl --unlabeled prompts.jsonl --output cut.jsonl`" in refused(
                capsys, *TRAIN, "--groups", "cut.jsonl", "--output_dir", "out"
            )
        assert run(capsys, *SCORE, "--output", "cut.jsonl")[0] == 0
        assert Path("cut.jsonl").read_bytes() == whole, there


def test_shards_merge_into_the_file_of_one_run(whole: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):  # the last has prompts alone
        assert run(capsys, *SCORE, "--shard", f"{i}/3", "--output", f"{i}.jsonl")[0] == 0
    status, out, err = run(capsys, "merge", "2.jsonl", "0.jsonl", "1.jsonl", "--output", "merged.jsonl")
    assert status == 0 and "13 groups (5 without a human pair)" in out, err
    assert Path("merged.jsonl").read_bytes() == whole
    without = [word for word in SCORE if word not in ("--unlabeled", "prompts.jsonl")]
    assert run(capsys, *without, "--shard", "2/3", "--output", "other.jsonl")[0] == 0
    assert b'"unlabeled":' not in Path("other.jsonl").read_bytes()
    for order in (["other.jsonl", "0.jsonl", "1.jsonl"], ["0.jsonl", "1.jsonl", "other.jsonl"]):
        assert "shards must be of one run, got unlabeled: " in refused(capsys, "merge", *order, "--output", "new.jsonl")


def test_other_prompts_are_refused(whole: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    again = [*SCORE, "--output", "whole.jsonl"]
    without = [word for word in again if word not in ("--unlabeled", "prompts.jsonl")]
    assert "unlabeled: prompts.jsonl with hash" in (said := refused(capsys, *without)) and ", none now" in said
    shutil.move("prompts.jsonl", "moved.jsonl")
    moved = ["moved.jsonl" if word == "prompts.jsonl" else word for word in again]
    assert "whole.jsonl holds this run, finished" in run(capsys, *moved)[1]
    write("moved.jsonl", PROMPTS[:4])
    assert "unlabeled: prompts.jsonl with hash" in refused(capsys, *moved)
    assert Path("whole.jsonl").read_bytes() == whole
    assert run(capsys, *without, "--output", "pairs-groups.jsonl")[0] == 0
    with_prompts = [*again, "--output", "pairs-groups.jsonl"]
    write("prompts.jsonl", PROMPTS)
    assert "unlabeled: none there, prompts.jsonl with hash" in refused(capsys, *with_prompts)


# --- train ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", ["0.9", "1", "0.25", "0.2"])
def test_train_on_a_file_of_both_kinds(
    share: str, whole: bytes, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    flags = [*TRAIN, "--groups", "whole.jsonl", "--unlabeled_share", share, "--num_train_epochs", "1"]
    with caplog.at_level(logging.INFO):
        status, _, err = run(capsys, *flags, "--output_dir", "out")
    assert status == 0, err
    labeled, unlabeled = {"0.9": (8, 5), "1": (8, 5), "0.25": (15, 5), "0.2": (20, 5)}[share]
    said = f"training on {labeled + unlabeled} groups: {labeled} with a human pair (of 8), {unlabeled} without (of 5)"
    assert said in caplog.text
    history = [entry for entry in load_run(Path("out")).history if "loss" in entry]
    assert len(history) == -(-(labeled + unlabeled) // 4)
    # The last step may have fewer groups: the mean over steps is that of the list if it has not.
    if (labeled + unlabeled) % 4 == 0:
        assert sum(e["unlabeled"] for e in history) / len(history) == pytest.approx(unlabeled / (labeled + unlabeled))
    assert all({"unlabeled", "agreement", "distinct"} <= entry.keys() for entry in history)
    assert any("unlabeled_distinct" in entry and "unlabeled_kept" in entry for entry in history)
    gate = json.loads(Path("out/rails.json").read_text())["rails"][0]
    assert gate["verdict"] == "not watched" and "of 8 human pairs rightly (fewer than 10" in gate["said"]


@pytest.mark.parametrize("loss", ["dpo", "ipo", "pro", "listwise_dpo", "sft"])
def test_other_losses_refuse_such_a_file_before_training(
    loss: str, whole: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, *TRAIN, "--groups", "whole.jsonl", "--loss", loss, "--output_dir", "out")
    what = "chosen answer" if loss == "sft" else "human pair"
    assert f"loss must be sega to learn from groups without a {what}, got {loss}, and 5 of 13 groups" in said
    assert not Path("out").exists()


def test_half_a_pair_is_enough_for_sft_alone() -> None:
    groups = [Group("", [1], [Member("chosen", [2])])]
    check_learnable(groups, 9, "g", loss="sft")
    with pytest.raises(ValueError, match="groups without a human pair, got dpo, and 1 of 1 groups without one in g"):
        check_learnable(groups, 9, "g", loss="dpo")


def test_train_online_goes_on_exactly(
    files: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    flags = [*ONLINE, "--max_steps", "5", "--save_steps", "1", "--save_total_limit", "9", "--learning_rate", "1e-2"]
    flags += ["--unlabeled_share", "0.25"]
    with caplog.at_level(logging.INFO):
        status, _, err = run(capsys, *flags, "--output_dir", "out")
    assert status == 0, err
    assert "training on 20 groups: 15 with a human pair (of 8), 5 without (of 5)" in caplog.text
    history = [entry for entry in load_run(Path("out")).history if "loss" in entry]
    assert sum(entry["unlabeled"] for entry in history) / 5 == 0.25  # 5 steps of 4 groups are the epoch
    shutil.copytree("out", "killed")
    for name in ("checkpoint-4", "checkpoint-5"):
        shutil.rmtree(f"killed/{name}")
    for name in ("metrics.json", "model.safetensors", "manifest.json", "trainer_state.json", "rails.json"):
        Path("killed", name).unlink(missing_ok=True)
    write("prompts.jsonl", PROMPTS[::-1])
    assert "unlabeled" in refused(capsys, *flags, "--output_dir", "killed")
    write("prompts.jsonl", PROMPTS)
    status, _, err = run(capsys, *flags, "--output_dir", "killed")
    assert status == 0, err
    ours, theirs = (load_file(f"{folder}/model.safetensors") for folder in ("out", "killed"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    again = [entry for entry in load_run(Path("killed")).history if "loss" in entry]
    assert [entry["loss"] for entry in again] == [entry["loss"] for entry in history]


def test_a_training_without_both_kinds_has_no_curves_of_them(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone = [word for word in ONLINE if word not in ("--unlabeled", "prompts.jsonl")]
    assert run(capsys, *alone, "--max_steps", "1", "--output_dir", "pairs")[0] == 0
    prompts = [{"--data": "--data", "pairs.jsonl": "prompts.jsonl"}.get(word, word) for word in alone]
    assert run(capsys, *prompts, "--human_weight", "0", "--max_steps", "1", "--output_dir", "prompts")[0] == 0
    for folder in ("pairs", "prompts"):
        (entry,) = (entry for entry in load_run(Path(folder)).history if "loss" in entry)
        assert "agreement" in entry and not any(name.startswith("unlabeled") for name in entry)


# --- what a user may give ---------------------------------------------------------------------------------------------


def read(source: str | None, tokenizer: Any = None, **changes: Any) -> list[Example]:
    tokenizer = tokenizer or build_tokenizer()
    rollout = changes.pop("rollout", RolloutArguments())
    unlabeled = UnlabeledArguments(source, changes.pop("unlabeled_split", None))
    data = DataArguments(**{"data": "pairs.jsonl", **changes})
    return read_unlabeled(data, unlabeled, tokenizer, rollout, ends_of(tokenizer))


def test_human_answers_are_not_read(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*PROMPTS, {"prompt": "3+3=", "chosen": "#### 6", "rejected": "#### 7"}, {"prompt": "4+3=", "chosen": "7"}]
    with caplog.at_level(logging.INFO):
        found = read(write("mixed.jsonl", rows), limit=2, data_format="implicit-prompt")
    assert len(found) == 7  # limit and data_format are of the data alone
    assert not any(e.chosen_ids or e.rejected_ids or e.candidate_ids for e in found)
    assert "2 of 7 records: human answers, which are not read (mixed.jsonl, line 6; mixed.jsonl, line 7)" in caplog.text
    assert read(None) == []


def test_the_file_of_the_pairs_itself(
    files: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    same = ["pairs.jsonl" if word == "prompts.jsonl" else word for word in ONLINE]
    held_out = ["--eval_data", write("test.jsonl", [{"prompt": "2+2=", "chosen": "4"}]), "--eval_samples", "0"]
    with caplog.at_level(logging.INFO):
        status, _, err = run(capsys, *same, *held_out, "--max_steps", "1", "--output_dir", "out")
    assert status == 0, err
    assert "8 of 8 records: human answers, which are not read" in caplog.text
    assert "8 of 8 unlabeled prompts are the prompt of a human pair, too" in caplog.text
    (warning,) = (r for r in caplog.records if "eval_data" in r.message)
    assert (warning.levelname, warning.message) == (
        "WARNING",
        "1 of 8 unlabeled prompts are in eval_data, and are trained on",
    )


def test_chats_requests_and_candidates(files: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "1+2="},
        {"prompt": "1+2=", "candidates": ["#### 3", "#### 4", "1+2 #### 3"]},
        {"prompt": "1+2="},
    ]
    rollout = RolloutArguments(cot_prompt="1+1=")
    plain, brought, twice = read(write("p.jsonl", rows), rollout=rollout)
    assert plain == twice  # repeated on purpose, as in data
    assert plain.sampling_prompt_ids != plain.prompt_ids and len(plain.sampling_prompt_ids) > len(plain.prompt_ids)
    assert not brought.sampling_prompt_ids and len(brought.candidate_ids) == 3
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (chat,) = read(write("c.jsonl", [{"prompt": [{"role": "user", "content": "1+2="}]}]), tokenizer)
    assert chat.prompt == "1+2=" and not chat.chosen_ids


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([], [], "unlabeled must hold at least one record, got none in 'prompts.jsonl'"),
        (None, [], "unlabeled must be"),
        ([{"text": 1}], [], "unlabeled must have 'prompt'"),
        ([{"prompt": " "}], [], "prompts.jsonl, line 1: "),
        (PROMPTS, ["--group_size", "1"], "group_size must be at least 2 for prompts without a human pair"),
        (PROMPTS, ["--unlabeled_share", "0"], "unlabeled_share must be in [0.01, 1], got 0"),
        (
            PROMPTS,
            ["--data", ""],
            "data must be given beside unlabeled='prompts.jsonl', got nothing: without human pairs",
        ),
    ],
    ids=str,
)
def test_mistakes(
    rows: list[dict[str, Any]] | None, flags: list[str], message: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("prompts.jsonl").unlink()
    if rows is not None:
        write("prompts.jsonl", rows)
    assert message in refused(capsys, *ONLINE, *flags, "--output_dir", "out")
    if "--unlabeled_share" not in flags:
        assert message in refused(capsys, *SCORE, *flags)
    assert not Path("out").exists() and not Path("groups.jsonl").exists()


def test_prompts_with_candidates_need_no_sampling(files: Path) -> None:
    rows = [{**row, "candidates": ["#### 3", "#### 4"]} for row in PROMPTS]
    assert len(read(write("p.jsonl", rows), rollout=RolloutArguments(group_size=0))) == 5
    with pytest.raises(ValueError, match="group_size must be at least 2 .* got 0"):
        read(write("p.jsonl", [*rows, PROMPTS[0]]), rollout=RolloutArguments(group_size=0))


# --- the loss of a batch of both kinds --------------------------------------------------------------------------------


def mixed_groups(model: Any) -> list[Group]:
    """Return four groups, the second and the fourth without a human pair."""
    groups = groups_of(model, 4)
    for group in groups[1::2]:
        (candidate, *_) = group.members
        worse = Member("candidate", [6, 5, EOS], weight=-0.5, logprobs=[-3.0, -2.0, -1.0])
        group.members = [candidate, worse]
    return groups


def loss_of(
    folder: Path, model: Any, groups: list[Group], loss: LossArguments
) -> tuple[float, dict[str, torch.Tensor]]:
    trainer = make_trainer(folder, loss, model=model, data=groups)
    (inputs,), items = trainer.get_batch_samples(iter([groups]), 1, torch.device("cpu"))
    model.zero_grad()
    total = trainer.compute_loss(model, inputs, num_items_in_batch=items)
    total.backward()
    return float(total.detach()), {name: p.grad.clone() for name, p in model.named_parameters()}


def nll_of_chosen(model: Any, group: Group) -> torch.Tensor:
    chosen = next(m for m in group.members if m.role == "chosen")
    logits = model(torch.tensor([group.prompt_ids + chosen.ids])).logits[0, len(group.prompt_ids) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(chosen.ids))


def test_the_supervised_term_is_of_the_pairs_alone(tmp_path: Path) -> None:
    model = tiny_model()
    groups = mixed_groups(model)
    plain, with_sft = (LossArguments(sft_weight=weight, kl_weight=0.0) for weight in (0.0, 1.0))
    (low, slope), (high, steeper) = (loss_of(tmp_path, model, groups, loss) for loss in (plain, with_sft))
    model.zero_grad()
    expected = torch.stack([nll_of_chosen(model, group) for group in groups[::2]]).sum() / len(groups)
    expected.backward()
    assert high - low == pytest.approx(float(expected.detach()), abs=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(steeper[name] - slope[name], p.grad, atol=1e-5, rtol=1e-4)


def test_a_batch_of_both_kinds_is_the_mean_of_its_groups(tmp_path: Path) -> None:
    """Weights, taper and KL of a group do not depend on the kind of its neighbours."""
    model = tiny_model()
    groups = mixed_groups(model)
    loss = LossArguments(kl_weight=0.3, sft_weight=0.1)
    together, slope = loss_of(tmp_path, model, groups, loss)
    alone = [loss_of(tmp_path, model, [group], loss) for group in groups]
    assert together == pytest.approx(sum(value for value, _ in alone) / 4, abs=1e-5)
    for name, gradient in slope.items():
        torch.testing.assert_close(gradient, sum(g[name] for _, g in alone) / 4, atol=1e-5, rtol=1e-4)
    changed = groups[1].members[1]
    changed.logprobs = [x - 1 for x in changed.logprobs]
    assert loss_of(tmp_path, model, groups, loss)[0] != pytest.approx(together, abs=1e-5)  # it has a KL of its own


@pytest.mark.parametrize("comparators", [["entropy"], ["entropy", "agreement"]])
def test_one_pass_is_two_for_a_batch_of_both_kinds(comparators: list[str], tmp_path: Path) -> None:
    rows = [Example("", [1, 3 + i, 12, 4 + i], [9, 3, 5 + i, EOS], [3, 8, EOS]) for i in range(4)]
    rows[1::2] = [Example(row.prompt, row.prompt_ids, []) for row in rows[1::2]]
    drawn = [[[5, 5, 6 + i, EOS], [6, 4, EOS], [7, 4 + i, 8, 9, EOS]] for i in range(4)]
    rows = [Example(**{**vars(row), "candidate_ids": own}) for row, own in zip(rows, drawn, strict=True)]
    found = []
    for one_pass in (True, False):
        model = tiny_model()
        rank = RankArguments(comparators=comparators, filter_groups=False)
        maker = GroupMaker(
            *(model, build_tokenizer(), RolloutArguments(), ScoreArguments(), rank),
            reference_for(model, LossArguments(), ScoreArguments()),
        )
        trainer = make_trainer(tmp_path, LossArguments(), model=model, data=rows, make_groups=maker)
        assert trainer.one_pass
        trainer.one_pass = one_pass
        (inputs,), items = trainer.get_batch_samples(iter([rows]), 1, torch.device("cpu"))
        loss = float(trainer.compute_loss(model, inputs, num_items_in_batch=items).detach())
        weights = [[member.weight for member in group.members] for group in inputs["groups"]]
        found.append((loss, weights))
        assert [len(own) for own in weights] == [5, 3, 5, 3]
        assert all(abs(sum(own)) < 1e-6 and max(own) > 0 for own in weights)
    (loss, weights), (other, others) = found
    assert loss == pytest.approx(other, abs=1e-5)
    for mine, theirs in zip(weights, others, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize(("share", "recurring"), [(1.0, False), (0.25, True)])
def test_pairs_that_come_again_have_their_reference_once(share: float, recurring: bool, tmp_path: Path) -> None:
    model = tiny_model()
    rows = [Example("", [1, 3], [9, 3, EOS], [3, 8, EOS]), Example("", [1, 4], [])]
    reference = reference_for(model, LossArguments(), ScoreArguments())
    maker = GroupMaker(model, build_tokenizer(), RolloutArguments(), ScoreArguments(), RankArguments(), reference)
    args = {"num_train_epochs": 1, "max_steps": -1}
    data = mix_by_pair(rows, share)
    trainer = make_trainer(tmp_path, LossArguments(), model=model, data=data, make_groups=maker, args=args)
    assert trainer.maker is not None and len(data) == {1.0: 2, 0.25: 4}[share]
    assert trainer.maker.reference.recurring is recurring  # type: ignore[union-attr]


# --- the log ----------------------------------------------------------------------------------------------------------


def answering(*answers: list[int], pair: bool, score: float, kept: bool = True) -> Group:
    """Return a group whose candidates give these answers, [] for none, behind one token of reasoning."""
    members = [Member("candidate", [9, *a], answer_span=(1, 1 + len(a)), score=score) for a in answers]
    human = [Member("chosen", [1], score=1.0), Member("rejected", [2], score=0.5)] if pair else []
    return Group("", [1], [*members, *human], kept)


def test_health_by_hand() -> None:
    groups = [
        answering([1], [1], [2], [3], pair=True, score=1.0),
        answering([4], [4], [4, 5], [], pair=False, score=2.0, kept=False),
        answering([], [], pair=False, score=4.0),
    ]
    found = group_health(groups, mixed=True)
    assert found["agreement"] == [0.5, 0.5, 0.0]  # what gives no answer agrees with nothing
    assert found["distinct"] == [3.0, 3.0, 1.0] and found["kept"] == [1.0, 0.0, 1.0]
    assert found["unlabeled"] == [0.0, 1.0, 1.0]
    assert found["unlabeled_kept"] == [0.0, 1.0] and found["unlabeled_distinct"] == [3.0, 1.0]
    assert found["unlabeled_score"] == [2.0] * 4 + [4.0] * 2
    assert not any(name.startswith("unlabeled") for name in group_health(groups))
    health = Health(mixed=True)
    health.record_groups(groups[:1])  # a batch may have no prompt alone: it counts in the share
    health.record_groups(groups[1:])
    means = health.means()
    assert means["unlabeled"] == 0.5 and means["unlabeled_kept"] == 0.5 and means["agreement"] == 0.375
    assert means["unlabeled_score"] == pytest.approx(16 / 6)
    assert group_health([Group("", [1], [Member("chosen", [2])])], mixed=True) == {}


def test_pairs_with_two_scores_are_counted() -> None:
    groups = [answering([1], pair=pair, score=1.0) for pair in (True, True, False)]
    assert scored_pairs(groups) == 2
    groups[0].members[-1].score = math.nan
    assert scored_pairs(groups) == 1


def test_train_calibrates_by_each_pair_once(files: Path, capsys: pytest.CaptureFixture[str], caplog: Any) -> None:
    flags = [*ONLINE, "--max_steps", "1", "--unlabeled_share", "0.25"]
    with caplog.at_level(logging.INFO):
        assert run(capsys, *flags, "--output_dir", "out")[0] == 0
    assert "trust in S by 8 human pairs: final term" in caplog.text
    for more in (["--calibrate", "false"], ["--reward", "rank"]):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert run(capsys, *flags, *more, "--output_dir", more[0][2:])[0] == 0
        assert "trust in S" not in caplog.text
