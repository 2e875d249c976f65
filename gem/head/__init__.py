"""fuse_lm_head(model): a Hugging Face language model whose own forward returns log-probs and losses, without its logits.

    fuse_lm_head                       attach.py    put a FusedHead in place of model.forward, then check it
      examine                          check.py     compare with the model's own logits and loss, on a few tokens (trial.py)
        transform.py, product.py, router.py         what the model does to its logits, its product, its router loss
        rounding.py                                 how far apart two correct results may be
    model(..., fused_lm_head=True)
      FusedHead.__call__               call.py      check the arguments, run the model's own forward
        HeadSwitch                     switch.py    the lm_head's forward: its own, or that of the running FusedCall
          FusedCall.__call__           call.py      statistics (B, T, k) in place of the logits (B, T, V)
            head_parts                 adapters.py  weight, bias and LoRA of the head
            gem_kernels.linear_logprob_entropy, .linear_group_loss
            EXTRA_OUTPUTS              extra.py     further fields of each token
        FusedCall.verify, .output      call.py      -> FusedCausalLMOutput (output.py), with the router loss (router.py)
    completion_stats, router_usage     batch.py     fused calls on a packed batch of gem.data

A file imports only files of lower levels: adapters, output < rounding, switch, trial < transform, product, router < extra <
call < check < attach; batch is above output.
"""

from gem.head.attach import ensure_fused, fuse_lm_head, fused_head, unfuse, unwrapped
from gem.head.batch import completion_stats, router_usage
from gem.head.call import FusedHead
from gem.head.output import FusedCausalLMOutput, HeadStats
from gem.head.trial import undisturbed

__all__ = [
    "FusedCausalLMOutput",
    "FusedHead",
    "HeadStats",
    "completion_stats",
    "ensure_fused",
    "fuse_lm_head",
    "fused_head",
    "router_usage",
    "undisturbed",
    "unfuse",
    "unwrapped",
]
