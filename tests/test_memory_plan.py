"""The plan of a training's memory: against true shapes, hand-computed numbers, and what the kernels hold."""

from __future__ import annotations

import json
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from architectures import TEXT_MODELS, available, build
from transformers import AutoConfig, LlamaConfig, MixtralConfig

from gem.launch import FSDP2, Launch
from gem.plan import GIB, STATES, Work, alike, head_buffers, on_meta, plan
from gem.plan_table import check_fits, lines, usable
from gem.sharding import Shards, shards_of
from gem.simulate import Live, forward_pass, training_pass
from gem_kernels import linear_group_loss

CONFIGS = Path(__file__).parent.parent / "examples" / "configs"
SHAPES = {
    "8b": (CONFIGS / "llama3-8b-8xa100" / "llama3-8b.json", 8, 8_030_261_248),
    "70b": (CONFIGS / "llama3-70b-32xa100" / "llama3-70b.json", 32, 70_553_706_496),
}
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# q and o, k and v, three of the MLP, two norms.
LAYER = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32


def meta(config: Any, dtype: str = "float32", lora_rank: int = 0) -> Any:
    return on_meta(config, dtype, lora_rank)


def tiny(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**TINY, "tie_word_embeddings": False, **changes})


# --- shards ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_the_shards_of_a_true_shape(name: str) -> None:
    path, devices, parameters = SHAPES[name]
    shards = shards_of(meta(AutoConfig.from_pretrained(path)), devices, FSDP2, masters=True)
    assert shards.numel == shards.numel_trained == parameters
    assert shards.local * devices == shards.trained * devices == 4 * parameters  # no dimension is ragged
    assert sum(unit.numel for unit in shards.units) == parameters
    (tail,) = [unit for unit in shards.units if unit.kept]
    (embedding,) = [unit for unit in shards.units if unit.embedding]
    d = json.loads(path.read_text())["hidden_size"]
    assert tail.numel == 128_256 * d + d and embedding.numel == 128_256 * d
    assert not dist.is_initialized()


def test_the_first_device_has_the_largest_part() -> None:
    shards = shards_of(meta(tiny(vocab_size=97)), 4, FSDP2, masters=True)
    assert shards.local == 4 * ((97 * 2 + 2) // 4 * 32 + 2 * 32 // 4 + (2 * LAYER + 32) // 4) + 4 * (32 - 16)


def test_a_tied_head_is_counted_once_and_stays_gathered() -> None:
    shards = shards_of(meta(tiny(tie_word_embeddings=True)), 2, FSDP2)
    assert shards.numel == 96 * 32 + 2 * LAYER + 32 and shards.local == 4 * shards.numel // 2
    assert [unit.numel for unit in shards.units if unit.kept] == [96 * 32 + 32]
    assert not any(unit.embedding for unit in shards.units)


@pytest.mark.parametrize(("bf16", "size"), [(True, 4), (False, 2)])
def test_bf16_weights_have_masters_in_mixed_precision_alone(bf16: bool, size: int) -> None:
    of = plan(Work(partial(meta, tiny(), "bfloat16"), Launch(2, FSDP2), bf16=bf16, length=16, labelled=8))
    assert of.shards.local == of.shards.trained == size * of.shards.numel // 2


def test_adapters_alone_have_masters_gradients_and_a_state() -> None:
    work = Work(partial(meta, tiny(), "bfloat16", 4), Launch(2, FSDP2), bf16=True, length=16, labelled=8)
    of = plan(work)
    pairs = 2 * (32 + 32) + 2 * (32 + 16) + 2 * (32 + 48) + (48 + 32)  # in and out of each linear layer
    assert of.shards.numel_trained == 2 * 4 * pairs
    frozen = 2 * 96 * 32 + 2 * LAYER + 32
    assert of.shards.local == (2 * frozen + 4 * of.shards.numel_trained) // 2
    (training,) = [phase for phase in of.phases if phase.name == "training"]
    assert training.parts["gradients"] == 2 * of.shards.numel_trained
    assert training.parts["optimizer state"] == 2 * training.parts["gradients"]


def test_every_expert_is_a_parameter_and_few_compute() -> None:
    config = MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False)
    of = plan(Work(partial(meta, config), length=16, labelled=16))
    experts = 3 * 32 * 48
    assert of.shards.numel == 2 * 96 * 32 + 2 * (LAYER + 3 * experts + 4 * 32) + 32  # four for one, and the router
    dense = plan(Work(partial(meta, tiny()), length=16, labelled=16))
    assert of.flop - dense.flop == 2 * 3 * 2 * 16 * (
        experts + 4 * 32
    )  # one expert more a token and layer, and the router


# --- parts ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", STATES)
def test_the_state_of_an_optimizer(optim: str) -> None:
    kind = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "rmsprop": torch.optim.RMSprop}
    layer = torch.nn.Linear(64, 64, bias=False)
    optimizer = kind.get(optim, torch.optim.AdamW)(layer.parameters())
    layer(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.numel() > 1]
    assert sum(t.numel() * 4 for t in states) == STATES[optim] * 4 * 64 * 64
    of = plan(Work(partial(meta, tiny()), optim=optim, length=8, labelled=8))
    assert all(phase.parts["optimizer state"] == STATES[optim] * 4 * of.shards.numel for phase in of.phases)


def test_an_optimizer_of_unknown_memory_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optim must be one whose memory is known \(adamw_torch, .*\), got 'lomo'"):
        plan(Work(partial(meta, tiny()), optim="lomo"))


def test_the_phases_of_data_parallel_training() -> None:
    work = Work(partial(meta, tiny()), Launch(4), length=16, labelled=16, accumulation=2)
    of = plan(work)
    whole = 4 * of.shards.numel
    training = next(phase for phase in of.phases if phase.name == "training").parts
    assert training["parameters"] == training["gradients"] == training["gradient buckets"] == whole
    assert "gathered units" not in training and of.sent == {"all-reduce": 2 * whole * 3 // 4}


def test_what_fsdp_sends() -> None:
    work = Work(partial(meta, tiny()), Launch(4, FSDP2), bf16=True, length=16, labelled=16, accumulation=3)
    head, rest = 96 * 32 + 32, 96 * 32 + 2 * LAYER
    sent = plan(work).sent
    assert sent == {
        "all-gather": 3 * 2 * (head + 2 * rest) * 3 // 4,
        "reduce-scatter": 3 * 4 * (head + rest) * 3 // 4,
    }


def test_online_phases() -> None:
    work = Work(
        partial(meta, tiny()), Launch(2, FSDP2), bf16=True, length=16, labelled=8, rollouts=6, prompt=8, new_tokens=8,
        score_tokens=64, frozen=True, average=True,
    )  # fmt: skip
    of = plan(work)
    generation = next(phase for phase in of.phases if phase.name == "generation").parts
    assert generation["whole weights"] == 2 * of.shards.numel
    assert (
        generation["keys and values"] == 6 * 16 * 2 * 2 * 2 * 8 * 2
    )  # rows, tokens, layers, k and v, heads, their size, bf16
    assert generation["reference"] == 4 * of.shards.numel // 2 and generation["averaged scorer"] == of.shards.local
    assert "gradients" not in generation
    assert [phase.name for phase in of.phases] == ["update", "training", "generation", "scoring"]
    assert of.total == max(phase.total for phase in of.phases)


# --- activations ----------------------------------------------------------------------------------------------------------


def saved_bytes(model: Any, rows: int, length: int) -> int:
    """Return the bytes that the backward of a real model keeps, its parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.model(input_ids=torch.zeros(rows, length, dtype=torch.long), use_cache=False).last_hidden_state
    return sum(found.values()) if out.requires_grad else 0


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "olmo2"])
def test_the_peak_holds_what_the_backward_of_a_real_model_keeps(name: str) -> None:
    real = build(name).train()
    kept = saved_bytes(real, 3, 40)
    cost = training_pass(real.to("meta"), 3, 40, 1, lambda *_: [], masked=False, gradients="leave")
    assert kept <= cost.peak <= 1.35 * kept, (kept, cost.peak)


def test_checkpoints_keep_the_inputs_of_layers_and_compute_again() -> None:
    sizes = {"rows": 2, "length": 64, "tokens": 1, "held": lambda *_: [], "gradients": "leave"}
    config = tiny(num_hidden_layers=12)
    plain, again = meta(config), meta(config)
    (getattr(again, "activation_checkpointing_enable", None) or again.gradient_checkpointing_enable)()
    whole, least = (training_pass(model, **sizes) for model in (plain, again))
    shallow = training_pass(meta(tiny(num_hidden_layers=1)), **sizes)
    assert least.peak < whole.peak / 3
    assert least.peak <= shallow.peak + 12 * 2 * 64 * 32 * 4
    assert least.flop == pytest.approx(whole.flop * 4 / 3, rel=0.05)


def test_attention_and_products_are_counted() -> None:
    config = tiny()
    n, t = 2 * 64, 64
    cost = forward_pass(meta(config), 2, t, lambda *_: [])
    products = 2 * n * 2 * (LAYER - 64)
    assert cost.flop == products + 2 * (2 * 4 * t * t // 2) * 2 * (8 + 8)


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "gpt2", "phi", "falcon", "mamba", "gemma3", "deepseek-v3"])
def test_other_architectures_run_without_numbers(name: str) -> None:
    if name not in TEXT_MODELS or not available(name):
        pytest.skip("not in this transformers")
    real = build(name)
    if hasattr(real, "set_experts_implementation"):  # the default of a model from a config, which `build` changes
        with suppress(ValueError):
            real.set_experts_implementation("grouped_mm")
    model = real.to("meta")
    cost = training_pass(model, 2, 16, 20, lambda *_: [], gradients="leave")
    assert cost.peak > 0 and cost.flop > 0


def test_autocast_holds_narrow_copies_of_weights() -> None:
    """fp32 weights under autocast: their bf16 copies live from the forward to the backward."""
    sizes = {"rows": 1, "length": 2, "tokens": 1, "held": lambda *_: [], "gradients": "leave"}
    plain = training_pass(meta(tiny()), **sizes)
    cast = training_pass(meta(tiny()), autocast=torch.bfloat16, **sizes)
    copies = 2 * 2 * (LAYER - 64)
    assert copies * 0.8 <= cast.peak - plain.peak <= copies * 1.2


# --- the head -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("groups", "cache_mib"), [(1, 1024), (4, 1024), (4, 8), (4, 1)])
def test_the_buffers_of_the_head_are_those_of_the_kernels(groups: int, cache_mib: int) -> None:
    """On the CPU, where they run: within 15 % of what linear_group_loss holds at its peak."""
    n, d, v = 1024, 64, 8192
    hidden, weight = torch.randn(n, d).requires_grad_(), torch.randn(v, d).requires_grad_()
    offsets = torch.arange(groups + 1) * (n // groups)
    with Real() as live:
        loss = linear_group_loss(
            hidden, weight, torch.zeros(n, dtype=torch.long), offsets, lambda stats, _: -stats.logprob.sum(),
            cache_bytes=cache_mib << 20,
        ).loss  # fmt: skip
    held = sum(t.nbytes for t in head_buffers(hidden, weight, groups=groups, cache_bytes=cache_mib << 20, gpu=False))
    results = 4 * (n * d + v * d)
    assert held + results == pytest.approx(live.peak, rel=0.15), (held, results, live.peak)
    assert loss.requires_grad


class Real(Live):
    """Live, that reads numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


# --- the table, and what does not fit -------------------------------------------------------------------------------------


def test_the_table() -> None:
    of = plan(Work(partial(meta, tiny()), Launch(2, FSDP2), groups=2, members=3, length=16, labelled=8))
    rows = lines(of, 80)
    assert rows[0].split() == ["GiB", "a", "device", "update", "training"]
    assert "2 devices by FSDP2" in rows[-5] and "2 groups of 3 sequences of at most 16 tokens" in rows[-4]
    assert rows[-1].startswith("device        80 GiB, of which 74.2 are for the plan")
    check_fits(of, 80)


def of_8b(**changes: Any) -> Work:
    config = AutoConfig.from_pretrained(SHAPES["8b"][0])
    work: dict[str, Any] = {
        "launch": Launch(8, FSDP2),
        "bf16": True,
        "checkpointing": True,
        "members": 7,
        "length": 640,
    }
    return Work(partial(meta, config), **{**work, "labelled": 512, "accumulation": 16, **changes})


@pytest.mark.parametrize(
    ("changes", "memory", "words"),
    [
        ({"launch": Launch(8)}, 80, "with accelerate_config of FSDP"),
        ({"checkpointing": False, "members": 14}, 80, "with fsdp_activation_checkpointing=true"),
        (
            {"groups": 32, "accumulation": 1},
            80,
            "with per_device_train_batch_size=1 and gradient_accumulation_steps=32",
        ),
        ({"launch": Launch(1)}, 80, "2 processes under FSDP"),
        ({"rollouts": 1024, "prompt": 128, "new_tokens": 512}, 80, "with rollout_batch_size=256"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_setting_to_change(changes: Any, memory: float, words: str) -> None:
    with pytest.raises(ValueError, match=r"device_memory must hold the plan, got 80 GiB, of which 74.2") as refused:
        check_fits(plan(of_8b(**changes)), memory)
    assert words in str(refused.value), str(refused.value)


def test_whole_weights_of_70b_want_a_server() -> None:
    config = AutoConfig.from_pretrained(SHAPES["70b"][0])
    work = Work(
        partial(meta, config), Launch(32, FSDP2), bf16=True, checkpointing=True, members=7, length=640, labelled=512,
        rollouts=64, prompt=128, new_tokens=512,
    )  # fmt: skip
    of = plan(work)
    (generation,) = [phase for phase in of.phases if phase.name == "generation"]
    assert generation.parts["whole weights"] == 2 * 70_553_706_496 > usable(80) * GIB
    with pytest.raises(ValueError, match="score --server"):
        check_fits(of, 80)


def test_a_model_like_another_has_its_class_and_no_memory() -> None:
    model = alike(build("gemma2"))
    assert type(model).__name__ == "Gemma2ForCausalLM" and model.device.type == "meta"


def test_shards_without_fsdp_are_the_model() -> None:
    config = tiny()
    numel = 2 * 96 * 32 + 2 * LAYER + 32
    assert shards_of(meta(config)) == Shards(4 * numel, 4 * numel, 4 * 96 * 32, numel, numel)
