"""The ways in which models are run: checkpointing, autocast, accelerate, Trainer, threads, torch.compile, accumulation."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import VOCAB, build
from head_cases import SKIP, B, batch, entropy_weighted, gradients
from torch import Tensor

from gem.head import fuse_lm_head


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
