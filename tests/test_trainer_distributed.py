"""GEMTrainer on two processes (gloo, CPU) takes the steps that it takes on one."""

from __future__ import annotations

import copy
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from test_trainer import EOS, examples, groups_of, make_trainer, tiny_model

from gem.config import LossArguments, RankArguments, RolloutArguments, ScoreArguments
from gem.data import Example
from gem.pipeline import GroupMaker
from gem.tasks import build_tokenizer

KINDS = {
    "sega": LossArguments(),
    "sft": LossArguments(loss="sft"),
    "dpo": LossArguments(loss="dpo"),
    "online": LossArguments(),
    "ema": LossArguments(),
    "calibrated": LossArguments(),
}
ONLINE = ("online", "ema", "calibrated")
STEPS, GROUPS = 2, 4  # groups of a step


def records() -> list[Example]:
    """Return records with candidates of unequal lengths, one of them cut off, and one without a human pair."""
    rows = []
    for i, example in enumerate(examples(STEPS * GROUPS)):
        candidates = [
            [8, 5, 8, *example.chosen_ids],
            [5, 3, 4, 6 + i % 8, EOS],
            [7, 5] * (1 + i % 3) + [EOS],
            [9, 10],
            [3, 6 + i % 8, EOS],  # the answer of the second
        ]
        pair = {} if i == 1 else {"rejected_ids": example.rejected_ids}
        chosen = [] if i == 1 else example.chosen_ids
        rows.append(Example(str(i), example.prompt_ids, chosen, candidate_ids=candidates, **pair))
    return rows


def steps(folder: Path, processes: int) -> dict[str, Any]:
    """Return the weights after two steps and the logged losses, for each kind of loss."""
    found = {}
    for name, loss in KINDS.items():
        model = tiny_model()
        data = groups_of(copy.deepcopy(model), STEPS * GROUPS)
        data[3].members[1].ids.extend([7, 7])  # the processes have unequally many tokens
        data[3].members[1].logprobs.extend([-1.0, -1.0])
        more: dict[str, Any] = {"data": data}
        if name in ONLINE:  # records bring their candidates, as what is sampled differs by process
            reference = copy.deepcopy(model)
            score = ScoreArguments(score_with="ema", ema_decay=0.5) if name == "ema" else ScoreArguments()
            pairs = [record for record in records() if record.has_pair and name == "calibrated"]
            maker = GroupMaker(
                model, build_tokenizer(), RolloutArguments(), score, RankArguments(), reference, pairs=pairs
            )
            more = {"data": records(), "make_groups": maker}
        args = {
            "max_steps": STEPS,
            "per_device_train_batch_size": GROUPS // 2 // processes,
            "gradient_accumulation_steps": 2,
            "optim": "sgd",  # Adam would make steps of roundings where a gradient is 0
            "learning_rate": 0.1,
        }
        trainer = make_trainer(folder / name, loss, model=model, args=args, **more)
        assert trainer.one_pass == (name in ("online", "calibrated"))
        assert trainer.args.world_size == processes
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trust = trainer.calibration.trust if trainer.calibration else None
        found[name] = {
            "trust": trust,
            "losses": losses,
            "weights": {n: p.detach().clone() for n, p in model.named_parameters()},
        }
    return found


def worker(rank: int, processes: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    environment = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.save(steps(Path(folder), processes), f"{folder}/{rank}.pt")


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(worker, (2, port, str(tmp_path)), 2)
    expected = steps(tmp_path / "one", 1)
    start = dict(tiny_model().named_parameters())
    assert expected["calibrated"]["trust"].agreement < 1  # orders of candidates are there
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for name in KINDS:
            assert found[name]["trust"] == expected[name]["trust"]
            assert found[name]["losses"] == pytest.approx(expected[name]["losses"], abs=1e-5)
            for n, p in expected[name]["weights"].items():
                torch.testing.assert_close(found[name]["weights"][n], p, atol=1e-6, rtol=1e-5)
                assert not torch.equal(p, start[n])
