"""Label smoothing without logits: loss and gradients equal those of transformers' LabelSmoother on the model's logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import VOCAB, build
from peft import LoraConfig, get_peft_model
from test_fuse_architectures import batch
from test_trainer import make_trainer
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.trainer_pt_utils import LabelSmoother

from gem.config import LossArguments
from gem.groups import Group, Member
from gem.head import extra, fuse_lm_head
from gem.head.extra import mean_logits
from gem_kernels import LogitTransform, LowRank

# plain, tied, scales, softcaps, heads with a bias, a mixture of experts
MODELS = ("llama", "llama tied", "granite", "cohere", "falcon-h1", "gemma2", "nanochat", "phi", "gptj", "olmoe")


def with_lora_head(name: str) -> Any:
    torch.manual_seed(3)
    targets = ["q_proj", "lm_head"]
    return get_peft_model(build(name), LoraConfig(r=3, lora_alpha=9, target_modules=targets, init_lora_weights=False))


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, grad in want.items():
        gap = float((got[name] - grad).norm())
        assert gap <= tolerance * float(grad.norm()) + 1e-12, name


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
@pytest.mark.parametrize("name", [*MODELS, "llama with LoRA", "gemma2 with LoRA", "phi with LoRA"])
def test_loss_and_every_gradient_are_those_of_the_logits(name: str, smoothing: float) -> None:
    stem, _, lora = name.partition(" with ")
    model = (with_lora_head(stem) if lora else build(name)).double().eval()
    inputs = batch()
    labels = inputs["labels"]
    fuse_lm_head(model)
    logits = model(inputs["input_ids"], use_cache=False).logits
    by_torch = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=smoothing)
    theirs = LabelSmoother(epsilon=smoothing)({"logits": logits}, labels, shift_labels=True)
    assert float(theirs.detach()) == pytest.approx(float(by_torch.detach()), rel=1e-6)  # it sums in fp32
    want = gradients(model, by_torch)
    loss = model(**inputs, fused_lm_head=True, label_smoothing=smoothing).loss
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, by_torch, rtol=1e-11, atol=1e-11)
    assert_same_gradients(gradients(model, loss), want, 1e-9)


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
def test_temperature_items_and_shifted_labels(name: str) -> None:
    model, inputs = fuse_lm_head(build(name).double(), temperature=0.7), batch()
    ids, labels = inputs["input_ids"], inputs["labels"]
    z = model(ids, use_cache=False).logits / 0.7
    total = cross_entropy(z.flatten(0, 1), labels.flatten(), label_smoothing=0.3, reduction="sum")
    keywords = {"fused_lm_head": True, "label_smoothing": 0.3, "num_items_in_batch": 7}
    torch.testing.assert_close(model(ids, shift_labels=labels, **keywords).loss, total / 7)
    assert torch.equal(model(**inputs, **{**keywords, "label_smoothing": 0.0}).loss, model(
        **inputs, fused_lm_head=True, num_items_in_batch=7
    ).loss)  # fmt: skip


def test_nothing_to_predict_is_a_zero_with_a_gradient() -> None:
    for name in ("llama tied", "gemma2"):
        model, inputs = fuse_lm_head(build(name)), batch()
        labels = torch.full_like(inputs["labels"], -100)
        loss = model(inputs["input_ids"], labels=labels, fused_lm_head=True, label_smoothing=0.2).loss
        assert loss == 0
        assert all(not grad.any() for grad in gradients(model, loss).values())


def test_bad_arguments_are_named() -> None:
    model, inputs = fuse_lm_head(build("llama")), batch()
    for smoothing in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"label_smoothing must be between 0 and 1, .* got {smoothing}"):
            model(**inputs, fused_lm_head=True, label_smoothing=smoothing)
    group = {"loss_fn": lambda stats, g: -stats.logprob.sum(), "cu_groups": torch.tensor([0, 3], dtype=torch.int32)}
    with pytest.raises(ValueError, match=r"0 with a loss_fn, got 0\.1 and a loss_fn"):
        model(**inputs, fused_lm_head=True, label_smoothing=0.1, **group)
    with pytest.raises(ValueError, match="label_smoothing, .* need fused_lm_head=True"):
        model(**inputs, label_smoothing=0.1)


def test_a_vocabulary_parallel_head_is_refused() -> None:
    arguments = {**operands(2, low_rank=False), "shard": object(), "transform": LogitTransform()}
    with pytest.raises(ValueError, match="vocabulary-parallel lm_head is not supported: .* label_smoothing at 0"):
        mean_logits(None, arguments)  # type: ignore[arg-type]


# --- precision --------------------------------------------------------------------------------------------------------


def operands(n: int, low_rank: bool) -> dict[str, Any]:
    """Return the operands of a head with a bias, in bf16, and an adapter in fp32."""
    g = torch.Generator().manual_seed(n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    low = LowRank(normal(4, 48).requires_grad_(), normal(301, 4).requires_grad_(), 0.5) if low_rank else None
    own = {"hidden": normal(n, 48), "weight": 0.3 * normal(301, 48), "bias": normal(301)}
    return {**{k: t.bfloat16().requires_grad_() for k, t in own.items()}, "low_rank": low, "shard": None}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_gradients_add_up_in_fp32(
    softcap: float | None, low_rank: bool, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of bf16 operands are rounded once, for any number of parts of the vocabulary."""
    n = 150
    monkeypatch.setattr(extra, "_TILE_BYTES", 4 * n * 16)  # 19 parts of 16 rows
    arguments = {**operands(n, low_rank), "transform": LogitTransform(scale=1.5, softcap=softcap, temperature=0.8)}
    low: Any = arguments["low_rank"]
    leaves = [arguments[k] for k in ("hidden", "weight", "bias")] + ([low.a, low.b] if low_rank else [])
    upstream = torch.randn(n, generator=torch.Generator().manual_seed(7))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mean = mean_logits(None, arguments)  # type: ignore[arg-type]
    assert mean.dtype == torch.float32
    got = torch.autograd.grad(mean, leaves, upstream)
    gold_leaves = [t.detach().double().requires_grad_() for t in leaves]
    h, w, bias, *ab = gold_leaves
    z = h @ w.T + bias + (0.5 * (h @ ab[0].T) @ ab[1].T if ab else 0.0)
    z = 1.5 * z if softcap is None else softcap * torch.tanh(1.5 * z / softcap)
    gold_mean = (z / 0.8).mean(-1)
    torch.testing.assert_close(mean.double(), gold_mean, rtol=1e-5, atol=1e-5)
    gold = torch.autograd.grad(gold_mean, gold_leaves, upstream.double())
    for ours, exact in zip(got, gold, strict=True):
        once = torch.finfo(ours.dtype).eps / 2 * exact.abs()
        in_fp32 = 1e-5 * float(exact.abs().max())
        assert bool(((ours.double() - exact).abs() <= once + in_fp32).all())


# --- the trainer ------------------------------------------------------------------------------------------------------


def groups(with_others: bool) -> list[Group]:
    g = torch.Generator().manual_seed(5)

    def ids(n: int) -> list[int]:
        return torch.randint(3, VOCAB, (n,), generator=g).tolist()

    made = []
    for prompt, completion in ((4, 3), (2, 6), (7, 1), (3, 2)):
        members = [Member("chosen", ids(completion))]
        others = [Member("rejected", ids(3)), Member("candidate", ids(2))] if with_others else []
        made.append(Group("", ids(prompt), others + members))
    return made


def by_label_smoother(model: Any, data: Sequence[Group], smoothing: float) -> Tensor:
    """Return the loss of transformers' LabelSmoother, one sequence at a time."""
    total, n = torch.zeros(()), sum(len(g.members[-1].ids) for g in data)
    for group in data:
        ids = torch.tensor([group.prompt_ids + group.members[-1].ids])
        labels = ids.clone()
        labels[:, : len(group.prompt_ids)] = -100
        logits = model(ids, use_cache=False).logits
        total = total + LabelSmoother(smoothing)({"logits": logits}, labels, shift_labels=True, num_items_in_batch=n)
    return total


@pytest.mark.parametrize("with_others", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
def test_sft_is_smoothed_over_the_tokens_of_the_whole_step(name: str, with_others: bool, tmp_path: Path) -> None:
    model, data = build(name), groups(with_others)
    want_loss = by_label_smoother(model, data, 0.3)
    want = gradients(model, want_loss)
    args = {"label_smoothing_factor": 0.3}
    trainer = make_trainer(tmp_path, LossArguments(loss="sft"), model=model, data=data, args=args)
    for size in (4, 2, 1):
        cut = [data[i : i + size] for i in range(0, 4, size)]
        batches, items = trainer.get_batch_samples(iter(cut), len(cut), torch.device("cpu"))
        losses = [trainer.compute_loss(model, b, num_items_in_batch=items) for b in batches]
        assert float(sum(losses).detach()) == pytest.approx(float(want_loss.detach()), rel=1e-5)
        assert_same_gradients(gradients(model, sum(losses)), want, 1e-4)


def test_the_router_loss_is_beside_the_smoothed_one(tmp_path: Path) -> None:
    model, data = build("mixtral", output_router_logits=True, router_aux_loss_coef=0.5), groups(False)
    losses = {}
    for smoothing in (0.0, 0.2):
        args = {"label_smoothing_factor": smoothing}
        trainer = make_trainer(tmp_path, LossArguments(loss="sft"), model=model, data=data, args=args)
        for size in (4, 1):
            cut = [data[i : i + size] for i in range(0, 4, size)]
            batches, items = trainer.get_batch_samples(iter(cut), len(cut), torch.device("cpu"))
            parts = [trainer.compute_loss(model, b, num_items_in_batch=items) for b in batches]
            losses[smoothing, size] = float(sum(parts).detach())
        assert losses[smoothing, 4] == pytest.approx(losses[smoothing, 1], rel=1e-5)
    assert losses[0.0, 4] != pytest.approx(losses[0.2, 4], rel=1e-3)


def test_a_smoothed_training_run_logs_another_loss_and_learns(tmp_path: Path) -> None:
    first = []
    for smoothing in (0.0, 0.2):
        args = {"label_smoothing_factor": smoothing, "max_steps": 6, "gradient_accumulation_steps": 2}
        args["per_device_train_batch_size"] = 2
        trainer = make_trainer(tmp_path, LossArguments(loss="sft"), model=build("llama"), data=groups(False), args=args)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert losses[-1] < losses[0]
        first.append(losses[0])
    assert first[0] != pytest.approx(first[1], rel=1e-2)
