"""The planner: even cuts, slabs that are few and balanced, tiles within their memory, and that calls do what it says."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from group_losses import group_loss, likelihood, make_case, sega
from numerics import DTYPES

from benchmarks.shapes import HEADS, Shape
from gem_kernels import compat, plan, tiles
from gem_kernels.compat import INTERPRETED
from gem_kernels.gradients import Gradients
from gem_kernels.group_loss import chunked
from gem_kernels.operands import Operands
from gem_kernels.plan import Blocks, Cache, Plan, Slab, even, fewest, padded, tiling
from gem_kernels.softmax import Transform
from gem_kernels.types import LogitTransform

SLIVER = 1024  # rows; with fewer the products with the gradient leave half of a GPU idle
GPUS = {80: 108, 90: 132}  # processors of an A100, and of an H100 or H200
IDENTITY = Transform.of(LogitTransform())


def sizes(parts: Sequence[slice]) -> list[int]:
    return [part.stop - part.start for part in parts]


# --- cuts -------------------------------------------------------------------------------------------------------------


def test_even_parts() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        granule = rng.choice([1, 16, 128, 256])
        total, most = rng.randint(1, 200_000), rng.randint(granule, 20_000)
        parts = even(total, fewest(total, most, granule), granule)
        assert [parts[0].start, *(p.stop for p in parts)] == [*(p.start for p in parts), total]
        assert all(part.start % granule == 0 for part in parts)
        assert max(sizes(parts)) <= most and max(sizes(parts)) - min(sizes(parts)) <= granule
        assert (len(parts) - 1) * (most // granule * granule) < total  # one part less would not do


def test_a_cut_leaves_no_sliver() -> None:
    """126,977 rows by 4096 are 31 tiles and one row over."""
    assert min(sizes(even(126_977, fewest(126_977, 4096, 128), 128))) == 3968
    assert even(0, 3, 128) == () and sizes(even(5, 9)) == [1] * 5


# --- slabs ------------------------------------------------------------------------------------------------------------


def cuts(offsets: Sequence[int], rows: int) -> list[list[int]]:
    """Return the sizes of the slabs of every cut into slabs of at most `rows` rows, or of one group."""
    found, groups = [], len(offsets) - 1
    for inner in itertools.product([False, True], repeat=groups - 1):
        ends = [0, *(i + 1 for i, cut in enumerate(inner) if cut), groups]
        slabs = list(itertools.pairwise(ends))
        if all(offsets[b] - offsets[a] <= rows or b == a + 1 for a, b in slabs):
            found.append([offsets[b] - offsets[a] for a, b in slabs])
    return found


def test_slabs_are_the_fewest_and_the_largest_is_as_small_as_possible() -> None:
    rng = random.Random(0)
    for _ in range(300):
        lengths = [rng.randint(0, 9) for _ in range(rng.randint(1, 8))]
        offsets, rows = [0, *itertools.accumulate(lengths)], rng.choice([0, 1, 7, 12, 30])
        slabs = Cache(row=10, shared=10 * rows + 9, most=1000, spare=0).plan(offsets).slabs
        assert [group for s in slabs for group in range(s.first, s.last)] == list(range(len(lengths)))
        assert all((s.start, s.stop) == (offsets[s.first], offsets[s.last]) for s in slabs)
        got, possible = [s.stop - s.start for s in slabs], cuts(offsets, rows)
        assert got in possible and len(got) == min(map(len, possible))
        assert max(got) == min(max(cut) for cut in possible if len(cut) == len(got))


def test_a_slab_is_cached_if_it_fits() -> None:
    """A group alone may fill `most`; one slab may use the spare memory too; another rank's rows decide for themselves."""
    cache = Cache(row=10, shared=50, most=80, spare=40)
    assert cache.plan([0, 8, 12, 21]) == Plan([Slab(0, 1, 0, 8), Slab(1, 2, 8, 12), Slab(2, 3, 12, 21)], 8)
    assert cache.plan([0, 5, 9]) == Plan([Slab(0, 2, 0, 9)], 9)
    assert cache.plan([0, 5, 10]) == Plan([Slab(0, 1, 0, 5), Slab(1, 2, 5, 10)], 5)
    assert cache.plan([0, 12]) == Plan([Slab(0, 1, 0, 12)], 12)
    assert cache.plan([0, 13]) == Plan([Slab(0, 1, 0, 13)], -1)
    assert cache.plan([0, 5, 10], own=cache._replace(row=17)) == Plan([Slab(0, 1, 0, 5), Slab(1, 2, 5, 10)], -1)
    assert cache.plan([0]) == Plan([], -1) and cache.plan([0, 0]) == Plan([Slab(0, 1, 0, 0)], 0)


def test_pieces_are_even_and_the_fewest() -> None:
    rng = random.Random(0)
    for _ in range(400):
        row, total = 16 * rng.randint(1, 50_000), rng.choice([0, 1, 300, 4000, 70_000]) * rng.randint(1, 9) // 9
        shared = rng.choice([1, 1 << 26, 1 << 30] if total < 300 else [1 << 28, 1 << 30])
        cache = Cache(row, shared, most=1 << 30, spare=rng.choice([0, 1 << 28]))
        offsets = cache.pieces(total)
        slabs = cache.plan(offsets).slabs
        lengths = [b - a for a, b in itertools.pairwise(offsets)]
        assert offsets[0] == 0 and offsets[-1] == total and 0 not in lengths
        assert [s.stop - s.start for s in slabs] == lengths
        most = max(1, cache.shared // row)
        assert lengths in ([], [total]) or (max(lengths) <= most and len(lengths) == fewest(total, most))
        assert len(lengths) < 2 or total * row > cache.shared + cache.spare
        assert not lengths or max(lengths) - min(lengths) <= 128


# --- on the heads of published models ---------------------------------------------------------------------------------


def tokens(step: int) -> list[int]:
    """Return numbers of tokens from 1k to 64k, round ones and their neighbours among them."""
    round_ones = [n + d for n in (1024, 2048, 4096, 4184, 8192, 16_384, 65_536) for d in (-1, 0, 1)]
    return [n for n in sorted({*round_ones, *range(1024, 65_536, step)}) if 1024 <= n <= 65_536]


def plan_of(head: Shape, n: int, dtype: torch.dtype, needed: Sequence[bool], cache_bytes: int) -> tuple[Cache, Plan]:
    """Plan sega_loss as its implementation does."""
    x = Operands(*(torch.empty(size, head.d, dtype=dtype, device="meta") for size in (n, head.v)), None, None)
    arguments = (x, IDENTITY, cache_bytes, needed, head.v)
    cache = chunked._cache(*arguments)
    return cache, cache.plan(chunked.pieces(*arguments, n))


@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_no_slab_and_no_tile_is_a_sliver(head: Shape, arch: int) -> None:
    with compat.compiling(arch, pytest.fail, GPUS[arch]):
        for n in tokens(331):
            for needed in ((True, True), (True, False)):
                _, plan = plan_of(head, n, torch.bfloat16, needed, 1 << 30)
                for slab in plan.slabs:
                    rows = slab.stop - slab.start
                    parts = tiles.tiling(torch.empty(rows, head.d, dtype=torch.bfloat16, device="meta"), head.v)
                    assert min(rows, *sizes(parts.rows)) >= SLIVER, (n, rows, sizes(parts.rows))
                    assert all(part.start % 128 == 0 for part in parts.rows)
                    assert all(part.start % 256 == 0 for part in parts.columns)


@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_memory_is_what_was_promised(head: Shape, dtype: torch.dtype, arch: int) -> None:
    """Cache and fp32 sum of a narrower dweight: together at most cache_bytes and that sum, which a frozen head does not have.

    The tile of logits is within its table.
    """
    with compat.compiling(arch, pytest.fail, GPUS[arch]):
        for n, cache_bytes, trained in itertools.product(tokens(4999), (1 << 26, 1 << 30), (True, False)):
            cache, plan = plan_of(head, n, dtype, (True, trained), cache_bytes)
            assert cache.row == padded(head.v) * (2 if dtype == torch.bfloat16 else 4)
            wider = 4 * head.d * head.v if trained and dtype != torch.float32 else 0
            held = max(plan.cached_rows, 0) * cache.row + (wider if len(plan.slabs) > 1 else 0)
            assert held <= cache_bytes + wider
            fits_at_once = n * cache.row <= cache_bytes + wider
            assert (len(plan.slabs) == 1) == fits_at_once
            assert (
                fits_at_once or cache_bytes < cache.row or plan.cached_rows == max(s.stop - s.start for s in plan.slabs)
            )
            hidden = torch.empty(n, head.d, dtype=dtype, device="meta")
            tile = tiles.chunk_tile(hidden)
            assert tiles.tiling(hidden, head.v).elements <= tile.rows * tile.cols


@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_tiles_are_near_the_best_cut_there_is(head: Shape, arch: int) -> None:
    """Within 3 % of every cut into even tiles of that memory and height; the logits of round numbers of tokens fill 90 % of
    the waves that they take.
    """
    d, processors, launches = head.d, GPUS[arch], tiles._LAUNCHES / head.d

    def waves(height: int, width: int) -> int:
        return -(-(-(-height // 128) * -(-width // 256)) // processors)

    def predicted(rows: Sequence[int], columns: Sequence[int]) -> float:
        """Sum over the tiles: logits, dhidden and dweight, what they read, and their launches, in waves over D."""
        return sum(
            waves(r, c) + waves(r, d) * c / d + waves(c, d) * r / d + (r + c) / plan._SIDES_OF_A_WAVE + launches
            for r, c in itertools.product(rows, columns)
        )

    with compat.compiling(arch, pytest.fail, processors):
        for n in (1024, 2048, 3000, 4096, 4184, 8192, 16_384):
            hidden = torch.empty(n, d, dtype=torch.bfloat16, device="meta")
            tile, parts = tiles.chunk_tile(hidden), tiles.tiling(hidden, head.v)
            rows, columns = sizes(parts.rows), sizes(parts.columns)
            others = [
                predicted(heights, sizes(even(head.v, fewest(head.v, most // 256 * 256, 256) + more, 256)))
                for row_parts in range(1, n // SLIVER + 1)
                if max(heights := sizes(even(n, row_parts, 128))) <= tile.rows
                for most in [tile.rows * tile.cols // max(heights)]
                for more in (0, 1, 2, 3, 5)
            ]
            assert predicted(rows, columns) <= 1.03 * min(others), (n, rows, columns)
            if n.bit_count() == 1:
                used = sum(waves(r, c) for r, c in itertools.product(rows, columns)) * processors
                assert n / 128 * head.v / 256 >= 0.9 * used, (n, rows, columns)


# --- tiles ------------------------------------------------------------------------------------------------------------


def test_tiles_of_a_cpu_are_plain_even_cuts() -> None:
    """Without waves nothing but the number of tiles counts."""
    cpu = Blocks(rows=1, columns=16, processors=1, launches=0.0)
    for n, rows, columns in (
        (1024, [1024], 32),
        (512, [512], 16),
        (1, [1], 1),
        (2048, [1024, 1024], 32),
        (1500, [750, 750], 23),
    ):
        parts = tiling(n, 512, 128_256, tiles.CHUNKED.rows, tiles.CHUNKED.rows * tiles.CHUNKED.cols, cpu)
        assert sizes(parts.rows) == rows and len(parts.columns) == columns
        assert {size // 16 * 16 for size in sizes(parts.columns)} <= {parts.widest, parts.widest - 16}
    assert tiles.tiling(torch.empty(1024, 512), 128_256).widest == 4016 or INTERPRETED


def test_tiles_cover_the_logits() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        blocks = Blocks(*rng.choice([(1, 16, 1), (1, 16, 2), (128, 256, 108), (128, 256, 132)]), launches=rng.random())
        n, d, v = rng.choice([0, 1, 5, 300, 5000]), rng.randint(1, 5000), rng.choice([0, 1, 17, 257, 9000, 130_000])
        n, v = rng.randint(n // 2, n), rng.randint(v // 2, v)
        rows, logits = rng.choice([(1, 16), (37, 37 * 48), (1024, 1 << 22), (8448, 8448 * 2048)])
        parts = tiling(n, d, v, rows, logits, blocks)
        for ranges, total, granule in ((parts.rows, n, blocks.rows), (parts.columns, v, blocks.columns)):
            assert sum(sizes(ranges)) == total and all(a.stop == b.start for a, b in itertools.pairwise(ranges))
            assert all(part.start % granule == 0 and part.start < part.stop for part in ranges)
        if blocks.rows <= rows and min(n, blocks.rows) * blocks.columns <= logits:
            assert parts.elements <= logits and max(sizes(parts.rows), default=0) <= rows


# --- calls do what the plan says --------------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect the number of slabs of every group loss of the test."""
    seen: list[int] = []
    init = Gradients.__init__

    def spy(self: Gradients, x: Operands, needed: Sequence[bool], passes: int) -> None:
        seen.append(passes)
        init(self, x, needed, passes)

    monkeypatch.setattr(Gradients, "__init__", spy)
    return seen


CALLS: dict[str, Callable[..., Any]] = {
    "linear_group_loss": lambda case, **kw: group_loss(case, "chunked", likelihood, range(0, 41, 8), **kw),
    "sega_loss": lambda case, **kw: sega(case, "chunked", torch.ones(5), range(0, 41, 8), **kw),
}


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", CALLS)
def test_one_slab_to_the_byte(op: str, dtype: torch.dtype, trained: bool, passes: list[int]) -> None:
    """All logits need as much as cache_bytes and the fp32 sum of a narrower dweight together, or one byte more."""
    case = make_case(40, 2, 64, dtype=dtype, bias=False, rank=0, ignored=0.0)
    x = case.leaves((True, trained, False, False, False))
    spare = 4 * 2 * 64 if trained and dtype != torch.float32 else 0
    all_logits = 40 * 64 * (2 if INTERPRETED and dtype == torch.bfloat16 else 4)
    for cache_bytes in (all_logits - spare, all_logits - spare - 1):
        CALLS[op](x, cache_bytes=cache_bytes)
    assert passes == [1, 2]


@pytest.mark.parametrize("cache_rows", [90, 40, 15])
@pytest.mark.usefixtures("small_tiles")
def test_the_products_of_a_call(cache_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tile of every slab: one product for its logits, one for each gradient."""
    outputs: list[tuple[int, ...]] = []
    for name in ("mm", "addmm_"):
        original = getattr(compat, name)

        def spy(*args: Any, original: Callable[..., Any] = original, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            outputs.append(tuple(result.shape))
            return result

        monkeypatch.setattr(compat, name, spy)
    n, d, v = 90, 13, 217
    case = make_case(n, d, v, bias=False, rank=0, ignored=0.0)
    sega(case.leaves(), "chunked", torch.ones(1), [0, n], cache_bytes=4 * padded(v) * cache_rows)
    expected = []
    for slab in even(n, fewest(n, cache_rows)):
        parts = tiles.tiling(case.hidden[slab], v)
        for rows, columns in itertools.product(sizes(parts.rows), sizes(parts.columns)):
            expected += [(rows, columns), (rows, d), (columns, d)]
    assert sorted(outputs) == sorted(expected) and len(outputs) >= 3 * 3


@pytest.mark.skipif(not INTERPRETED, reason="exponentials are cached where Triton runs")
@pytest.mark.parametrize("cache_rows", [90, 40])
def test_the_launches_of_cached_exponentials(cache_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch a tile, and one a slab for the targets."""
    names: list[str] = []
    launch = compat.launch

    def spy(kernel: Any, *args: Any, **kwargs: Any) -> None:
        names.append(kernel.__name__)
        launch(kernel, *args, **kwargs)

    monkeypatch.setattr(compat, "launch", spy)
    n, v = 90, 217
    case = make_case(n, 13, v, dtype=torch.bfloat16, bias=False, rank=0, ignored=0.0)
    x = case.leaves((True, False, False, False, False))
    sega(x, "chunked", torch.ones(1), [0, n], cache_bytes=2 * padded(v) * cache_rows)
    slabs = even(n, fewest(n, cache_rows))
    parts = [tiles.tiling(case.hidden[slab], v) for slab in slabs]
    assert names.count("_row_exponentials_kernel") == sum(len(p.rows) * len(p.columns) for p in parts)
    assert names.count("_fold_target_kernel") == len(slabs)
