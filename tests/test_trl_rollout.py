"""gem.integrations.trl: GEM's rollout function and reward in TRL's GRPOTrainer."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

pytest.importorskip("trl")

from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOTrainer
from trl_trainers import RECORDS, build_trainer, fives, save_tiny_llama, sums

from gem.config import ScoreArguments
from gem.groups import Group, Member
from gem.head import fuse_lm_head
from gem.integrations.trl import GEMReward, gem_rollout, use_gem_head
from gem.score import score_groups
from gem.tasks import build_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


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
        reward(prompts=["1+1="], completion_ids=[[9, 2]], entropies=[[0.5]], truncated=[False])
    given = {"completion_ids": [[3, 2], [9, 2]], "entropies": [[0.5, 0.1], [0.25, 0.1]], "truncated": [False, False]}
    assert reward(prompts=["1+1=", "1+1="], **given) == [None, -0.25]
    repeats = {"completion_ids": [[8, 5, 8, 6, 2]], "entropies": [[0.5] * 5], "truncated": [False]}
    assert reward(prompts=["1+1="], **repeats) == [None]
