"""Losses against their formulas, and MATHS's identities of Eq. 2 as gradients: SEGA, DPO, IPO, Plackett-Luce, RLOO.

Each identity is checked on the parameters of a 7-way categorical and of a tiny Llama, in fp64 and fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from gem.config import CHOICES, LossArguments
from gem.groups import ROLES
from gem.losses import dpo_loss, group_loss, ipo_loss, kl_k3, listwise_dpo_reward, pro_loss, sega_loss_fn
from gem.rank import bradley_terry_posterior
from gem.sega import RewardKind, advantages, rewards, sega_weights

BETA = 0.3


@dataclass
class Policy:
    """A differentiable policy and a reference; `logprob()` gives the log-probs (7,) of seven fixed responses."""

    parameters: list[Tensor]
    logprob: Callable[[], Tensor]
    ref: Tensor
    eps: float

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.parameters)])

    def assert_same_gradient(self, ours: Tensor, theirs: Tensor) -> None:
        a, b = self.gradient(ours), self.gradient(theirs)
        assert float(b.norm()) > 0
        # Both sides sum the same terms, weighted in another order; a few hundred roundings separate them.
        assert float((a - b).norm()) <= 500 * self.eps * float(b.norm())


def categorical(dtype: torch.dtype) -> Policy:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(7, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    ref = torch.randn(7, generator=generator, dtype=torch.float64).to(dtype).log_softmax(0)
    return Policy([logits], lambda: logits.log_softmax(0), ref, torch.finfo(dtype).eps)


def llama(dtype: torch.dtype) -> Policy:
    """Return a tiny Llama with seven responses of 6 tokens to one prompt of 3."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
    )
    model, reference = LlamaForCausalLM(config).to(dtype), LlamaForCausalLM(config).to(dtype)
    tokens = torch.randint(32, (7, 9))
    tokens[:, :3] = tokens[0, :3]

    def logprob(of: LlamaForCausalLM) -> Tensor:
        logits = of(tokens[:, :-1]).logits[:, 2:]
        return logits.log_softmax(-1).gather(-1, tokens[:, 3:, None]).sum((1, 2))

    with torch.no_grad():
        ref = logprob(reference)
    return Policy(list(model.parameters()), lambda: logprob(model), ref, torch.finfo(dtype).eps)


@pytest.fixture(params=[categorical, llama], ids=lambda build: build.__name__)
def policy(request: pytest.FixtureRequest, dtype: torch.dtype) -> Policy:
    built: Policy = request.param(dtype)
    return built


@pytest.fixture(params=[torch.float64, torch.float32], ids=["fp64", "fp32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


def sega(logprob: Tensor, reward: Tensor) -> Tensor:
    """Return SEGA's loss of one group without normalisation: the literal Eq. 2."""
    reward = reward.to(logprob.dtype)[None]
    mask = torch.ones_like(reward, dtype=torch.bool)
    return sega_loss_fn(logprob, sega_weights(advantages(reward, mask), mask, norm="none")[0])


def group_scores(k: int) -> Tensor:
    return torch.randn(k, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


# -- identities of Eq. 2 -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["identity", "softmax", "rank", "bt"])
def test_gradient_is_unchanged_under_a_shift_of_the_scores(policy: Policy, kind: RewardKind) -> None:
    def loss(scores: Tensor) -> Tensor:
        mask = torch.ones_like(scores, dtype=torch.bool)
        theta = bradley_terry_posterior(scores, tau=0.5, prior_sd=1.0).mean
        return sega(policy.logprob(), rewards(scores, mask, kind=kind, tau=0.5, posterior_mean=theta)[0])

    scores = group_scores(7)[None]
    policy.assert_same_gradient(loss(scores + 3.0), loss(scores))


def cosine_with_dpo(policy: Policy, reward: Tensor) -> float:
    """Return the cosine between the gradients of SEGA and DPO on responses 0 (chosen) and 1 (rejected); 0 if SEGA's is 0."""
    ours = policy.gradient(sega(policy.logprob()[:2], reward))
    lp, ref = policy.logprob(), policy.ref
    dpo = policy.gradient(dpo_loss(lp[:1], lp[1:2], ref[:1], ref[1:2], beta=BETA).sum())
    return float(torch.cosine_similarity(ours, dpo, dim=0))


@pytest.mark.parametrize("kind", ["identity", "softmax", "rank", "bt"])
@pytest.mark.parametrize(("pair", "cosine"), [((0.9, 0.2), 1.0), ((-3.0, 0.1), -1.0), ((0.4, 0.4), 0.0)])
def test_two_responses_give_dpos_direction_iff_the_chosen_scores_higher(
    policy: Policy, kind: RewardKind, pair: tuple[float, float], cosine: float
) -> None:
    scores = torch.tensor([pair])
    theta = bradley_terry_posterior(scores, tau=0.5, prior_sd=1.0).mean
    mask = torch.ones_like(scores, dtype=torch.bool)
    reward = rewards(scores, mask, kind=kind, tau=0.5, posterior_mean=theta)[0]
    assert cosine_with_dpo(policy, reward) == pytest.approx(cosine, abs=1e-5)


@pytest.mark.parametrize(("target", "cosine"), [((1.0, 0.0), 1.0), ((0.0, 1.0), -1.0)])
def test_listwise_reward_gives_dpos_direction_iff_the_target_is_the_chosen(
    policy: Policy, target: tuple[float, float], cosine: float
) -> None:
    one_hot = torch.tensor(target, dtype=policy.ref.dtype)
    reward = listwise_dpo_reward(policy.logprob()[:2], policy.ref[:2], one_hot, beta=BETA)
    assert cosine_with_dpo(policy, reward) == pytest.approx(cosine, abs=1e-5)


def test_two_responses_are_dpo_exactly_when_the_reward_gap_is_its_own(policy: Policy) -> None:
    def dpo() -> Tensor:
        lp = policy.logprob()
        return dpo_loss(lp[:1], lp[1:2], policy.ref[:1], policy.ref[1:2], beta=BETA).sum()

    lp = policy.logprob()[:2]
    ratio = (lp - policy.ref[:2]).detach()
    gap = 2 * BETA * torch.sigmoid(-BETA * (ratio[0] - ratio[1]))  # r_c - r_r = 2 beta s(-d)
    policy.assert_same_gradient(sega(lp, torch.stack((0.7 + gap, torch.full_like(gap, 0.7)))), dpo())
    # Any other gap gives the direction but not the size: "SEGA is DPO at k = 2" needs the condition.
    other = policy.gradient(sega(policy.logprob()[:2], torch.stack((2 * gap, 0 * gap))))
    assert float(other.norm()) == pytest.approx(2 * float(policy.gradient(dpo()).norm()), rel=1e-4)


@pytest.mark.parametrize("k", [2, 3, 5, 7])
def test_listwise_reward_gives_plackett_luces_gradient(policy: Policy, k: int) -> None:
    target = group_scores(k).softmax(0).to(policy.ref)
    ref = policy.ref[:k]
    lp = policy.logprob()[:k]
    reward = listwise_dpo_reward(lp, ref, target, beta=BETA)
    assert not reward.requires_grad and abs(float(reward.sum())) <= 8 * policy.eps
    plackett_luce = -(target * (BETA * (policy.logprob()[:k] - ref)).log_softmax(0)).sum()
    policy.assert_same_gradient(sega(lp, reward), plackett_luce)


def test_one_hot_listwise_of_two_is_dpo(policy: Policy) -> None:
    ref, one_hot = policy.ref[:2], torch.tensor([1.0, 0.0]).to(policy.ref)
    lp = policy.logprob()[:2]
    reward = listwise_dpo_reward(lp, ref, one_hot, beta=BETA)
    lp2 = policy.logprob()
    policy.assert_same_gradient(sega(lp, reward), dpo_loss(lp2[:1], lp2[1:2], ref[:1], ref[1:], beta=BETA).sum())


def test_ipo_is_two_responses_with_its_own_advantage(policy: Policy) -> None:
    lp = policy.logprob()
    ratio = (lp - policy.ref).detach()
    d = BETA * (ratio[0] - ratio[1])
    a = -2 * (d / BETA - 1 / (2 * BETA))
    ours = sega_loss_fn(lp[:2], torch.stack((a, -a)))
    lp = policy.logprob()
    policy.assert_same_gradient(ours, ipo_loss(lp[:1], lp[1:2], policy.ref[:1], policy.ref[1:2], beta=BETA).sum())


def test_rloos_gradient_is_k_over_k_minus_one_times_segas(policy: Policy) -> None:
    r = group_scores(5).to(policy.ref)
    rloo = torch.stack([r[i] - r[torch.arange(5) != i].mean() for i in range(5)])
    policy.assert_same_gradient(sega_loss_fn(policy.logprob()[:5], rloo), 1.25 * sega(policy.logprob()[:5], r))


def test_weights_that_sum_to_zero_leave_the_normaliser_out(dtype: torch.dtype) -> None:
    policy = categorical(dtype)
    weight = (group_scores(7) - group_scores(7).mean()).to(dtype)
    torch.testing.assert_close(policy.gradient(sega_loss_fn(policy.logprob(), weight)), -weight)


# -- values ------------------------------------------------------------------------------------------------------------


def test_sega_loss_and_its_gradient_by_hand() -> None:
    logprob = torch.tensor([-1.0, -2.0, -4.0], requires_grad=True)
    weight = torch.tensor([0.5, 0.25, -0.75], requires_grad=True)
    loss = sega_loss_fn(logprob, weight)
    assert loss.item() == 0.5 + 0.5 - 3.0
    loss.backward()
    assert logprob.grad is not None and torch.equal(logprob.grad, -weight.detach())
    assert weight.grad is None  # the weights are constants


def test_dpo_and_ipo_by_hand() -> None:
    chosen, rejected = torch.tensor([-10.0, -5.0]), torch.tensor([-12.0, -5.0])
    ref_chosen, ref_rejected = torch.tensor([-11.0, -5.0]), torch.tensor([-11.0, -5.0])
    dpo = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1)
    torch.testing.assert_close(dpo, torch.tensor([math.log1p(math.exp(-0.2)), math.log(2)]))
    ipo = ipo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.25)
    torch.testing.assert_close(ipo, torch.tensor([0.0, 4.0]))  # the target margin is 1 / (2 beta) = 2


def test_dpo_stays_finite_far_out() -> None:
    far = torch.tensor([-1e4], requires_grad=True)
    zero = torch.zeros(1)
    loss = dpo_loss(far, zero, zero, zero, beta=1.0)
    (gradient,) = torch.autograd.grad(loss.sum(), far)
    assert loss.item() == 1e4 and gradient.item() == -1.0


@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss])
def test_no_gradient_reaches_the_reference(loss: Callable[..., Tensor]) -> None:
    inputs = [torch.randn(3, requires_grad=True) for _ in range(4)]
    loss(*inputs, beta=0.1).sum().backward()
    assert [t.grad is not None for t in inputs] == [True, True, False, False]


def test_pro_is_plackett_luce_on_the_mean_token_logprob() -> None:
    logprob, lengths = torch.tensor([-6.0, -4.0, -9.0], dtype=torch.float64), torch.tensor([3, 4, 3])
    a, b, c = -2.0, -1.0, -3.0
    expected = -math.log(math.exp(a) / (math.exp(a) + math.exp(b) + math.exp(c)))
    expected -= math.log(math.exp(b) / (math.exp(b) + math.exp(c)))
    assert pro_loss(logprob, lengths).item() == pytest.approx(expected)
    assert torch.autograd.gradcheck(lambda x: pro_loss(x, lengths), logprob.requires_grad_())


def test_pro_of_two_is_the_logistic_loss_of_their_gap() -> None:
    logprob = torch.tensor([-3.0, -8.0])
    expected = -torch.nn.functional.logsigmoid(torch.tensor(-3.0 / 2 + 8.0 / 4))
    torch.testing.assert_close(pro_loss(logprob, torch.tensor([2, 4])), expected)


def test_k3_estimates_the_kl_and_is_never_negative() -> None:
    generator = torch.Generator().manual_seed(3)
    policy, ref = (torch.randn(9, dtype=torch.float64, generator=generator).log_softmax(0) for _ in range(2))
    k3 = kl_k3(policy, ref)
    assert bool((k3 >= 0).all())
    # Its mean under the policy is the KL divergence itself.
    torch.testing.assert_close((policy.exp() * k3).sum(), (policy.exp() * (policy - ref)).sum())
    assert torch.equal(kl_k3(policy, policy), torch.zeros_like(policy))


def test_k3_resolves_small_differences_and_its_gradient_flows_to_the_policy_only() -> None:
    logprob = torch.tensor([-3.0], requires_grad=True)
    ref = torch.tensor([-3.0 + 2**-12], requires_grad=True)
    k3 = kl_k3(logprob, ref)
    # exp(x) - 1 in fp32 would leave half of x^2 / 2 = 3e-8.
    assert k3.item() == pytest.approx(math.expm1(2**-12) - 2**-12, rel=1e-2)
    k3.sum().backward()
    assert logprob.grad is not None and logprob.grad.item() == pytest.approx(-math.expm1(2**-12), rel=1e-3)
    assert ref.grad is None


# -- the loss of a group -----------------------------------------------------------------------------------------------


def loss_of_group(arguments: LossArguments, *, roles: tuple[str, ...] = ("candidate", "chosen", "rejected")) -> Tensor:
    """Return the loss of a group whose members have two tokens each."""
    k = len(roles)
    generator = torch.Generator().manual_seed(4)
    logprob, ref = (-torch.rand(2 * k, generator=generator) for _ in range(2))
    sequence, role = torch.arange(k).repeat_interleave(2), torch.tensor([ROLES[name] for name in roles])  # type: ignore[index]
    weight, fresh = torch.linspace(0.5, -0.5, k), torch.zeros(k, dtype=torch.bool)
    return group_loss(logprob, ref, sequence, weight, role, fresh, arguments)["loss"]


def test_every_loss_of_the_configuration_has_a_case_of_its_own() -> None:
    found = [float(loss_of_group(LossArguments(loss=name))) for name in CHOICES["loss"]]
    assert all(map(math.isfinite, found)) and len(set(found)) == len(found)


@pytest.mark.parametrize("listed", [False, True])
def test_an_unknown_loss_raises(listed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that the configuration allows and group_loss lacks trains nothing, rather than another loss."""
    if listed:
        monkeypatch.setitem(CHOICES, "loss", (*CHOICES["loss"], "ppo"))
    with pytest.raises(ValueError, match="loss must be one of sega, listwise_dpo, dpo, ipo, pro, sft, got 'ppo'"):
        loss_of_group(LossArguments(loss="ppo"))
    with pytest.raises(ValueError, match="got 'ppo'"):
        group_loss(ONE, None, ONE.long(), ONE, ONE.long(), ONE.bool(), LossArguments(loss="ppo"))


@pytest.mark.parametrize("name", ["listwise_dpo", "dpo", "ipo", "pro"])
def test_losses_that_need_a_human_pair_say_so(name: str) -> None:
    with pytest.raises(
        ValueError, match=f"loss={name} needs groups with the log-probs of a reference and a human pair"
    ):
        loss_of_group(LossArguments(loss=name), roles=("candidate", "chosen"))
    assert math.isfinite(loss_of_group(LossArguments(), roles=("candidate", "chosen")))


def test_taper_ends_the_push_on_what_the_policy_no_longer_says() -> None:
    role, sequence = torch.tensor([1, 2]), torch.tensor([0, 1])
    weight, fresh = torch.tensor([1.0, -1.0]), torch.tensor([False, False])
    for drop, expected in ((0.0, 1.0), (2.0, 2.718281828**-2.0), (100.0, 0.0)):
        logprob = torch.tensor([-1.0, -1.0 - drop], requires_grad=True)
        terms = group_loss(
            logprob, torch.tensor([-1.0, -1.0]), sequence, weight, role, fresh, LossArguments(sft_weight=0.0)
        )
        terms["loss"].backward()
        torch.testing.assert_close(logprob.grad, torch.tensor([-1.0, expected]))


# -- bad input ---------------------------------------------------------------------------------------------------------

ONE, TWO = torch.zeros(1), torch.zeros(2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sega_loss_fn(TWO, ONE), ValueError, "logprob, weight of one shape"),
        (lambda: sega_loss_fn(torch.zeros(1, 2), torch.zeros(1, 2)), ValueError, r"\(1, 2\)"),
        (lambda: sega_loss_fn(TWO.bfloat16(), TWO), TypeError, "logprob must be float32 or float64 .*bfloat16"),
        (lambda: dpo_loss(TWO, TWO, TWO, ONE, beta=0.1), ValueError, "ref_rejected"),
        (lambda: dpo_loss(TWO, TWO, TWO, TWO, beta=0.0), ValueError, "beta must be finite and > 0, got 0.0"),
        (lambda: ipo_loss(TWO, TWO, TWO, TWO, beta=math.nan), ValueError, "beta must be finite and > 0, got nan"),
        (lambda: pro_loss(ONE, ONE), ValueError, "K >= 2"),
        (lambda: pro_loss(TWO, ONE), ValueError, r"\(2,\), \(1,\)"),
        (lambda: pro_loss(TWO, TWO), ValueError, "lengths must be > 0, got"),
        (lambda: listwise_dpo_reward(TWO, TWO, TWO, beta=0.1), ValueError, "target must be >= 0 and sum to 1"),
        (lambda: listwise_dpo_reward(TWO, TWO, torch.tensor([2.0, -1.0]), beta=0.1), ValueError, "target must be >= 0"),
        (lambda: kl_k3(TWO.half(), TWO), TypeError, "logprob must be float32 or float64"),
        (lambda: kl_k3(TWO, ONE), ValueError, "ref_logprob of one shape"),
    ],
)
def test_bad_input(call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_known_kl_is_shown_whatever_its_weight() -> None:
    """Of a groups file the reference log-probs are there; what is not known has no part."""
    role, sequence, logprob = torch.tensor([0, 1]), torch.tensor([0, 0, 1]), torch.tensor([-1.0, -2.0, -3.0])
    weight, fresh = torch.tensor([0.5, -0.5]), torch.tensor([True, False])
    arguments = LossArguments(kl_weight=0.0, taper=False)

    def parts(ref: list[float] | None) -> dict[str, torch.Tensor]:
        return group_loss(logprob, None if ref is None else torch.tensor(ref), sequence, weight, role, fresh, arguments)

    x = torch.tensor([0.5, 0.25])
    assert parts([-0.5, -1.75, -3.0])["kl"] == pytest.approx(float((x.exp() - 1 - x).sum()))
    for unknown in ([math.nan, math.nan, -3.0], None):
        assert "kl" not in parts(unknown) and torch.isfinite(parts(unknown)["loss"])
