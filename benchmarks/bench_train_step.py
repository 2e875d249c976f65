"""One SEGA step of a whole model: a randomly initialised Llama, its head and the loss, forward + backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import record, tiny
from benchmarks.contest import Row, taken
from benchmarks.measure import DoesNotError, in_turns, peak_memory
from benchmarks.peers import per_token
from benchmarks.results import EAGER, OURS
from benchmarks.sega import batch_weights, group_weights
from benchmarks.shapes import DEVICE, GROUP, make_groups
from gem_kernels import TokenStats, linear_group_loss

LIBRARIES = [OURS, EAGER, "TRL"]


class Model(NamedTuple):
    name: str
    config: tuple[tuple[str, Any], ...]  # of transformers.LlamaConfig
    lora: bool
    sequences: int
    length: int


_LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
_LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
_LLAMA_SMALL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}


def _sizes(model: dict[str, Any], **other: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(({"vocab_size": 128_256} | model | other).items())


TINY = Model("tiny", _sizes(_LLAMA_SMALL, hidden_size=16, intermediate_size=32, vocab_size=250), False, 5, 8)
if DEVICE.type == "cuda":
    MODELS = [
        Model("Llama-3.2-1B, 20 sequences of 400", _sizes(_LLAMA_1B), False, 20, 400),
        Model("Llama-3-8B with LoRA, 20 sequences of 400", _sizes(_LLAMA_8B), True, 20, 400),
    ]
else:
    MODELS = [Model("2-layer Llama, 10 sequences of 50", _sizes(_LLAMA_SMALL), False, 10, 50)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "model" in metafunc.fixturenames:
        models = [TINY] if tiny(metafunc.config) else MODELS
        metafunc.parametrize("model", models, ids=[model.name for model in models])


@lru_cache(maxsize=1)
def _build(model: Model) -> tuple[Any, Tensor]:
    """Return the model and its input (S, T + 1)."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    with torch.device(DEVICE):
        config = transformers.LlamaConfig(
            **dict(model.config), dtype=torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
        )
        net = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    # Logits get a standard deviation of 4, as in a trained model: equal entropies would rank nothing.
    with torch.no_grad():
        head = net.get_output_embeddings().weight
        head *= 4 / (head.float().std() * head.shape[1] ** 0.5)
    if model.lora:
        peft = pytest.importorskip("peft")
        net = peft.get_peft_model(net, peft.LoraConfig(r=16, target_modules=["q_proj", "v_proj"])).base_model.model
        net.enable_input_require_grads()
    if hasattr(net, "activation_checkpointing_enable"):
        net.activation_checkpointing_enable()
    else:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    net.train()
    ids = torch.randint(0, config.vocab_size, (model.sequences, model.length + 1), device=DEVICE)
    return net, ids


def _step(model: Model, library: str) -> Callable[[], tuple[Tensor, ...]]:
    net, ids = _build(model)
    head, targets = net.get_output_embeddings().weight, ids[:, 1:].reshape(-1)
    cu_seqlens = torch.arange(model.sequences + 1, dtype=torch.int32) * model.length
    groups, cu_groups = make_groups(cu_seqlens, cu_seqlens[::GROUP], DEVICE), cu_seqlens[::GROUP].to(DEVICE)
    fn = None if library == OURS else per_token(library, entropy=True)

    def loss_fn(stats: TokenStats, group: int) -> Tensor:
        return -(group_weights(stats.entropy.detach(), groups[group]) * stats.logprob).sum()

    def step() -> tuple[Tensor, ...]:
        hidden = net.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
        if fn is None:
            loss = linear_group_loss(hidden, head, targets, cu_groups, loss_fn).loss
        else:
            logprob, entropy = fn(hidden, head, targets, True)
            assert entropy is not None
            loss = -(batch_weights(entropy.detach(), groups) * logprob).sum()
        loss.backward()
        return (loss.detach(), *(grad for grad in taken(*net.parameters()) if grad is not None))

    return step


@lru_cache
def _rows(model: Model, timed: bool) -> dict[str, Row]:
    rows, steps, agreed = {}, {}, None
    for library in LIBRARIES:
        try:
            step = _step(model, library)
        except DoesNotError as error:
            rows[library] = Row(str(error), {}, [])
            continue
        if DEVICE.type == "cuda":
            step()  # compiles outside the measurement
        peak, (loss, *grads) = peak_memory(step, tuple)
        norm = float(torch.stack([g.float().norm() for g in grads]).norm())
        agreed = agreed or norm  # ours comes first
        off = abs(norm - agreed) / agreed
        assert off < (0.05 if DEVICE.type == "cuda" else 1e-3), f"{library}: the gradient's norm is {off:.1%} from ours"
        rows[library] = Row(
            None, {"peak extra MiB": None if peak is None else round(peak, 1), "gradient norm": round(norm, 4)}, []
        )
        steps[library] = step
        del grads, loss
    for library, times in (in_turns(steps) if timed else {}).items():
        rows[library] = rows[library]._replace(times=times)
    return rows


@pytest.mark.over(libraries=LIBRARIES)
def test_train_step(benchmark: Any, model: Model, library: str) -> None:
    row = _rows(model, benchmark.enabled)[library]
    if row.reason is not None:
        pytest.skip(row.reason)
    shape = {"shape": model.name, "N": model.sequences * model.length, "V": dict(model.config)["vocab_size"]}
    record(benchmark, {"task": "SEGA step of a whole model, forward + backward", **shape, "library": library}, row)
