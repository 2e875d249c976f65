"""What a fused call returns, beside the model's own logits, and which calls it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import VOCAB, build
from head_cases import SKIP, B, T, batch, entropy_weighted, from_logits
from torch import Tensor

from gem.head import FusedCausalLMOutput, fuse_lm_head
from gem.head.output import STATISTICS, HeadStats
from gem_kernels import TokenStats, linear_group_loss


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "phi"])  # plain, softcap, scale, bias
def test_every_field_is_that_of_the_logits(name: str, temperature: float, shifted: bool) -> None:
    model, inputs = build(name), batch()
    z = model(inputs["input_ids"]).logits / temperature
    labels = inputs.pop("labels")
    if shifted:
        inputs["shift_labels"] = targets = labels
    else:
        inputs["labels"], targets, z = labels, labels[:, 1:], z[:, :-1]
    extra = ("is_top1", "mean_logits", "log_sum_sq_probs")
    assert fuse_lm_head(model, temperature=temperature, outputs=extra) is model
    out = model(**inputs, fused_lm_head=True)
    assert isinstance(out, FusedCausalLMOutput) and out.aux_loss is None
    assert torch.equal(out.label_mask, targets != SKIP)
    for field, expected in from_logits(z, targets).items():
        got = out[field]
        assert got.shape == targets.shape
        assert got.dtype == (torch.bool if field == "is_top1" else torch.float32)
        assert got.requires_grad == (field in ("log_probs", "entropy", "lse"))
        torch.testing.assert_close(got.double(), expected.double(), atol=2e-5, rtol=1e-5)
    nll = -out.log_probs.sum()
    torch.testing.assert_close(out.loss, nll / (targets != SKIP).sum())
    for items in (7, torch.tensor(7)):
        torch.testing.assert_close(model(**inputs, fused_lm_head=True, num_items_in_batch=items).loss, nll / 7)
    sharper = model(**inputs, fused_lm_head=True, temperature=temperature / 2)
    torch.testing.assert_close(sharper.lse.double(), from_logits(2 * z, targets)["lse"].double(), atol=4e-5, rtol=1e-5)


def test_extra_fields_are_none_unless_asked_for() -> None:
    out = fuse_lm_head(build("llama"))(**batch(), fused_lm_head=True)
    assert out.mean_logits is out.is_top1 is out.log_sum_sq_probs is out.aux_loss is None


def test_nothing_to_predict_is_a_zero_with_a_gradient() -> None:
    model, inputs = build("llama tied"), batch()
    fuse_lm_head(model, outputs=("mean_logits", "is_top1"))
    out = model(inputs["input_ids"], labels=torch.full((B, T), SKIP), fused_lm_head=True)
    assert out.loss == 0 and not out.log_probs.any() and not out.is_top1.any() and not out.label_mask.any()
    out.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_bf16_statistics_are_fp32_of_bf16_logits_unrounded() -> None:
    model, inputs = build("llama").bfloat16(), batch()
    hidden = model.model(inputs["input_ids"]).last_hidden_state[:, :-1]
    exact = from_logits(hidden.double() @ model.lm_head.weight.double().T, inputs["labels"][:, 1:])
    rounded = from_logits(model(inputs["input_ids"]).logits[:, :-1], inputs["labels"][:, 1:])
    out = fuse_lm_head(model)(**inputs, fused_lm_head=True)
    assert out.log_probs.dtype == out.loss.dtype == torch.float32
    ours = (out.log_probs - exact["log_probs"]).abs().max()
    theirs = (rounded["log_probs"] - exact["log_probs"]).abs().max()
    assert ours < 1e-5 and theirs > 1e-3


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_group_loss_goes_through_the_models_forward(name: str) -> None:
    model, inputs = build(name), batch()
    keep = inputs["labels"][:, 1:] != SKIP
    counts = keep.sum(1).tolist()
    cu_groups = torch.tensor([0, counts[0] + counts[1], sum(counts)])  # rows 0 and 1; row 2
    fuse_lm_head(model)
    stats = model(**inputs, fused_lm_head=True)
    groups = [
        HeadStats(*(s[keep][a:b] for s in (stats[name] for name in STATISTICS)))
        for a, b in ((0, cu_groups[1]), (cu_groups[1], cu_groups[2]))
    ]
    expected = entropy_weighted(groups[0], 0) + entropy_weighted(groups[1], 1)
    expected.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    out = model(**inputs, fused_lm_head=True, loss_fn=entropy_weighted, cu_groups=cu_groups)
    torch.testing.assert_close(out.loss, expected)
    for field in STATISTICS:
        assert not out[field].requires_grad
        torch.testing.assert_close(out[field], stats[field].detach())
    out.loss.backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[n], atol=1e-6, rtol=1e-4)


def test_a_group_loss_is_that_of_the_op() -> None:
    model, inputs = build("llama"), batch()
    targets = inputs["labels"][:, 1:]
    hidden = model.model(inputs["input_ids"]).last_hidden_state[:, :-1][targets != SKIP]
    cu_groups = torch.tensor([0, 3, hidden.shape[0]])
    expected = linear_group_loss(hidden, model.lm_head.weight, targets[targets != SKIP], cu_groups, entropy_weighted)
    fuse_lm_head(model)
    out = model(**inputs, fused_lm_head=True, loss_fn=entropy_weighted, cu_groups=cu_groups)
    assert torch.equal(out.loss, expected.loss)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "a fused call needs labels or shift_labels, got neither"),
        ({"shift_labels": torch.zeros(B, T, dtype=torch.int64)}, "labels or shift_labels, got both"),
        ({"loss_fn": entropy_weighted}, "loss_fn and cu_groups go together, got one of them"),
        ({"cu_groups": torch.tensor([0, 1])}, "loss_fn and cu_groups go together, got one of them"),
        ({"loss_fn": entropy_weighted, "cu_groups": torch.tensor([0, 5])}, "cu_groups must start at 0 and end at"),
        (
            {"labels": torch.zeros(B, T + 1, dtype=torch.int64)},
            r"for labels \(3, 11\), got hidden states \(3, 10, 32\)",
        ),
        ({"labels": torch.full((B, T), VOCAB)}, rf"in \[0, V={VOCAB}\) \(ignore_index is None\), got {VOCAB}"),
        ({"temperature": 0.0}, "temperature must be finite and > 0, got 0.0"),
        ({"logits_to_keep": 2}, r"logits_to_keep must be 0 in a fused call \(labels of -100 cost nothing\), got 2"),
        ({"logits_to_keep": torch.arange(T).flip(0)}, "logits_to_keep must be 0 in a fused call"),
        ({"labels": [[1, 2]]}, r"labels must be a tensor of token ids \(batch, seq_len\), got list"),
        ({"labels": torch.zeros(T, dtype=torch.int64)}, r"labels must be a tensor .*, got \(10,\)"),
        ({"num_items_in_batch": 0}, "num_items_in_batch must be >= 1, got 0"),
    ],
)
def test_bad_calls_are_refused_and_leave_the_model_usable(changes: dict[str, Any], message: str) -> None:
    model, inputs = fuse_lm_head(build("llama")), batch()
    before = model(**inputs, fused_lm_head=True).loss
    with pytest.raises(ValueError, match=message):
        model(**{**inputs, **changes}, fused_lm_head=True)
    assert torch.equal(model(**inputs, fused_lm_head=True).loss, before)
    assert model(inputs["input_ids"]).logits.shape == (B, T, VOCAB)  # the head returns logits again


def test_words_of_a_fused_call_need_the_flag() -> None:
    model = fuse_lm_head(build("llama"))
    with pytest.raises(ValueError, match="need fused_lm_head=True, got a call without it"):
        model(**batch(), loss_fn=entropy_weighted, cu_groups=torch.tensor([0, 1]))


def test_a_loss_fn_may_call_the_model_and_may_fail() -> None:
    model, inputs = fuse_lm_head(build("llama")), batch()
    seen: list[Tensor] = []

    def calls_it(stats: TokenStats, group: int) -> Tensor:
        with torch.no_grad():
            seen.append(model(inputs["input_ids"]).logits)
            seen.append(model(**inputs, fused_lm_head=True).log_probs)
        return -stats.logprob.sum()

    out = model(**inputs, fused_lm_head=True, loss_fn=calls_it, cu_groups=torch.tensor([0, 20]))
    torch.testing.assert_close(out.loss, -out.log_probs.sum())
    assert seen[0].shape == (B, T, VOCAB) and torch.equal(seen[1], model(**inputs, fused_lm_head=True).log_probs)

    def fails(stats: TokenStats, group: int) -> Tensor:
        raise RuntimeError("a mistake of the caller")

    with pytest.raises(RuntimeError, match="a mistake of the caller"):
        model(**inputs, fused_lm_head=True, loss_fn=fails, cu_groups=torch.tensor([0, 20]))
    assert model(inputs["input_ids"]).logits.shape == (B, T, VOCAB)


def test_a_rounded_output_is_refused() -> None:
    """FSDP2 with the output_dtype that accelerate gives it rebuilds the output with every tensor in bf16."""
    out = fuse_lm_head(build("llama"))(**batch(), fused_lm_head=True)
    with pytest.raises(ValueError, match=r"rounded log_probs to torch.bfloat16: give FSDP2 a MixedPrecisionPolicy"):
        FusedCausalLMOutput(**{name: t.bfloat16() for name, t in out.items()})
