"""gem.integrations.trl: TRL's trainers give the same losses and metrics with our head as with theirs.

Where the heads must differ, because TRL's leaves something out, the model's own logits decide.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

pytest.importorskip("trl")

from architectures import build
from peft import LoraConfig, PeftModel
from trl import (
    DPOTrainer,
    GRPOTrainer,
    KTOTrainer,
    RLOOTrainer,
    SFTTrainer,
)
from trl_trainers import CONFIGS, RECORDS, STEPS, build_trainer, logs, save_tiny_llama, sums

from gem.head import fused_head
from gem.integrations.trl import use_gem_head
from gem.tasks import build_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


def assert_same_logs(theirs: list[dict[str, float]], ours: list[dict[str, float]]) -> None:
    assert len(theirs) == len(ours)
    for a, b in zip(theirs, ours, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-4, nan_ok=True), (key, a[key], b[key])


@pytest.mark.parametrize("kind", CONFIGS, ids=lambda kind: kind.__name__)
def test_losses_and_metrics_are_those_of_trls_head(kind: type, folder: str, tmp_path: Path) -> None:
    runs, randomness = [], []
    for ours in (False, True):
        torch.manual_seed(3)
        trainer = build_trainer(kind, folder, folder, tmp_path)
        if ours:
            assert use_gem_head(use_gem_head(trainer)) is trainer
        trainer.train()
        trainer.evaluate()
        runs.append(logs(trainer))
        randomness.append(torch.get_rng_state())
    assert_same_logs(*runs)
    assert torch.equal(*randomness)
    losses = [entry["loss"] for entry in runs[1] if "loss" in entry]
    assert (
        len(losses) == STEPS and max(losses) - min(losses) > 1e-3 and max(map(abs, losses)) > 1e-3
    )  # or nothing was compared
    seen = set().union(*runs[1])
    expected = {
        SFTTrainer: {"entropy", "mean_token_accuracy", "eval_mean_token_accuracy"},
        DPOTrainer: {"entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected", "rewards/margins"},
        KTOTrainer: {"entropy", "logits/chosen", "logits/rejected", "kl", "eval_logits/chosen"},
        GRPOTrainer: {"entropy", "kl", "reward", "eval_reward"},
        RLOOTrainer: {"entropy", "kl", "reward", "eval_reward"},
    }[kind]  # fmt: skip
    assert expected <= seen


def test_the_temperature_of_the_trainer_reaches_policy_and_reference(folder: str, tmp_path: Path) -> None:
    trainer = use_gem_head(build_trainer(GRPOTrainer, folder, folder, tmp_path))
    assert fused_head(trainer.model).transform.temperature == 0.7
    assert fused_head(trainer.ref_model).transform.temperature == 0.7
    assert use_gem_head(trainer, impl="reference") and fused_head(trainer.ref_model).impl == "reference"


@pytest.mark.parametrize(
    ("kind", "outputs"),
    [
        (SFTTrainer, ("is_top1",)),
        (DPOTrainer, ("is_top1", "mean_logits", "log_sum_sq_probs")),
        (KTOTrainer, ("mean_logits",)),
        (GRPOTrainer, ()),
    ],
)
def test_only_what_a_trainer_reads_is_computed(
    kind: type, outputs: tuple[str, ...], folder: str, tmp_path: Path
) -> None:
    trainer = use_gem_head(build_trainer(kind, folder, folder, tmp_path))
    assert fused_head(trainer.model).outputs == outputs
    if getattr(trainer, "ref_model", None) is not None:
        assert fused_head(trainer.ref_model).outputs == ()


def test_a_mixture_of_experts_keeps_its_router_loss(folder: str, tmp_path: Path) -> None:
    runs = []
    for ours in (False, True):
        model = build("mixtral", vocab_size=len(build_tokenizer()))
        trainer = build_trainer(
            SFTTrainer, model, folder, tmp_path, router_aux_loss_coef=0.5, gradient_accumulation_steps=2, max_steps=3
        )
        (use_gem_head(trainer) if ours else trainer).train()
        runs.append(logs(trainer))
    assert_same_logs(*runs)
    assert all(entry["aux_loss"] > 0.5 for entry in runs[1][:3])


def test_the_router_loss_where_trls_head_fails(folder: str, tmp_path: Path) -> None:
    """TRL computes it anew, from a num_experts that Granite's config calls otherwise; ours is the model's own."""
    model = build("granite-moe", vocab_size=len(build_tokenizer()), router_aux_loss_coef=0.5)
    trainer = build_trainer(SFTTrainer, model, folder, tmp_path, max_steps=1, records=RECORDS[SFTTrainer][:4])
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    own = float(model(**batch, output_router_logits=True).loss)
    use_gem_head(trainer).train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(own, abs=1e-5)
    assert trainer.state.log_history[0]["aux_loss"] > 0.5


@pytest.mark.parametrize("kind", [SFTTrainer, DPOTrainer, GRPOTrainer], ids=lambda kind: kind.__name__)
def test_under_autocast_the_losses_differ_by_the_rounding_of_bf16_logits(
    kind: type, folder: str, tmp_path: Path
) -> None:
    """TRL prepares the reference of DPO and GRPO when it is built: autocast is then inside its forward."""
    losses = []
    for ours in (False, True):
        torch.manual_seed(3)
        trainer = build_trainer(kind, folder, folder, tmp_path, bf16=True, max_steps=3, learning_rate=1e-4)
        (use_gem_head(trainer) if ours else trainer).train()
        losses.append([entry["loss"] for entry in logs(trainer)[:3]])
    assert losses[1] == pytest.approx(losses[0], abs=3e-2)


def test_a_head_in_fp32_beside_a_narrow_body(folder: str, tmp_path: Path) -> None:
    """cast_lm_head_to_fp32: TRL replaces the forward of the lm_head, and ours takes the place of that."""
    runs = []
    for ours in (False, True):
        changes = {"cast_lm_head_to_fp32": True, "max_steps": 2, "model_init_kwargs": {"dtype": "bfloat16"}}
        trainer = build_trainer(GRPOTrainer, folder, folder, tmp_path, **changes)
        (use_gem_head(trainer) if ours else trainer).train()
        runs.append(logs(trainer))
    assert_same_logs(*runs)


def own_logprobs(model: Any, prompt: list[int], completion: list[int]) -> Tensor:
    """(T,) log-probs of a completion by the model's own logits, in fp64."""
    ids = torch.tensor([[*prompt, *completion]])
    z = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double()
    return z.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


def own_dpo_loss(model: Any, reference: Any, trainer: Any) -> Tensor:
    """The mean over all records of a trainer's dataset, one sequence at a time."""
    losses = []
    for row in trainer.train_dataset:
        margin = torch.zeros((), dtype=torch.float64)
        for sign, role in ((1, "chosen_ids"), (-1, "rejected_ids")):
            with torch.no_grad():
                ref = own_logprobs(reference, row["prompt_ids"], row[role]).sum()
            margin = margin + sign * (own_logprobs(model, row["prompt_ids"], row[role]).sum() - ref)
        losses.append(-torch.nn.functional.logsigmoid(trainer.args.beta * margin))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dpo_trains_lora_on_the_lm_head(checkpointing: bool, folder: str, tmp_path: Path) -> None:
    """One SGD step at learning rate 1 moves every adapter by minus the gradient of DPO's loss of peft's own logits."""
    trainer = build_trainer(
        DPOTrainer, folder, folder, tmp_path, records=sums(8),
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
        use_weighting=False, max_steps=1, gradient_accumulation_steps=2, gradient_checkpointing=checkpointing,
        optim="sgd", learning_rate=1.0, max_grad_norm=0.0,
    )  # fmt: skip
    trainer.model.add_adapter("head", LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
    trainer.model.base_model.set_adapter(["default", "head"])
    use_gem_head(trainer)
    own_loss = own_dpo_loss(trainer.model, LlamaForCausalLM.from_pretrained(folder), trainer)
    own_loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.model.zero_grad()
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(own_loss), abs=1e-5)
    assert abs(float(own_loss) - math.log(2)) > 1e-2
    assert any("lm_head" in n for n in before) and any("q_proj" in n for n in before)
    for name, parameter in trainer.model.named_parameters():
        if name in before:
            moved = before[name] - parameter.detach()
            assert float(moved.abs().max()) > 1e-6, name
            torch.testing.assert_close(moved, gradients[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    trainer.save_model(str(tmp_path / "saved"))
    again = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder), tmp_path / "saved")
    again.load_adapter(str(tmp_path / "saved" / "head"), "head")
    again.base_model.set_adapter(["default", "head"])
    ids = torch.tensor([[1, 9, 5, 10, 6]])
    torch.testing.assert_close(again(ids).logits, trainer.model(ids).logits)


def test_sft_trains_lora_that_transformers_put_on_the_lm_head(folder: str, tmp_path: Path) -> None:
    """model.add_adapter gets past TRL's refusal; with TRL's head the adapter would count nowhere and never move."""
    model = LlamaForCausalLM.from_pretrained(folder)
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    trainer = build_trainer(SFTTrainer, model, folder, tmp_path, max_steps=1, records=RECORDS[SFTTrainer][:4])
    own = model(**trainer.data_collator([trainer.train_dataset[i] for i in range(4)])).loss
    without = model.lm_head.base_layer
    before = model.lm_head.lora_B["default"].weight.detach().clone()
    use_gem_head(trainer).train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(own), abs=1e-5)
    assert float((model.lm_head.lora_B["default"].weight.detach() - before).abs().max()) > 1e-4
    assert without.weight.grad is None and not without.weight.requires_grad


def test_refusals_of_the_head(folder: str, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = LlamaForCausalLM.from_pretrained(folder)
    plain = Trainer(model=model, args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"))
    with pytest.raises(TypeError, match="trainer must be one of TRL's GRPOTrainer, .*, got Trainer"):
        use_gem_head(plain)
    with pytest.raises(TypeError, match="got LlamaForCausalLM"):
        use_gem_head(model)
    trainer = build_trainer(GRPOTrainer, folder, folder, tmp_path, cast_lm_head_to_fp32=True)
    trainer.args.bf16 = True
    with pytest.raises(ValueError, match="cast_lm_head_to_fp32 must be False under autocast"):
        use_gem_head(trainer)
