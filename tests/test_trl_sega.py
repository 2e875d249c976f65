"""gem.integrations.trl: SEGAReward gives TRL's GRPOTrainer the gradient of Eq. 2.

The gold is Eq. 2 in plain torch and fp64, on the completions that TRL sampled and the weights of gem.pipeline.weight_groups.
"""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

pytest.importorskip("trl")

from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback
from trl import GRPOTrainer, RLOOTrainer
from trl_trainers import build_trainer, fives, save_tiny_llama

from gem.config import RankArguments, ScoreArguments
from gem.group import Group, Member
from gem.head import fuse_lm_head
from gem.integrations.trl import SEGAReward, gem_rollout, use_gem_head
from gem.pipeline import weight_groups
from gem.score import score_groups
from gem.tasks import build_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

K = 4  # completions of a prompt
SCORE, RANK = ScoreArguments(top_m=0.3), RankArguments(human_weight=0.0, tau=0.02)
SEGA = {
    "loss_type": "luspo",
    "importance_sampling_level": "sequence",
    "scale_rewards": "none",
    "num_generations": K,
    "reward_weights": [float(K)],
    "num_iterations": 1,
    "beta": 0.0,
    "temperature": 1.0,
    "max_grad_norm": 0.0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


class Recorder(SEGAReward):
    """Keeps what TRL handed to the reward and what came back."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.calls: list[tuple[dict[str, Any], list[float]]] = []

    def __call__(self, **kwargs: Any) -> list[float]:
        result = super().__call__(**kwargs)
        self.calls.append((kwargs, result))
        return result


class Gradients(TrainerCallback):
    """The model before every optimizer step, and the gradient of that step."""

    def __init__(self) -> None:
        self.models: list[Any] = []
        self.gradients: list[dict[str, Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.models.append(copy.deepcopy({n: p.detach() for n, p in model.named_parameters()}))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def sega_run(folder: str, tmp_path: Path, **changes: Any) -> tuple[Any, Recorder, Gradients]:
    torch.manual_seed(5)  # of new adapters
    reward, gradients = Recorder(build_tokenizer(), SCORE, RANK), Gradients()
    defaults = {
        **SEGA,
        "rollout_func": gem_rollout,
        "reward_funcs": [reward],
        "max_steps": 2,
        "per_device_train_batch_size": 6 * K,
        "learning_rate": 1e-3,
    }
    trainer = build_trainer(GRPOTrainer, folder, folder, tmp_path, **{**defaults, **changes})
    trainer.add_callback(gradients)
    use_gem_head(trainer).train()
    return trainer, reward, gradients


def groups_of(given: dict[str, Any]) -> list[Group]:
    """Return the groups of a call, not yet scored."""
    prompts, completions = given["prompts"], given["completion_ids"]
    tokenizer = build_tokenizer()
    return [
        Group(
            prompts[at],
            tokenizer(prompts[at])["input_ids"],
            [Member("candidate", ids) for ids in completions[at : at + K]],
        )
        for at in range(0, len(prompts), K)
    ]


def eq2(model: Any, groups: list[Group], weights: list[float]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the gradient of Eq. 2 in the dtype of the model, and for each parameter a bound on the error of fp32.

    The gradient is -(1/B) sum_i w_i g_i, g_i the gradient of log pi(a_i). In fp32 a g_i passes the products of forward and
    backward: 7 a layer and the head, once forward and twice backward. Each sums at most 48 terms, the intermediate size. Their
    independent roundings make g_i off by 4 sqrt(48 products) u of its size, as in tests/test_real.py. What multiplies errors
    along the way is left out: norms before each block keep it near 1. The completions' errors add up in the worst case.
    """
    unit, products = torch.finfo(torch.float32).eps / 2, 3 * (7 * model.config.num_hidden_layers + 1)
    relative = 4 * math.sqrt(48 * products) * unit
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(p) for n, p in named.items()}
    bound = dict.fromkeys(named, 0.0)
    members = [(group, member) for group in groups for member in group.members]
    for (group, member), weight in zip(members, weights, strict=True):
        ids = torch.tensor([[*group.prompt_ids, *member.ids]])
        logits = model(input_ids=ids).logits[0, len(group.prompt_ids) - 1 : -1]
        log_pi = logits.log_softmax(-1).gather(-1, torch.tensor(member.ids)[:, None]).sum()
        for n, g in zip(named, torch.autograd.grad(log_pi, list(named.values())), strict=True):
            total[n] -= weight * g / len(groups)
            bound[n] += relative * abs(weight) * float(g.norm()) / len(groups)
    return total, bound


def fresh(folder: str, weights: dict[str, Tensor], peft_config: Any = None) -> Any:
    """Return a new model with its own head, with these weights, in fp64."""
    model: Any = LlamaForCausalLM.from_pretrained(folder)
    model = model if peft_config is None else get_peft_model(model, peft_config)
    model.load_state_dict(weights, strict=False)
    return model.double().eval()


def errors(folder: str, reward: Recorder, gradients: Gradients, peft_config: Any = None) -> list[float]:
    """Return for every step and parameter the error of the gradient as a multiple of its bound."""
    assert len(gradients.gradients) == len(reward.calls) == 2
    found = []
    for (given, weights), before, gradient in zip(reward.calls, gradients.models, gradients.gradients, strict=True):
        due, bound = eq2(fresh(folder, before, peft_config), groups_of(given), weights)
        assert gradient.keys() == due.keys()
        found += [float((gradient[n].double() - due[n]).norm()) / bound[n] for n in due if bound[n]]
    return found


def test_weights_are_those_of_the_pipeline(folder: str, tmp_path: Path) -> None:
    trainer, reward, gradients = sega_run(folder, tmp_path)
    kinds = set()
    for (given, weights), before in zip(reward.calls, gradients.models, strict=True):
        groups = groups_of(given)
        score_groups(groups, build_tokenizer(), fuse_lm_head(fresh(folder, before).float()), None, SCORE)
        weight_groups(groups, RANK)
        members = [member for group in groups for member in group.members]
        assert weights == pytest.approx([member.weight for member in members], abs=1e-4)
        assert all(w == 0 for w, m in zip(weights, members, strict=True) if m.truncated or m.flaw)
        kinds |= {(m.truncated, m.weight != 0) for m in members}
        for at in range(0, len(weights), K):
            assert sum(weights[at : at + K]) == pytest.approx(0, abs=1e-12)
        assert len({len(m.ids) for m in members}) > 2
    assert kinds >= {(True, False), (False, True)}
    assert any("gem/kept" in entry and "rewards/sega/mean" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"importance_sampling_level": "token"},
        {"per_device_train_batch_size": K, "gradient_accumulation_steps": 6},
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 8},  # no micro-batch holds a whole group
        {"peft_config": LoraConfig(r=4, target_modules="all-linear", lora_alpha=1, init_lora_weights=False)},
    ],
    ids=["one batch", "token level", "accumulation", "groups across micro-batches", "peft"],
)
def test_the_gradient_is_that_of_eq2(changes: dict[str, Any], folder: str, tmp_path: Path) -> None:
    _, reward, gradients = sega_run(folder, tmp_path, **changes)
    assert any(any(given["truncated"]) for given, _ in reward.calls)
    assert all(sum(map(bool, weights)) >= 2 for _, weights in reward.calls)
    assert max(errors(folder, reward, gradients, changes.get("peft_config"))) <= 1


def test_a_scaled_reward_has_another_gradient(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the bound would notice, and the refusal is needed."""
    monkeypatch.setattr("gem.integrations.trl._check_sega", lambda trainer: None)
    for changes in ({"scale_rewards": "group"}, {"loss_type": "grpo"}):
        assert max(errors(folder, *sega_run(folder, tmp_path, **changes)[1:])) > 100, changes


def kl_gradient(policy: Any, reference: Any, groups: list[Group], beta: float) -> dict[str, Tensor]:
    """Return the gradient of beta times gem's KL term: the sum of k3 over the tokens, a mean over the completions."""
    named = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    total, members = torch.zeros(()).double(), [(group, member) for group in groups for member in group.members]
    for group, member in members:
        ids, start = torch.tensor([[*group.prompt_ids, *member.ids]]), len(group.prompt_ids) - 1
        own, ref = (
            model(input_ids=ids).logits[0, start:-1].log_softmax(-1).gather(-1, torch.tensor(member.ids)[:, None])[:, 0]
            for model in (policy, reference)
        )
        x = ref.detach() - own
        total = total + (x.exp() - 1 - x).sum()
    gradients = torch.autograd.grad(beta * total / len(members), list(named.values()))
    return dict(zip(named, gradients, strict=True))


@pytest.mark.parametrize("corrected", [False, True])
def test_beta_is_the_kl_weight(corrected: bool, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second step, where the policy has left its reference. TRL's corrected KL has another gradient."""
    if corrected:
        monkeypatch.setattr("gem.integrations.trl._check_sega", lambda trainer: None)
    _, reward, gradients = sega_run(folder, tmp_path, beta=0.5, use_bias_correction_kl=corrected, learning_rate=1e-2)
    reference, policy = (fresh(folder, weights) for weights in gradients.models)
    (given, weights), got = reward.calls[1], gradients.gradients[1]
    due, _ = eq2(policy, groups_of(given), weights)
    kl = kl_gradient(policy, reference, groups_of(given), 0.5)
    error = sum(float((got[n].double() - due[n] - kl[n]).square().sum()) for n in due) ** 0.5
    size = sum(float(kl[n].square().sum()) for n in kl) ** 0.5
    assert size > 1e-3 and (error > 0.02 * size if corrected else error < 1e-4 * size)


def test_other_rewards_and_an_evaluation_beside_it(folder: str, tmp_path: Path) -> None:
    reward = Recorder(build_tokenizer(), SCORE, RANK)
    trainer, *_ = sega_run(
        folder,
        tmp_path,
        reward_funcs=[reward, fives],
        reward_weights=[float(K), 0.5],
        beta=0.05,
        use_bias_correction_kl=False,
        num_generations_eval=2,
    )
    assert "eval_rewards/sega/mean" in trainer.evaluate()
    assert reward.calls[-1][0]["group_size"] == [2] * len(reward.calls[-1][1])


def test_refusals_of_the_trainer(folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def build(kind: type = GRPOTrainer, **changes: Any) -> Any:
        rollout = {"rollout_func": gem_rollout} if kind is GRPOTrainer else {}
        reward = {"reward_funcs": [fives, SEGAReward(build_tokenizer())], "reward_weights": None}
        return build_trainer(kind, folder, folder, tmp_path, **{**reward, **rollout, **changes})

    for changes, said in (
        ({"scale_rewards": "group"}, "scale_rewards must be 'none' with SEGAReward, .*, got 'group'"),
        ({"loss_type": "dapo"}, "loss_type must be 'luspo' with SEGAReward, .*, got 'dapo'"),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "must be 'sum_then_normalize' with SEGAReward"),
        ({"top_entropy_quantile": 0.2}, "top_entropy_quantile must be 1.0 with SEGAReward, .*, got 0.2"),
        ({"entropy_coef": 0.1}, "entropy_coef must be 0.0 with SEGAReward, .*, got 0.1"),
        ({"beta": 0.05}, "use_bias_correction_kl must be False with SEGAReward and beta > 0, .*, got True"),
        ({"num_generations": 2}, "num_generations must be at least 3 with SEGAReward: .*, got 2"),
    ):
        with pytest.raises(ValueError, match=said):
            use_gem_head(build(**{**SEGA, "reward_weights": None, **changes}))
    with pytest.raises(ValueError, match="SEGAReward is for TRL's GRPOTrainer, got RLOOTrainer"):
        use_gem_head(build(RLOOTrainer))
    with caplog.at_level(logging.WARNING, "gem"):
        use_gem_head(build(**{**SEGA, "reward_weights": None}))
        assert not [r for r in caplog.records if r.name.startswith("gem")]
        use_gem_head(build(**{**SEGA, "reward_weights": None, "num_iterations": 2, "temperature": 0.7}))
    assert [r.message[:16] for r in caplog.records if r.name.startswith("gem")] == [
        "num_iterations=2",
        "temperature=0.7:",
    ]


def test_refusals_of_the_reward() -> None:
    tokenizer = build_tokenizer()
    with pytest.raises(ValueError, match="score_with must be 'policy' in SEGAReward, got 'reference'"):
        SEGAReward(tokenizer, ScoreArguments(score_with="reference"))
    with pytest.raises(ValueError, match="human_weight must be 0 in SEGAReward, .* got 4.0"):
        SEGAReward(tokenizer, rank=RankArguments())
    with pytest.raises(ValueError, match="weight_norm must be one of"):
        SEGAReward(tokenizer, rank=RankArguments(human_weight=0.0, weight_norm="sum"))
    reward = SEGAReward(tokenizer)
    given = {"completion_ids": [[9, 2], [10, 2], [11, 2]], "entropies": [[0.5, 0.1]] * 3, "truncated": [False] * 3}
    with pytest.raises(ValueError, match="SEGAReward needs group_size: give GRPOTrainer rollout_func=gem_rollout"):
        reward(prompts=["1+1="] * 3, **given)
    for prompts, size in ((["1+1="] * 3, 2), (["1+1=", "1+1=", "2+2="], 3)):
        with pytest.raises(ValueError, match=f"whole groups of {size} completions .* per_device_train_batch_size"):
            reward(prompts=prompts, group_size=[size] * 3, **given)
    weights = reward(prompts=["1+1="] * 3, group_size=[3] * 3, **{**given, "entropies": [[0.5, 0], [1.5, 0], [9.0, 0]]})
    assert weights[0] > 0 > weights[2] and sum(weights) == pytest.approx(0, abs=1e-12)
    all_kept = SEGAReward(tokenizer, rank=RankArguments(human_weight=0.0, filter_groups=False))
    given["completion_ids"] = [[8, 5, 8, 6, 2], [10, 2], [11, 2]]  # the first repeats the prompt: no score
    weights = all_kept(
        prompts=["1+1="] * 3, group_size=[3] * 3, **{**given, "entropies": [[0.1] * 5, [1.5, 0], [5.0, 0]]}
    )
    assert weights[0] == 0 and weights[1] > 0 > weights[2]
