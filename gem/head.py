"""A Hugging Face causal language model seen as a body that gives hidden states and a head that gem_kernels computes."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from gem_kernels import LogitTransform, linear_logprob_entropy


class Head(NamedTuple):
    """What stands between the last hidden state and the softmax."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    transform: LogitTransform


def hidden_states(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(N, D): the last hidden state in front of every completion token of a batch from gem.data.pack."""
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "attention_mask") if name in batch}
    hidden: Tensor = _causal_lm(model).get_decoder()(**inputs, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, batch["hidden_index"])


def lm_head(model: nn.Module) -> Head:
    """The model's head: output embeddings, bias and the transform that its config names.

    Raises:
        ValueError: an adapter sits on the lm_head.
    """
    causal_lm = _causal_lm(model)
    linear = causal_lm.get_output_embeddings()
    if type(linear) is not nn.Linear:
        raise ValueError(
            f"the lm_head must be a plain nn.Linear, got {type(linear).__name__} (no adapter on it, please)"
        )
    config = causal_lm.config.get_text_config()
    scale = 1.0
    if getattr(config, "logits_scaling", None):  # Granite divides
        scale = 1.0 / config.logits_scaling
    if getattr(config, "logit_scale", None):  # Cohere multiplies
        scale = config.logit_scale
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    return Head(linear.weight, linear.bias, LogitTransform(scale=scale, softcap=softcap))


@torch.no_grad()
def check_head(model: nn.Module) -> Head:
    """lm_head(model), after a few tokens went through the model's own logits and through ours.

    Raises:
        ValueError: the two disagree (a transform that the config does not name); training would be on wrong numbers.
    """
    head = lm_head(model)
    n = min(9, head.weight.shape[0])
    ids = torch.arange(n, device=head.weight.device)
    was_training = model.training
    model.eval()
    theirs = model(input_ids=ids[None, :-1], use_cache=False).logits[0].float().log_softmax(-1)
    batch = {
        "input_ids": ids[None, :-1],
        "position_ids": torch.arange(n - 1, device=ids.device)[None],
        "hidden_index": torch.arange(n - 1, device=ids.device),
    }
    ours = linear_logprob_entropy(
        hidden_states(model, batch), head.weight, ids[1:], bias=head.bias, transform=head.transform
    ).logprob
    model.train(was_training)
    expected = theirs.gather(1, ids[1:, None])[:, 0]
    # The model rounds its logits to its dtype, we do not: half an eps of the largest logit each for z_y and for lse.
    largest = float(expected.abs().max()) + 10.0
    tolerance = 4 * torch.finfo(head.weight.dtype).eps * largest
    gap = float((ours - expected).abs().max())
    if not gap <= tolerance:
        raise ValueError(
            f"{type(_causal_lm(model)).__name__} does something to its logits that its config does not name: the largest "
            f"difference between its log-probs and ours is {gap:.3g}, expected <= {tolerance:.3g} "
            f"(first token: {float(expected[0]):.5f} and {float(ours[0]):.5f})"
        )
    return head


def _causal_lm(model: nn.Module) -> Any:
    """The transformers model inside a peft wrapper."""
    return cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
