"""The scorer of `score_with: ema`: its values by hand, every bit of the weights restored, and a run that goes on exactly."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_trainer import Stop, examples, make_trainer, tiny_model
from torch import nn

from gem.checkpoints import newest_checkpoint
from gem.config import LossArguments, RankArguments, RolloutArguments, ScoreArguments
from gem.ema import WeightAverage
from gem.head import ensure_fused
from gem.pipeline import GroupMaker
from gem.run_files import AVERAGE_FILE, MANIFEST_FILE, read_object
from gem.score import token_stats
from gem.tasks import build_tokenizer
from gem.trainer import GEMTrainer

EVENT: Any = (None, None, None)  # args, state, control, which these callbacks do not read


def begun(model: nn.Module, decay: float) -> WeightAverage:
    average = WeightAverage(decay)
    average.on_train_begin(*EVENT, model=model)
    return average


def linear(value: float, dtype: torch.dtype = torch.float32) -> nn.Linear:
    model = nn.Linear(1, 1, bias=False, dtype=dtype)
    nn.init.constant_(model.weight, value)
    return model


# --- values -----------------------------------------------------------------------------------------------------------


def test_values_by_hand() -> None:
    model = linear(1.0)
    average = begun(model, 0.75)
    for weight, expected in ((5.0, 2.0), (2.0, 2.0), (-6.0, 0.0)):  # 0.75 * 1 + 0.25 * 5, ...
        nn.init.constant_(model.weight, weight)
        average.on_step_end(*EVENT, model=model)
        with average.averaged(model) as scorer:
            assert scorer is model and model.weight.item() == expected
        assert model.weight.item() == weight


def test_before_training_it_is_the_model() -> None:
    model = linear(3.0)
    with WeightAverage(0.5).averaged(model) as scorer:
        assert scorer.weight.item() == 3.0  # type: ignore[operator]


def test_small_steps_of_bfloat16_are_not_lost() -> None:
    model = linear(1.0, torch.bfloat16)
    average = begun(model, 0.99)
    nn.init.constant_(model.weight, 1.0078125)  # the next number of bfloat16
    for _ in range(300):
        average.on_step_end(*EVENT, model=model)
    with average.averaged(model):
        assert model.weight.dtype == torch.bfloat16 and model.weight.item() == 1.0078125


# --- the weights come back --------------------------------------------------------------------------------------------


def test_every_bit_is_restored_whatever_happens() -> None:
    model = tiny_model()
    model.model.embed_tokens.weight.data[0, 0] = -0.0
    model.model.embed_tokens.weight.data[0, 1] = torch.tensor(0x7FC01234, dtype=torch.int32).view(
        torch.float32
    )  # a NaN
    average = begun(model, 0.5)
    for p in model.parameters():
        p.data.mul_(2)
    before = {name: (p.data_ptr(), p.detach().view(torch.int32).clone()) for name, p in model.named_parameters()}
    average.on_step_end(*EVENT, model=model)
    with pytest.raises(RuntimeError, match="in the block"), average.averaged(model):
        assert not torch.equal(model.lm_head.weight.view(torch.int32), before["lm_head.weight"][1])
        raise RuntimeError("in the block")
    for name, p in model.named_parameters():
        assert p.data_ptr() == before[name][0] and torch.equal(p.detach().view(torch.int32), before[name][1])
        assert p.requires_grad and p.grad is None


def test_tied_weights_stay_tied() -> None:
    model = tiny_model()
    model.lm_head.weight = model.model.embed_tokens.weight
    average = begun(model, 0.5)
    model.lm_head.weight.data.mul_(3)
    average.on_step_end(*EVENT, model=model)
    doubled = model.lm_head.weight.detach() * (2 / 3)
    with average.averaged(model):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        torch.testing.assert_close(model.lm_head.weight.detach(), doubled)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_fused_head_scores_with_the_average() -> None:
    """Its statistics in the block are those of a model that has the averaged weights."""
    model, other = tiny_model(), tiny_model()
    ensure_fused(model)
    average = begun(model, 0.5)
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn_like(p))
    average.on_step_end(*EVENT, model=model)
    for p, q in zip(other.parameters(), model.parameters(), strict=True):
        p.data.lerp_(q.data, 0.5)
    ensure_fused(other)
    sequences = [(e.prompt_ids, e.chosen_ids) for e in examples(3)]
    own = token_stats(model, sequences, batch_tokens=64)
    with average.averaged(model) as scorer:
        scored = token_stats(scorer, sequences, batch_tokens=64)
    expected = token_stats(other, sequences, batch_tokens=64)
    assert all(torch.equal(a.entropy, b.entropy) for a, b in zip(scored, expected, strict=True))
    again = token_stats(model, sequences, batch_tokens=64)
    assert all(torch.equal(a.entropy, b.entropy) for a, b in zip(own, again, strict=True))
    assert not torch.equal(own[0].entropy, scored[0].entropy)


def test_of_a_lora_model_the_adapters_are_averaged_alone(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    average = begun(model, 0.5)
    state = SimpleNamespace(global_step=1)
    (tmp_path / "checkpoint-1").mkdir()
    args: Any = SimpleNamespace(output_dir=str(tmp_path), should_save=True, save_only_model=False)
    average.on_save(args, state, None)  # type: ignore[arg-type]
    saved = load_file(tmp_path / "checkpoint-1" / AVERAGE_FILE)
    assert len(saved) == 4 and all("lora_" in name for name in saved)


# --- in a training ----------------------------------------------------------------------------------------------------


def online(folder: Path, score: ScoreArguments, *, stop: int = 8, lora: bool = False, **changes: Any) -> GEMTrainer:
    model: Any = tiny_model()
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"])) if lora else model
    rollout, rank = (
        RolloutArguments(group_size=3, max_new_tokens=6),
        RankArguments(human_weight=0.0, filter_groups=False),
    )
    reference = copy.deepcopy(model).requires_grad_(False)
    maker = GroupMaker(model, build_tokenizer(), rollout, score, rank, reference)
    args = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, **changes}
    return make_trainer(
        folder, LossArguments(), model=model, data=examples(12), make_groups=maker, callbacks=[Stop(stop)], args=args
    )


def weights_and_log(trainer: GEMTrainer) -> tuple[torch.Tensor, list[dict[str, float]]]:
    flat = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])  # type: ignore[union-attr]
    return flat, [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("lora", [False, True])
def test_an_online_run_goes_on_exactly(lora: bool, tmp_path: Path) -> None:
    score = ScoreArguments(score_with="ema", ema_decay=0.6)
    whole = online(tmp_path / "whole", score, lora=lora)
    whole.train()
    for stop in (3, 6, 8):
        again = online(tmp_path / "cut", score, stop=stop, lora=lora)
        again.train(resume_from_checkpoint=newest_checkpoint(tmp_path / "cut"))
    weights, log = weights_and_log(again)
    assert torch.equal(weights, weights_and_log(whole)[0]) and log == weights_and_log(whole)[1]
    at = newest_checkpoint(tmp_path / "cut")
    assert at and AVERAGE_FILE in read_object(Path(at) / MANIFEST_FILE)["files"]


def test_the_decay_goes_from_the_policy_to_the_reference(tmp_path: Path) -> None:
    """Decay 0 scores with the policy's weights, 1 with those before training."""
    logs = {}
    for name, score in {
        "policy": ScoreArguments(),
        "0": ScoreArguments(score_with="ema", ema_decay=0.0),
        "0.5": ScoreArguments(score_with="ema", ema_decay=0.5),
        "1": ScoreArguments(score_with="ema", ema_decay=1.0),
        "reference": ScoreArguments(score_with="reference"),
    }.items():
        trainer = online(tmp_path / name, score, save_strategy="no", learning_rate=0.05)
        trainer.train()
        logs[name] = [entry["final_entropy"] for entry in weights_and_log(trainer)[1]]
    assert logs["0"] == pytest.approx(logs["policy"], abs=1e-4)
    assert logs["1"] == pytest.approx(logs["reference"], abs=1e-4)
    assert all(logs["0.5"] != pytest.approx(logs[other], abs=1e-3) for other in ("policy", "reference"))


def test_only_ema_averages(tmp_path: Path) -> None:
    assert online(tmp_path, ScoreArguments()).average is None


def test_a_checkpoint_without_its_average(tmp_path: Path) -> None:
    score = ScoreArguments(score_with="ema")
    online(tmp_path, score, stop=2).train()
    path = tmp_path / "checkpoint-2" / AVERAGE_FILE
    saved = load_file(path)
    first = min(saved)
    save_file({name: tensor for name, tensor in saved.items() if name != first}, path)
    with pytest.raises(
        ValueError, match=rf"{AVERAGE_FILE} must hold .* got none of {first}, expected {first} of shape"
    ):
        online(tmp_path, score).train(str(path.parent))
    path.unlink()
    expected = (
        rf"resume_from_checkpoint must hold {AVERAGE_FILE} with score_with=ema, got .*checkpoint-2, which has none"
    )
    with pytest.raises(ValueError, match=expected):
        online(tmp_path, score).train(str(path.parent))


def test_another_model_cannot_be_averaged(tmp_path: Path) -> None:
    rollout, score = RolloutArguments(group_size=2, max_new_tokens=4), ScoreArguments(score_with="ema")
    maker = GroupMaker(tiny_model(), build_tokenizer(), rollout, score, RankArguments())
    with pytest.raises(ValueError, match="make_groups must sample from the model that is trained with score_with=ema"):
        make_trainer(tmp_path, LossArguments(), data=examples(4), make_groups=maker)
    with pytest.raises(ValueError, match="score_with=ema needs a GroupMaker that GEMTrainer got as make_groups"):
        maker(examples(1))
