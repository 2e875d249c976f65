"""gem's head in TRL's trainers, and S of Eq. 1 or the weights of Eq. 2 (arXiv 2511.13007) as a reward of GRPOTrainer.

    args = GRPOConfig(reward_weights=[0.2, 1.0], beta=0.05, scale_rewards="none", ...)
    trainer = GRPOTrainer(model, [GEMReward(tokenizer), accuracy], args, rollout_func=gem_rollout, ...)
    use_gem_head(trainer).train()

It needs TRL 1.16 or newer, and uses only its public parts: the models of a constructed trainer, rollout_func, reward functions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer, SFTTrainer  # type: ignore[attr-defined]
from trl.data_utils import is_conversational
from trl.distributed import DistributedBackend
from trl.models import unwrap_model_for_generation  # type: ignore[attr-defined]

from gem.config import RankArguments, ScoreArguments, check
from gem.ends import Ends
from gem.group import Group, Member
from gem.head import fuse_lm_head, fused_head
from gem.pipeline import weight_groups
from gem.score import apply_eq1, read_members, token_stats
from gem.tokens import cut_at_eos, left_pad
from gem_kernels import Impl

logger = logging.getLogger(__name__)
TrainerT = TypeVar("TrainerT")
_TRAINERS = (GRPOTrainer, RLOOTrainer, DPOTrainer, KTOTrainer, SFTTrainer)
# Without these, SEGAReward's gradient is not Eq. 2's on any completion.
_SEGA_SETTINGS: dict[str, Any] = {
    "loss_type": "luspo",
    "scale_rewards": "none",
    "multi_objective_aggregation": "sum_then_normalize",
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
}


def use_gem_head(trainer: TrainerT, *, impl: Impl = "auto") -> TrainerT:
    """Let a TRL trainer compute log-probs, entropies and their gradients with gem_kernels; call it before train().

    Losses, metrics and random numbers stay those of TRL, to rounding. Three things change. Log-probs and entropies come from
    fp32 logits. LoRA on the lm_head counts and is trained (TRL's head multiplies with `lm_head.weight` alone). The head is
    compared with the model's own logits before this returns.

    TRL's trainers refuse a PeftModel that has an adapter on the lm_head, so add that adapter after construction::

        trainer = DPOTrainer(model, peft_config=LoraConfig(target_modules="all-linear"), ...)  # all but the lm_head
        trainer.model.add_adapter("head", LoraConfig(target_modules=["lm_head"]))
        trainer.model.base_model.set_adapter(["default", "head"])
        use_gem_head(trainer)

    Args:
        trainer: a GRPOTrainer, RLOOTrainer, DPOTrainer, KTOTrainer or SFTTrainer; its model and, if it holds one, its reference
            model are fused (gem.head.fuse_lm_head) at the trainer's temperature. A second call replaces the first.
        impl: as in gem_kernels.

    Returns:
        The same trainer.

    Raises:
        TypeError: another trainer, or a model without an lm_head.
        ValueError: from fuse_lm_head; cast_lm_head_to_fp32 is set under autocast, which would undo the cast; or a setting of
            the trainer changes the gradient of its SEGAReward.
    """
    if not isinstance(trainer, _TRAINERS):
        expected = ", ".join(t.__name__ for t in _TRAINERS)
        raise TypeError(f"trainer must be one of TRL's {expected}, got {type(trainer).__name__}")
    trl_trainer: Any = trainer
    args = trl_trainer.args
    if getattr(args, "cast_lm_head_to_fp32", False) and (args.bf16 or args.fp16):
        raise ValueError(
            "cast_lm_head_to_fp32 must be False under autocast (bf16 or fp16), got True: gem's head multiplies the "
            "operands that autocast has rounded, and keeps the logits and all that follows in fp32 anyway"
        )
    if any(isinstance(reward, SEGAReward) for reward in getattr(trl_trainer, "reward_funcs", ())):
        _check_sega(trl_trainer)
    temperature = float(getattr(trl_trainer, "temperature", 1.0))  # GRPO and RLOO divide by it in policy and reference
    fuse_lm_head(trl_trainer.model, temperature=temperature, outputs=_outputs(trl_trainer), impl=impl)
    reference = getattr(trl_trainer, "ref_model", None)
    if reference is not None:
        fuse_lm_head(reference, temperature=temperature, impl=impl)
    return trainer


def _check_sega(trainer: Any) -> None:
    """Raise ValueError for settings with which SEGAReward does not give Eq. 2; warn of those with which it is not exact."""
    if not isinstance(trainer, GRPOTrainer):
        raise ValueError(f"SEGAReward is for TRL's GRPOTrainer, got {type(trainer).__name__}")
    args: Any = trainer.args
    for name, needed in _SEGA_SETTINGS.items():
        if (value := getattr(args, name)) != needed:
            raise ValueError(
                f"{name} must be {needed!r} with SEGAReward, whose gradient is else not Eq. 2's, got {value!r}"
            )
    if args.beta and args.use_bias_correction_kl:
        raise ValueError(
            "use_bias_correction_kl must be False with SEGAReward and beta > 0, whose KL term is else not GEM's, got True"
        )
    rewards = [reward for reward in trainer.reward_funcs if isinstance(reward, SEGAReward)]
    k: int = cast(Any, trainer).num_generations
    if k < 3 and any(reward.rank.filter_groups for reward in rewards):
        raise ValueError(
            "num_generations must be at least 3 with SEGAReward: one comparison is less than its own uncertainty, so "
            f"filter_groups drops every group, got {k}"
        )
    if args.gradient_accumulation_steps % (args.steps_per_generation * args.num_iterations):
        logger.warning(
            "num_iterations=%d, steps_per_generation=%d and gradient_accumulation_steps=%d: of several optimizer steps on the "
            "same completions, only the first has the gradient of Eq. 2",
            args.num_iterations,
            args.steps_per_generation,
            args.gradient_accumulation_steps,
        )
    if args.temperature != 1:
        logger.warning(
            "temperature=%g: TRL's loss, and so Eq. 2, is that of the policy at this temperature; GEMTrainer's is at 1",
            args.temperature,
        )


def _outputs(trainer: Any) -> tuple[str, ...]:
    """Return the fields beyond log-probs and entropies that a trainer reads; the others would cost time."""
    match trainer:
        case SFTTrainer():
            return ("is_top1",)  # mean_token_accuracy
        case DPOTrainer():
            weights = ("log_sum_sq_probs",) if cast(Any, trainer).args.use_weighting else ()  # WPO
            return ("is_top1", "mean_logits", *weights)  # mean_token_accuracy, logits/*
        case KTOTrainer():
            return ("mean_logits",)  # logits/*
        case _:
            return ()


def gem_rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """Rollout function of GRPOTrainer: TRL's own generation, and the entropies of the policy that generated.

    It samples what TRL would sample without it: settings, chat template, ends of sequence and random numbers are the same. Then
    it makes one pass without gradients over the completions. The entropies are untempered at any temperature of the trainer.

    Args:
        prompts: the prompts of this process. TRL 1.16 passes every prompt num_generations times in a row (its documentation
            says once): each gets one completion. TRL passes the columns of the dataset to the reward functions itself.
        trainer: a GRPOTrainer after use_gem_head.

    Returns:
        prompt_ids and completion_ids: lists of token ids, in the order of the prompts. logprobs: None, as in TRL's own
        generation with transformers (TRL computes log-probs where it needs them). For GEMReward and SEGAReward: entropies,
        nats, one for each completion token; truncated, True if a completion has no end of sequence; and group_size, the number
        of completions of a prompt on all processes.

    Raises:
        ValueError: use_gem_head was not called, or not all completions are sampled here: use_vllm, tools, images.
    """
    _check_rollout(prompts, trainer)
    processing = trainer.processing_class
    if is_conversational({"prompt": prompts[0]}):
        prompt_ids = processing.apply_chat_template(
            conversation=prompts,
            chat_template=trainer.chat_template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            **trainer.chat_template_kwargs,
        )["input_ids"]
    else:
        prompt_ids = processing(text=prompts)["input_ids"]
    arguments = next((r.arguments for r in trainer.reward_funcs if isinstance(r, _EntropyReward)), ScoreArguments())
    group_size = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
    with (
        unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
            generation_kwargs=trainer.generation_kwargs,
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        ) as model,
        DistributedBackend(trainer.accelerator).summon_full_params(trainer.model_wrapped, recurse=False),
    ):
        completion_ids = _sample(model, prompt_ids, trainer)
        sequences = list(zip(prompt_ids, completion_ids, strict=True))
        stats = token_stats(model, sequences, batch_tokens=arguments.score_tokens)
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": completion_ids,
        "logprobs": None,
        "entropies": [s.entropy.tolist() for s in stats],
        "truncated": [ids[-1] not in trainer.eos_token_ids for ids in completion_ids],
        "group_size": [group_size] * len(completion_ids),
    }


def _check_rollout(prompts: list[Any], trainer: Any) -> None:
    """Raise ValueError for a trainer or prompts that gem_rollout cannot serve."""
    try:
        fused_head(trainer.model)
    except ValueError as error:
        raise ValueError(f"gem_rollout needs use_gem_head(trainer) before train(): {error}") from None
    if trainer.use_vllm or trainer.tools:
        setting = "use_vllm" if trainer.use_vllm else "tools"
        raise ValueError(f"gem_rollout samples with transformers, one turn: {setting} must be unset, got {setting} set")
    if any(isinstance(message["content"], list) for p in prompts if not isinstance(p, str) for message in p):
        raise ValueError("gem_rollout takes text only, got a prompt with content blocks (images)")


@torch.no_grad()
def _sample(model: nn.Module, prompt_ids: Sequence[list[int]], trainer: Any) -> list[list[int]]:
    """Return one completion for each prompt, sampled in one batch as TRL does, with its end of sequence unless cut off."""
    inputs = left_pad(prompt_ids, trainer.generation_config.pad_token_id, trainer.accelerator.device)
    out = cast(Any, model).generate(**inputs, generation_config=trainer.generation_config)
    completions: list[list[int]] = out[:, inputs["input_ids"].shape[1] :].tolist()
    ends = set(trainer.eos_token_ids)
    return [cut_at_eos(ids, ends) for ids in completions]


class _EntropyReward:
    """What the rewards share: S of Eq. 1 from the entropies of gem_rollout, with the spans and flaws of gem.score."""

    def __init__(self, tokenizer: Any, arguments: ScoreArguments | None = None) -> None:
        self.tokenizer, self.arguments = tokenizer, arguments or ScoreArguments()
        check(self.arguments)
        if self.arguments.score_with != "policy":
            raise ValueError(f"score_with must be 'policy' in {type(self).__name__}, got {self.arguments.score_with!r}")

    def _scored(
        self,
        prompts: Sequence[Any],
        completion_ids: Sequence[list[int]],
        entropies: Sequence[list[float]] | None,
        truncated: Sequence[bool] | None,
        log_metric: Callable[[str, float], None] | None,
        size: int,
    ) -> list[Group]:
        """Return groups of `size` completions in a row, with S of every completion; log the means of its terms as gem/*."""
        if entropies is None or truncated is None:
            name = type(self).__name__
            raise ValueError(f"{name} needs entropies and truncated: give GRPOTrainer rollout_func=gem_rollout")
        for ids, entropy in zip(completion_ids, entropies, strict=True):
            if len(ids) != len(entropy):
                raise ValueError(f"expected an entropy for each of {len(ids)} completion tokens, got {len(entropy)}")
        members = [
            Member("candidate", list(ids), entropies=list(entropy), sampled=True)
            for ids, entropy in zip(completion_ids, entropies, strict=True)
        ]
        groups = [Group(_question(prompts[at]), [], members[at : at + size]) for at in range(0, len(members), size)]
        # A completion that was not cut off ends with an end of sequence, and only there.
        ends = Ends(frozenset(ids[-1] for ids, cut in zip(completion_ids, truncated, strict=True) if not cut))
        read_members(groups, self.tokenizer, ends, self.arguments)
        apply_eq1(members, torch.tensor([h for entropy in entropies for h in entropy]), self.arguments)
        scored = [member for member in members if not math.isnan(member.score)]
        if log_metric is not None and scored:
            log_metric("gem/final_entropy", sum(member.final_entropy for member in scored) / len(scored))
            log_metric("gem/branch_entropy", sum(member.branch_entropy for member in scored) / len(scored))
            log_metric("gem/answers_by_marker", sum(member.span_rule == "marker" for member in scored) / len(scored))
        return groups


def _question(prompt: Any) -> str:
    """Return the user's own words in a prompt of TRL: the text, or the last message of a conversation."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


class GEMReward(_EntropyReward):
    """Reward function of GRPOTrainer: S of Eq. 1, from the entropies of gem_rollout.

        S = -w_final * mean of H over the answer + lambda * mean of the m largest H of the reasoning    (nats)

    A completion that was cut off, gives no answer or only repeats the prompt gets None, no reward. GRPO centres S within the
    group of a prompt. The means of the two terms and the share of answers found by a marker are logged as gem/*.

    Beside other rewards TRL adds None up as 0: a premium if the others' S is below 0, a penalty if it is above. Give
    max_completion_length room, or set GRPOConfig.multi_objective_aggregation="normalize_then_sum". There None counts as the
    mean of the group, but rewards are divided by standard deviations.

    **S alone is no objective.** It does not see right or wrong: a policy raises it by growing sure of its answers and unsure of
    its reasoning. On chain addition, divided by the group's standard deviation, it took greedy accuracy from 0.32 to 0.92 in 20
    steps and to 0.17 by step 60 (one seed). Where errors sit on tokens of high entropy it collapses at once. So combine it with
    a reward that sees the task (GRPOConfig.reward_weights: one weight a function), keep beta > 0 and scale_rewards="none", and
    watch a held-out accuracy.

    Args:
        tokenizer: the policy's tokenizer.
        arguments: settings of Eq. 1; default ScoreArguments(). A quantile of entropy_clip is taken over the completions of one
            call.

    Raises:
        ValueError: a setting is out of its range, or score_with is not "policy": the rollout's entropies are the policy's.
    """

    __name__ = "gem"  # the name of the reward in TRL's logs

    def __call__(
        self,
        *,
        prompts: Sequence[Any],
        completion_ids: Sequence[list[int]],
        entropies: Sequence[list[float]] | None = None,
        truncated: Sequence[bool] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **_: Any,
    ) -> list[float | None]:
        """Return S of every completion, or None where it has none.

        Args:
            prompts, completion_ids: texts or messages, and token ids, as TRL passes them.
            entropies, truncated: from gem_rollout.
            log_metric: TRL's function.

        Raises:
            ValueError: there are no entropies, or not one for each token: the completions are from another rollout.
        """
        groups = self._scored(prompts, completion_ids, entropies, truncated, log_metric, size=1)
        return [None if math.isnan(member.score) else member.score for group in groups for member in group.members]


class SEGAReward(_EntropyReward):
    """Reward function of GRPOTrainer: the weight w of Eq. 2, so that a step of GRPO is a step of GEM without the human pair.

        args = GRPOConfig(loss_type="luspo", importance_sampling_level="sequence", scale_rewards="none",
                          num_generations=k, reward_weights=[k], beta=0.05, use_bias_correction_kl=False, ...)
        trainer = GRPOTrainer(model, SEGAReward(tokenizer), args, rollout_func=gem_rollout, ...)
        use_gem_head(trainer).train()

    Eq. 1 scores the completions of a prompt, and gem.pipeline.weight_groups ranks, filters and weighs them. Weights sum to 0
    in a group, so GRPO's centring changes nothing. LUSPO sums over the tokens of a completion and averages over the k
    completions of B prompts. At ratio 1, where the completions are the policy's own, its gradient is that of

        L / k,    L = -(1/B) sum_q sum_i w_i log pi(a_i | q)                                                          (Eq. 2)

    With reward_weights=[k] it is L, and TRL's beta is gem's kl_weight. Other rewards beside it add their own GRPO term to L.
    A completion that was cut off, gives no answer or only repeats the prompt has weight 0; so have all of a group that
    agrees. The share of groups with weights is logged as gem/kept.

    **S alone is no objective**: see GEMReward. These groups have no human pair, which in GEMTrainer anchors the ranking, so
    the warning holds here in full: add a reward that sees the task, keep beta > 0, and watch a held-out accuracy.

    Args:
        tokenizer: the policy's tokenizer.
        arguments: settings of Eq. 1; default ScoreArguments(). A quantile of entropy_clip is taken over the completions of one
            call.
        rank: settings of the ranking and of the weights; default RankArguments(human_weight=0.0).

    Raises:
        ValueError: a setting is out of its range, score_with is not "policy", or human_weight is not 0.
    """

    __name__ = "sega"  # the name of the reward in TRL's logs

    def __init__(
        self, tokenizer: Any, arguments: ScoreArguments | None = None, rank: RankArguments | None = None
    ) -> None:
        super().__init__(tokenizer, arguments)
        self.rank = rank or RankArguments(human_weight=0.0)
        check(self.rank)
        if self.rank.human_weight:
            raise ValueError(
                f"human_weight must be 0 in SEGAReward, as TRL's groups have no human pair, got {self.rank.human_weight}"
            )

    def __call__(
        self,
        *,
        prompts: Sequence[Any],
        completion_ids: Sequence[list[int]],
        entropies: Sequence[list[float]] | None = None,
        truncated: Sequence[bool] | None = None,
        group_size: Sequence[int] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **_: Any,
    ) -> list[float]:
        """Return w of every completion.

        Args:
            prompts, completion_ids: texts or messages, and token ids, as TRL passes them.
            entropies, truncated, group_size: from gem_rollout.
            log_metric: TRL's function.

        Raises:
            ValueError: the completions are from another rollout, or a group is not whole on this process.
        """
        if group_size is None:
            raise ValueError("SEGAReward needs group_size: give GRPOTrainer rollout_func=gem_rollout")
        size = group_size[0]
        groups_of = [prompts[at : at + size] for at in range(0, len(prompts), size)]
        if any(len(own) < size or any(prompt != own[0] for prompt in own) for own in groups_of):
            raise ValueError(
                f"SEGAReward needs whole groups of {size} completions on every process, got {len(prompts)} completions: "
                f"per_device_train_batch_size * steps_per_generation must be a multiple of num_generations, and "
                f"per_device_eval_batch_size one of num_generations_eval"
            )
        groups = self._scored(prompts, completion_ids, entropies, truncated, log_metric, size)
        weight_groups(groups, self.rank)
        if log_metric is not None:
            log_metric("gem/kept", sum(group.kept for group in groups) / len(groups))
        return [member.weight for group in groups for member in group.members]
