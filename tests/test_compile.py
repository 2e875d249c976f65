"""torch.compile keeps every op in its graph; the operators keep the rules of torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from numerics import IMPLS, make_case
from torch import Tensor

from gem_kernels import (
    LogitTransform,
    TokenStats,
    gem_score,
    linear_group_loss,
    linear_logprob_entropy,
    logprob_entropy,
    sega_loss,
    topm_mean,
)

OFFSETS = torch.tensor([0, 10, 40])
COMPILED = [impl for impl in IMPLS if impl != "reference"]


def score(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, impl: str) -> Tensor:
    transform = LogitTransform(softcap=30.0)
    s = linear_logprob_entropy(2 * hidden, weight, targets, bias=bias, transform=transform, impl=impl)  # type: ignore[arg-type]
    return (s.logprob + 0.1 * s.entropy).sum()


def all_kept(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, impl: str) -> Tensor:
    x = {"targets": targets.clamp(min=0), "bias": bias, "ignore_index": None, "impl": impl}
    s = linear_logprob_entropy(2 * hidden, weight, **x)  # type: ignore[arg-type]
    known = sega_loss(hidden, weight, cu_seqlens=OFFSETS, seq_weight=torch.tensor([0.5, -0.5]), **x)  # type: ignore[arg-type]
    return s.logprob.sum() + known.loss


def from_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, impl: str, inplace: bool = False
) -> Tensor:
    logits = hidden @ weight.T + bias
    s = logprob_entropy(logits, targets, inplace_backward=inplace, impl=impl)  # type: ignore[arg-type]
    return (s.logprob + 0.1 * s.lse).sum()


def from_logits_inplace(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, impl: str) -> Tensor:
    return from_logits(hidden, weight, bias, targets, impl, True)


def sega(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, impl: str) -> Tensor:
    result = sega_loss(hidden, weight, targets, OFFSETS, torch.tensor([0.5, -0.5]), bias=bias, impl=impl)  # type: ignore[arg-type]
    return 2 * result.loss


def spans(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, impl: str) -> Tensor:
    entropy = linear_logprob_entropy(hidden, weight, targets, bias=bias, impl=impl).entropy  # type: ignore[arg-type]
    branch, answer = torch.tensor([[0, 5], [10, 20]]), torch.tensor([[5, 9], [20, 33]])
    means = topm_mean(entropy, OFFSETS, 0.3, impl=impl)  # type: ignore[arg-type]
    return means.sum() + gem_score(entropy, branch, answer, impl=impl).score.sum()  # type: ignore[arg-type]


@pytest.mark.parametrize("impl", COMPILED)
@pytest.mark.parametrize("fn", [score, all_kept, from_logits, from_logits_inplace, sega, spans])
def test_no_graph_break_and_the_same_numbers(fn: Callable[..., Tensor], impl: str) -> None:
    torch._dynamo.reset()
    case = make_case(40, 16, 130, rank=0)
    eager, compiled = case.leaves(), case.leaves()
    expected = fn(eager.hidden, eager.weight, eager.bias, eager.targets, impl)
    expected.backward()
    got = torch.compile(fn, fullgraph=True, backend="aot_eager")(
        compiled.hidden, compiled.weight, compiled.bias, compiled.targets, impl
    )
    got.backward()
    assert torch.equal(got, expected)
    for name, grad in eager.gradients().items():
        other = compiled.gradients()[name]
        assert (grad is None and other is None) or torch.equal(grad, other), name  # type: ignore[arg-type]


@pytest.mark.parametrize("impl", COMPILED)
def test_a_group_loss_breaks_the_graph_once(impl: str) -> None:
    def likelihood(s: TokenStats, group: int) -> Tensor:
        return -(s.entropy.detach() * s.logprob).sum()

    def fn(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return 2 * linear_group_loss(3 * hidden, weight, targets, OFFSETS, likelihood, impl=impl).loss  # type: ignore[arg-type]

    torch._dynamo.reset()
    x = make_case(40, 16, 130, rank=0, bias=False).leaves()
    explained = torch._dynamo.explain(fn)(x.hidden, x.weight, x.targets)
    assert explained.graph_break_count == 1
    assert explained.graph_count == 2
    compiled = torch.compile(fn, backend="aot_eager")(x.hidden, x.weight, x.targets)
    assert torch.equal(compiled, fn(x.hidden, x.weight, x.targets))


@pytest.mark.parametrize("ignore_index", [-100, None])
@pytest.mark.parametrize("impl", COMPILED)
def test_operators_keep_the_rules_of_torch(impl: str, ignore_index: int | None) -> None:
    """torch's own checks of schemas, fake implementations and the registration of gradients."""
    ops, x = torch.ops.gem_kernels, make_case(11, 8, 30, ignored=0.0).leaves()
    a, b, scale = x.low_rank  # type: ignore[misc]
    transform = (1.0, 1.0, False, ignore_index, impl)
    arguments = (x.hidden, x.weight, x.bias, a, b, scale, x.targets, *transform)
    stats = ops.linear_logprob(*arguments)
    upstream, plain = torch.ones(11), [t.detach() if isinstance(t, Tensor) else t for t in arguments]
    cases = [
        (ops.linear_logprob, arguments),
        (
            ops.linear_logprob_backward,
            (upstream, None, upstream, stats[-1].detach(), *plain, [True, False, True, True, True]),
        ),
        (ops.weighted_logprob, (*plain, upstream, 1 << 20, [True, True, False, False, True])),
        (ops.scale_gradient_, (torch.randn(11, 8), torch.tensor(2.0))),
    ]
    logits = torch.randn(1, 11, 30)
    state = ops.logprob(logits, x.targets, *transform[:4], False, impl)[-1]
    gradient = (logits, upstream, upstream, None, state, x.targets, *transform)
    cases += [
        (ops.logprob, (logits.clone().requires_grad_(), x.targets, *transform[:4], False, impl)),
        (ops.logprob_backward, gradient),
        (ops.logprob_backward_, gradient),
    ]
    for op, args in cases:
        torch.library.opcheck(op.default, args)
