"""The fused head on several processes (gloo, CPU): DDP, FSDP2, ZeRO-3 and tensor parallelism give the gradients of one process.

One spawn per world size runs all its cases and leaves the results in files. Rank 1 has labelled rows, or rows without a label.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from architectures import VOCAB, build
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from gem.head import fuse_lm_head, fused_head
from gem_kernels import TokenStats

ROWS, T = 4, 9
TIMEOUT = 240  # seconds; a case that hangs would otherwise hang the tests
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


def data(silent: bool) -> tuple[Tensor, Tensor]:
    """Return input_ids and labels (4, 9), two rows a rank; silent: the second rank's rows have no label."""
    ids = torch.randint(10, VOCAB, (ROWS, T), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[0, :4] = labels[1, 6:] = -100
    labels[2:] = -100 if silent else labels[2:]
    return ids, labels


def call(model: Any, rows: slice, silent: bool, grouped: bool, share: float = 1.0) -> Tensor:
    """Return the loss of some rows; summed over all rows it is that of one process. share undoes the averaging of gradients."""
    ids, labels = data(silent)
    counts = (labels[:, 1:] != -100).sum(1)
    inputs = {"input_ids": ids[rows], "labels": labels[rows], "fused_lm_head": True}
    if not grouped:
        return model(**inputs, num_items_in_batch=int(counts.sum())).loss * share
    weights = torch.arange(1.0, ROWS + 1)[rows]

    def loss_fn(stats: TokenStats, group: int) -> Tensor:  # a group a row
        return -(weights[counts[rows] > 0][group] * stats.entropy.detach() * stats.logprob).mean() * share

    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts[rows][counts[rows] > 0].cumsum(0)])
    return model(**inputs, loss_fn=loss_fn, cu_groups=offsets).loss


def whole_gradients(model: nn.Module) -> dict[str, Tensor]:
    def whole(t: Any) -> Tensor:
        return t.full_tensor() if hasattr(t, "full_tensor") else t

    # Wrappers change the names of parameters, but not their order.
    return {str(i): whole(p.grad) for i, p in enumerate(p for p in model.parameters() if p.requires_grad)}


def adapted(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(4)
    model = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "lm_head"]))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.3)
    return model


def ddp(model: Any, world: int, find_unused_parameters: bool = False) -> nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=find_unused_parameters)


def fsdp(model: Any, world: int, own_group: bool = False, policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    """own_group: the lm_head is gathered for its own call and freed after it, instead of staying with the root."""
    options: dict[str, Any] = {"mesh": init_device_mesh("cpu", (world,))}
    if policy is not None:
        options["mp_policy"] = policy
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in inner.model.layers:
        fully_shard(layer, **options)
    if own_group:
        fully_shard(inner.lm_head, reshard_after_forward=True, **options)
    return fully_shard(model, **options)


def fused_after(model: Any, world: int) -> nn.Module:
    return fuse_lm_head(fsdp(model, world, own_group=True))


def zero3(model: Any, world: int, partitioned_first: bool = False) -> Any:
    import deepspeed

    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 1}
    zero |= {"reduce_bucket_size": 100_000, "stage3_prefetch_bucket_size": 100_000}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {**zero, "stage3_max_reuse_distance": 0},
    }
    if partitioned_first:  # as from_pretrained does under a ZeRO-3 config
        deepspeed.zero.Init(module=model, config_dict_or_path=config)
        assert model.lm_head.weight.numel() == 0
    fuse_lm_head(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    return deepspeed.initialize(model=model, config=config, optimizer=optimizer)[0]


# name: (architecture, wrapper, fused before wrapping, has adapters)
WRAPPED: dict[str, tuple[str, Callable[[Any, int], nn.Module], bool, bool]] = {
    "ddp": ("llama", ddp, True, False),
    "ddp tied, unused parameters": ("llama tied", lambda m, w: ddp(m, w, True), True, False),
    "ddp lora": ("llama", lambda m, w: ddp(adapted(m), w), True, True),
    "fsdp2": ("llama", fsdp, True, False),
    "fsdp2 tied": ("llama tied", fsdp, True, False),
    "fsdp2 softcap": ("gemma2", fsdp, True, False),
    "fsdp2 head of its own": ("llama", lambda m, w: fsdp(m, w, own_group=True), True, False),
    "fsdp2 fused after": ("llama", fused_after, False, False),
    "fsdp2 lora": ("llama", lambda m, w: fsdp(adapted(m), w), True, True),
    "fsdp2 lora, head of its own": ("llama", lambda m, w: fsdp(adapted(m), w, own_group=True), True, True),
}
ZERO3 = {
    "zero3": ("llama", zero3, False, False),
    "zero3 tied": ("llama tied", zero3, False, False),
    "zero3 partitioned first": ("llama", lambda m, w: zero3(m, w, True), False, False),
}
MODES = [(silent, grouped) for silent in (False, True) for grouped in (False, True)]


def case_results(name: str, rank: int, world: int) -> dict[tuple[bool, bool], dict[str, Tensor]]:
    architecture, wrap, fused_before, _ = {**WRAPPED, **ZERO3}[name]
    results = {}
    for silent, grouped in MODES:
        model = build(architecture).train()
        if fused_before:
            fuse_lm_head(model)
        wrapped = wrap(model, world)
        rows = slice(2 * rank, 2 * rank + 2)
        loss = call(wrapped, rows, silent, grouped, share=world)
        if name.startswith("zero3"):
            from deepspeed.utils import safe_get_full_grad

            wrapped.backward(loss)
            results[silent, grouped] = {str(i): safe_get_full_grad(p) for i, p in enumerate(model.parameters())}
        else:
            loss.backward()
            results[silent, grouped] = whole_gradients(wrapped)
    return results


def rounding_is_refused(world: int) -> str:
    """Return the error of FSDP2 as accelerate sets it up for mixed precision."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.bfloat16)
    model = fsdp(fuse_lm_head(build("llama")), world, policy=policy)
    try:
        call(model, slice(2), False, False)
    except ValueError as error:
        return str(error)
    return "accepted"


def mixed_precision(world: int) -> dict[str, Any]:
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32)
    model = fsdp(fuse_lm_head(build("llama")), world, own_group=True, policy=policy)
    ids, labels = data(False)
    out = model(input_ids=ids, labels=labels, fused_lm_head=True)
    out.loss.backward()
    return {"dtype": out.log_probs.dtype, "loss": out.loss.detach(), "grad": whole_gradients(model)}


def two_processes(rank: int, world: int, folder: str) -> None:
    start(rank, world, folder)
    names = [*WRAPPED, *(ZERO3 if HAS_DEEPSPEED else ())]
    results: dict[str, Any] = {name: case_results(name, rank, world) for name in names}
    results["rounding"], results["mixed"] = rounding_is_refused(world), mixed_precision(world)
    finish(rank, folder, results)


def four_processes(rank: int, world: int, folder: str) -> None:
    start(rank, world, folder)
    from transformers import LlamaForCausalLM

    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    results: dict[str, Any] = {}
    for name in ("llama", "llama tied"):
        for silent, grouped in MODES:
            model: Any = LlamaForCausalLM.from_pretrained(f"{folder}/{name}", tp_plan="auto", device_mesh=mesh)
            assert hasattr(model.lm_head.weight, "placements")
            fuse_lm_head(model)
            call(model, slice(ROWS), silent, grouped).backward()
            results[f"{name} {silent} {grouped}"] = {
                n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                for n, p in model.named_parameters()
            }
            results["vocab"] = fused_head(model).vocab
    finish(rank, folder, results)


def start(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_SIZE=str(world))
    os.environ["DS_ACCELERATOR"] = "cpu"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)


def finish(rank: int, folder: str, results: dict[str, Any]) -> None:
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def spawn(worker: Callable[..., None], world: int, folder: Path) -> list[dict[str, Any]]:
    context = mp.spawn(worker, (world, str(folder)), world, join=False)
    deadline = time.monotonic() + TIMEOUT
    while not context.join(timeout=5):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail(f"{worker.__name__} was not done after {TIMEOUT} s: a rank waits for another")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawn(two_processes, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("four")
    for name in ("llama", "llama tied"):
        build(name, num_key_value_heads=4).save_pretrained(folder / name)
    return spawn(four_processes, 4, folder)


def one_process(architecture: str, adapters: bool, silent: bool, grouped: bool, **changes: Any) -> dict[str, Tensor]:
    model = fuse_lm_head(build(architecture, **changes).train())
    if adapters:
        model = adapted(model)
    call(model, slice(ROWS), silent, grouped).backward()
    return whole_gradients(model)


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same terms are summed in another order, through the whole body: allow a few dozen eps of the largest."""
    assert got.keys() == expected.keys()
    for name, g in expected.items():
        torch.testing.assert_close(got[name], g, atol=32 * 2**-23 * float(g.abs().max()) + 1e-9, rtol=1e-5)


@pytest.mark.parametrize(
    ("silent", "grouped"), MODES, ids=["sum", "group loss", "sum, silent rank", "group loss, silent rank"]
)
@pytest.mark.parametrize("name", [*WRAPPED, *ZERO3])
def test_gradients_are_those_of_one_process(name: str, silent: bool, grouped: bool, two: list[dict[str, Any]]) -> None:
    if name.startswith("zero3") and not HAS_DEEPSPEED:
        pytest.skip("deepspeed is not installed")
    architecture, _, _, adapters = {**WRAPPED, **ZERO3}[name]
    expected = one_process(architecture, adapters, silent, grouped)
    for results in two:
        assert_same(results[name][silent, grouped], expected)


def test_an_output_that_fsdp_would_round_is_refused(two: list[dict[str, Any]]) -> None:
    for results in two:
        assert (
            "rounded log_probs to torch.bfloat16: give FSDP2 a MixedPrecisionPolicy(output_dtype" in results["rounding"]
        )


def test_mixed_precision_keeps_the_output_in_fp32(two: list[dict[str, Any]]) -> None:
    model = fuse_lm_head(build("llama").train().bfloat16())
    ids, labels = data(False)
    out = model(input_ids=ids, labels=labels, fused_lm_head=True)
    out.loss.backward()
    for results in two:
        assert results["mixed"]["dtype"] == torch.float32
        # FSDP2 also rounds the inputs of a layer, so the bodies differ by roundings to bf16.
        torch.testing.assert_close(results["mixed"]["loss"], out.loss.detach(), rtol=2**-8, atol=0)
        for got, p in zip(results["mixed"]["grad"].values(), model.parameters(), strict=True):
            torch.testing.assert_close(got, p.grad.float(), atol=2**-5 * float(p.grad.abs().max()), rtol=0)


@pytest.mark.parametrize(
    ("silent", "grouped"), MODES, ids=["sum", "group loss", "sum, silent rows", "group loss, silent rows"]
)
@pytest.mark.parametrize("name", ["llama", "llama tied"])
def test_tensor_parallel_models(name: str, silent: bool, grouped: bool, four: list[dict[str, Any]]) -> None:
    """The plan of transformers splits the lm_head over the vocabulary (97 rows: 25, 25, 25 and 22)."""
    model = fuse_lm_head(build(name, num_key_value_heads=4))
    call(model, slice(ROWS), silent, grouped).backward()
    expected = {n: p.grad for n, p in model.named_parameters()}
    for results in four:
        assert results["vocab"] == VOCAB
        assert_same(results[f"{name} {silent} {grouped}"], expected)
