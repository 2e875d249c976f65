"""Left-padded, right-padded, packed and single sequences: log-probs, entropies, scores and gradients agree to 1e-5."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from gem.data import TokenPair, pack
from gem.head import completion_stats, ensure_fused
from gem_kernels import gem_score

GROUPS: list[list[TokenPair]] = [
    [([1, 5, 9], [4, 3, 8, 2]), ([1, 5, 9], [7, 2])],
    [([1, 6], [3, 3, 3, 3, 9, 11, 2]), ([1, 6], [2]), ([1, 6, 7, 8, 9], [12, 13, 2])],
]
BRANCH = [(0, 2), (0, 1), (0, 4), (0, 0), (0, 1)]
ANSWER = [(2, 4), (1, 2), (4, 7), (0, 1), (1, 3)]


def tiny(kind: str) -> Any:
    torch.manual_seed(0)
    size = {"vocab_size": 17, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    model = (
        LlamaForCausalLM(LlamaConfig(**size, **heads))
        if kind == "llama"
        else Qwen2ForCausalLM(Qwen2Config(**size, **heads, tie_word_embeddings=True))
    )
    for p in model.parameters():  # the default initialisation is so small that every layout agrees by accident
        torch.nn.init.normal_(p, std=0.3)
    return model


def results(model: Any, groups: list[list[TokenPair]], layout: str, spans: slice) -> list[torch.Tensor]:
    batch = pack(groups, layout=layout, pad_id=0)  # type: ignore[arg-type]
    ensure_fused(model)
    _, stats = completion_stats(model, batch)
    start = batch["cu_seqlens"][:-1, None]
    branch, answer = (torch.tensor(s[spans]) + start for s in (BRANCH, ANSWER))
    score = gem_score(stats.entropy, branch, answer)
    (stats.logprob.sum() + 0.3 * score.score.sum()).backward()
    return [stats.logprob.detach(), stats.entropy.detach(), score.score.detach()]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("layout", ["left", "right", "packed"])
def test_every_layout_agrees_with_one_by_one(kind: str, layout: str) -> None:
    model = tiny(kind)
    together = results(model, GROUPS, layout, slice(None))
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    sequences = [pair for group in GROUPS for pair in group]
    parts = [results(model, [[pair]], "right", slice(i, i + 1)) for i, pair in enumerate(sequences)]
    for all_at_once, one_by_one in zip(together, zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(all_at_once, torch.cat(one_by_one), atol=1e-5, rtol=1e-5)
    for g, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(g, p.grad, atol=1e-5 * float(p.grad.abs().max()), rtol=1e-5)


def test_a_packed_batch_would_show_leaking_attention() -> None:
    """The check above can fail: without position_ids, packed sequences see one another."""
    model = tiny("llama")
    batch = pack(GROUPS, layout="packed", pad_id=0)
    ensure_fused(model)
    _, right = completion_stats(model, batch)
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
    assert (completion_stats(model, batch)[1].logprob - right.logprob).abs().max() > 1e-3
