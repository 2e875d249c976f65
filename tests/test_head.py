"""fuse_lm_head: what it accepts, what it refuses, what a fused call returns; beside it the model's own logits.

The check of a model: test_head_check.py. Every architecture: test_fuse_architectures.py. Adapters: test_fuse_adapters.py.
Several processes: test_fuse_distributed.py.
"""

from __future__ import annotations

import copy
import inspect
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import TEXT, VOCAB, build
from torch import Tensor, nn
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, LlamaModel, T5Config, T5ForConditionalGeneration

import gem
from gem.head import FusedCausalLMOutput, fuse_lm_head, fused_head, unfuse
from gem_kernels import LogitTransform, TokenStats, linear_group_loss

B, T = 3, 10
SKIP = -100


def batch() -> dict[str, Tensor]:
    ids = torch.randint(10, VOCAB, (B, T), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[0, :4] = labels[1, 7:] = SKIP
    labels[2, 5] = SKIP
    return {"input_ids": ids, "labels": labels}


def from_logits(z: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Every field of the output by its definition, in fp64; 0 where ignored."""
    z = z.double()
    log_p = z.log_softmax(-1)
    fields = {
        "log_probs": log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "lse": z.logsumexp(-1),
        "mean_logits": z.mean(-1),
        "is_top1": z.argmax(-1) == targets,
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
    }
    return {name: f * (targets != SKIP) for name, f in fields.items()}


# --- what a fused call returns ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "phi"])  # plain, softcap, scale, bias
def test_every_field_is_that_of_the_logits(name: str, temperature: float, shifted: bool) -> None:
    model, inputs = build(name), batch()
    z = model(inputs["input_ids"]).logits / temperature
    labels = inputs.pop("labels")
    if shifted:
        inputs["shift_labels"] = targets = labels
    else:
        inputs["labels"], targets, z = labels, labels[:, 1:], z[:, :-1]
    extra = ("is_top1", "mean_logits", "log_sum_sq_probs")
    assert fuse_lm_head(model, temperature=temperature, outputs=extra) is model
    out = model(**inputs, fused_lm_head=True)
    assert isinstance(out, FusedCausalLMOutput) and out.aux_loss is None
    assert torch.equal(out.label_mask, targets != SKIP)
    for field, expected in from_logits(z, targets).items():
        got = out[field]
        assert got.shape == targets.shape
        assert got.dtype == (torch.bool if field == "is_top1" else torch.float32)
        assert got.requires_grad == (field in ("log_probs", "entropy", "lse"))
        torch.testing.assert_close(got.double(), expected.double(), atol=2e-5, rtol=1e-5)
    nll = -out.log_probs.sum()
    torch.testing.assert_close(out.loss, nll / (targets != SKIP).sum())
    for items in (7, torch.tensor(7)):
        torch.testing.assert_close(model(**inputs, fused_lm_head=True, num_items_in_batch=items).loss, nll / 7)
    sharper = model(**inputs, fused_lm_head=True, temperature=temperature / 2)
    torch.testing.assert_close(sharper.lse.double(), from_logits(2 * z, targets)["lse"].double(), atol=4e-5, rtol=1e-5)


def test_extra_fields_are_none_unless_asked_for() -> None:
    out = fuse_lm_head(build("llama"))(**batch(), fused_lm_head=True)
    assert out.mean_logits is out.is_top1 is out.log_sum_sq_probs is out.aux_loss is None


def test_nothing_to_predict_is_a_zero_with_a_gradient() -> None:
    model, inputs = build("llama tied"), batch()
    fuse_lm_head(model, outputs=("mean_logits", "is_top1"))
    out = model(inputs["input_ids"], labels=torch.full((B, T), SKIP), fused_lm_head=True)
    assert out.loss == 0 and not out.log_probs.any() and not out.is_top1.any() and not out.label_mask.any()
    out.loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_bf16_statistics_are_fp32_of_bf16_logits_unrounded() -> None:
    model, inputs = build("llama").bfloat16(), batch()
    hidden = model.model(inputs["input_ids"]).last_hidden_state[:, :-1]
    exact = from_logits(hidden.double() @ model.lm_head.weight.double().T, inputs["labels"][:, 1:])
    rounded = from_logits(model(inputs["input_ids"]).logits[:, :-1], inputs["labels"][:, 1:])
    out = fuse_lm_head(model)(**inputs, fused_lm_head=True)
    assert out.log_probs.dtype == out.loss.dtype == torch.float32
    ours = (out.log_probs - exact["log_probs"]).abs().max()
    theirs = (rounded["log_probs"] - exact["log_probs"]).abs().max()
    assert ours < 1e-5 and theirs > 1e-3


# --- a group loss through the model's own forward -----------------------------------------------------------------------


def entropy_weighted(stats: TokenStats, group: int) -> Tensor:
    return -(stats.entropy.detach() * stats.logprob).sum() / (group + 1)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_group_loss_goes_through_the_models_forward(name: str) -> None:
    model, inputs = build(name), batch()
    keep = inputs["labels"][:, 1:] != SKIP
    counts = keep.sum(1).tolist()
    cu_groups = torch.tensor([0, counts[0] + counts[1], sum(counts)])  # rows 0 and 1; row 2
    fuse_lm_head(model)
    stats = model(**inputs, fused_lm_head=True)
    groups = [
        TokenStats(*(s[keep][a:b] for s in (stats.log_probs, stats.entropy, stats.lse)))
        for a, b in ((0, cu_groups[1]), (cu_groups[1], cu_groups[2]))
    ]
    expected = entropy_weighted(groups[0], 0) + entropy_weighted(groups[1], 1)
    expected.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    out = model(**inputs, fused_lm_head=True, loss_fn=entropy_weighted, cu_groups=cu_groups)
    torch.testing.assert_close(out.loss, expected)
    for field in ("log_probs", "entropy", "lse"):
        assert not out[field].requires_grad
        torch.testing.assert_close(out[field], stats[field].detach())
    out.loss.backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[n], atol=1e-6, rtol=1e-4)


def test_a_group_loss_is_that_of_the_op() -> None:
    model, inputs = build("llama"), batch()
    targets = inputs["labels"][:, 1:]
    hidden = model.model(inputs["input_ids"]).last_hidden_state[:, :-1][targets != SKIP]
    cu_groups = torch.tensor([0, 3, hidden.shape[0]])
    expected = linear_group_loss(hidden, model.lm_head.weight, targets[targets != SKIP], cu_groups, entropy_weighted)
    fuse_lm_head(model)
    out = model(**inputs, fused_lm_head=True, loss_fn=entropy_weighted, cu_groups=cu_groups)
    assert torch.equal(out.loss, expected.loss)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, "a fused call needs labels or shift_labels, got neither"),
        ({"shift_labels": torch.zeros(B, T, dtype=torch.int64)}, "labels or shift_labels, got both"),
        ({"loss_fn": entropy_weighted}, "loss_fn and cu_groups go together, got one of them"),
        ({"cu_groups": torch.tensor([0, 1])}, "loss_fn and cu_groups go together, got one of them"),
        ({"loss_fn": entropy_weighted, "cu_groups": torch.tensor([0, 5])}, "cu_groups must start at 0 and end at"),
        (
            {"labels": torch.zeros(B, T + 1, dtype=torch.int64)},
            r"for labels \(3, 11\), got hidden states \(3, 10, 32\)",
        ),
        ({"labels": torch.full((B, T), VOCAB)}, rf"in \[0, V={VOCAB}\) or ignore_index=-100, got {VOCAB}"),
        ({"temperature": 0.0}, "temperature must be finite and > 0, got 0.0"),
        ({"logits_to_keep": 2}, r"logits_to_keep must be 0 in a fused call \(labels of -100 cost nothing\), got 2"),
        ({"logits_to_keep": torch.arange(T).flip(0)}, "logits_to_keep must be 0 in a fused call"),
        ({"labels": [[1, 2]]}, r"labels must be a tensor of token ids \(batch, seq_len\), got list"),
        ({"labels": torch.zeros(T, dtype=torch.int64)}, r"labels must be a tensor .*, got \(10,\)"),
        ({"num_items_in_batch": 0}, "num_items_in_batch must be >= 1, got 0"),
    ],
)
def test_bad_calls_are_refused_and_leave_the_model_usable(changes: dict[str, Any], message: str) -> None:
    model, inputs = fuse_lm_head(build("llama")), batch()
    before = model(**inputs, fused_lm_head=True).loss
    with pytest.raises(ValueError, match=message):
        model(**{**inputs, **changes}, fused_lm_head=True)
    assert torch.equal(model(**inputs, fused_lm_head=True).loss, before)
    assert model(inputs["input_ids"]).logits.shape == (B, T, VOCAB)  # the head answers with logits again


def test_words_of_a_fused_call_need_the_flag() -> None:
    model = fuse_lm_head(build("llama"))
    with pytest.raises(ValueError, match="need fused_lm_head=True, got a call without it"):
        model(**batch(), loss_fn=entropy_weighted, cu_groups=torch.tensor([0, 1]))


# --- attaching, detaching ---------------------------------------------------------------------------------------------


def test_public_names() -> None:
    assert gem.fuse_lm_head is fuse_lm_head and gem.unfuse is unfuse
    with pytest.raises(AttributeError, match="module 'gem' has no attribute 'fuse'"):
        gem.fuse  # noqa: B018


def test_unfuse_restores_what_stood_there() -> None:
    model = build("llama")
    fuse_lm_head(model)
    assert inspect.signature(model.forward) == inspect.signature(LlamaForCausalLM.forward.__get__(model))
    unfuse(model)
    assert "forward" not in vars(model) and not [name for name in vars(model) if "gem" in name]
    with pytest.raises(ValueError, match="model must have gone through fuse_lm_head, got a plain LlamaForCausalLM"):
        unfuse(model)

    own = model.forward
    model.forward = watched = lambda *args, **kwargs: own(*args, **kwargs)  # somebody else's patch
    fuse_lm_head(model)
    assert model(**batch(), fused_lm_head=True).log_probs is not None
    unfuse(model)
    assert model.forward is watched


def test_fused_again_the_new_settings_hold() -> None:
    model = fuse_lm_head(fuse_lm_head(build("llama"), temperature=2.0), impl="reference")
    assert fused_head(model).transform == LogitTransform() and fused_head(model).impl == "reference"
    unfuse(model)
    assert "forward" not in vars(model)


def test_a_patch_on_top_of_ours_works_and_is_not_undone() -> None:
    model = fuse_lm_head(build("llama"))
    ours = model.forward
    model.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    assert model(**batch(), fused_lm_head=True).log_probs is not None
    with pytest.raises(ValueError, match="forward was replaced after fuse_lm_head"):
        unfuse(model)
    fuse_lm_head(model, temperature=2.0)  # over it
    assert fused_head(model).transform.temperature == 2.0
    unfuse(model)
    assert fused_head(model).transform.temperature == 1.0


def test_a_copy_computes_with_its_own_weights() -> None:
    model = fuse_lm_head(build("llama"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(0.5)
    z = twin(batch()["input_ids"]).logits[:, :-1]
    out = twin(**batch(), fused_lm_head=True)
    torch.testing.assert_close(out.lse.double(), from_logits(z, batch()["labels"][:, 1:])["lse"], atol=2e-5, rtol=1e-5)
    unfuse(twin)
    assert fused_head(model)


def test_a_head_that_is_replaced_later_is_used() -> None:
    model = fuse_lm_head(build("llama"))
    model.lm_head = nn.Linear(32, VOCAB)
    z = model(batch()["input_ids"]).logits[:, :-1]
    out = model(**batch(), fused_lm_head=True)
    expected = from_logits(z, batch()["labels"][:, 1:])["lse"]
    torch.testing.assert_close(out.lse.double(), expected, atol=2e-5, rtol=1e-5)


def test_attaching_leaves_modes_gradients_and_random_numbers_alone() -> None:
    model = build("llama").train()
    model.model.layers[0].eval()  # frozen by its owner
    before = torch.random.get_rng_state()
    fuse_lm_head(model)
    assert model.training and not model.model.layers[0].training and not model.model.layers[0].mlp.training
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature must be finite and > 0, got 0.0"),
        ({"outputs": ("is_top1", "logits")}, ValueError, "outputs must be among is_top1, .*, got logits"),
        ({"impl": "cuda"}, ValueError, "impl must be one of auto, reference, chunked, triton, got 'cuda'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = build("llama")
    with pytest.raises(error, match=message):
        fuse_lm_head(model, **arguments)
    assert "forward" not in vars(model)


def test_models_that_are_refused() -> None:
    for model, error, message in (
        (nn.Linear(3, 4), TypeError, "must be a transformers causal language model, got Linear"),
        (
            LlamaModel(LlamaConfig(**TEXT)),
            TypeError,
            r"must have an lm_head \(get_output_embeddings\), LlamaModel has none",
        ),
        (nn.DataParallel(build("llama")), TypeError, "must not be in nn.DataParallel"),
        (
            T5ForConditionalGeneration(
                T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
            ),
            ValueError,
            "must be a decoder-only language model, got T5ForConditionalGeneration",
        ),
        (LlamaForCausalLM(LlamaConfig(**TEXT)).to("meta"), ValueError, "on the meta device: load or materialise"),
    ):
        with pytest.raises(error, match=message):
            fuse_lm_head(model)


# --- the ways in which models are run -------------------------------------------------------------------------------------


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_gradient_checkpointing(use_reentrant: bool, grouped: bool) -> None:
    model, inputs = fuse_lm_head(build("llama")).train(), batch()
    count = int((inputs["labels"][:, 1:] != SKIP).sum())
    extra = {"loss_fn": entropy_weighted, "cu_groups": torch.tensor([0, 4, count])} if grouped else {}
    expected = gradients(model, model(**inputs, fused_lm_head=True, **extra).loss)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    got = gradients(model, model(**inputs, fused_lm_head=True, **extra).loss)
    assert all(torch.equal(got[n], g) for n, g in expected.items())


def test_autocast_multiplies_as_the_models_own_head_would() -> None:
    model, inputs = build("llama"), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        own = model(**inputs)
    expected = gradients(model, own.loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fuse_lm_head(model)
        out = model(**inputs, fused_lm_head=True)
    got = gradients(model, out.loss)
    assert out.log_probs.dtype == torch.float32
    torch.testing.assert_close(out.loss, own.loss, atol=0, rtol=2e-3)  # its logits were rounded to bf16, ours were not
    for n, g in expected.items():
        torch.testing.assert_close(got[n], g, atol=2e-2 * float(g.abs().max()), rtol=0)


def test_accelerates_wrapper_for_mixed_precision() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    model, inputs = build("llama"), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = fuse_lm_head(model)(**inputs, fused_lm_head=True)
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    try:
        prepared = accelerator.prepare_model(model)
        out = prepared(**inputs, fused_lm_head=True)
        assert torch.equal(out.log_probs, expected.log_probs) and out.log_probs.dtype == torch.float32
        bare = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    finally:
        AcceleratorState._reset_state(True)
    exact = bare(**inputs, fused_lm_head=True)  # still fused, no longer under autocast
    assert 0 < float((exact.log_probs - out.log_probs).detach().abs().max()) < 1


def test_a_plain_trainer_whose_collator_adds_the_flag(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments, set_seed

    inputs = batch()
    rows = [{name: t[i % B] for name, t in inputs.items()} for i in range(12)]
    losses = {}
    for fused in (False, True):

        def collate(rows: list[dict[str, Tensor]], fused: bool = fused) -> dict[str, Any]:
            columns = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
            return {**columns, "fused_lm_head": True} if fused else columns

        set_seed(0)
        model = build("llama")
        args = TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to="none",
            logging_steps=1,
            max_steps=4,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
            optim="sgd",  # Adam would make steps of roundings where a gradient is 0
            learning_rate=0.3,
            disable_tqdm=True,
            save_strategy="no",
        )
        trainer = Trainer(
            fuse_lm_head(model) if fused else model,
            args,
            train_dataset=rows,
            eval_dataset=rows[:4],
            data_collator=collate,
        )
        trainer.train()
        losses[fused] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        losses[fused].append(trainer.evaluate()["eval_loss"])
    assert len(losses[True]) == 5 and losses[True][0] - losses[True][3] > 0.1
    assert losses[True] == pytest.approx(losses[False], abs=1e-4)


def test_threads_each_get_their_own_answer() -> None:
    model = fuse_lm_head(build("llama"))
    batches = [{"input_ids": t, "labels": t} for t in torch.randint(10, VOCAB, (4, 2, 7))]
    with torch.no_grad():
        expected = [model(**b, fused_lm_head=True).log_probs for b in batches]
        logits = [model(b["input_ids"]).logits for b in batches]

        def both(i: int) -> bool:
            fused = model(**batches[i % 4], fused_lm_head=True).log_probs
            plain = model(batches[i % 4]["input_ids"]).logits
            return torch.equal(fused, expected[i % 4]) and torch.equal(plain, logits[i % 4])

        def quiet(i: int) -> bool:
            with torch.no_grad():
                return both(i)

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(quiet, range(200)))


def test_a_loss_fn_may_call_the_model_and_may_fail() -> None:
    model, inputs = fuse_lm_head(build("llama")), batch()
    seen: list[Tensor] = []

    def asks(stats: TokenStats, group: int) -> Tensor:
        with torch.no_grad():
            seen.append(model(inputs["input_ids"]).logits)
            seen.append(model(**inputs, fused_lm_head=True).log_probs)
        return -stats.logprob.sum()

    out = model(**inputs, fused_lm_head=True, loss_fn=asks, cu_groups=torch.tensor([0, 20]))
    torch.testing.assert_close(out.loss, -out.log_probs.sum())
    assert seen[0].shape == (B, T, VOCAB) and torch.equal(seen[1], model(**inputs, fused_lm_head=True).log_probs)

    def fails(stats: TokenStats, group: int) -> Tensor:
        raise RuntimeError("a mistake of the caller")

    with pytest.raises(RuntimeError, match="a mistake of the caller"):
        model(**inputs, fused_lm_head=True, loss_fn=fails, cu_groups=torch.tensor([0, 20]))
    assert model(inputs["input_ids"]).logits.shape == (B, T, VOCAB)


@pytest.mark.parametrize("first", ["fuse", "offload"])
def test_a_head_that_accelerate_moves_between_devices(first: str) -> None:
    from accelerate import cpu_offload

    model, inputs = build("llama"), batch()
    expected = model(**inputs).loss.detach()
    if first == "fuse":
        fuse_lm_head(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    if first == "offload":
        fuse_lm_head(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, fused_lm_head=True).loss, expected, atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(model(**inputs).loss, expected)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_a_head_of_another_dtype_than_the_body(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    body, head = dtypes
    model = build("llama").to(body)
    model.lm_head.to(head)
    model.lm_head.register_forward_pre_hook(lambda module, arguments: (arguments[0].to(head),))
    out = fuse_lm_head(model)(**batch(), fused_lm_head=True)
    torch.testing.assert_close(out.loss, model(**batch()).loss, atol=5e-2, rtol=0)


def test_torch_compile_keeps_one_graph() -> None:
    model, inputs = build("gemma2"), batch()
    fuse_lm_head(model, outputs=("is_top1", "mean_logits", "log_sum_sq_probs"))
    eager = model(**inputs, fused_lm_head=True)
    expected = gradients(model, eager.loss)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        out = compiled(**inputs, fused_lm_head=True)
        assert out.keys() == eager.keys()
        for name, value in eager.items():
            torch.testing.assert_close(out[name], value, atol=1e-5, rtol=1e-5)
        for n, g in gradients(model, out.loss).items():
            torch.testing.assert_close(g, expected[n], atol=1e-6, rtol=1e-4)
    nobody = {"input_ids": inputs["input_ids"], "labels": torch.full_like(inputs["labels"], SKIP)}
    assert compiled(**nobody, fused_lm_head=True).loss == 0
    broken = torch.compile(model, backend="aot_eager")  # loss_fn is Python: one break
    keywords = {"fused_lm_head": True, "loss_fn": entropy_weighted, "cu_groups": torch.tensor([0, 4, 20])}
    torch.testing.assert_close(broken(**inputs, **keywords).loss, model(**inputs, **keywords).loss)
    torch.compiler.reset()


def test_a_fused_model_can_be_saved_whole(tmp_path: Path) -> None:
    model = fuse_lm_head(build("llama"))
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    out = again(**batch(), fused_lm_head=True)
    assert torch.equal(out.log_probs, model(**batch(), fused_lm_head=True).log_probs)
    model.save_pretrained(tmp_path / "folder")
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "folder")
    torch.testing.assert_close(plain(**batch()).logits, model(**batch()).logits)


def test_gradient_accumulation_adds_up() -> None:
    model, inputs = fuse_lm_head(build("llama")), batch()
    items = int((inputs["labels"][:, 1:] != SKIP).sum())
    whole = gradients(model, model(**inputs, fused_lm_head=True).loss)
    model.zero_grad()
    for row in range(B):
        part = {name: t[row : row + 1] for name, t in inputs.items()}
        model(**part, fused_lm_head=True, num_items_in_batch=items).loss.backward()
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, whole[n], atol=1e-6, rtol=1e-4)


def test_what_rounds_the_output_is_told_off() -> None:
    """FSDP2 with the output_dtype that accelerate gives it rebuilds the output with every tensor in bf16."""
    out = fuse_lm_head(build("llama"))(**batch(), fused_lm_head=True)
    with pytest.raises(ValueError, match=r"rounded log_probs to torch.bfloat16: give FSDP2 a MixedPrecisionPolicy"):
        FusedCausalLMOutput(**{name: t.bfloat16() for name, t in out.items()})


def test_a_model_with_a_config_of_conv1d_heads() -> None:
    """GPT-2's layers are Conv1D, its head is not."""
    assert isinstance(fuse_lm_head(build("gpt2")).config, GPT2Config)
