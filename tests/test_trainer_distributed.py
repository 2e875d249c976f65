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
from test_trainer import groups_of, make_trainer, tiny_model

from gem.config import LossArguments

KINDS = {"sega": LossArguments(), "sft": LossArguments(loss="sft"), "dpo": LossArguments(loss="dpo")}
STEPS, GROUPS = 2, 4  # groups of a step


def steps(folder: Path, processes: int) -> dict[str, Any]:
    """Return the weights after two steps and the logged losses, for each kind of loss."""
    found = {}
    for name, loss in KINDS.items():
        model = tiny_model()
        data = groups_of(copy.deepcopy(model), STEPS * GROUPS)
        data[3].members[1].ids.extend([7, 7])  # the processes have unequally many tokens
        data[3].members[1].logprobs.extend([-1.0, -1.0])
        args = {
            "max_steps": STEPS,
            "per_device_train_batch_size": GROUPS // 2 // processes,
            "gradient_accumulation_steps": 2,
            "optim": "sgd",  # Adam would make steps of roundings where a gradient is 0
            "learning_rate": 0.1,
        }
        trainer = make_trainer(folder / name, loss, model=model, data=data, args=args)
        assert trainer.args.world_size == processes
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        found[name] = {"losses": losses, "weights": {n: p.detach().clone() for n, p in model.named_parameters()}}
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
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        for name in KINDS:
            assert found[name]["losses"] == pytest.approx(expected[name]["losses"], abs=1e-5)
            for n, p in expected[name]["weights"].items():
                torch.testing.assert_close(found[name]["weights"][n], p, atol=1e-6, rtol=1e-5)
                assert not torch.equal(p, start[n])
