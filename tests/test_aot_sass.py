"""What a step of a row costs, read from machine code: the instructions of its usual path, whatever lies beside it."""

from __future__ import annotations

import pytest

from tools.aot_sass import Instruction, Step, Work, parse, step, usual_path

# Four logits of fp32 a step, four of bf16 written.
WORK = Work(read=16, exponentials=4, written=8)


def sass(*lines: str) -> str:
    """Write instructions as cuobjdump prints them: with addresses, 16 apart, and encodings."""
    head = '\n\tcode for sm_90a\n\t\tFunction : _row_kernel\n\t.headerflags\t@"EF_CUDA_SM90"\n'
    encoded = "/* 0x0000000a04028981 */\n" + " " * 88 + "/* 0x000362000c1e1b00 */\n"
    return head + "".join(f"        /*{16 * k:04x}*/ {line:>40} ; {encoded}" for k, line in enumerate(lines))


def cost(*lines: str) -> Step | None:
    return step(parse(sass(*lines)), 4, WORK)


def names(*lines: str) -> list[str]:
    return [i.opcode for i in usual_path(parse(sass(*lines)), WORK)]


LOAD = "LDG.E.128 R4, desc[UR4][R2.64]"
EXPONENTIALS = ["MUFU.EX2 R4, R4", "MUFU.EX2 R5, R5", "MUFU.EX2 R6, R6", "MUFU.EX2 R7, R7"]
STORE = "STG.E.64 desc[UR4][R8.64], R4"
END = ["EXIT", "BRA 0x90", "NOP"]


def test_parses_what_cuobjdump_prints() -> None:
    assert parse(sass("@!P0 LDG.E.64 R2, desc[UR10][R4.64]", "EXIT")) == [
        Instruction(0, "@!P0", "LDG.E.64", "R2, desc[UR10][R4.64]"),
        Instruction(16, "", "EXIT", ""),
    ]


@pytest.mark.parametrize(
    ("opcode", "work"),
    [
        ("LDG.E", Work(4, 0)),
        ("LDG.E.U16", Work(2, 0)),
        ("LDG.E.S8.CONSTANT", Work(1, 0)),
        ("LDG.E.LTC128B.128", Work(16, 0)),  # LTC128B says how much the level-2 cache fetches
        ("LDGSTS.E.BYPASS.128", Work(16, 0)),
        ("STG.E.EF.64", Work(0, 0, 8)),
        ("MUFU.EX2", Work(0, 1)),
        ("MUFU.RCP", Work(0, 0)),
        ("LDS.128", Work(0, 0)),
    ],
)
def test_knows_what_an_instruction_moves(opcode: str, work: Work) -> None:
    assert Instruction(0, "", opcode, "R0, R1").work == work


def test_counts_a_loop_and_nothing_around_it() -> None:
    before = ["LDG.E.128 R4, [R2]", "MUFU.EX2 R4, R4", "@!P0 BRA 0xc0"]
    # An instruction that its predicate turns off is issued; padding is not.
    loop = [LOAD, *EXPONENTIALS, "NOP", "@P1 FADD R4, R4, R5", STORE, "@P0 BRA 0x30"]
    assert cost(*before, *loop, "BAR.SYNC 0x0", *END) == Step(per_logit=8 / 4, barriers=0)


def test_counts_the_barriers_at_which_the_block_waits() -> None:
    loop = [
        LOAD,
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "WARPSYNC.ALL",
        *EXPONENTIALS,
        "BAR.RED.OR.DEFER_BLOCKING 0x0, P1",
        STORE,
    ]
    assert cost(*loop, "@P0 BRA 0x0", *END) == Step(per_logit=10 / 4, barriers=2)


def test_what_runs_rarely_is_not_counted_wherever_it_is() -> None:
    #  0x00 load, 0x10 the usual path jumps over the rare one, in which a loop rescales what has been written: 0x30 ... 0x60
    rare = [
        "BAR.SYNC 0x0",
        "LDG.E.128 R8, [R2]",
        "STG.E.128 [R2], R8",
        "FMUL R8, R8, R9",
        "@P3 BRA 0x30",
        "BAR.SYNC 0x0",
    ]
    inside = [LOAD, "@!P2 BRA 0x80", *rare, *EXPONENTIALS, STORE, "@P0 BRA 0x0"]
    assert cost(*inside, *END) == Step(per_logit=8 / 4, barriers=0)
    #  0x80 ...: the same behind the loop, from where it jumps back to 0x20
    behind = [LOAD, "@P2 BRA 0x80", *EXPONENTIALS, STORE, "@P0 BRA 0x0", "BAR.SYNC 0x0", "LDG.E R8, [R2]", "BRA 0x20"]
    assert names(*behind, *END) == names(*inside, *END)


def test_a_way_that_leaves_out_the_work_is_not_the_step() -> None:
    # Rows beyond the last one jump over everything that only they would store.
    assert len(names(LOAD, "@P1 BRA 0x70", *EXPONENTIALS, STORE, "@P0 BRA 0x0", *END)) == 8
    assert len(names(LOAD, *EXPONENTIALS, "@P1 BRA 0x70", STORE, "@P0 BRA 0x0", *END)) == 8
    assert len(names("@P1 BRA 0x20", LOAD, *EXPONENTIALS, STORE, "@P0 BRA 0x0", *END)) == 8


def test_an_unrolled_loop_is_several_steps() -> None:
    once = [LOAD, *EXPONENTIALS, "BAR.SYNC 0x0", STORE]
    assert cost(*once, *once, "IADD3 R2, R2, R3, RZ", "@P0 BRA 0x0", *END) == Step(per_logit=16 / 2 / 4, barriers=1)


def test_follows_every_kind_of_jump() -> None:
    step_ = [LOAD, *EXPONENTIALS, STORE]  # 0x00 ... 0x50
    # Out of the loop by a call, which is a jump where the target is far, and back by a jump.
    assert len(names(*step_, "@P0 CALL.REL.NOINC 0x80", "BRA 0x0", *END)) == 8
    # By a condition of the whole warp, which is an operand: here the usual way goes on.
    assert len(names("BRA.U !UP0, 0x80", *step_, "BRA 0x0", *END)) == 8
    assert len(names(*step_, "@!P0 EXIT", "BRA 0x0", *END)) == 8


def test_no_step_no_cost() -> None:
    assert cost(LOAD, *EXPONENTIALS, STORE, *END) is None  # no loop
    assert cost(LOAD, *EXPONENTIALS, STORE, "EXIT", "BRA 0x0", *END) is None  # ends before it jumps back
    assert cost(LOAD, *EXPONENTIALS, "@P0 BRA 0x0", *END) is None  # writes nothing
    assert cost("LDG.E.64 R4, [R2]", *EXPONENTIALS, STORE, "@P0 BRA 0x0", *END) is None  # reads half a block
    assert cost(LOAD, "LDG.E R8, [R2]", *EXPONENTIALS, STORE, "@P0 BRA 0x0", *END) is None  # reads something besides
    assert cost(LOAD, *EXPONENTIALS, STORE, "CALL.REL.NOINC 0x90", "@P0 BRA 0x0", *END) is None  # calls a function
    assert cost() is None
