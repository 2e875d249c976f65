"""The printed plan: the recorder counts exactly, every head costs the promised FLOP, and the page says what is predicted."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import HEADS, ragged
from gem_kernels import compat
from tools import plan, plan_model, plan_page, record
from tools.plan_model import DEVICES, work
from tools.plan_ops import OPS, Call, Shape
from tools.record import Gemm, Launch, TorchOp

pytestmark = pytest.mark.skipif(bool(plan.unavailable()), reason=plan.unavailable() or "-")

BF16, FP32 = torch.bfloat16, torch.float32
H200 = DEVICES["h200"]
SMALL = Shape(256, 64, 1000, BF16)


def meta(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def recorded(call: Call) -> record.Recording:
    return record.record(lambda: call, 90, 132)


# --- the recorder -----------------------------------------------------------------------------------------------------


def test_a_score_is_one_product_and_one_row_kernel() -> None:
    p = plan.plan("score", SMALL, H200)
    assert p.gemms == {Gemm(256, 1000, 64, BF16, FP32, accumulates=False): 1}
    assert {name: kernel.launches for name, kernel in p.kernels.items()} == {"_row_statistics_kernel": 1}
    assert p.flops == 2 * 256 * 64 * 1000
    tile, state, results = 4 * 256 * 1008, 4 * 4 * 256, 4 * 4 * 256  # four statistics each, running and finished
    assert p.extra_bytes == tile + state - results


def test_sega_is_three_products_each_once() -> None:
    p = plan.plan("sega", SMALL, H200)
    assert p.gemms == {
        Gemm(256, 1000, 64, BF16, FP32, accumulates=False): 1,  # logits
        Gemm(256, 64, 1000, BF16, FP32, accumulates=True): 1,  # dhidden
        Gemm(1000, 64, 256, BF16, FP32, accumulates=False): 1,  # dweight
    }
    assert p.kernels["_row_exponentials_kernel"].launches == p.kernels["_fold_target_kernel"].launches == 1
    frozen = plan.plan("sega-frozen", SMALL, H200)
    assert (p.flops, frozen.flops) == (6 * 256 * 64 * 1000, 4 * 256 * 64 * 1000)


def test_the_fused_forward_is_one_launch_on_the_processors_of_the_device() -> None:
    shape = Shape(8192, 4096, 128_256, BF16)
    programs = {}
    for name in ("a100", "h200"):
        p = plan.plan("score-triton", shape, DEVICES[name])
        assert not p.gemms and p.flops == 2 * 8192 * 4096 * 128_256
        programs[name] = p.kernels["_linear_logprob_fwd_kernel"].first.grid[0]
    assert programs["a100"] % 64 == programs["h200"] % 64 == 0
    assert programs["a100"] != programs["h200"]  # 108 and 132 processors


def test_peak_memory_of_a_known_call() -> None:
    x, out = meta(1000), meta(1000)

    def call() -> tuple[Tensor, Tensor]:
        first = x + 1  # 4000 bytes
        second = first.view(10, 100).double()  # 8000 more
        del first
        torch.add(x, 2, out=out)  # nothing new, and neither is a view
        kept = second[:5].float() + second[5:].float()  # 2000 each, of which one stays
        del second
        x.mul_(2)
        return kept, x.view(2, 500)  # x was there before

    assert recorded(call).extra_bytes == 8000 + 3 * 2000 - 2000


def test_memory_that_results_share_counts_once() -> None:
    x = meta(1000)

    def call() -> tuple[Tensor, Tensor]:
        y = x + 1
        return y[:500], y[500:]

    assert recorded(call).extra_bytes == 0


@pytest.mark.parametrize(
    ("call", "moved"),
    [
        (lambda x, at: x + 1, 8000),
        (lambda x, at: x.mul_(2), 8000),  # read and written
        (lambda x, at: x.zero_(), 4000),
        (lambda x, at: x.copy_(x.new_empty(1000)), 8000),
        (lambda x, at: x.half(), 6000),
        (lambda x, at: x[:1].expand(1000) + x, 8004),
        (lambda x, at: torch.cat([x, x]), 16_000),
        (lambda x, at: x.index_select(0, at), 800),  # the index itself is small and not counted
        (lambda x, at: x.index_copy_(0, at, x[:100]), 800),
        (lambda x, at: torch.add(x, 1, out=x.new_empty(1000)), 8000),
        (lambda x, at: x.float(), 0),  # nothing to do
        (lambda x, at: x.view(10, 100)[:5].t(), 0),
        (lambda x, at: torch.empty_like(x), 0),
    ],
)
def test_bytes_of_an_operation(call: object, moved: int) -> None:
    x, at = meta(1000), meta(100, dtype=torch.int64)
    events = recorded(lambda: call(x, at)).events  # type: ignore[operator]
    assert all(isinstance(event, TorchOp) for event in events)
    assert [event.bytes for event in events if event.bytes] == ([moved] if moved else [])


def test_products_are_recorded_as_on_cuda() -> None:
    a, b = meta(32, 64, dtype=BF16), meta(64, 48, dtype=BF16)

    def call() -> None:
        out = meta(32, 48)
        compat.mm(a, b, out)
        compat.addmm_(out, a.float(), b.float())
        assert compat.gemm_dtype(a) == BF16

    found = [event for event in recorded(call).events if isinstance(event, Gemm)]
    assert found == [Gemm(32, 48, 64, BF16, FP32, False), Gemm(32, 48, 64, FP32, FP32, True)]
    assert compat.gemm_dtype(a) == FP32, "nothing is left behind"


def test_products_on_meta_tensors_are_not_asked_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b, out = meta(32, 64, dtype=BF16), meta(64, 48, dtype=BF16), meta(32, 48)
    ran = []
    monkeypatch.setattr(torch._ops.OpOverload, "__call__", lambda func, *args, **kwargs: ran.append(func))
    with record.WithoutProducts():
        assert torch.mm(a, b, out_dtype=FP32, out=out) is out
        wide = torch.mm(a, b, out_dtype=FP32)
    assert (wide.shape, wide.dtype, ran) == ((32, 48), FP32, [])


# --- the promises -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_the_promised_flop_at_every_head(op: str, head: object) -> None:
    shape = Shape(head.n, head.d, head.v, head.dtype)  # type: ignore[attr-defined]
    tokens = OPS[op].products * shape.n
    if op.startswith("group"):  # a group too large for the cache of 1 GiB is computed again
        groups = [stop - start for start, stop in pairwise(ragged(shape.n)[1].tolist())]
        tokens += sum(size for size in groups if 2 * size * shape.v > 1 << 30)
    for device in ("a100", "h200"):
        assert plan.plan(op, shape, DEVICES[device]).flops == 2 * tokens * shape.d * shape.v


# --- the model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DEVICES)
def test_a_large_product_takes_what_the_device_declares(name: str) -> None:
    device = DEVICES[name]
    for dtype, rate in ((BF16, device.gemm), (FP32, device.fp32)):
        large = work(Gemm(8192, 8192, 8192, dtype, dtype, False), device)
        assert large.flops / large.seconds == pytest.approx(rate, rel=1e-6)
        assert large.use > 0.95


def test_a_sliver_uses_the_processors_as_counted() -> None:
    sliver = work(Gemm(88, 4096, 4096, BF16, FP32, False), H200)  # 16 tiles of 128 rows on 132 processors
    assert sliver.use == pytest.approx(88 / 128 * 16 / 132)
    tail = work(Gemm(4096, 1280, 4096, BF16, FP32, False), H200)  # 160 tiles: 2 waves
    assert tail.use == pytest.approx(160 / (2 * 132))


def test_a_long_product_of_few_tiles_is_split() -> None:
    short, long = (work(Gemm(1024, 896, k, BF16, FP32, False), H200) for k in (4096, 151_936))
    assert short.use < 0.3 < 0.9 < long.use  # 28 tiles
    assert long.flops / long.seconds <= H200.gemm


def test_an_accumulating_product_moves_its_result_twice() -> None:
    plain, adding = (work(Gemm(4096, 4096, 4096, BF16, FP32, adds), H200) for adds in (False, True))
    assert adding.bytes - plain.bytes == 4 * 4096 * 4096
    assert adding.seconds - plain.seconds == pytest.approx(4 * 4096 * 4096 / H200.memory)


def row_launch(rows: int, size: int) -> Launch:
    launched = {"BLOCK_V": 2048, "num_warps": 4, "z_ptr": record.Shaped((rows, 4000), size)}
    return Launch("_row_statistics_kernel", (rows,), {"n_rows": rows, "n_cols": 4000, **launched})


def test_a_row_kernel_takes_the_longer_of_instructions_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = 132 * 32  # whole waves
    for per_logit, limit in ((1.0, "memory"), (100.0, "instructions")):
        monkeypatch.setattr(plan_model, "instructions", lambda launch, device, n=per_logit: n)
        found = work(row_launch(rows, 4), H200)
        issued = rows * (2 * 2048 * per_logit + 128 * plan_model._OUTSIDE["_row_statistics_kernel"])  # two steps
        assert found.limit == limit and found.bytes == 4 * rows * 4000
        longer = max(issued / (132 * 128 * 1.75e9 * 0.7), found.bytes / 4.3e12)
        assert found.seconds == pytest.approx(longer + plan_model.RAMP)
    few = work(row_launch(133, 4), H200)  # they take the time of 264
    assert few.seconds - plan_model.RAMP == pytest.approx(2 * (found.seconds - plan_model.RAMP) / 32)


def test_instructions_are_those_of_the_nearest_compiled_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = {"kernel": "_row_statistics_kernel", "arch": "sm_90", "variant": "1x2048 FRESH"}
    chunked, logits = (
        statistics | {"case": "chunked", "dtype": "bf16"},
        statistics | {"case": "logits", "dtype": "bf16"},
    )
    compiled = [
        chunked | {"instructions/logit": "12.5"},
        chunked | {"instructions/logit": "12.7", "dtype": "fp32"},
        chunked | {"instructions/logit": "14.0", "arch": "sm_80"},
        chunked | {"instructions/logit": "99.0", "kernel": "_row_gradient_kernel"},
        logits | {"instructions/logit": "11.0", "variant": "1x2048 IGNORES FRESH"},
        logits | {"instructions/logit": "30.0", "variant": "1x2048 SOFTCAP IGNORES FRESH"},
        logits | {"instructions/logit": "13.0", "variant": "1x2048 IGNORES FRESH", "dtype": "fp32"},
    ]
    monkeypatch.setattr(plan_model, "_compiled", lambda: compiled)

    def count(device: str, size: int, block: int = 2048, ignores: bool = False) -> float:
        meta = {"IGNORES": ignores, "FRESH": True, "BLOCK_N": 1, "BLOCK_V": block, "z_ptr": record.Shaped((1,), size)}
        return plan_model.instructions(Launch("_row_statistics_kernel", (1,), meta), DEVICES[device])

    assert (count("h200", 4), count("a100", 4)) == (12.7, 14.0)
    assert count("h200", 2) == count("h200", 2, ignores=True) == 11.0  # bf16 logits of the caller
    assert count("h200", 4, ignores=True) == 13.0
    assert count("h200", 4, block=512) == 12.7  # the block of a small vocabulary is cut


def test_the_fused_forward_takes_as_long_as_its_busiest_processor() -> None:
    sizes = {
        "N": 300,
        "V": 1000,
        "D": 64,
        "BLOCK_N": 128,
        "BLOCK_V": 256,
        "GROUP_N": 2,
        "splits": 2,
        "tiles_per_split": 3,
    }
    tensors = {name: record.Shaped((1,), 2) for name in ("hidden_ptr", "weight_ptr", "partial_ptr")}
    two = H200._replace(processors=2, l2=1e15, memory=1e15)
    # Row blocks (0, 1) and then (2): 3 and 3 tiles, then 1 and 1; then 3 and 1.
    found = work(Launch("_linear_logprob_fwd_kernel", (6,), sizes | tensors), two)
    assert found.use == pytest.approx(300 * 1000 / (128 * 256) / (2 * 7))
    tile = 2 * 128 * 256 * 64 / (0.9 * two.rate(BF16)) + plan_model.EPILOGUE * 128 * 256 / two.issue()
    assert found.seconds == pytest.approx(7 * tile + plan_model.RAMP)
    assert (found.flops, found.limit) == (2 * 300 * 1000 * 64, "tensor cores")
    slow = work(Launch("_linear_logprob_fwd_kernel", (6,), sizes | tensors), two._replace(l2=1e9))
    assert slow.limit == "level-2 cache" and slow.seconds > found.seconds


# --- the command and the page -----------------------------------------------------------------------------------------


def test_the_command_prints_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["256", "64", "1000", "bf16", "a100", "--op", "sega", "logprob"]) == 0
    sega, logprob = capsys.readouterr().out.split("\n\n")
    assert "`sega_loss`, forward and backward, N=256 D=64 V=1000 bfloat16 on a100" in sega
    assert "3 GEMMs, 1 _row_exponentials_kernel, 1 _fold_target_kernel" in sega and "6 NDV" in sega
    assert "1 x (256, 64) (64, 1000) = float32" in sega
    assert ": 1 _row_statistics_kernel, " in logprob and "GEMM" not in logprob and "no product" in logprob


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["0", "64", "1000", "bf16", "h200"], "argument N: must be a whole number >= 1, got '0'"),
        (["256", "-1", "1000", "bf16", "h200"], "argument D: must be a whole number >= 1, got '-1'"),
        (["256", "64", "1e3", "bf16", "h200"], "argument V: must be a whole number >= 1, got '1e3'"),
        (["256", "64", "1000", "fp8", "h200"], "argument dtype: invalid choice: 'fp8'"),
        (["256", "64", "1000", "bf16", "b200"], "argument device: invalid choice: 'b200'"),
        (["256", "64", "1000", "bf16", "h200", "--op", "loss"], "argument --op: invalid choice: 'loss'"),
        (["256", "64"], "the following arguments are required: V, dtype, device"),
    ],
)
def test_what_is_wrong_with_the_arguments_is_said(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        plan.main(arguments)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("INTERPRETED", True, "TRITON_INTERPRET=1 is set"), ("HAS_TRITON", False, "triton is not installed")],
)
def test_says_what_it_needs(
    name: str, value: bool, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compat, name, value)
    for main, arguments in ((plan.main, ["1", "1", "1", "bf16", "h200"]), (plan_page.main, [])):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert said in capsys.readouterr().err


@pytest.mark.skipif(not compat._ADDMM_WIDENS, reason="an older torch adds a product in two steps")
def test_the_page_says_what_is_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_page.main(["--check"]) == 0, capsys.readouterr().out
