"""The router loss of a mixture of experts does not depend on how a batch is cut into micro-batches and processes."""

from __future__ import annotations

import copy
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from architectures import VOCAB, available, build
from peft import LoraConfig, get_peft_model
from test_trainer import groups_of, make_trainer
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import gem.head.call
from gem.config import LossArguments
from gem.groups import Group, Member
from gem.head import fuse_lm_head, fused_head
from gem.head.router import adds_router_loss, find_top_k, routing
from gem.trainer import GEMTrainer

WEIGHT = 0.5
FAMILIES = ("mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "gpt-oss", "granite-moe")
LENGTHS = ((9, 6), (2, 3), (4, 12), (1, 2))  # tokens of prompt and completion


def moe(name: str = "mixtral", **changes: Any) -> Any:
    """A model whose loss contains a router loss, and whose routers prefer some experts."""
    if not available(name):
        pytest.skip("not in this transformers")
    model = build(name, router_aux_loss_coef=WEIGHT, output_router_logits=True, **changes)
    with torch.no_grad():
        for parameter, p in model.named_parameters():
            if parameter.endswith(("gate.weight", "router.weight", "router.layer.weight")):
                p.mul_(20)
    return model


def unequal_groups() -> list[Group]:
    """Groups of one chosen completion, of many lengths."""
    g = torch.Generator().manual_seed(5)
    ids = [torch.randint(3, VOCAB, (sum(pair),), generator=g).tolist() for pair in LENGTHS]
    return [Group("", i[:p], [Member("chosen", i[p:])]) for i, (p, _) in zip(ids, LENGTHS, strict=True)]


def step(trainer: GEMTrainer, groups: Sequence[Group], size: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of one optimizer step in micro-batches of `size` groups."""
    cut = [list(groups[i : i + size]) for i in range(0, len(groups), size)]
    batches, items = trainer.get_batch_samples(iter(cut), len(cut), torch.device("cpu"))
    model: Any = trainer.model
    total = 0.0
    for batch in batches:
        loss = trainer.compute_loss(model, batch, num_items_in_batch=items)
        loss.backward()
        total += float(loss.detach())
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return total, found


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return the distance of two gradients, as a share of the first."""
    assert a.keys() == b.keys()
    norm = sum(float(t.double().square().sum()) for t in a.values())
    return (sum(float((a[n] - b[n]).double().square().sum()) for n in a) / norm) ** 0.5


@pytest.mark.parametrize("name", FAMILIES)
def test_every_cut_of_a_batch_gives_the_same_loss_and_gradient(name: str, tmp_path: Path) -> None:
    groups = unequal_groups()
    trainer = make_trainer(tmp_path, LossArguments(loss="sft"), model=moe(name), data=groups)
    assert fused_head(trainer.model).router_top_k == 2
    loss, gradient = step(trainer, groups, 4)
    for size in (2, 1, 3):
        cut_loss, cut_gradient = step(trainer, groups, size)
        assert cut_loss == pytest.approx(loss, rel=1e-5)
        assert distance(gradient, cut_gradient) < 1e-5
    # The whole is the model's own loss, padding left out, and the router loss is a good part of it.
    (batch,), _ = trainer.get_batch_samples(iter([groups]), 1, torch.device("cpu"))
    names = ("input_ids", "attention_mask", "position_ids", "shift_labels")
    own = trainer.model(**{n: batch[n] for n in names}, labels=batch["input_ids"])
    nll = torch.nn.functional.cross_entropy(own.logits.flatten(0, 1), batch["shift_labels"].flatten())
    assert loss == pytest.approx(float((nll + WEIGHT * own.aux_loss).detach()), rel=1e-5)
    assert WEIGHT * float(own.aux_loss.detach()) > 0.05 * loss
    # By the shares alone it would be another one: the test sees the difference.
    fused_head(trainer.model).router_top_k = 0
    _, by_share = step(trainer, groups, 1)
    assert distance(gradient, by_share) > 1e-3


@pytest.mark.parametrize("loss", ["sega", "dpo"])
def test_the_groups_of_other_losses_are_cut_alike(loss: str, tmp_path: Path) -> None:
    model = moe("qwen3-moe")
    groups = groups_of(copy.deepcopy(model), 4)
    groups[1].prompt_ids = [5, 6, 7, 8, 9, 5]
    trainer = make_trainer(tmp_path, LossArguments(loss=loss), model=model, data=groups)
    whole, gradient = step(trainer, groups, 4)
    for size in (2, 1):
        cut, cut_gradient = step(trainer, groups, size)
        assert cut == pytest.approx(whole, rel=1e-4)
        assert distance(gradient, cut_gradient) < 1e-4


def test_adapters_around_a_mixture_of_experts(tmp_path: Path) -> None:
    model = get_peft_model(
        moe("mixtral"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    groups = unequal_groups()
    trainer = make_trainer(tmp_path, LossArguments(loss="sft"), model=model, data=groups)
    loss, gradient = step(trainer, groups, 4)
    cut_loss, cut_gradient = step(trainer, groups, 1)
    assert cut_loss == pytest.approx(loss, rel=1e-5) and distance(gradient, cut_gradient) < 1e-5
    assert all("lora" in n for n in gradient)


def test_without_a_router_loss_nothing_is_looked_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One micro-batch and a router loss of weight 0 need no look-ahead either."""
    calls: list[Any] = []
    monkeypatch.setattr("gem.trainer.router_usage", lambda *a: calls.append(a) or torch.zeros(4))
    groups = unequal_groups()
    weightless = moe("mixtral")
    weightless.router_aux_loss_coef = 0.0
    assert not adds_router_loss(weightless) and not adds_router_loss(build("mixtral")) and adds_router_loss(moe())
    for model, size, expected in ((moe(), 4, 0), (build("mixtral"), 1, 0), (weightless, 1, 0), (moe(), 1, 4)):
        calls.clear()
        trainer = make_trainer(tmp_path, LossArguments(loss="sft"), model=model, data=groups)
        cut = [groups[i : i + size] for i in range(0, 4, size)]
        batches, items = trainer.get_batch_samples(iter(cut), len(cut), torch.device("cpu"))
        assert not calls  # before the random numbers of a resumed run are restored
        for batch in batches:
            trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)
        assert len(calls) == expected
        assert sum(b["router"]["router_share"] for b in batches) == pytest.approx(1.0)


def test_the_look_ahead_sees_the_random_numbers_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout changes what the routers choose: the experts looked up must be those that the training then uses."""
    seen: list[Tensor] = []

    def spy(*arguments: Any) -> Any:
        found = routing(*arguments)
        seen.append(found.usage)
        return found

    groups = unequal_groups()
    model = moe("mixtral", attention_dropout=0.3)
    args = {"max_steps": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    trainer = make_trainer(tmp_path, LossArguments(loss="sft"), model=model, data=groups, args=args)
    monkeypatch.setattr(gem.head.call, "routing", spy)
    trainer.train()
    assert len(seen) == 8  # of two steps: two micro-batches looked up, the same two trained on
    for looked_up, trained in ((0, 2), (1, 3), (4, 6), (5, 7)):
        assert torch.equal(seen[looked_up], seen[trained])
    assert not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("name", ["olmoe", "gpt-oss", "mixtral"])
def test_by_the_shares_alone_it_is_off_by_the_covariance(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equation (2) of gem/head/router.py, for a model whose router loss is of another form; 0 where the parts are equal."""
    groups, model = unequal_groups(), moe(name)
    trainer = make_trainer(tmp_path, LossArguments(loss="sft"), model=model, data=groups)
    parts = []
    for i in range(4):
        ids = torch.tensor([groups[i].prompt_ids + groups[i].members[0].ids])
        with torch.no_grad():
            parts.append(routing(model(ids).router_logits, None, 2))
    share = torch.tensor([float(sum(pair)) for pair in LENGTHS])
    share = share / share.sum()
    f, p = (torch.stack(t) for t in zip(*parts, strict=True))
    covariance = 4 * float((share[:, None] * (f - share @ f) * (p - share @ p)).sum())
    exact, _ = step(trainer, groups, 1)

    monkeypatch.setattr("gem.head.check.find_top_k", lambda *a: 0)
    trainer = make_trainer(tmp_path, LossArguments(loss="sft"), model=model, data=groups)
    assert "the router loss of" in caplog.text and "each counts its own by its share of the tokens" in caplog.text
    by_share, _ = step(trainer, groups, 1)
    assert by_share - exact == pytest.approx(WEIGHT * covariance, abs=1e-5)
    assert abs(covariance) > 1e-3
    equal = [groups[0]] * 4
    (whole, gradient), (cut, cut_gradient) = (step(trainer, equal, size) for size in (4, 1))
    assert cut == pytest.approx(whole, rel=1e-6) and distance(gradient, cut_gradient) < 1e-5


# --- the fused call ---------------------------------------------------------------------------------------------------


def one_call() -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def test_a_call_of_somebody_else_has_the_models_own_loss() -> None:
    model, inputs = fuse_lm_head(moe("qwen2-moe")), one_call()
    own, ours = (model(**inputs, **how) for how in ({}, {"fused_lm_head": True}))
    torch.testing.assert_close(ours.loss, own.loss, rtol=1e-6, atol=1e-6)
    assert torch.equal(ours.aux_loss, own.aux_loss)
    assert float(ours.router_usage.sum()) == pytest.approx(2.0) and not ours.router_usage.requires_grad
    half = model(**inputs, fused_lm_head=True, router_share=0.5)
    torch.testing.assert_close(half.loss, ours.loss - 0.5 * WEIGHT * own.aux_loss)
    again = model(**inputs, fused_lm_head=True, router_share=torch.tensor(0.5), router_usage=ours.router_usage)
    torch.testing.assert_close(again.loss, half.loss)
    positional = model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"], fused_lm_head=True)
    assert torch.equal(positional.router_usage, ours.router_usage)
    assert model(**inputs, fused_lm_head=True, output_router_logits=False).router_usage is None


def test_bad_arguments_are_named() -> None:
    model, inputs = fuse_lm_head(moe("mixtral")), one_call()
    with pytest.raises(ValueError, match=r"router_usage must be .* got a tensor \(3,\) for 4 experts"):
        model(**inputs, fused_lm_head=True, router_usage=torch.ones(3))
    fused_head(model).router_top_k = 0
    with pytest.raises(ValueError, match=r"router_usage must be .* for a router loss of another form"):
        model(**inputs, fused_lm_head=True, router_usage=torch.ones(4))
    for keywords in ({"router_share": 0.5}, {"router_share": torch.tensor(1.0)}, {"router_usage": torch.ones(4)}):
        with pytest.raises(ValueError, match="router_share and router_usage need fused_lm_head=True"):
            model(**inputs, **keywords)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_the_experts_a_token_chooses_are_found_out(top_k: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(top_k)
    logits = tuple((2 * torch.randn(12, 6, generator=g)).to(dtype) for _ in range(3))
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 2:] = 0
    loss = load_balancing_loss_func(logits, 6, top_k, mask)
    ours = routing(logits, mask, top_k)
    torch.testing.assert_close(ours.loss(ours.usage), loss, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=0)
    assert find_top_k(logits, mask, loss) == top_k
    if dtype == torch.float32:  # in bf16 some transformers round the mean, and a per cent may be rounding
        with_padding = load_balancing_loss_func(logits, 6, top_k, None)
        for other in (loss * 1.001, loss + 1.0, with_padding):
            assert find_top_k(logits, mask, other) == 0


# --- two processes ----------------------------------------------------------------------------------------------------


def weights_after_steps(folder: Path, processes: int) -> dict[str, Any]:
    groups, model = unequal_groups(), moe("olmoe")
    args = {
        "max_steps": 2,
        "per_device_train_batch_size": 2 // processes,
        "gradient_accumulation_steps": 2,
        "optim": "sgd",  # Adam would make steps of roundings where a gradient is 0
        "learning_rate": 0.05,
        "label_smoothing_factor": 0.2,
    }
    trainer = make_trainer(folder, LossArguments(loss="sft"), model=model, data=groups, args=args)
    assert trainer.args.world_size == processes
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "weights": {n: p.detach() for n, p in model.named_parameters()}}


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.save(weights_after_steps(Path(folder), 2), f"{folder}/{rank}.pt")


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(worker, (port, str(tmp_path)), 2)
    expected = weights_after_steps(tmp_path / "one", 1)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        for n, p in expected["weights"].items():
            torch.testing.assert_close(found["weights"][n], p, atol=2e-6, rtol=1e-5)
