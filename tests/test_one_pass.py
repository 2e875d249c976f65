"""One pass equals two: weights from the entropies of the training's own forward are those of a scoring pass before it.

Where the two forwards see the same batch, they are equal bit by bit. Where they do not, the entropies differ by rounding,
delta, and what follows from them by at most a multiple of it (`weight_bound`).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from test_trainer import EOS, make_trainer, tiny_model
from torch import Tensor, nn

from gem.config import LossArguments, RankArguments, RolloutArguments, ScoreArguments
from gem.data import Example
from gem.generators import Completion
from gem.group import Group
from gem.noise import active_noise
from gem.pipeline import GroupMaker
from gem.reference import AdapterOff, reference_for
from gem.stops import Diverged
from gem.tasks import build_tokenizer

GROUPS, K = 50, 5
LETTERS = range(3, 17)  # ids of the tokenizer that stand for a text


def answer(rng: random.Random, most: int = 9) -> list[int]:
    """Return a completion: mostly a text with its end, now and then cut off, or empty."""
    if rng.random() < 0.08:
        return [EOS]
    ids = [rng.choice(LETTERS) for _ in range(rng.randint(1, most))]
    return ids if rng.random() < 0.15 else [*ids, EOS]


def cases(seed: int) -> tuple[list[Example], list[list[list[int]]]]:
    """Return examples and their candidates: some without a human pair, some with half of one, some that all agree."""
    rng = random.Random(seed)
    rows, drawn = [], []
    for i in range(GROUPS):
        pair = [[*answer(rng)[:-1], 5, EOS] for _ in range(2)]
        chosen, rejected = [pair, [pair[0], []], [[], []]][0 if i % 5 else 1 + i % 3 % 2]
        prompt = [1, LETTERS[i // 10], LETTERS[i % 10], *(rng.choice(LETTERS) for _ in range(rng.randint(0, 3)))]
        rows.append(Example(str(i), prompt, chosen, rejected))
        same = answer(rng)
        candidates = [same if i % 7 == 3 else answer(rng) for _ in range(K)]
        drawn.append(sorted(candidates, key=len))
    return rows, drawn


def scripted(rows: list[Example], drawn: list[list[list[int]]]) -> Callable[..., list[list[Completion]]]:
    said = {tuple(row.sampled_from): candidates for row, candidates in zip(rows, drawn, strict=True)}

    def generator(prompts: Any, n: int = 1, **_: Any) -> list[list[Completion]]:
        return [[Completion(list(ids), "stop") for ids in said[tuple(prompt)]] for prompt in prompts]

    return generator


def moved(model: nn.Module) -> nn.Module:
    """Move the trained weights a little, as training does."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn_like(p))
    return model


def with_lora(model: Any, dropout: float = 0.0) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, lora_dropout=dropout, target_modules="all-linear"))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny_model,
    "LoRA": lambda: with_lora(tiny_model()),
    "mixture of experts": lambda: build("mixtral", vocab_size=17),
}


class Step:
    """The groups, losses and summed gradients of training steps on all groups, `batch` of them at a time."""

    def __init__(self, folder: Path, base: Any, seed: int, batch: int, one_pass: bool, **settings: Any) -> None:
        loss = settings.pop("loss", LossArguments())
        rank, score = settings.pop("rank", RankArguments()), settings.pop("score", ScoreArguments())
        model = copy.deepcopy(base)
        rows, drawn = cases(seed)
        reference = reference_for(model, loss, score)
        assert not hasattr(model, "peft_config") or reference is None or isinstance(reference, AdapterOff)
        moved(model)
        rollout = RolloutArguments(group_size=K, max_new_tokens=12)
        maker = GroupMaker(model, build_tokenizer(), rollout, score, rank, reference, scripted(rows, drawn))
        trainer = make_trainer(
            folder, loss, model=model, data=rows, make_groups=maker, args={"per_device_train_batch_size": batch}
        )
        assert trainer.one_pass
        trainer.one_pass = one_pass
        model.train()
        self.losses, self.groups = list[Tensor](), list[Group]()
        for i in range(0, GROUPS, batch):
            (inputs,), items = trainer.get_batch_samples(iter([rows[i : i + batch]]), 1, torch.device("cpu"))
            loss_of_batch = trainer.compute_loss(model, inputs, num_items_in_batch=items)
            loss_of_batch.backward()
            self.losses.append(loss_of_batch.detach())
            self.groups += inputs["groups"]
        assert all(bool(m.entropies) != one_pass for group in self.groups for m in group.members)
        self.members = [member for group in self.groups for member in group.members]
        self.weights = torch.tensor([member.weight for member in self.members])
        self.scores = torch.tensor([member.score for member in self.members])
        self.gradients: dict[str, Tensor] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def weight_bound(delta: float, rank: RankArguments, score: ScoreArguments) -> float:
    """Return how far weights may lie apart whose entropies differ by delta at most, to first order.

    S moves by (w_final + lambda) delta; p_ij = s((S_i - S_j) / tau) by half of that over tau, as s' <= 1/4; a row of the slope
    by K - 1 times as much; theta by prior_sd^2 times its norm, as the prior bounds the inverse Hessian; A = theta - mean by
    twice the largest entry, and w = A / max(1, sum|A| / 2) by (1 + K / 2) times as much.
    """
    members = K + 2
    slope = (members - 1) * (score.final_weight + score.branch_weight) * delta / (2 * rank.tau)
    theta = rank.prior_sd**2 * members**0.5 * slope
    return 2 * theta * (1 + members / 2)


@pytest.mark.parametrize(("name", "seed"), [("llama", 0), ("llama", 1), ("LoRA", 0), ("mixture of experts", 0)])
def test_the_same_batch_gives_the_same_bits(name: str, seed: int, tmp_path: Path) -> None:
    """A group alone, its members by rising length: the scoring pass then sees the batch of the training."""
    base = MODELS[name]()
    one, two = (Step(tmp_path / str(one_pass), base, seed, 1, one_pass) for one_pass in (True, False))
    sorted_groups = [
        i
        for i, g in enumerate(one.groups)
        if all(a <= b for a, b in pairwise(len(g.sequence(m)[0] + m.ids) for m in g.members))
    ]
    assert len(sorted_groups) >= 5
    for i in sorted_groups:
        mine, theirs = one.groups[i], two.groups[i]
        assert [m.weight for m in mine.members] == [m.weight for m in theirs.members]
        assert torch.equal(one.losses[i], two.losses[i])
    check(one, two, RankArguments(), ScoreArguments())


SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "candidates alone": {"rank": RankArguments(human_weight=0.0)},
    "tokens": {"loss": LossArguments(length_norm="tokens", taper=False)},
    "no KL": {"loss": LossArguments(loss="sega", kl_weight=0.0)},
    "no reference": {"loss": LossArguments(kl_weight=0.0, taper=False)},
    "Eq. 1 with other weights": {"score": ScoreArguments(top_m=2, branch_weight=0.5, final_weight=2.0)},
}


@pytest.mark.parametrize(
    ("name", "settings"),
    [*((name, "defaults") for name in MODELS), *(("llama", s) for s in SETTINGS if s != "defaults")],
)
def test_other_batches_differ_by_rounding(name: str, settings: str, tmp_path: Path) -> None:
    given = SETTINGS[settings]
    one, two = (Step(tmp_path / str(o), MODELS[name](), 2, 10, o, **given) for o in (True, False))
    check(one, two, given.get("rank", RankArguments()), given.get("score", ScoreArguments()))


def check(one: Step, two: Step, rank: RankArguments, score: ScoreArguments) -> None:
    """Compare two steps, and check that their groups are of every kind."""
    assert [g.kept for g in one.groups] == [g.kept for g in two.groups]
    kept, members = [g.kept for g in one.groups], one.members
    assert 5 <= sum(kept) < GROUPS and any(m.truncated for m in members) and any(m.flaw for m in members)
    assert any(g.role("chosen") is None for g in one.groups) and any(g.role("rejected") is None for g in one.groups)
    delta = max(
        abs(a.final_entropy - b.final_entropy)
        for a, b in zip(members, two.members, strict=True)
        if a.answer_span[1] > a.answer_span[0]
    )
    delta = max(delta, *(abs(a.branch_entropy - b.branch_entropy) for a, b in zip(members, two.members, strict=True)))
    # Entropies of 17 tokens are below 3 nats. 64 ulp: the forward rounds a few dozen times in a row.
    assert delta <= 64 * 3 * 2.0**-24
    assert torch.equal(one.scores.isnan(), two.scores.isnan())
    bound = weight_bound(max(delta, 2.0**-24), rank, score)
    assert float((one.weights - two.weights).abs().max()) <= bound
    assert float(one.weights.abs().max()) > 1e3 * bound  # so that the bound can tell
    logprob = 60.0  # nats, of the least likely completion
    for a, b in zip(one.losses, two.losses, strict=True):
        assert float((a - b).abs()) <= (K + 2) * bound * logprob
    assert one.gradients.keys() == two.gradients.keys() and one.gradients
    # The gradient is linear in the weights; 4 allows for members that cancel.
    relative = 4 * bound / float(one.weights.abs().max())
    for name, gradient in one.gradients.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(gradient, two.gradients[name], rtol=0, atol=relative * largest, msg=name)


def test_what_takes_two_passes(tmp_path: Path) -> None:
    """An entropy that is not that of the training's forward is computed in one of its own."""

    def why(model: Any, **settings: Any) -> str:
        noise, loss = settings.pop("args", {}), LossArguments(loss=settings.pop("loss", "sega"))
        maker = GroupMaker(
            settings.pop("scorer", model),
            build_tokenizer(),
            RolloutArguments(),
            ScoreArguments(**settings),
            RankArguments(),
        )
        trainer = make_trainer(tmp_path, loss, model=model, data=cases(0)[0], make_groups=maker, args=noise)
        found = trainer._two_passes(maker)
        assert trainer.one_pass == (not found)
        return found

    assert why(tiny_model()) == why(build("mixtral", vocab_size=17)) == ""
    assert why(tiny_model(), entropy_clip=0.9) == "entropy_clip=0.9 is a quantile of the whole step"
    assert why(tiny_model(), score_with="reference") == "score_with=reference"
    assert why(tiny_model(), scorer=tiny_model()) == "the candidates are those of another model"
    smooth = {"label_smoothing_factor": 0.1}
    assert why(tiny_model(), loss="sft", args=smooth) == "label_smoothing_factor=0.1, whose loss is no group's"
    assert why(tiny_model(), args={"neftune_noise_alpha": 5.0}) == "neftune_noise_alpha=5"


LORA_Q = "base_model.model.model.layers.0.self_attn.q_proj"


def test_a_call_of_ones_own_is_called(tmp_path: Path) -> None:
    """A subclass that changes what a call returns is a function like any other; one with its own weigh scores by itself."""

    class Halved(GroupMaker):
        def __call__(self, examples: Any, progress: bool = False) -> list[Group]:
            groups = super().__call__(examples, progress)
            for member in (m for g in groups for m in g.members):
                member.weight = member.weight / 2
            return groups

    class Silent(GroupMaker):
        def weigh(self, groups: Any, stats: Any = None, progress: bool = False) -> None:
            assert stats is None
            super().weigh(groups, progress=progress)

    rows, drawn = cases(0)
    for kind in (Halved, Silent):
        model = tiny_model()
        rollout = RolloutArguments(group_size=K, max_new_tokens=12)
        settings: Any = (build_tokenizer(), rollout, ScoreArguments(), RankArguments(), None, scripted(rows, drawn))
        maker, plain = kind(model, *settings), GroupMaker(model, *settings)
        trainer = make_trainer(tmp_path, LossArguments(), model=model, data=rows, make_groups=maker)
        assert not trainer.one_pass
        (batch,), _ = trainer.get_batch_samples(iter([rows[:4]]), 1, torch.device("cpu"))
        share = 0.5 if kind is Halved else 1.0
        for mine, theirs in zip(batch["groups"], plain(rows[:4]), strict=True):
            assert [m.weight for m in mine.members] == [share * m.weight for m in theirs.members]


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("scorer", ["policy", "reference"])
def test_the_gap_is_that_of_the_policy_without_noise(noisy: bool, scorer: str, tmp_path: Path) -> None:
    """With dropout the training's forward is not what sampled; with another scorer no forward without it is there."""
    model = tiny_model()
    if noisy:
        model = with_attention_dropout(model)
    rollout, score = RolloutArguments(group_size=2, max_new_tokens=6), ScoreArguments(score_with=scorer)
    maker = GroupMaker(model, build_tokenizer(), rollout, score, RankArguments(), copy.deepcopy(model))
    trainer = make_trainer(
        tmp_path, LossArguments(), model=model, data=cases(0)[0], make_groups=maker, args={"max_steps": 2}
    )
    trainer.train()
    gaps = [entry["sampler_gap"] for entry in trainer.state.log_history if "sampler_gap" in entry]
    assert len(gaps) == (0 if noisy and scorer == "reference" else 2)
    assert all(0 < gap < 1e-5 for gap in gaps)


def test_nan_in_the_forward_names_the_group(tmp_path: Path) -> None:
    rows, drawn = cases(0)
    model = tiny_model()
    rollout = RolloutArguments(group_size=K, max_new_tokens=12)
    maker = GroupMaker(
        model, build_tokenizer(), rollout, ScoreArguments(), RankArguments(), None, scripted(rows, drawn)
    )
    trainer = make_trainer(tmp_path, LossArguments(), model=model, data=rows, make_groups=maker)
    assert trainer.one_pass
    (batch,), items = trainer.get_batch_samples(iter([rows[:2]]), 1, torch.device("cpu"))
    with torch.no_grad():
        model.get_input_embeddings().weight[rows[1].prompt_ids[1]] = float("nan")
    with pytest.raises(
        Diverged, match=r"step 1: the model gives nan in logprob \(\d+ of \d+ entries\) for a group \('[01]'\)"
    ):
        trainer.compute_loss(model, batch, num_items_in_batch=items)


def test_without_a_reference_the_policy_is_its_own(tmp_path: Path) -> None:
    """k3 is then exactly 0, and so is dpo's gap: log 2."""
    rows, drawn = cases(0)
    for loss, name, expected in (
        (LossArguments(), "kl", 0.0),
        (LossArguments(loss="dpo", sft_weight=0.0), "loss", 0.6931472),
    ):
        model = tiny_model()
        rollout = RolloutArguments(group_size=K, max_new_tokens=12)
        maker = GroupMaker(
            model, build_tokenizer(), rollout, ScoreArguments(), RankArguments(), None, scripted(rows, drawn)
        )
        whole = [row for row in rows if row.rejected_ids]
        trainer = make_trainer(tmp_path, loss, model=model, data=whole, make_groups=maker, args={"max_steps": 2})
        trainer.train()
        found = [entry[name] for entry in trainer.state.log_history if "loss" in entry]
        assert found == pytest.approx([expected] * 2, abs=1e-5)


STILL = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def with_lokr(model: Any) -> Any:
    from peft import LoKrConfig, get_peft_model

    return get_peft_model(model, LoKrConfig(r=4, module_dropout=0.5, target_modules=["q_proj", "v_proj", "o_proj"]))


def with_attention_dropout(model: Any) -> Any:
    model.model.layers[0].self_attn.attention_dropout = 0.25
    return model


@pytest.mark.parametrize(
    ("noisy", "expected"),
    [
        (lambda: build("gpt2", **STILL | {"resid_pdrop": 0.1}), "p=0.1 of transformer.h.0.attn.resid_dropout"),
        (lambda: with_attention_dropout(tiny_model()), "attention_dropout=0.25 of model.layers.0.self_attn"),
        (lambda: with_lora(tiny_model(), dropout=0.1), f"p=0.1 of {LORA_Q}.lora_dropout"),
        (lambda: build("mixtral", router_jitter_noise=0.1), "jitter_noise=0.1 of model.layers.0.mlp"),
        (lambda: with_lokr(tiny_model()), f"module_dropout=0.5 of {LORA_Q}"),
        (tiny_model, ""),
        (lambda: build("gpt2", **STILL), ""),
        (lambda: with_lora(tiny_model()), ""),
    ],
)  # fmt: skip
def test_noise_of_training_mode(noisy: Callable[[], Any], expected: str) -> None:
    model = moved(noisy())  # new adapters change nothing, with dropout or without
    assert active_noise(model).removesuffix(".default") == expected
    ids = torch.arange(3, 11)[None]
    with torch.no_grad():
        one, two = (model.train()(input_ids=ids).logits for _ in range(2))
    assert torch.equal(one, two) == (not expected)
