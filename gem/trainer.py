"""GEMTrainer: transformers.Trainer over groups. It overrides public methods only: get_batch_samples, compute_loss,
evaluate and log.

A step reads top to bottom: examples or groups -> (online: fresh candidates, scores, weights) -> one packed batch -> the fused
forward of the model, which is linear_group_loss with `group_loss` as its loss_fn.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gem.config import GuardArguments, LossArguments, check
from gem.data import Example, pack
from gem.groups import Group
from gem.head import completion_stats, fuse_lm_head, fused_head, router_usage, unwrapped
from gem.losses import dpo_loss, ipo_loss, kl_k3, listwise_dpo_reward, pro_loss, sega_loss_fn
from gem.models import KeepSpecialTokens, check_positions
from gem.router_loss import adds_router_loss
from gem.score import longest_row
from gem.training_flags import refuse_ignored
from gem_kernels import IGNORE_INDEX, TokenStats

logger = logging.getLogger(__name__)

ROLES = {"candidate": 0, "chosen": 1, "rejected": 2}


class GEMTrainer(Trainer):
    """Trains on groups (from a file), or on examples from which `make_groups` makes fresh groups at every step (online).

    Args:
        model: a transformers causal language model, or a peft model around one.
        args: TrainingArguments; per_device_train_batch_size counts groups. Several processes (torchrun) train one model by
            DistributedDataParallel; each logs the health of its own groups.
        loss: which loss and its weights (gem.config.LossArguments).
        guard: AUROC gate and automatic stop.
        train_dataset: groups, or examples when make_groups is given.
        processing_class: the tokenizer.
        make_groups: examples -> groups, called once per optimizer step with the examples of that step.
        evaluation: the model -> metrics, called by evaluate(); with an eval strategy it is required.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        *,
        loss: LossArguments,
        guard: GuardArguments,
        train_dataset: Sequence[Group] | Sequence[Example],
        processing_class: Any,
        make_groups: Callable[[list[Example]], list[Group]] | None = None,
        evaluation: Callable[[nn.Module], dict[str, float]] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        check(loss)
        check(guard)
        refuse_ignored(args, loss.loss, evaluates=evaluation is not None)
        if args.eval_strategy != "no" and evaluation is None:
            raise ValueError(f"evaluation must be given with eval_strategy={args.eval_strategy}, got None")
        args.remove_unused_columns = False
        super().__init__(
            model,
            args,
            data_collator=list,  # type: ignore[arg-type]
            train_dataset=train_dataset,  # type: ignore[arg-type]
            eval_dataset=[] if evaluation is not None else None,  # type: ignore[arg-type]
            processing_class=processing_class,
            callbacks=[CollapseGuard(guard), KeepSpecialTokens(model), *callbacks],
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or args.n_gpu > 1:
            other = "FSDP" if self.is_fsdp_enabled else "DeepSpeed" if self.is_deepspeed_enabled else "DataParallel"
            raise ValueError(
                f"args must ask for one process a device (DistributedDataParallel) or for one, got {other}"
            )
        if not args.disable_tqdm:
            self.pop_callback(ProgressCallback)
            self.add_callback(Progress())
        self.loss, self.make_groups, self.evaluation = loss, make_groups, evaluation
        fuse_lm_head(model, cache_bytes=loss.cache_mib << 20)
        check_positions(model, longest_row(train_dataset), "max_length: prompt and completion")
        if adds_router_loss(unwrapped(model)) and not fused_head(model).router_top_k:
            logger.warning(
                "the router loss of %s is another than E sum f P: of several micro-batches or processes, each counts its "
                "own by its share of the tokens",
                type(unwrapped(model)).__name__,
            )
        self.model_accepts_loss_kwargs = True  # our loss is normalised over the accumulated batch: do not divide again
        flash = "flash" in (getattr(model.config, "_attn_implementation", None) or "")
        self.layout = "packed" if flash else "right"
        self._health: dict[str, list[Tensor]] = {}

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        """The micro-batches of one optimizer step, and how many items (groups; tokens for sft) it has on all processes."""
        micro_batches: list[list[Any]] = [items for _, items in zip(range(num_batches), epoch_iterator, strict=False)]
        if self.make_groups is not None:
            fresh = iter(self.make_groups([example for items in micro_batches for example in items]))
            micro_batches = [[next(fresh) for _ in items] for items in micro_batches]
        groups = [group for items in micro_batches for group in items]
        for name, values in group_health(groups).items():
            self._record(name, torch.tensor(values).nanmean())
        batches = [self._batch(items) for items in micro_batches]
        items = len(groups)
        if self.loss.loss == "sft":
            items = sum(len(m.ids) for group in groups for m in group.members if m.role == "chosen")
        tokens = [int(b["attention_mask"].sum()) if "attention_mask" in b else b["input_ids"].numel() for b in batches]
        items, all_tokens = self.accelerator.reduce(torch.tensor([items, sum(tokens)], device=device)).tolist()
        shares = [n / all_tokens for n in tokens]
        usage = self._router_usage(batches, shares)
        for batch, share in zip(batches, shares, strict=True):
            batch["router"] = {"router_share": share, "router_usage": usage}
        return batches, items

    def _router_usage(self, batches: Sequence[dict[str, Any]], shares: Sequence[float]) -> Tensor | None:
        """(E,) how often a token of the whole step chooses each expert of a mixture of experts, on average.

        The router loss of the whole is made of it, and each micro-batch needs it before its backward (gem/router_loss.py): a
        forward of the body more, with the random numbers that the training's forward will have.

        Returns:
            None: there is one micro-batch on one process, or no router loss, or one of another form.
        """
        model = cast(nn.Module, self.model)
        alone = len(batches) * self.accelerator.num_processes == 1
        if alone or not adds_router_loss(unwrapped(model)) or not fused_head(model).router_top_k:
            return None
        model.train()
        device = self.args.device
        usage = torch.zeros((), device=device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), self.compute_loss_context_manager():
            for batch, share in zip(batches, shares, strict=True):
                usage = usage + share * cast(Tensor, router_usage(model, self._prepare_inputs(batch)))
        return cast(Tensor, self.accelerator.reduce(usage))

    def _batch(self, groups: Sequence[Group]) -> dict[str, Any]:
        """pack() of the groups, and per sequence its weight and role, per token its reference log-prob."""
        tokenizer: Any = self.processing_class
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        members = [member for group in groups for member in group.members]
        return {
            **pack([[g.sequence(m) for m in g.members] for g in groups], layout=self.layout, pad_id=pad_id),  # type: ignore[arg-type]
            "weight": torch.tensor([member.weight for member in members]),
            "role": torch.tensor([ROLES[member.role] for member in members]),
            "ref_logprob": torch.tensor([x for member in members for x in member.logprobs]),
            # Sampled from the policy as it is now; everything else was written by somebody else.
            "fresh": torch.tensor([self.make_groups is not None and m.sampled for m in members]),
            "members_per_group": [len(group.members) for group in groups],
        }

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        tokens = inputs["cu_groups"].tolist()
        weights, roles, fresh = (
            inputs[name].split(inputs["members_per_group"]) for name in ("weight", "role", "fresh")
        )
        items = num_items_in_batch if num_items_in_batch is not None else len(weights)
        share = self.accelerator.num_processes  # DistributedDataParallel averages the gradients of all processes
        router = {**inputs["router"], "router_share": inputs["router"]["router_share"] * share}
        if self.loss.loss == "sft" and self.args.label_smoothing_factor:
            smooth = {"label_smoothing": self.args.label_smoothing_factor, "num_items_in_batch": items / share}
            result, stats = completion_stats(model, _of_chosen(inputs), **smooth, **router)
            return (result, {"stats": stats}) if return_outputs else result

        def loss_fn(stats: TokenStats, group: int) -> Tensor:
            at = slice(tokens[group], tokens[group + 1])
            ref = inputs["ref_logprob"][at] if len(inputs["ref_logprob"]) else None
            members = (weights[group], roles[group], fresh[group])
            terms = group_loss(stats.logprob, ref, inputs["sequence"][at], *members, self.loss)
            for name, value in terms.items():
                self._record(name, value.detach())
            loss: Tensor = terms["loss"] * share / items
            return loss

        result, stats = completion_stats(model, inputs, loss_fn=loss_fn, cu_groups=inputs["cu_groups"], **router)
        return (result, {"stats": stats}) if return_outputs else result

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """The evaluation's metrics, each under eval_<name>; the training's random numbers do not notice."""
        if self.evaluation is None:
            raise ValueError("evaluation must be given to evaluate, got None")
        with torch.random.fork_rng():
            torch.manual_seed(self.args.seed)
            metrics = {f"{metric_key_prefix}_{k}": v for k, v in self.evaluation(cast(nn.Module, self.model)).items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means of the batches since the last log of a training loss."""
        if "loss" in logs:
            means = {name: float(torch.stack(values).nanmean()) for name, values in self._health.items()}
            logs = {**means, **logs}
            self._health.clear()
        super().log(logs, start_time)

    def _record(self, name: str, value: Tensor) -> None:
        self._health.setdefault(name, []).append(value.float().cpu())


def _of_chosen(inputs: dict[str, Any]) -> dict[str, Any]:
    """The batch with the labels of the chosen completions alone."""
    chosen = (inputs["role"] == ROLES["chosen"]).repeat_interleave(inputs["cu_seqlens"].diff())
    labels = inputs["shift_labels"].clone()
    kept = labels != IGNORE_INDEX
    labels[kept] = labels[kept].masked_fill(~chosen, IGNORE_INDEX)
    return {**inputs, "shift_labels": labels}


def group_loss(
    logprob: Tensor,
    ref_logprob: Tensor | None,
    sequence: Tensor,
    weight: Tensor,
    role: Tensor,
    fresh: Tensor,
    arguments: LossArguments,
) -> dict[str, Tensor]:
    """The loss of one group and its parts, nats.

    Args:
        logprob: (n,) log-probs of the group's tokens. ref_logprob: (n,) the same under the reference.
        sequence: (n,) the member of each token. weight, role, fresh: (K,) of the members;
            fresh: sampled from the policy as it is.

    Returns:
        {"loss": scalar, and what the report shows}.
    """
    chosen, rejected, candidate = (role == ROLES[r] for r in ("chosen", "rejected", "candidate"))
    if arguments.loss == "sft":
        return {"loss": -(logprob * chosen[sequence]).sum()}  # the caller divides by the number of tokens
    if ref_logprob is None or (arguments.loss != "sega" and not (chosen.any() and rejected.any())):
        raise ValueError(f"loss={arguments.loss} needs groups with the log-probs of a reference and a human pair")
    lengths = torch.bincount(sequence, minlength=len(role))
    log_pi, log_ref = (torch.zeros_like(weight).index_add(0, sequence, x) for x in (logprob, ref_logprob))
    match arguments.loss:
        case "sega":
            if arguments.taper:
                # SEGA's negative weights are constants: on a response that the policy no longer gives they would push for
                # ever, and what breaks is everything else. The truncated importance ratio of TOPR (arXiv 2503.14286).
                ratio = (log_pi - log_ref).detach().clamp(max=0.0).exp()
                weight = torch.where((weight < 0) & ~fresh, weight * ratio, weight)
            main = sega_loss_fn(log_pi / lengths if arguments.length_norm == "tokens" else log_pi, weight)
        case "listwise_dpo":
            target = chosen.float() / chosen.sum()
            main = sega_loss_fn(log_pi, listwise_dpo_reward(log_pi, log_ref, target, beta=arguments.beta))
        case "dpo" | "ipo":
            pair_loss = dpo_loss if arguments.loss == "dpo" else ipo_loss
            pair = (log_pi[chosen], log_pi[rejected], log_ref[chosen], log_ref[rejected])
            main = pair_loss(*pair, beta=arguments.beta).sum()
        case _:
            best_first = torch.argsort(weight + chosen.float() - rejected.float(), descending=True, stable=True)
            main = pro_loss(log_pi[best_first], lengths[best_first])
    # k3 estimates the KL of what was sampled: of the candidates, per sequence.
    sampled = candidate[sequence]
    kl = kl_k3(logprob[sampled], ref_logprob[sampled]).sum() / candidate.sum().clamp(min=1)
    nll = -log_pi[chosen].sum() / lengths[chosen].sum().clamp(min=1)
    loss = main + arguments.sft_weight * nll
    if arguments.loss in ("sega", "listwise_dpo"):
        loss = loss + arguments.kl_weight * kl
    parts = {
        "loss": loss,
        "kl": kl,
        "weight_positive": weight.clamp(min=0).sum(),
        "weight_negative": -weight.clamp(max=0).sum(),
    }
    if chosen.any() and rejected.any():
        parts |= {"logprob_chosen": log_pi[chosen].mean(), "logprob_rejected": log_pi[rejected].mean()}
    return parts


def group_health(groups: Sequence[Group]) -> dict[str, list[float]]:
    """What the report's curves show of the candidates of a batch. {} when there are none (sft, dpo)."""
    candidates = [member for group in groups for member in group.members if member.role == "candidate"]
    if not candidates:
        return {}
    return {
        "score": [m.score for m in candidates],
        "final_entropy": [m.final_entropy for m in candidates],
        "branch_entropy": [m.branch_entropy for m in candidates],
        "length": [float(len(m.ids)) for m in candidates],
        "truncated": [float(m.truncated) for m in candidates],
        "flawed": [float(bool(m.flaw)) for m in candidates],
        "span_fallback": [float(m.span_rule != "marker") for m in candidates],
        "distinct": [
            float(len({tuple(m.ids[slice(*m.answer_span)]) for m in group.members if m.role == "candidate"}))
            for group in groups
        ],
        "kept": [float(group.kept) for group in groups],
    }


class Progress(ProgressCallback):
    """The Trainer's bar with a few numbers behind it, in place of a printed dictionary a step."""

    SHOWN = ("loss", "score", "eval_accuracy_sampled", "eval_preference_sum")

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **_: Any) -> None:
        if self.training_bar is not None and logs:
            self.shown = {**getattr(self, "shown", {}), **{k: f"{logs[k]:.3g}" for k in self.SHOWN if k in logs}}
            self.training_bar.set_postfix(self.shown)


class CollapseGuard(TrainerCallback):
    """Warns when S hardly tells right from wrong, and stops when held-out accuracy or AUROC has fallen for good.

    Its memory is the trainer's log history, so that a resumed run stops where an uninterrupted one would.
    """

    WATCHED = ("eval_accuracy_sampled", "eval_auroc")

    def __init__(self, guard: GuardArguments) -> None:
        self.guard = guard

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        metrics: dict[str, float] = kwargs["metrics"]
        if state.global_step == 0 and metrics.get("eval_auroc", 1.0) < self.guard.auroc_gate:
            logger.warning("AUROC gate: %s", gate_message(metrics["eval_auroc"], self.guard))
        for name in self.WATCHED:
            values = [entry[name] for entry in state.log_history if name in entry]
            if has_fallen(values, self.guard):
                logger.warning("stopping at step %d: %s fell to %.3f", state.global_step, name, values[-1])
                control.should_training_stop = True


def gate_message(auroc: float, guard: GuardArguments) -> str:
    return (
        f"S orders {auroc:.2f} of the pairs rightly, below auroc_gate={guard.auroc_gate}: "
        "training on it may teach the wrong thing"
    )


def has_fallen(values: Sequence[float], guard: GuardArguments) -> bool:
    """Whether each of the last stop_patience values is more than stop_margin below the best before them."""
    patience = guard.stop_patience
    if not patience or len(values) <= patience:
        return False
    best = max(values[:-patience])
    return all(value < best - guard.stop_margin for value in values[-patience:])
