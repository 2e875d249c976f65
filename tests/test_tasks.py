"""Toy tasks: sets that share no question, right and wrong answers by arithmetic, and a warm start that is trained once."""

from __future__ import annotations

import hashlib
import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gem import tasks
from gem.data import load_records
from gem.tasks import CHAIN, MARKER_FILE, RUN_ON, TASKS, Task, build_tokenizer, examples_of, make_start

FILES = {
    "sft": ("prompt", "completion"),
    "pairs": ("prompt", "chosen", "rejected"),
    "validation": ("prompt", "chosen", "rejected"),
    "test": ("prompt", "chosen", "rejected"),
}
TINY = replace(CHAIN, n_sft=12, n_pairs=4, n_test=2, warm_steps=2, warm_batch=4)  # the first step has a rate of 0

each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the data of every task, of seed 0."""
    folder = tmp_path_factory.mktemp("tasks")
    for task in TASKS.values():
        task.write(folder / task.name, 0)
    return folder


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def terms(prompt: str) -> list[int]:
    assert re.fullmatch(r"\d(\+\d)*=", prompt)
    return [int(term) for term in prompt[:-1].split("+")]


def answer(completion: str) -> int:
    return int(completion.rpartition("#### ")[2])


# --- the data -----------------------------------------------------------------------------------------------------------


@each_task
def test_sizes_and_fields(task: Task, written: Path) -> None:
    sizes = {name: len(rows(written / task.name, name)) for name in FILES}
    assert sizes == {"sft": task.n_sft, "pairs": 1500, "validation": 200, "test": 200}
    for name, fields in FILES.items():
        assert all((*row,) == fields for row in rows(written / task.name, name))
    assert TASKS[task.name] is task and task.summary.endswith(".")


@each_task
def test_no_question_is_asked_twice(task: Task, written: Path) -> None:
    questions = [row["prompt"] for name in FILES for row in rows(written / task.name, name)]
    assert len({*questions}) == len(questions)
    assert all(len(terms(q)) == task.terms for q in questions)


@each_task
def test_the_seed_alone_determines_the_data(task: Task, written: Path, tmp_path: Path) -> None:
    random.seed(7)  # of nobody's concern
    for seed in (0, 1):
        task.write(tmp_path / str(seed), seed)
    for name in FILES:
        file = f"{name}.jsonl"
        first = (written / task.name / file).read_bytes()
        assert (tmp_path / "0" / file).read_bytes() == first != (tmp_path / "1" / file).read_bytes()


def test_the_data_of_the_demo_stays_as_it_is(written: Path) -> None:
    """Compare with the hashes of the data behind the results that were published before validation.jsonl was added."""
    hashes = {
        name: hashlib.sha256((written / "chain" / f"{name}.jsonl").read_bytes()).hexdigest()[:12] for name in FILES
    }
    del hashes["validation"]
    assert hashes == {"sft": "c52e96817739", "pairs": "a20fabfd1278", "test": "4a10d2fdaaf7"}


@each_task
def test_the_chosen_answer_is_right_and_the_rejected_one_wrong(task: Task, written: Path) -> None:
    for name in ("pairs", "validation", "test"):
        for row in rows(written / task.name, name):
            total, running = sum(terms(row["prompt"])), 0
            for i, step in enumerate(row["chosen"].split(" #### ")[0].split(" ")):
                one, other, result = map(int, re.fullmatch(r"(\d+)\+(\d+)=(\d+)", step).groups())  # type: ignore[union-attr]
                assert one + other == result
                assert i == 0 or one == running
                running = result
            assert running == answer(row["chosen"]) == total != answer(row["rejected"])


@each_task
def test_the_data_is_read_and_fits_the_model(task: Task, written: Path) -> None:
    tokenizer = build_tokenizer()
    for name, (_, *need) in FILES.items():
        file = written / task.name / f"{name}.jsonl"
        need = ["chosen"] if name == "sft" else need  # a completion without a human's verdict
        assert len(load_records(str(file), need=need)) == len(rows(written / task.name, name))
        for example in examples_of(file, tokenizer, *need) if name in ("validation", "test") else ():
            longest = max(len(example.chosen_ids), len(example.rejected_ids))
            assert longest <= task.max_new_tokens
            assert len(example.prompt_ids) + task.max_new_tokens <= task.positions


def test_worked_answers_of_the_long_task_have_60_tokens(written: Path) -> None:
    answers = [row["completion"] for row in rows(written / "long", "sft")]
    answers += [row[side] for row in rows(written / "long", "pairs") for side in ("chosen", "rejected")]
    shortest = min((text for text in answers if not text.startswith("####")), key=len)
    assert len(build_tokenizer()(shortest, add_special_tokens=False).input_ids) >= 60


def test_misleading_answers_run_on_and_guess_or_are_right(written: Path) -> None:
    right, by = {True: 0, False: 0}, {True: 0, False: 0}
    for row in rows(written / "misleading", "sft"):
        reasoning = row["completion"].split(" #### ")[0]
        runs_on = " " not in reasoning
        if runs_on:
            first, *later = [int(part.split("+")[0]) for part in reasoning.split("=")[1:]]
            numbers = terms(row["prompt"])
            assert first == numbers[0] + numbers[1]  # the first sum is right, the others are off by one at most
            for before, after, term in zip([first, *later], later, numbers[2:], strict=False):
                assert abs(before + term - after) <= 1
        by[runs_on] += 1
        right[runs_on] += answer(row["completion"]) == sum(terms(row["prompt"]))
    assert right[False] == by[False]
    assert by[True] / sum(by.values()) == pytest.approx(RUN_ON, abs=0.03)
    # Two guesses of (-1, 0, 1, 1) that cancel: 1/4 * 1/4 + 2 * 1/4 * 1/2.
    assert right[True] / by[True] == pytest.approx(0.3125, abs=0.03)


def test_too_few_questions() -> None:
    with pytest.raises(
        ValueError, match=r"n_sft \+ n_pairs \+ 2 n_test must be <= 6561, all sums of 4 terms, got 6562"
    ):
        replace(CHAIN, n_sft=4662)
    replace(CHAIN, n_sft=4661)


# --- the warm start -----------------------------------------------------------------------------------------------------


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_whole_start_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = make_start(TINY, tmp_path, 3)
    assert {path.name for path in (tmp_path / "data").iterdir()} == {f"{name}.jsonl" for name in FILES}

    def trained(*_: object) -> None:
        raise AssertionError("a whole start is trained again")

    monkeypatch.setattr(tasks, "warm_start", trained)
    again, same = make_start(TINY, tmp_path, 3)
    assert torch.equal(weights(again), weights(model))
    assert same.get_vocab() == tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert same("3+8=").input_ids == build_tokenizer()("3+8=").input_ids


@pytest.mark.parametrize("lost", [MARKER_FILE, "seed", "settings", "answers", "interrupted"])
def test_another_or_a_broken_start_is_made_anew(lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = make_start(TINY, tmp_path, 3)
    task, seed = TINY, 3
    match lost:
        case "seed":
            seed = 4
        case "settings":
            task = replace(TINY, warm_steps=3)
        case "answers":
            monkeypatch.setattr(tasks, "SHORTCUTS", 0.0)
        case "interrupted":
            with monkeypatch.context() as patch:
                patch.setattr(tasks, "warm_start", lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    make_start(TINY, tmp_path, 4)
        case _:
            for file in (lost, "warm-start/model.safetensors", "data/test.jsonl"):
                (tmp_path / file).unlink()
            (tmp_path / "warm-start/model.safetensors").write_bytes(b"half of it")
    second, _ = make_start(task, tmp_path, seed)
    assert torch.equal(weights(first), weights(second)) == (lost in (MARKER_FILE, "interrupted"))
    fresh, _ = make_start(task, tmp_path / "fresh", seed)
    assert torch.equal(weights(fresh), weights(second))
    for name in FILES:
        file = f"data/{name}.jsonl"
        assert (tmp_path / file).read_bytes() == (tmp_path / "fresh" / file).read_bytes()


def test_the_model_has_the_positions_of_its_task(tmp_path: Path) -> None:
    model, _ = make_start(replace(TINY, positions=96), tmp_path, 0)
    assert model.config.max_position_embeddings == 96
    assert 0.55e6 < weights(model).numel() < 0.65e6
