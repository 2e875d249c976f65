"""GEMTrainer: its loss against plain torch, accumulation, online groups, and resuming after a kill."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    TrainerCallback,
    TrainingArguments,
)

from gem.checkpoints import newest_checkpoint
from gem.config import GuardArguments, LossArguments, RankArguments, RolloutArguments, ScoreArguments
from gem.data import Example
from gem.generators import seeded
from gem.groups import Group, Member
from gem.guard import SoundWeights
from gem.head import ensure_fused
from gem.pipeline import GroupMaker, pair_group
from gem.score import token_stats
from gem.stops import Diverged
from gem.tasks import build_tokenizer
from gem.trainer import GEMTrainer

ROOT = Path(__file__).parent.parent
EOS = 2


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=17,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            bos_token_id=1,
            eos_token_id=EOS,
            pad_token_id=0,
        )
    )
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


class Stop(TrainerCallback):
    """Ends a training after a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= state.global_step == self.at


def examples(n: int) -> list[Example]:
    return [Example("", [1, 7 + i % 9], [3, 4, 7 + i % 9, EOS], [3, 8, EOS]) for i in range(n)]


def groups_of(model: Any, n: int) -> list[Group]:
    """Return groups of three members with made-up weights and the model's own log-probs as reference."""
    groups = []
    for i, e in enumerate(examples(n)):
        members = [
            Member("candidate", [5, 5, 6 + i, EOS], weight=0.5 + 0.1 * i),
            Member("chosen", e.chosen_ids, weight=0.4),
            Member("rejected", e.rejected_ids, weight=-0.9 - 0.1 * i),
        ]
        groups.append(Group("", e.prompt_ids, members))
    sequences = [(g.prompt_ids, m.ids) for g in groups for m in g.members]
    ensure_fused(model)
    stats = token_stats(model, sequences, batch_tokens=64)
    for member, s in zip((m for g in groups for m in g.members), stats, strict=True):
        member.logprobs = (s.logprob - 0.05).tolist()  # as if the policy had moved a little
    return groups


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    defaults = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no"}
    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        lr_scheduler_type="constant",
        **{**defaults, **changes},
    )


def make_trainer(folder: Path, loss: LossArguments, *, model: Any = None, data: Any = None, **kw: Any) -> GEMTrainer:
    args = arguments(folder, **kw.pop("args", {}))
    model = model or tiny_model()
    data = groups_of(model, 8) if data is None else data
    return GEMTrainer(
        model,
        args,
        loss=loss,
        guard=kw.pop("guard", GuardArguments()),
        train_dataset=data,
        processing_class=build_tokenizer(),
        **kw,
    )


def naive_loss(model: Any, groups: list[Group], loss: LossArguments) -> torch.Tensor:
    """Return the trainer's loss, one sequence at a time through the model's own logits."""
    total = torch.zeros(())
    for group in groups:
        logprobs, refs = [], []
        for m in group.members:
            ids = torch.tensor([group.prompt_ids + m.ids])
            logits = model(ids).logits[0, len(group.prompt_ids) - 1 : -1].log_softmax(-1)
            logprobs.append(logits.gather(1, torch.tensor(m.ids)[:, None])[:, 0])
            refs.append(torch.tensor(m.logprobs))
        candidate, chosen, rejected = logprobs
        gap = (chosen.sum() - rejected.sum()) - (refs[1].sum() - refs[2].sum())
        if loss.loss == "dpo":
            total = total - torch.nn.functional.logsigmoid(loss.beta * gap)
        elif loss.loss == "ipo":
            total = total + (gap - 1 / (2 * loss.beta)) ** 2
        else:
            for member, lp, ref in zip(group.members, logprobs, refs, strict=True):
                w = member.weight
                if w < 0 and loss.taper:
                    w *= float(torch.exp(lp.sum() - ref.sum()).clamp(max=1).detach())
                total = total - w * (lp.mean() if loss.length_norm == "tokens" else lp.sum())
            x = refs[0] - candidate
            total = total + loss.kl_weight * (x.exp() - 1 - x).sum()
        total = total - loss.sft_weight * chosen.mean()
    return total / len(groups)


@pytest.mark.parametrize(
    "loss",
    [
        LossArguments(),
        LossArguments(taper=False, kl_weight=0.0, sft_weight=0.0),
        LossArguments(length_norm="tokens"),
        LossArguments(loss="dpo"),
        LossArguments(loss="ipo", sft_weight=0.0),
    ],
    ids=["sega", "literal", "length_norm", "dpo", "ipo"],
)
def test_loss_and_gradient_equal_plain_torch(tmp_path: Path, loss: LossArguments) -> None:
    trainer = make_trainer(tmp_path, loss)
    groups = trainer.train_dataset[:3]
    (batch,), items = trainer.get_batch_samples(iter([groups]), 1, torch.device("cpu"))
    model: Any = trainer.model
    ours = trainer.compute_loss(model, batch, num_items_in_batch=items)
    ours.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    expected = naive_loss(model, groups, loss)
    expected.backward()
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    for g, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad, atol=2e-5 * float(p.grad.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("name", ["sega", "listwise_dpo", "dpo", "ipo", "pro"])
def test_every_preference_loss_widens_the_gap(tmp_path: Path, name: str) -> None:
    trainer = make_trainer(tmp_path, LossArguments(loss=name, kl_weight=0.0, sft_weight=0.0), args={"max_steps": 8})
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "logprob_chosen" in entry]
    gap = [entry["logprob_chosen"] - entry["logprob_rejected"] for entry in log]
    assert gap[-1] > gap[0] + 0.1


@pytest.mark.parametrize(
    ("name", "read"), [("sft", "C"), ("dpo", "CR"), ("ipo", "CR"), ("pro", "cCR"), ("sega", "cCR")]
)
def test_what_a_loss_does_not_read_is_not_forwarded(
    name: str, read: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longest: list[int] = []
    monkeypatch.setattr("gem.trainer.check_positions", lambda model, tokens, what: longest.append(tokens))
    model = tiny_model()
    data = groups_of(model, 4)
    data[1].members[0].ids[1:1] = [5] * 900
    data[1].members[0].logprobs[1:1] = [-1.0] * 900
    trainer = make_trainer(tmp_path, LossArguments(loss=name), model=model, data=data)
    assert (longest[0] > 900) == ("c" in read)
    (batch,), _ = trainer.get_batch_samples(iter([data]), 1, torch.device("cpu"))
    assert len(batch["input_ids"]) == 4 * len(read) and all(len(group.members) == 3 for group in data)
    trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert all((curve in logged) == ("c" in read) for curve in ("kl", "weight_positive", "kept"))
    letters = {"chosen": "C", "rejected": "R", "candidate": "c"}
    assert {"".join(letters[m.role] for m in group.members) for group in batch["groups"]} == {read}


def test_examples_alone_are_no_training_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_dataset must hold groups, unless make_groups is given, got Example"):
        make_trainer(tmp_path, LossArguments(), data=examples(4))


def test_sft_is_the_mean_negative_log_likelihood_of_the_tokens(tmp_path: Path) -> None:
    groups = [pair_group(e) for e in examples(5)]
    trainer = make_trainer(tmp_path, LossArguments(loss="sft"), data=groups)
    (batch,), items = trainer.get_batch_samples(iter([groups]), 1, torch.device("cpu"))
    model: Any = trainer.model
    logprobs = []
    for g in groups:
        ids = torch.tensor([g.prompt_ids + g.members[0].ids])
        labels = ids.clone()
        labels[:, : len(g.prompt_ids)] = -100
        logprobs.append(model(ids, labels=labels).loss)  # every completion here has as many tokens
    ours = trainer.compute_loss(model, batch, num_items_in_batch=items)
    torch.testing.assert_close(ours, torch.stack(logprobs).mean(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["sega", "sft"])
def test_gradient_accumulation_changes_nothing(tmp_path: Path, name: str) -> None:
    model = tiny_model()
    data = groups_of(model, 8)
    if name == "sft":
        for group in data:
            group.members = [group.members[1]]
    weights = []
    for size, steps in ((8, 1), (2, 4)):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 3}
        trainer = make_trainer(
            tmp_path / str(size), LossArguments(loss=name), model=copy.deepcopy(model), data=data, args=changes
        )
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    torch.testing.assert_close(*weights, atol=2e-5, rtol=1e-4)


def test_online_groups_are_fresh_and_on_policy(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), build_tokenizer()
    reference = copy.deepcopy(model).requires_grad_(False)
    rollout = RolloutArguments(group_size=3, max_new_tokens=6)
    maker = GroupMaker(model, tokenizer, rollout, ScoreArguments(), RankArguments(), reference)
    seen: list[list[Group]] = []

    def make_groups(batch: list[Example]) -> list[Group]:
        seen.append(maker(batch))
        return seen[-1]

    trainer = make_trainer(
        tmp_path, LossArguments(), model=model, data=examples(8), make_groups=make_groups, args={"max_steps": 3}
    )
    trainer.train()
    assert [len(groups) for groups in seen] == [4, 4, 4]
    member = seen[-1][0].members[0]
    assert member.role == "candidate"
    assert (
        member.logprobs
        != token_stats(model, [(seen[-1][0].prompt_ids, member.ids)], batch_tokens=64)[0].logprob.tolist()
    )  # the reference's, not the policy's
    logged = trainer.state.log_history[0]
    for name in ("kl", "weight_positive", "weight_negative", "score", "final_entropy", "branch_entropy", "length"):
        assert name in logged, name
    for name in ("truncated", "span_fallback", "distinct", "kept", "logprob_chosen", "logprob_rejected", "no_gradient"):
        assert name in logged, name


def test_evaluation_does_not_move_the_training_random_numbers(tmp_path: Path) -> None:
    losses = []
    for every in (1, 100):
        model, tokenizer = tiny_model(), build_tokenizer()
        rollout = RolloutArguments(group_size=2, max_new_tokens=5)
        maker = GroupMaker(model, tokenizer, rollout, ScoreArguments(), RankArguments())
        trainer = make_trainer(
            tmp_path / str(every),
            LossArguments(),
            model=model,
            data=examples(8),
            make_groups=maker,
            evaluation=lambda m: {"noise": float(torch.rand(()))},
            args={"eval_strategy": "steps", "eval_steps": every},
        )
        trainer.train()
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert losses[0] == losses[1]


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loss must be one of .*, got 'ppo'"):
        make_trainer(tmp_path, LossArguments(loss="ppo"))
    with pytest.raises(ValueError, match="evaluation must be given with eval_strategy"):
        make_trainer(tmp_path, LossArguments(), args={"eval_strategy": "steps", "eval_steps": 1})
    trainer = make_trainer(tmp_path, LossArguments(loss="dpo"))
    groups = trainer.train_dataset[:1]
    groups[0].members = groups[0].members[:2]
    (batch,), items = trainer.get_batch_samples(iter([groups]), 1, torch.device("cpu"))
    with pytest.raises(ValueError, match="loss=dpo needs groups with"):
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)


# --- numbers that are not finite --------------------------------------------------------------------------------------


def _nan_weight(groups: list[Group], model: Any) -> None:
    groups[5].members[0].weight = float("nan")


def _nan_reference(groups: list[Group], model: Any) -> None:
    groups[5].members[2].logprobs[1] = float("nan")


def _infinite_kl(groups: list[Group], model: Any) -> None:
    groups[5].members[0].logprobs[0] = 200.0


def _nan_log_prob(groups: list[Group], model: Any) -> None:
    groups[5].members[0].ids[2] = 16  # in no other group
    with torch.no_grad():
        model.model.embed_tokens.weight[16] = float("nan")


PLANTED = {
    "weight": (_nan_weight, r"weight_\w+ is nan"),
    "reference": (_nan_reference, "the reference log-prob of a token is nan"),
    "kl": (_infinite_kl, "kl is inf"),
    "log-prob": (_nan_log_prob, "the log-prob of a token is nan"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_number_that_is_not_finite_stops_at_its_group(name: str, tmp_path: Path) -> None:
    plant, message = PLANTED[name]
    model = tiny_model()
    groups = groups_of(model, 8)
    for i, group in enumerate(groups):
        group.where = f"groups.jsonl, line {i + 2}"
    changes = {"max_steps": 8, "per_device_train_batch_size": 1, "train_sampling_strategy": "sequential"}
    changes |= {"save_strategy": "no" if name == "log-prob" else "steps", "save_steps": 1}
    trainer = make_trainer(tmp_path, LossArguments(), model=model, data=groups, args=changes)
    plant(groups, model)
    if name == "log-prob":  # this weight is not finite before the first step
        trainer.remove_callback(SoundWeights)
    with pytest.raises(Diverged, match=rf"^step 6: {message} in groups\.jsonl, line 7 \(''\)$"):
        trainer.train()
    assert trainer.state.global_step == 5
    if name != "log-prob":
        assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")


@pytest.mark.parametrize("name", ["sega", "sft"])
def test_a_gradient_that_is_not_finite_stops_before_the_optimizer(name: str, tmp_path: Path) -> None:
    model = tiny_model()
    groups = groups_of(model, 8)
    trainer = make_trainer(
        tmp_path, LossArguments(loss=name), model=model, data=groups, args={"save_strategy": "steps", "save_steps": 1}
    )
    up = model.model.layers[0].mlp.up_proj.weight
    up.register_hook(lambda grad: grad * (float("inf") if trainer.state.global_step == 2 else 1))
    with pytest.raises(
        Diverged, match=r"^step 3: the gradient, after a group .* has (nan|inf) in .*up_proj\.weight \("
    ):
        trainer.train()
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_weight_that_is_not_finite_is_never_saved(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, LossArguments())
    with torch.no_grad():
        trainer.model.lm_head.weight[3, 2] = float("inf")
    with pytest.raises(
        Diverged, match=r"nothing is saved, as the model has inf in lm_head\.weight \(1 of 272 entries\)"
    ):
        trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()
    with pytest.raises(Diverged, match=r"before the first step, the model has inf in lm_head\.weight"):
        trainer.train()


def test_a_checkpoint_that_is_written_again_is_not_whole_meanwhile(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, LossArguments())
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "manifest.json").write_text("{}")
    trainer.save_model(str(tmp_path / "checkpoint-5"))
    assert not (tmp_path / "checkpoint-5" / "manifest.json").exists()


def test_a_smoothed_loss_is_checked_too(tmp_path: Path) -> None:
    groups = [pair_group(e) for e in examples(4)]
    trainer = make_trainer(tmp_path, LossArguments(loss="sft"), data=groups, args={"label_smoothing_factor": 0.1})
    (batch,), items = trainer.get_batch_samples(iter([groups]), 1, torch.device("cpu"))
    with torch.no_grad():
        trainer.model.lm_head.weight[3, 2] = float("nan")
    with pytest.raises(Diverged, match=r"step 1: the loss of a group \(''\) and 3 more is nan"):
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)


# --- exact resume -----------------------------------------------------------------------------------------------------


def test_what_is_sampled_depends_on_its_key_alone() -> None:
    def draw(*key: object) -> float:
        with seeded(*key):
            return float(torch.rand(()))

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draw(0, 3, 0, [[1, 2]])
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert draw(0, 3, 0, [[1, 2]]) == first
    assert (
        len({first, draw(1, 3, 0, [[1, 2]]), draw(0, 4, 0, [[1, 2]]), draw(0, 3, 1, [[1, 2]]), draw(0, 3, 0, [[1, 3]])})
        == 5
    )


def test_an_online_run_goes_on_exactly(tmp_path: Path) -> None:
    """With dropout and evaluations, which use random numbers between the steps; eight steps, resumed after each third."""

    def run(folder: Path, stops: list[int]) -> tuple[torch.Tensor, list[dict[str, float]]]:
        for stop in [*stops, 8]:
            model, tokenizer = tiny_model(), build_tokenizer()
            model.config.attention_dropout = 0.3
            maker = GroupMaker(
                model, tokenizer, RolloutArguments(group_size=3, max_new_tokens=6), ScoreArguments(),
                RankArguments(human_weight=0.0), copy.deepcopy(model).requires_grad_(False),
            )  # fmt: skip

            trainer = make_trainer(
                folder, LossArguments(), model=model, data=examples(12), make_groups=maker, callbacks=[Stop(stop)],
                evaluation=lambda m: {"noise": float(torch.rand(()))},
                args={"max_steps": 8, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 2,
                      "save_total_limit": 2},
            )  # fmt: skip
            trainer.train(resume_from_checkpoint=newest_checkpoint(folder))
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        logs = [{k: v for k, v in e.items() if not k.startswith("train_")} for e in trainer.state.log_history]
        return weights, [e for e in logs if "loss" in e or "eval_noise" in e]

    weights, log = run(tmp_path / "whole", [])
    again, log_again = run(tmp_path / "cut", [3, 6])
    assert torch.equal(again, weights) and log_again == log


def test_a_mixture_of_experts_goes_on_exactly(tmp_path: Path) -> None:
    """transformers stores its experts under other names, and Trainer loads none of them."""

    def run(folder: Path, resume: str | None) -> torch.Tensor:
        torch.manual_seed(0)
        model = MixtralForCausalLM(
            MixtralConfig(
                vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True,
                router_aux_loss_coef=0.5, attention_dropout=0.3, bos_token_id=1, eos_token_id=EOS, pad_token_id=0,
            )
        )  # fmt: skip
        args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 2}
        args |= {"gradient_accumulation_steps": 2}
        data = [pair_group(e) for e in examples(24)]
        for group in data:
            group.members = group.members[:1]
        trainer = make_trainer(folder, LossArguments(loss="sft"), model=model, data=data, args=args)
        trainer.train(resume_from_checkpoint=resume)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    whole = run(tmp_path / "whole", None)
    assert torch.equal(run(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-2")), whole)


def test_kill_and_resume_ends_as_an_uninterrupted_run(tmp_path: Path) -> None:
    """kill -9 in the middle of `gem-kernels sft`; the same command again gives the same losses to 1e-6."""
    model = tiny_model()
    model.config.to_json_file(tmp_path / "model.json")
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    rows = [{"prompt": f"{i % 9 + 1}+{i % 7}=", "completion": f"#### {i % 9 + 1 + i % 7}"} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))

    def command(folder: str) -> list[str]:
        flags = ["--model", str(tmp_path / "model.json"), "--tokenizer", str(tmp_path / "tokenizer")]
        flags += ["--data", str(tmp_path / "data.jsonl"), "--output_dir", str(tmp_path / folder), "--use_cpu"]
        flags += ["--max_steps", "300", "--save_steps", "20", "--learning_rate", "1e-3", "--disable_tqdm", "true"]
        return [sys.executable, "-m", "gem", "sft", *flags]

    def losses(folder: str) -> list[float]:
        state = json.loads((tmp_path / folder / "trainer_state.json").read_text())
        return [entry["loss"] for entry in state["log_history"] if "loss" in entry]

    subprocess.run(command("whole"), cwd=ROOT, check=True, capture_output=True, timeout=120)
    killed = subprocess.Popen(command("killed"), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while newest_checkpoint(tmp_path / "killed") is None and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert killed.returncode == -signal.SIGKILL, "it ended before it could be killed"
    assert not (tmp_path / "killed" / "metrics.json").exists()
    again = subprocess.run(command("killed"), cwd=ROOT, check=True, capture_output=True, text=True, timeout=120)
    assert "train_steps" in again.stdout
    assert len(losses("whole")) == 300
    assert losses("killed") == pytest.approx(losses("whole"), abs=1e-6)
