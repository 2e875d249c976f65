"""The reference of the KL term, DPO and `taper`: log-probs under the model before training, without a second model if possible.

    FromFile     they are in the groups file
    AdapterOff   the policy with its adapters switched off
    Frozen       a second model

`reference_for` picks the cheapest that a training needs. The human answers are the same in every epoch: their log-probs are
computed once, each pair alone, so that they are the same bits whenever that is, also after a resume.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gem.config import LossArguments, ScoreArguments
from gem.distributed import awaits_shards, is_sharded
from gem.group import ROLES, Group, Member
from gem.head import completion_stats, ensure_fused, undisturbed
from gem.head.trial import trial_tokens
from gem.launch import takes_weights
from gem.losses import reads_reference
from gem.score import group_stats

logger = logging.getLogger(__name__)

Wanted = Callable[[Member], bool]
_FURTHER_PARTS = ("modules_to_save", "trainable_tokens")  # of adapters of any kind, in the names of their parameters


class Reference(Protocol):
    """Where the log-probs under the model before training come from."""

    def fill(self, groups: Sequence[Group], wanted: Wanted) -> None:
        """Fill in `logprobs` of the members that are wanted and have none, in place, nats.

        Raises:
            ValueError: they cannot be had.
            Diverged: one of them is not finite.
        """


class FromFile:
    """The log-probs that the groups bring: of a groups file, or of a `make_groups` of one's own."""

    def fill(self, groups: Sequence[Group], wanted: Wanted) -> None:
        for group in groups:
            for member in group.members:
                if wanted(member) and len(member.logprobs) != len(member.ids):
                    raise ValueError(
                        f"groups must bring a reference log-prob for each token, got {len(member.logprobs)} for "
                        f"{len(member.ids)} tokens of the {member.role} answer of {group.name}"
                    )


class Computed:
    """A reference that a model computes, in evaluation mode and without gradients. The model must not change.

    Attributes:
        recurring: False says that no human pair comes twice: the pairs then go through the model with all the rest.
    """

    def __init__(self, batch_tokens: int) -> None:
        self.batch_tokens, self.recurring = batch_tokens, True
        self._human: dict[bytes, list[Tensor]] = {}  # log-probs of the human answers of a group, by all their tokens

    def attach(self, shard: Callable[[nn.Module], nn.Module]) -> None:
        """Get ready once the policy has been sharded by FSDP2, and before it changes. Collective.

        Args:
            shard: shards a model that is not trained.
        """

    def serving(self) -> AbstractContextManager[nn.Module]:
        """Return a context in which the model is that before training; it gives the fused model."""
        raise NotImplementedError

    def fill(self, groups: Sequence[Group], wanted: Wanted) -> None:
        missing = partial(_lacks, wanted)
        with self.serving() as model:
            if self.recurring:
                self._fill_human(model, groups, missing)
            members = [m for group in groups for m in group.members if missing(m)]
            computed = group_stats(model, groups, self.batch_tokens, wanted=missing)
            for member, stats in zip(members, computed, strict=True):
                member.logprobs = stats.logprob.tolist()

    def _fill_human(self, model: nn.Module, groups: Sequence[Group], missing: Wanted) -> None:
        """Fill in the human answers of each group, in a batch of their own unless they are known."""

        def is_human(member: Member) -> bool:
            return member.role != "candidate" and missing(member)

        answers = [(group, [m for m in group.members if is_human(m)]) for group in groups]
        keyed = [(_key(group, human), group, human) for group, human in answers if human]
        unknown = {key: (group, human) for key, group, human in keyed if key not in self._human}
        alone = iter(
            group_stats(model, [g for g, _ in unknown.values()], self.batch_tokens, wanted=is_human, apart=True)
        )
        for key, (_, human) in unknown.items():
            self._human[key] = [next(alone).logprob for _ in human]
        for key, _, human in keyed:
            for member, logprob in zip(human, self._human[key], strict=True):
                member.logprobs = logprob.tolist()


def _lacks(wanted: Wanted, member: Member) -> bool:
    return not member.logprobs and wanted(member)


def _key(group: Group, members: Sequence[Member]) -> bytes:
    """Return what the log-probs of members of a group depend on, hashed."""
    return hashlib.sha256(repr([group.sequence(member) for member in members]).encode()).digest()


class AdapterOff(Computed):
    """The model under adapters that are being trained: the policy itself with its adapters switched off. It takes no memory.

    Args:
        model: a peft model whose adapters change nothing yet, as new LoRA adapters do; what is trained is in its adapters.
        batch_tokens: as in gem.score.token_stats.

    Raises:
        TypeError: the model is no peft model.
        ValueError: the adapters change the model already, or more than the adapters is trained.
    """

    def __init__(self, model: nn.Module, *, batch_tokens: int = ScoreArguments.score_tokens) -> None:
        super().__init__(batch_tokens)
        if not hasattr(model, "disable_adapter"):
            raise TypeError(f"model must be a peft model for AdapterOff, got {type(model).__name__}")
        self.model: Any = model
        parts = (getattr(self.model.base_model, "prefix", "") or "prompt_encoder", *_FURTHER_PARTS)
        outside = [n for n, p in model.named_parameters() if p.requires_grad and not any(part in n for part in parts)]
        if outside:
            raise ValueError(
                f"model must train its adapters alone for AdapterOff, got {outside[0]}, which stays as it is trained when the "
                "adapters are off: take Frozen(copy.deepcopy(model))"
            )
        if not awaits_shards(model):
            ensure_fused(model)
            self._check_new()

    def attach(self, shard: Callable[[nn.Module], nn.Module]) -> None:
        self._check_new()

    def _check_new(self) -> None:
        with self.serving():
            off = _trial_logprobs(self.model)
        if not torch.equal(_trial_logprobs(self.model), off):
            raise ValueError(
                "model must have adapters that change nothing yet for AdapterOff, got some that do: merge trained ones before "
                "new ones are added, or take Frozen(copy.deepcopy(model))"
            )

    @contextmanager
    def serving(self) -> Iterator[nn.Module]:
        trained = [(p, p.requires_grad) for p in self.model.parameters()]
        try:
            with self.model.disable_adapter():
                yield self.model
        finally:
            for parameter, flag in trained:  # peft switches the gradients of all its adapters on again
                parameter.requires_grad_(flag)


def _trial_logprobs(model: Any) -> Tensor:
    """Return log-probs of a few ordinary tokens, and of those whose embeddings an adapter trains."""
    ids = trial_tokens(model)
    named = [getattr(config, "trainable_token_indices", None) or [] for config in model.peft_config.values()]
    indices = [i for n in named for one in (n.values() if isinstance(n, dict) else [n]) for i in one]
    ids = torch.cat([ids.flatten(), torch.tensor(indices, dtype=ids.dtype, device=ids.device), ids.flatten()[:1]])[None]
    labels = {"input_ids": ids, "shift_labels": ids.roll(-1, 1)}
    with undisturbed(model):
        return completion_stats(model, labels)[1].logprob


class Frozen(Computed):
    """A second model.

    Args:
        model: the model before training; it is fused, and runs in evaluation mode without gradients.
        policy: the model that is trained: the second one follows it to its device. None: it stays where it is.
        batch_tokens: as in gem.score.token_stats.
    """

    def __init__(
        self, model: nn.Module, policy: nn.Module | None = None, *, batch_tokens: int = ScoreArguments.score_tokens
    ) -> None:
        super().__init__(batch_tokens)
        self.model, self.policy = model, policy
        if not awaits_shards(model):
            ensure_fused(model)

    def attach(self, shard: Callable[[nn.Module], nn.Module]) -> None:
        self.model = shard(self.model)
        ensure_fused(self.model)

    @contextmanager
    def serving(self) -> Iterator[nn.Module]:
        if self.policy is not None and not is_sharded(self.model):
            self.model.to(next(self.policy.parameters()).device)
        yield self.model


def reference_for(model: nn.Module, loss: LossArguments, score: ScoreArguments) -> AdapterOff | Frozen | None:
    """Return the reference that online training of `model` needs, before it begins: none, its adapters off, or a frozen copy.

    Args:
        model: the policy; a peft model with new adapters is not copied.
        loss: what reads reference log-probs.
        score: score_tokens; `score_with: reference` needs one as well.
    """
    read = any(reads_reference(loss, role, fresh) for role in ROLES for fresh in (True, False))
    if not read and score.score_with != "reference":
        return None
    if hasattr(model, "disable_adapter"):
        try:
            return AdapterOff(model, batch_tokens=score.score_tokens)
        except ValueError as error:
            logger.warning("the reference is a copy of the model, which takes its memory again: %s", error)
    return Frozen(_copied(model), model, batch_tokens=score.score_tokens)


def _copied(model: nn.Module) -> nn.Module:
    """Return a frozen copy of a model, which may have been trained.

    In mixed precision accelerate puts a function around the forward. A copied function still calls the model that it was made
    for, so the copy gets the forward below it, which is its own.
    """
    # Where the weights are still to come, a copy of them would only take memory.
    memo = {id(p): nn.Parameter(torch.empty_like(p)) for p in model.parameters()} if takes_weights() else {}
    copied = copy.deepcopy(model, memo).requires_grad_(False)
    own = vars(copied).pop("_original_forward", None)
    if own is not None:
        copied.forward = own
    return copied
