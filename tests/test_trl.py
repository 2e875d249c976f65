"""gem.integrations.trl: TRL's trainers give the same losses and metrics with our head as with theirs; GEM's rollout and reward.

Where the two heads must differ, in what TRL's leaves out, the model's own logits are the judge.
"""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

pytest.importorskip("trl")

from architectures import build
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import TrainerCallback
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from gem.config import ScoreArguments
from gem.demo import build_tokenizer
from gem.groups import Group, Member
from gem.head import fuse_lm_head, fused_head
from gem.integrations.trl import GEMReward, gem_rollout, use_gem_head
from gem.score import score_groups

STEPS = 5
TIMES = ("time", "runtime", "per_second", "total_flos")
CHAT = (
    "{% for m in messages %}{{ '+' if m['role'] == 'user' else '=' }}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}={% endif %}"
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama on disk, where TRL looks for its reference model; a few nats between its logits."""
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.4)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def sums(n: int) -> list[dict[str, str]]:
    """Prompt, right and wrong answer."""
    rng = random.Random(0)
    rows = []
    for _ in range(n):
        a, b = rng.randrange(10), rng.randrange(10)
        wrong = f"{a + b} #### {a + b + 1}" if rng.random() < 0.5 else f"{a + b + 1}"
        rows.append({"prompt": f"{a}+{b}=", "chosen": f"{a}+{b}={a + b} #### {a + b}", "rejected": wrong})
    return rows


def fives(completions: list[Any], **_: Any) -> list[float]:
    """A reward that varies: the share of fives and blanks."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [(text.count("5") + text.count(" ")) / 8 for text in texts]


RECORDS = {
    SFTTrainer: [{"prompt": r["prompt"], "completion": r["chosen"]} for r in sums(24)],
    DPOTrainer: sums(24),
    KTOTrainer: [
        {"prompt": r["prompt"], "completion": r[k], "label": k == "chosen"}
        for r in sums(12) for k in ("chosen", "rejected")
    ],
    GRPOTrainer: [{"prompt": r["prompt"]} for r in sums(24)],
    RLOOTrainer: [{"prompt": r["prompt"]} for r in sums(24)],
}  # fmt: skip
CONFIGS: dict[type, type] = {
    SFTTrainer: SFTConfig,
    DPOTrainer: DPOConfig,
    KTOTrainer: KTOConfig,
    GRPOTrainer: GRPOConfig,
    RLOOTrainer: RLOOConfig,
}
SAMPLING = {"num_generations": 4, "max_completion_length": 8, "temperature": 0.7, "num_iterations": 2, "beta": 0.1}
SETTINGS: dict[type, dict[str, Any]] = {
    SFTTrainer: {},
    DPOTrainer: {"beta": 0.5, "use_weighting": True},
    KTOTrainer: {"beta": 0.5},
    GRPOTrainer: SAMPLING,
    RLOOTrainer: SAMPLING,
}


def build_trainer(kind: type, model: Any, folder: str, tmp_path: Path, **changes: Any) -> Any:
    """A trainer of a few steps on the CPU in fp32; changes: of its arguments, and what TRL's constructor takes."""
    of_trainer = {
        k: changes.pop(k) for k in ("peft_config", "rollout_func", "reward_funcs", "ref_model") if k in changes
    }
    if kind in (GRPOTrainer, RLOOTrainer):
        of_trainer.setdefault("reward_funcs", [fives])
    records = changes.pop("records", RECORDS[kind])
    defaults = {
        "bf16": False,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "gradient_checkpointing": False,
    }
    config = CONFIGS[kind](
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to="none",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        seed=1,
        lr_scheduler_type="constant",
        **{**defaults, **SETTINGS[kind], **changes},
    )
    tokenizer = changes.get("tokenizer") or build_tokenizer()
    tokenizer.chat_template = CHAT
    dataset = Dataset.from_list(records)
    return kind(
        model=model, args=config, train_dataset=dataset, eval_dataset=dataset.select(range(4)),
        processing_class=tokenizer, **of_trainer,
    )  # fmt: skip


def logs(trainer: Any) -> list[dict[str, float]]:
    """What a trained trainer logged, without what is time."""
    return [
        {k: v for k, v in entry.items() if not any(word in k for word in TIMES)} for entry in trainer.state.log_history
    ]


def assert_same_logs(theirs: list[dict[str, float]], ours: list[dict[str, float]]) -> None:
    assert len(theirs) == len(ours)
    for a, b in zip(theirs, ours, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-4, nan_ok=True), (key, a[key], b[key])


# --- the head ---------------------------------------------------------------------------------------------------------


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


# --- LoRA on the lm_head, which TRL's head leaves out -----------------------------------------------------------------


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


# --- the rollout and the reward ---------------------------------------------------------------------------------------


class Recorder(GEMReward):
    """Keeps what TRL handed to the reward and what came back."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.calls: list[tuple[dict[str, Any], list[float | None]]] = []

    def __call__(self, **kwargs: Any) -> list[float | None]:
        result = super().__call__(**kwargs)
        self.calls.append((kwargs, result))
        return result


class Snapshots(TrainerCallback):
    """The weights before every step."""

    def __init__(self) -> None:
        self.models: list[Any] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.models.append(copy.deepcopy(model.state_dict()))


def gem_run(folder: str, tmp_path: Path, **changes: Any) -> tuple[Any, Recorder, Snapshots]:
    reward, snapshots = Recorder(build_tokenizer(), ScoreArguments(top_m=0.3)), Snapshots()
    defaults = {
        "rollout_func": gem_rollout,
        "reward_funcs": [reward, fives],
        "max_steps": 3,
        "num_iterations": 1,
        "learning_rate": 1e-3,
    }
    trainer = build_trainer(
        GRPOTrainer, folder, folder, tmp_path, per_device_train_batch_size=8, **{**defaults, **changes}
    )
    trainer.add_callback(snapshots)
    use_gem_head(trainer).train()
    return trainer, reward, snapshots


def test_entropies_of_the_policy_reach_the_reward(folder: str, tmp_path: Path) -> None:
    trainer, reward, snapshots = gem_run(folder, tmp_path)
    assert len(reward.calls) == len(snapshots.models) == 3
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder), build_tokenizer()
    for (given, scores), weights in zip(reward.calls, snapshots.models, strict=True):
        model.load_state_dict(weights)
        groups = []
        assert given["prompts"][0] == given["prompts"][3] != given["prompts"][4]  # repeated, and in a row
        columns = ("prompts", "completions", "completion_ids", "entropies", "truncated")
        for prompt, completion, ids, entropies, cut in zip(*(given[k] for k in columns), strict=True):
            assert tokenizer.decode(ids, skip_special_tokens=True) == completion
            prompt_ids = tokenizer(prompt)["input_ids"]
            with torch.no_grad():
                z = model(input_ids=torch.tensor([[*prompt_ids, *ids]])).logits[0, len(prompt_ids) - 1 : -1].double()
            expected = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)  # untempered; the trainer's temperature is 0.7
            torch.testing.assert_close(torch.tensor(entropies), expected.float(), rtol=1e-4, atol=1e-5)
            assert cut == (ids[-1] != tokenizer.eos_token_id) and len(ids) <= 8
            groups.append(Group(prompt, prompt_ids, [Member("candidate", ids)]))
        score_groups(groups, tokenizer, fuse_lm_head(model), None, ScoreArguments(top_m=0.3))
        for group, score in zip(groups, scores, strict=True):
            assert (score is None) == math.isnan(group.members[0].score)
            assert score is None or score == pytest.approx(group.members[0].score, abs=1e-5)
    outcomes = [(cut, s) for given, scores in reward.calls for cut, s in zip(given["truncated"], scores, strict=True)]
    assert {cut for cut, _ in outcomes} == {True, False} and all(s is None for cut, s in outcomes if cut)
    assert sum(s is not None for _, s in outcomes) >= 5
    assert any("rewards/gem/mean" in entry and "gem/final_entropy" in entry for entry in trainer.state.log_history)


def test_the_rollout_samples_what_trl_samples(folder: str, tmp_path: Path) -> None:
    seen: list[list[Any]] = []

    def watch(prompts: list[Any], completion_ids: list[Any], **_: Any) -> list[float]:
        seen[-1].extend(zip(map(str, prompts), completion_ids, strict=True))
        return [float(len(ids)) for ids in completion_ids]

    chat = [{"prompt": [{"role": "user", "content": r["prompt"]}]} for r in sums(8)]
    settings = {"top_k": 5, "repetition_penalty": 1.1, "reward_funcs": [watch], "max_steps": 2}
    for records in (RECORDS[GRPOTrainer], chat):
        for rollout in (None, gem_rollout):
            seen.append([])
            torch.manual_seed(4)
            trainer = build_trainer(
                GRPOTrainer, folder, folder, tmp_path, rollout_func=rollout, records=records, **settings
            )
            use_gem_head(trainer).train()
        assert seen[-1] == seen[-2] and seen[-1]


def test_a_stop_token_of_the_model_ends_a_completion(folder: str, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = [2, 5, 6]  # as a chat model's; the tokenizer knows the first alone
    reward = Recorder(build_tokenizer())
    trainer = build_trainer(
        GRPOTrainer, model, folder, tmp_path, rollout_func=gem_rollout, reward_funcs=[reward], max_steps=1, beta=0.0
    )
    use_gem_head(trainer).train()
    ends = {
        ids[-1]: cut
        for given, _ in reward.calls
        for ids, cut in zip(given["completion_ids"], given["truncated"], strict=True)
    }
    assert not any(cut for token, cut in ends.items() if token in (2, 5, 6)) and {5, 6} & set(ends)


def test_the_rollout_under_peft_and_checkpointing(folder: str, tmp_path: Path) -> None:
    changes = {"peft_config": LoraConfig(r=4, target_modules="all-linear"), "gradient_checkpointing": True}
    trainer, reward, _ = gem_run(folder, tmp_path, **changes, gradient_accumulation_steps=2)
    assert trainer.model.is_gradient_checkpointing and len(reward.calls) == 3
    assert "eval_reward" in trainer.evaluate() and len(reward.calls) == 5
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


# --- refusals ---------------------------------------------------------------------------------------------------------


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


def test_refusals_of_the_rollout(folder: str, tmp_path: Path) -> None:
    trainer = build_trainer(GRPOTrainer, folder, folder, tmp_path)
    with pytest.raises(ValueError, match=r"gem_rollout needs use_gem_head\(trainer\) before train\(\)"):
        gem_rollout(["1+1="], trainer)
    use_gem_head(trainer)
    image = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "1+1="}]}]
    with pytest.raises(ValueError, match="gem_rollout takes text only"):
        gem_rollout([image], trainer)
    for setting, value in (("use_vllm", True), ("tools", [print])):
        before = getattr(trainer, setting)
        setattr(trainer, setting, value)
        with pytest.raises(ValueError, match=f"{setting} must be unset, got {setting} set"):
            gem_rollout(["1+1="], trainer)
        setattr(trainer, setting, before)


def test_refusals_of_the_reward() -> None:
    tokenizer = build_tokenizer()
    with pytest.raises(ValueError, match="score_with must be 'policy' in GEMReward, got 'reference'"):
        GEMReward(tokenizer, ScoreArguments(score_with="reference"))
    with pytest.raises(ValueError, match="top_m must be in"):
        GEMReward(tokenizer, ScoreArguments(top_m=-1.0))
    reward = GEMReward(tokenizer)
    with pytest.raises(
        ValueError, match="GEMReward needs entropies and truncated: give GRPOTrainer rollout_func=gem_rollout"
    ):
        reward(prompts=["1+1="], completions=["2"], completion_ids=[[9, 2]])
    with pytest.raises(ValueError, match="expected an entropy for each of 2 completion tokens, got 1"):
        reward(completion_ids=[[9, 2]], entropies=[[0.5]], truncated=[False])
    assert reward(completion_ids=[[3, 2], [9, 2]], entropies=[[0.5, 0.1], [0.25, 0.1]], truncated=[False, False]) == [
        None,
        -0.25,
    ]
