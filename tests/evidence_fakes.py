"""Runs without a model for tests/test_evidence.py, in a module that a process loads at once."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from gem.evidence.config import Config
from gem.evidence.plan import Job, Record


def reached(job: Job) -> float:
    return 0.5 + (0.2 if job.rate == 2e-5 else 0.1 if job.method else 0.0) + 0.01 * job.seed


def result_of(job: Job, **changes: Any) -> Record:
    """Return what a run gives; a diverged one has no metrics."""
    metrics = {"accuracy_sampled": reached(job), "accuracy_greedy": reached(job) + 0.1, "auroc": 0.6}
    measured = {"validation": metrics, "test": metrics} if "outcome" not in changes else {}
    trained = {
        "uses_score": job.method == "GEM",
        "spent": {"optimizer_steps": 80, "sampled_tokens": 100, "seconds": 5.0},
    }
    start = {"model": f"{job.task}{job.seed}", "data": "d"}
    return {
        "outcome": "finished",
        **measured,
        **(trained if job.method else {}),
        "seconds": 10.0,
        "start": start,
        **changes,
    }


def sight(config: Config) -> Callable[[Job], Record]:
    """Return what tells which GPU a process of the pool sees, and the device of its config."""
    return lambda job: {"sees": os.environ.get("CUDA_VISIBLE_DEVICES"), "device": config.device}


def fake_runner(config: Config) -> Callable[[Job], Record]:
    """Return what makes a run in a process of the pool; runs of seed 1 end in some other way."""

    def make(job: Job) -> Record:
        print("said")
        if job.seed == 1 and job.method == "SFT":
            raise RuntimeError("out of luck")
        if job.seed == 1 and job.method == "GEM":
            os._exit(7)
        list(tqdm(range(3)))
        if job.seed == 9:
            time.sleep(60)
        return result_of(job, pid=os.getpid())

    return make
