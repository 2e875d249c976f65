"""gem's head in TRL's trainers, and S of Eq. 1 (arXiv 2511.13007) as a reward of GRPOTrainer.

    args = GRPOConfig(reward_weights=[0.2, 1.0], beta=0.05, scale_rewards="none", ...)
    trainer = GRPOTrainer(model, [GEMReward(tokenizer), accuracy], args, rollout_func=gem_rollout, ...)
    use_gem_head(trainer).train()

It needs TRL 1.16 or newer, and uses only its public parts: the models of a constructed trainer, rollout_func, reward functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RLOOTrainer, SFTTrainer  # type: ignore[attr-defined]
from trl.data_utils import is_conversational
from trl.distributed import DistributedBackend
from trl.models import unwrap_model_for_generation  # type: ignore[attr-defined]

from gem.config import LAST_TOKENS, ScoreArguments, check
from gem.group import Member
from gem.head import fuse_lm_head, fused_head
from gem.score import apply_eq1, token_stats
from gem.spans import find_spans
from gem.tokens import cut_at_eos, left_pad
from gem_kernels import Impl

TrainerT = TypeVar("TrainerT")
_TRAINERS = (GRPOTrainer, RLOOTrainer, DPOTrainer, KTOTrainer, SFTTrainer)


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
        ValueError: from fuse_lm_head; or cast_lm_head_to_fp32 is set under autocast, which would undo the cast.
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
    temperature = float(getattr(trl_trainer, "temperature", 1.0))  # GRPO and RLOO divide by it in policy and reference
    fuse_lm_head(trl_trainer.model, temperature=temperature, outputs=_outputs(trl_trainer), impl=impl)
    reference = getattr(trl_trainer, "ref_model", None)
    if reference is not None:
        fuse_lm_head(reference, temperature=temperature, impl=impl)
    return trainer


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
        generation with transformers (TRL computes log-probs where it needs them). For GEMReward: entropies, nats, one for each
        completion token; and truncated, True if a completion has no end of sequence.

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
    arguments = next((r.arguments for r in trainer.reward_funcs if isinstance(r, GEMReward)), ScoreArguments())
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


class GEMReward:
    """Reward function of GRPOTrainer: S of Eq. 1, from the entropies of gem_rollout.

        S = -w_final * mean of H over the answer + lambda * mean of the m largest H of the reasoning    (nats)

    A completion that was cut off or gives no answer gets None, no reward. GRPO centres S within the group of a prompt. The
    means of the two terms and the share of answers found by a marker are logged as gem/*.

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

    def __init__(self, tokenizer: Any, arguments: ScoreArguments | None = None) -> None:
        self.tokenizer, self.arguments = tokenizer, arguments or ScoreArguments()
        check(self.arguments)
        if self.arguments.score_with != "policy":
            raise ValueError(f"score_with must be 'policy' in GEMReward, got {self.arguments.score_with!r}")

    def __call__(
        self,
        *,
        completion_ids: Sequence[list[int]],
        entropies: Sequence[list[float]] | None = None,
        truncated: Sequence[bool] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **_: Any,
    ) -> list[float | None]:
        """Return S of every completion, or None where it has none.

        Args:
            completion_ids: token ids, as TRL passes them.
            entropies, truncated: from gem_rollout.
            log_metric: TRL's function.

        Raises:
            ValueError: there are no entropies, or not one for each token: the completions are from another rollout.
        """
        if entropies is None or truncated is None:
            raise ValueError("GEMReward needs entropies and truncated: give GRPOTrainer rollout_func=gem_rollout")
        members = []
        for ids, entropy, cut in zip(completion_ids, entropies, truncated, strict=True):
            if len(ids) != len(entropy):
                raise ValueError(f"expected an entropy for each of {len(ids)} completion tokens, got {len(entropy)}")
            spans = find_spans(ids, self.tokenizer, markers=self.arguments.markers, last_tokens=LAST_TOKENS)
            members.append(Member("candidate", list(ids), "", cut, [], list(entropy), *spans))
        apply_eq1(members, torch.tensor([h for entropy in entropies for h in entropy]), self.arguments)
        scored = [member for member in members if not math.isnan(member.score)]
        if log_metric is not None and scored:
            log_metric("gem/final_entropy", sum(member.final_entropy for member in scored) / len(scored))
            log_metric("gem/branch_entropy", sum(member.branch_entropy for member in scored) / len(scored))
            log_metric("gem/answers_by_marker", sum(member.span_rule == "marker" for member in scored) / len(scored))
        return [None if math.isnan(member.score) else member.score for member in members]
