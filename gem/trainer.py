"""GEMTrainer: transformers.Trainer over groups. It overrides public methods only, in the order in which a step calls them:

    create_scheduler    FSDP2 has just sharded the model: fuse it
    get_batch_samples   examples or groups -> (online: fresh candidates) -> reference log-probs -> packed micro-batches
    training_step       Trainer's own; then the gradient must be finite
      compute_loss      micro-batch -> the model's fused forward: linear_group_loss, whose loss_fn turns the entropies of this
                        forward into weights (online), and the weights into `group_loss`
    log, evaluate       the means of what the batches recorded; held-out metrics
    save_model          Trainer's own, for finite weights alone

What is sampled at a step depends on the seed, the step, the process and the prompts alone, so a run that was killed goes on
exactly. A number that is not finite raises Diverged at its step.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object, save_fsdp_model
from torch import Tensor, nn
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.fsdp import get_fsdp_ckpt_kwargs

from gem.calibration import Calibration, Signals, orders
from gem.checkpoints import newest_checkpoint, write_manifest
from gem.config import GuardArguments, LossArguments, check
from gem.data import Example, pack
from gem.distributed import (
    is_sharded,
    reshard,
    saved_whole,
    set_up_fsdp,
    shard_frozen,
    wake_up,
)
from gem.ema import WeightAverage
from gem.evaluate import Evaluation, pair_auroc
from gem.finite import is_finite, not_finite
from gem.generators import seeded
from gem.group import ROLES, Group, Member
from gem.guard import CollapseGuard, SoundWeights, check_gradients, check_weights, scored_pairs
from gem.head import completion_stats, fuse_lm_head, fused_head, router_usage, unwrapped
from gem.head.router import adds_router_loss
from gem.health import Health, Progress, group_health
from gem.launch import check_engine, check_several, fsdp_is_on
from gem.losses import group_loss, reads, reads_reference
from gem.noise import active_noise
from gem.pipeline import GroupMaker
from gem.positions import check_positions
from gem.rails import Verdict, verdicts
from gem.reference import Computed, FromFile
from gem.run_files import BEST_FOLDER, MANIFEST_FILE, STATE_FILE
from gem.saving import KeepWhole, load_weights
from gem.score import longest_row
from gem.special_tokens import KeepSpecialTokens
from gem.stops import Diverged
from gem.together import together
from gem.training_flags import check_sharded, refuse_ignored
from gem_kernels import IGNORE_INDEX, TokenStats

__all__ = ["GEMTrainer", "Progress", "group_health"]

logger = logging.getLogger(__name__)


class GEMTrainer(Trainer):
    """Train on groups (offline, from a file), or on examples that `make_groups` turns into fresh groups at every step (online).

    Args:
        model: a transformers causal language model, or a peft model around one.
        args: TrainingArguments; per_device_train_batch_size counts groups. Several processes train one model: by
            DistributedDataParallel (torchrun), or by FSDP2 (accelerate launch), which shards it before the first step. Losses
            are logged as they are (logging_nan_inf_filter is off), and old checkpoints are deleted only once a newer one is
            whole (gem.saving.KeepWhole obeys save_total_limit).
        loss: the loss and its weights.
        guard: AUROC gate and automatic stops. After one, `stopped` says why, `diverged` is True unless the run merely got worse
            than its best, and `restored` names the folder whose weights the model has again.
        train_dataset: groups, of which the members that the loss does not read are not forwarded; with make_groups, examples.
        processing_class: the tokenizer.
        make_groups: examples -> groups, called once per optimizer step with the examples of that step. The groups of a
            GroupMaker are weighed inside the training's own forward, unless GroupMaker.two_passes says why not.
        evaluation: model -> metrics, called by evaluate(); required if args has an eval strategy.

    Raises:
        ValueError: a setting is out of range, would have no effect here, or asks for FSDP1, DeepSpeed or DataParallel; or
            train_dataset does not hold groups, without make_groups.
        Diverged: in train() and save_model(): a log-prob, loss, gradient or weight is NaN or infinite.
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
        if is_sharded(model):
            raise ValueError(
                "model must be whole when a training begins, got one in the shards of an earlier training: save that with "
                "save_model, and load it again"
            )
        refuse_ignored(args, loss.loss, evaluates=evaluation is not None)
        if args.eval_strategy != "no" and evaluation is None:
            raise ValueError(f"evaluation must be given with eval_strategy={args.eval_strategy}, got None")
        args = copy.copy(args)  # the caller's stay as they are
        if fsdp_is_on():  # else gradients of whole weights pile up: 32 GB for 8 billion parameters in fp32
            config: Any = copy.copy(args.accelerator_config)
            own = config.gradient_accumulation_kwargs or {}
            config.gradient_accumulation_kwargs = {**own, "sync_each_batch": True}
            args.accelerator_config = config
        args.remove_unused_columns = False
        args.logging_nan_inf_filter = False  # it would log a NaN as the mean of the losses before it
        guessing = math.log(model.get_input_embeddings().weight.shape[0]) if loss.loss == "sft" else math.inf  # type: ignore[operator]
        self.guard = CollapseGuard(guard, online=make_groups is not None, guessing=guessing)
        keep_whole, args.save_total_limit = KeepWhole(args.save_total_limit, lambda: self.guard.doubtful), None
        self.average: WeightAverage | None = None
        if isinstance(make_groups, GroupMaker) and make_groups.score.score_with == "ema":
            if make_groups.model is not model:
                raise ValueError(
                    "make_groups must sample from the model that is trained with score_with=ema, got another one"
                )
            self.average = make_groups.average = WeightAverage(make_groups.score.ema_decay)
        plain = isinstance(make_groups, GroupMaker) and type(make_groups).__call__ is GroupMaker.__call__
        self.maker = cast(GroupMaker, make_groups) if plain else None
        self.calibration: Calibration | None = None
        self._keep_whole, self._attached = keep_whole, False
        self._begun: Path | None = None  # the checkpoint that the training goes on from
        super().__init__(
            model,
            args,
            data_collator=list,  # type: ignore[arg-type]
            train_dataset=train_dataset,  # type: ignore[arg-type]
            eval_dataset=[] if evaluation is not None else None,  # type: ignore[arg-type]
            processing_class=processing_class,
            callbacks=[SoundWeights(guard), keep_whole, self.guard, KeepSpecialTokens(model), *callbacks],
        )
        if not args.disable_tqdm:
            self.pop_callback(ProgressCallback)
            self.add_callback(Progress())
        self.loss, self.make_groups, self.evaluation = loss, make_groups, evaluation
        self._evaluated: dict[int, dict[str, float]] = {}  # metrics of the last evaluation in training, by its step
        self._batches: list[dict[str, Any]] = []  # of this step
        self._usage: tuple[Tensor | None, ...] = ()  # of its experts, once it is known
        rows: Iterable[Group | Example] = train_dataset
        if make_groups is None:
            rows = (_read_by(loss, group) for group in cast(Sequence[Group], train_dataset))
        check_positions(model, longest_row(rows), "max_length: prompt and completion")
        # What makes the training's forward another than that of the policy.
        neftune = f"neftune_noise_alpha={args.neftune_noise_alpha:g}" if args.neftune_noise_alpha else ""
        self._noise = neftune or active_noise(model)
        self.one_pass = self.maker is not None and not self._two_passes(self.maker)
        if self.maker is not None and isinstance(self.maker.reference, Computed):
            repeats = len(set(map(id, train_dataset))) < len(train_dataset)  # a mix with unlabeled prompts
            self.maker.reference.recurring = repeats or self._rounds() > 1
        # compute_loss divides by the items of the whole step: Trainer must not divide again.
        self.model_accepts_loss_kwargs = True
        flash = "flash" in (getattr(model.config, "_attn_implementation", None) or "")
        self.layout = "packed" if flash else "right"
        items = cast(Sequence[Group | Example], train_dataset)
        self._health = Health(mixed=len({item.has_pair for item in items}) == 2)
        if not self.is_fsdp_enabled:
            self._attach()

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator as Trainer does, for DistributedDataParallel, FSDP2 or one process.

        Raises:
            ValueError: it is to be another engine.
        """
        if self.args.n_gpu > 1:
            raise ValueError(
                f"args must ask for one process a device, got {self.args.n_gpu} devices for one, DataParallel: "
                f"torchrun --nproc_per_node {self.args.n_gpu}, or CUDA_VISIBLE_DEVICES=0"
            )
        check_engine()
        check_several()
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = set_up_fsdp(self.accelerator)
        if self.is_fsdp_enabled:
            check_sharded(self.args, averages=self.average is not None)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the scheduler as Trainer does.

        It is the first thing after the model is sharded, and comes before the weights of a checkpoint: now the model can be
        fused, and is still that before training.
        """
        if self.is_fsdp_enabled and not self._attached:
            wake_up(cast(nn.Module, self.model))
            self._attach()
            reshard(cast(nn.Module, self.model))
        self._restart()
        return super().create_scheduler(num_training_steps, optimizer)

    def _attach(self) -> None:
        """Fuse the model, and look at it before it changes: the reference, the first trust in S."""
        self._attached, model, maker = True, cast(nn.Module, self.model), self.maker
        fuse_lm_head(model, cache_bytes=self.loss.cache_mib << 20)
        if adds_router_loss(unwrapped(model)) and not fused_head(model).router_top_k:
            logger.warning(
                "the router loss of %s is not E sum f P: with several micro-batches or processes, each counts its own "
                "by its share of the tokens",
                type(unwrapped(model)).__name__,
            )
        if self.is_fsdp_enabled:
            if isinstance(self.evaluation, Evaluation):
                self.evaluation.attach(model)
            if maker is not None and isinstance(maker.reference, Computed):
                maker.reference.attach(partial(shard_frozen, self.accelerator))
        self.calibration = maker.calibration if maker is not None else None
        saved: list[TrainerCallback] = [part for part in (self.average, self.calibration) if part is not None]
        callbacks = self.callback_handler.callbacks
        at = callbacks.index(self._keep_whole)  # it writes the manifest of what they save
        callbacks[at:at] = saved

    def _restart(self) -> None:
        """Let what follows the policy go on from the checkpoint that the training goes on from, or from the beginning."""
        if self.average is not None:
            self.average.restart(cast(nn.Module, self.model), self._begun)
        if self.calibration is not None:
            self.calibration.restart(self._begun)

    def _two_passes(self, maker: GroupMaker) -> str:
        """Return why the groups need a scoring pass of their own; "" if they do not."""
        why = maker.two_passes(cast(nn.Module, self.model)) or self._noise
        if not why and self.args.label_smoothing_factor:
            why = f"label_smoothing_factor={self.args.label_smoothing_factor:g}, whose loss is no group's"
        if why:
            logger.info("scores take a forward of their own at every step: %s", why)
        return why

    def _rounds(self) -> float:
        """Return how often the training goes through its data."""
        if self.args.max_steps <= 0:
            return float(self.args.num_train_epochs)
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return float(self.args.max_steps * step / len(cast(Sequence[Any], self.train_dataset)))

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        """Return the micro-batches of one optimizer step and its number of items (groups; tokens for sft) on all processes."""
        micro_batches: list[list[Any]] = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        if self.make_groups is not None:
            # One call for the whole step: generation runs in larger batches than training.
            fresh = iter(self._fresh_groups([example for batch in micro_batches for example in batch]))
            micro_batches = [[next(fresh) for _ in batch] for batch in micro_batches]
        else:
            micro_batches = [[_read_by(self.loss, group) for group in batch] for batch in micro_batches]
        groups = [group for batch in micro_batches for group in batch]
        if self.maker is None:
            FromFile().fill(groups, self._reads_reference)
        batches = [self._batch(batch) for batch in micro_batches]
        tokens = [int(b["attention_mask"].sum()) if "attention_mask" in b else b["input_ids"].numel() for b in batches]
        counts = torch.tensor([self._items(groups), sum(tokens)], device=device)
        items, all_tokens = self.accelerator.reduce(counts).tolist()
        for batch, n in zip(batches, tokens, strict=True):
            batch["router"] = {"router_share": n / all_tokens}
        self._batches, self._usage = batches, ()
        return batches, items

    def _fresh_groups(self, examples: list[Example]) -> list[Group]:
        """Return a group for each example of the step: drawn, with weights unless the training forward gives them."""
        prompts = [example.prompt_ids for example in examples]
        make = cast(Callable[[list[Example]], list[Group]], self.make_groups if self.maker is None else self.maker.draw)
        try:
            with seeded(self.args.seed, self.state.global_step, self.args.process_index, prompts):
                groups: list[Group] = make(examples)
            if self.maker is not None and not self.one_pass:
                self.maker.weigh(groups)
                if self.maker.score.score_with == "policy":
                    self._health.record_gap(self.maker.gap)
            if self.maker is not None:
                self.maker.refer(groups, self._reads_reference)
        except Diverged as error:
            raise Diverged(f"{self._at} {error}") from None
        return groups

    def _reads_reference(self, member: Member) -> bool:
        return reads_reference(self.loss, member.role, self._is_fresh(member))

    def _is_fresh(self, member: Member) -> bool:
        """Return True for a member sampled in this step: on-policy. A groups file is off-policy from the first update on."""
        return self.make_groups is not None and member.sampled

    def _items(self, groups: Sequence[Group]) -> int:
        """Return what the loss is a mean over: the number of groups, for sft that of the chosen completions' tokens."""
        if self.loss.loss == "sft":
            return sum(len(m.ids) for group in groups for m in group.members if m.role == "chosen")
        return len(groups)

    def _router_usage(self) -> Tensor | None:
        """Return how often (E,) a token of the whole step chooses each expert of a mixture of experts, on average.

        The router loss of the step depends on these averages, and each micro-batch needs them before its backward
        (gem/head/router.py). They cost one more forward of the body, with the random numbers of the training's forward.

        Returns:
            None if the step is one micro-batch on one process, or the model has no router loss of this form.
        """
        model = cast(nn.Module, self.model)
        alone = len(self._batches) * self.accelerator.num_processes == 1
        if alone or not adds_router_loss(unwrapped(model)) or not fused_head(model).router_top_k:
            return None
        model.train()
        device = self.args.device
        usage = torch.zeros((), device=device)
        with torch.random.fork_rng([device] if device.type == "cuda" else []), self.compute_loss_context_manager():
            for batch in self._batches:
                own = cast(Tensor, router_usage(model, self._prepare_inputs(batch)))
                usage = usage + batch["router"]["router_share"] * own
        return cast(Tensor, self.accelerator.reduce(usage))

    def _batch(self, groups: Sequence[Group]) -> dict[str, Any]:
        """Pack the groups, and take them along."""
        tokenizer: Any = self.processing_class
        pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        sequences = [[group.sequence(member) for member in group.members] for group in groups]
        return {**pack(sequences, layout=self.layout, pad_id=pad_id), "groups": list(groups)}  # type: ignore[arg-type]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Return the loss of Trainer's own forward and backward; raise Diverged if the step's gradient is not finite."""
        names = _names(inputs)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            groups = [group for batch in self._batches for group in batch["groups"]]
            self._health.record_groups(groups)
            if self.calibration is not None:
                self._recalibrate(self.calibration, groups)
        # With fp16, infinite gradients are a matter of the scaler, which skips their step.
        if self.accelerator.sync_gradients and self.accelerator.scaler is None:
            norm = check_gradients(model, f"{self._at} the gradient, after {_first(names)}, has")
            self._health.record("no_gradient", float(norm == 0))
        return loss

    def _recalibrate(self, calibration: Calibration, groups: Sequence[Group]) -> None:
        """Let the trust of the next step follow the candidates that all processes had in this one."""
        for signal, trust in calibration.trust._asdict().items():
            self._health.record(f"trust_{signal}", trust)
        found: list[tuple[str, Signals]] = gather_object(orders(groups))
        calibration.follow(found)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the micro-batch's share of the step's loss, and with return_outputs its token statistics."""
        groups: list[Group] = inputs["groups"]
        tokens = inputs["cu_groups"].tolist()
        items = num_items_in_batch if num_items_in_batch is not None else len(groups)
        share = self.accelerator.num_processes  # undoes the mean of the gradients over processes
        if not self._usage:  # not in get_batch_samples: a resumed run restores the random numbers only after it
            self._usage = (self._router_usage(),)
        usage = self._usage[0]  # as a list: FSDP2 rounds tensors of a call to the dtype of the computation
        router = {
            "router_share": inputs["router"]["router_share"] * share,
            "router_usage": usage if usage is None else usage.tolist(),
        }
        if self.loss.loss == "sft" and self.args.label_smoothing_factor:
            smooth = {"label_smoothing": self.args.label_smoothing_factor, "num_items_in_batch": items / share}
            result, stats = completion_stats(model, _of_chosen(inputs), **smooth, **router)
            self._check_loss(result, _names(inputs))
            return (result, {"stats": stats}) if return_outputs else result

        def loss_fn(stats: TokenStats, i: int) -> Tensor:
            if self.maker is not None:
                self._weigh_and_compare(self.maker, groups[i], stats)
            sequence = inputs["sequence"][tokens[i] : tokens[i + 1]]
            loss: Tensor = self._group_loss(groups[i], stats, sequence) * share / items
            return loss

        result, stats = completion_stats(model, inputs, loss_fn=loss_fn, cu_groups=inputs["cu_groups"], **router)
        self._check_loss(result, _names(inputs))  # with the router loss, which is no group's
        return (result, {"stats": stats}) if return_outputs else result

    def _weigh_and_compare(self, maker: GroupMaker, group: Group, stats: TokenStats) -> None:
        """Weigh a group with the entropies of the training's forward, if it has no weights yet; compare sampler and policy."""
        if found := not_finite((name, getattr(stats, name)) for name in ("logprob", "entropy")):
            raise Diverged(f"{self._at} the model gives {found} for {group.name}")
        if self.one_pass or (maker.score.score_with != "policy" and not self._noise):
            self._health.record_gap(maker.compare(group.members, stats.logprob))
        if self.one_pass:
            maker.weigh([group], stats)

    def _group_loss(self, group: Group, stats: TokenStats, sequence: Tensor) -> Tensor:
        """Return the loss of one weighted group, and record its parts.

        Args:
            group: its members, in the order of the tokens.
            stats: of its tokens (n,), under the policy.
            sequence: (n,) int64, index of each token's member.

        Raises:
            Diverged: one of the parts is not finite.
        """
        members, device = group.members, stats.logprob.device
        weight = torch.tensor([member.weight for member in members], device=device)
        role = torch.tensor([ROLES[member.role] for member in members], device=device)
        fresh = torch.tensor([self._is_fresh(member) for member in members], device=device)
        ref = self._reference_of(group, stats)
        terms = group_loss(stats.logprob, ref, sequence, weight, role, fresh, self.loss)
        values = {name: self._health.record(name, value.detach()) for name, value in terms.items()}
        if not all(map(math.isfinite, values.values())):
            read = torch.tensor([self._reads_reference(member) for member in members], device=device)[sequence]
            cause = _cause(stats.logprob, ref[read] if ref is not None and bool(read.any()) else None, values)
            raise Diverged(f"{self._at} {cause} in {group.name}")
        loss: Tensor = terms["loss"]
        return loss

    def _reference_of(self, group: Group, stats: TokenStats) -> Tensor | None:
        """Return the group's reference log-probs (n,), NaN for members whose are not known; None if there are none."""
        if self.maker is not None and self.maker.reference is None:
            return stats.logprob.detach() if any(map(self._reads_reference, group.members)) else None
        known = [len(member.logprobs) == len(member.ids) for member in group.members]
        if not any(known):
            return None
        unknown = [[math.nan] * len(member.ids) for member in group.members]
        values = [m.logprobs if k else nan for m, k, nan in zip(group.members, known, unknown, strict=True)]
        return torch.tensor([x for member in values for x in member], device=stats.logprob.device)

    def _check_loss(self, loss: Tensor, names: Sequence[str]) -> None:
        if not is_finite(loss):
            raise Diverged(f"{self._at} the loss of {_first(names)} is {float(loss.detach()):g}")

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return and log the evaluation's metrics, each as eval_<name>. The training's random state is left as it was."""
        if self.evaluation is None:
            raise ValueError("evaluation must be given to evaluate, got None")
        with torch.random.fork_rng():
            torch.manual_seed(self.args.seed)
            metrics = {f"{metric_key_prefix}_{k}": v for k, v in self.evaluation(cast(nn.Module, self.model)).items()}
        self.log(dict(metrics))
        if self.is_in_train:
            self._evaluated = {self.state.global_step: metrics}
        if self.is_in_train and self.args.save_strategy != "no" and self.guard.is_best(self.state):
            self._save_best()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save_best(self) -> None:
        """Save the weights that a guard's stop restores, in place of those of an earlier evaluation.

        A kill in between loses nothing: the run goes on from before this evaluation and comes here again.
        """
        folder = Path(str(self.args.output_dir)) / BEST_FOLDER
        self.save_model(str(folder))
        if self.is_fsdp_enabled:  # in the form that Trainer restores
            plugin: Any = self.accelerator.state.fsdp_plugin
            save_fsdp_model(plugin, self.accelerator, self.model, str(folder), **get_fsdp_ckpt_kwargs())
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            self.state.save_to_json(str(folder / STATE_FILE))  # it says of which step the weights are
            write_manifest(folder, world_size=self.args.world_size)
        self.accelerator.wait_for_everyone()  # the guard of each process looks for the manifest

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **keywords: Any) -> Any:
        """Train as Trainer does, with all the weights of the checkpoint to resume from, or of the one to restore at the end.

        With True it resumes from the newest checkpoint of output_dir that is whole.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_checkpoint(Path(str(self.args.output_dir))) or True
        self._begun = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str) else None
        if self._begun is not None and not self.is_fsdp_enabled:
            load_weights(self.model, self._begun)
        self._evaluated = {}
        with together():
            result = super().train(resume_from_checkpoint, *arguments, **keywords)
        if self.restored and not self.is_fsdp_enabled:
            load_weights(self.model, Path(self.restored))
        return result

    @property
    def final_metrics(self) -> dict[str, float] | None:
        """What evaluate() would return again after train(), without an entry in the log; None if it is not known."""
        ends_restored = self.args.load_best_model_at_end and self.state.best_model_checkpoint
        return None if ends_restored else self._evaluated.get(self.state.global_step)

    def verdicts(self, error: Diverged | None = None) -> list[Verdict]:
        """Return what each guard rail has found so far. `error` is what train() raised, if it did."""
        groups: Any = self.train_dataset if self.make_groups is None else []
        once = list({id(group): group for group in groups}.values())  # mixing repeats some
        guard, online = self.guard.guard, self.guard.online
        log: Any = self.state.log_history
        pairs = {"pairs": pair_auroc(once), "number": scored_pairs(once)}
        return verdicts(log, guard, online=online, guessing=self.guard.guessing, error=error, **pairs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as Trainer does; raise Diverged if a weight is not finite, before anything is written.

        Of a sharded model all weights are saved, as of any other. The checkpoints of a training with SHARDED_STATE_DICT hold
        the shards alone.
        """
        check_weights(cast(nn.Module, self.model), "nothing is saved, as the model has")
        if output_dir is not None and self.is_world_process_zero():  # what lies there is no longer whole
            (Path(output_dir) / MANIFEST_FILE).unlink(missing_ok=True)
        with nullcontext() if _internal_call else saved_whole(self.accelerator):
            super().save_model(output_dir, _internal_call)

    @property
    def stopped(self) -> str:
        return self.guard.stopped

    @property
    def diverged(self) -> bool:
        return self.guard.diverged

    @property
    def restored(self) -> str:
        return (self.stopped and self.state.best_model_checkpoint) or ""

    @property
    def _at(self) -> str:
        return f"step {self.state.global_step + 1}:"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, and add to a training loss the means of what the batches recorded since the last one."""
        if "loss" in logs:
            logs = {**self._health.means(), **logs}
        super().log(logs, start_time)


def _read_by(loss: LossArguments, group: Group) -> Group:
    """Return a group with the members that the loss reads, unchanged if it has none of them."""
    if not isinstance(group, Group):
        raise ValueError(f"train_dataset must hold groups, unless make_groups is given, got {type(group).__name__}")
    members = [member for member in group.members if reads(loss, member.role)]
    return replace(group, members=members) if members else group


def _cause(logprob: Tensor, ref_logprob: Tensor | None, terms: dict[str, float]) -> str:
    """Return which number of a group's loss is not finite first: what enters it, then its terms."""
    for what, tensor in (("log-prob", logprob), ("reference log-prob", ref_logprob)):
        if tensor is not None and not is_finite(tensor):
            return f"the {what} of a token is {float(tensor.detach()[~tensor.isfinite()][0]):g}"
    name = next(name for name, value in reversed(terms.items()) if not math.isfinite(value))
    return f"{name} is {terms[name]:g}"


def _names(inputs: dict[str, Any]) -> list[str]:
    return [group.name for group in inputs["groups"]]


def _first(names: Sequence[str]) -> str:
    """Name a micro-batch by its first group."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _of_chosen(inputs: dict[str, Any]) -> dict[str, Any]:
    """Return the batch with the labels of all but the chosen completions masked."""
    lengths = inputs["cu_seqlens"].diff()
    is_chosen = [member.role == "chosen" for group in inputs["groups"] for member in group.members]
    chosen = torch.tensor(is_chosen, device=lengths.device).repeat_interleave(lengths)
    labels = inputs["shift_labels"].clone()
    kept = labels != IGNORE_INDEX
    labels[kept] = labels[kept].masked_fill(~chosen, IGNORE_INDEX)
    return {**inputs, "shift_labels": labels}
