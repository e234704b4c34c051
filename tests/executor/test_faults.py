"""What a GPU would not forgive is an error that says where, who and at which address."""

import pytest
import torch

from tests.executor.machine import KernelError
from tests.executor.ptx import UnsupportedError, parse
from tests.executor.snippet import run

#: %d2 = the thread's own 4 bytes of the tensor at %d0; %r2 = those of shared memory.
OWN = """
mul.wide.u32 %d1, %r0, 4;
add.s64 %d2, %d0, %d1;
shl.b32 %r2, %r0, 2;
mov.u32 %r9, %ctaid.x;
"""


def numbers(count: int = 64) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int32)


def fault(body: str, *tensors: torch.Tensor, **sizes: int) -> str:
    with pytest.raises(KernelError) as error:
        run(OWN + body, *tensors, **sizes)
    return str(error.value)


# Global memory


def test_an_access_past_the_end_of_a_tensor() -> None:
    storage = numbers(128)
    message = fault("ld.global.b32 {%r3}, [%d2+16];", storage[:64])
    assert message == (
        "snippet, snippet.py:6: ld.global.b32 reads outside the tensors of the launch "
        "(program 0, threads 60-63, at t0 + 256 of 256 bytes)"
    )
    assert "writes outside" in fault("st.global.b32 [%d2+-4], {%r0};", storage[64:])


def test_an_access_past_the_end_does_not_land_in_the_next_tensor() -> None:
    storage = numbers(128)
    assert "t0 + 256 of 256 bytes" in fault("ld.global.b32 {%r3}, [%d2+4];", storage[:64], storage[64:])


def test_a_null_pointer() -> None:
    message = fault("mov.u64 %d2, 0;\nld.global.b32 {%r3}, [%d2];", numbers())
    assert message.endswith("reads outside the tensors of the launch (program 0, threads 0-63, at 0x0)")


def test_a_masked_access_is_none() -> None:
    run(OWN + "setp.lt.u32 %p1, %r0, 60;\n@%p1 ld.global.b32 {%r3}, [%d2+16];", numbers())


def test_a_misaligned_access() -> None:
    message = fault("ld.global.v2.b32 {%r3, %r4}, [%d2];", numbers(65))
    assert "is misaligned: 8 bytes (program 0, threads 1, 3, 5, 7 and 28 more ranges, at t0 + 4 of" in message


def test_programs_that_write_one_element() -> None:
    message = fault("st.global.b32 [%d2], {%r9};", numbers(), programs=2)
    assert "writes global memory that another program writes (program 0, threads 0-63, at t0 + 0" in message
    # And when they do not run together.
    assert "another program writes" in fault("st.global.b32 [%d2], {%r9};", numbers(), programs=70)


@pytest.mark.parametrize("reader_first", [True, False])
def test_a_program_that_reads_what_another_writes(reader_first: bool) -> None:
    condition = f"setp.{'eq' if reader_first else 'ne'}.b32 %p1, %r9, 0;"
    body = f"{condition}\n@%p1 ld.global.b32 {{%r3}}, [%d2];\n@!%p1 st.global.b32 [%d2], {{%r9}};"
    message = fault(body, numbers(), programs=40)
    assert "that another program reads" in message or "that another program writes" in message


def test_programs_may_read_one_element_and_write_their_own() -> None:
    body = """
ld.global.b32 {%r3}, [%d0];
mad.wide.u32 %d3, %r9, 256, %d2;
st.global.b32 [%d3+256], {%r3};
"""
    memory = numbers(64 * 41)
    memory[0] = 7
    run(OWN + body, memory, programs=40)
    assert (memory[64:] == 7).all()


def test_threads_that_write_different_values_to_one_address() -> None:
    assert "writes another value than another thread" in fault("st.global.b32 [%d0], {%r0};", numbers())
    run(OWN + "st.global.b32 [%d0], {%r9};", numbers())
    assert "writes another value than another warp to one address" in fault("st.shared.b32 [0], {%r0};", numbers())
    run(OWN + "st.shared.b32 [0], {%r0};", numbers(), threads=32)


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        ("st.global.b32 [%d2], {%r0};", "ld.global.b32 {%r3}, [%d4];", "reads what another warp wrote"),
        ("ld.global.b32 {%r3}, [%d4];", "st.global.b32 [%d2], {%r2};", "writes what another warp read"),
        ("st.global.b32 [%d2], {%r0};", "st.global.b32 [%d4], {%r0};", "writes what another warp wrote"),
        ("ld.global.b32 {%r3}, [%d2];", "ld.global.b32 {%r3}, [%d4];", None),
        ("st.global.b32 [%d2], {%r9};", "st.global.b32 [%d4], {%r9};", None),
    ],
)
def test_warps_of_a_program_meet_in_global_memory_at_a_barrier(first: str, second: str, what: str | None) -> None:
    body = "xor.b32 %r5, %r2, 128;\nmov.b32 %r6, 0;\ncvt.u64.u32 %d3, %r5;\nadd.s64 %d4, %d0, %d3;\n"
    run(OWN + body + first + "\nbar.sync 0;\n" + second, numbers())
    if what is None:
        run(OWN + body + first + "\n" + second, numbers())
    else:
        assert f"{what} since the last barrier (program 0, threads" in fault(body + first + "\n" + second, numbers())


# Shared memory


def test_shared_memory_has_an_end() -> None:
    message = fault("st.shared.b32 [%r2+128], {%r0};", numbers(), shared=256)
    assert message.endswith("is out of the 256 bytes of shared memory (program 0, threads 32-63, at shared 0x100)")
    assert "is misaligned: 4 bytes" in fault("st.shared.b32 [%r2+2], {%r0};", numbers())


def test_shared_memory_is_written_before_it_is_read() -> None:
    body = "setp.ne.b32 %p1, %r0, 5;\n@%p1 st.shared.b32 [%r2], {%r0};\nbar.sync 0;\nld.shared.b32 {%r3}, [%r2];"
    assert "reads shared memory that nothing wrote (program 0, thread 5, at shared 0x14)" in fault(body, numbers())


#: %r5 = the same word of the other warp.
OTHER = "xor.b32 %r5, %r2, 128;\n"


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        ("st.shared.b32 [%r2], {%r0};", "ld.shared.b32 {%r3}, [%r5];", "reads what another warp wrote"),
        ("ld.shared.b32 {%r3}, [%r5];", "st.shared.b32 [%r2], {%r2};", "writes what another warp read"),
        ("st.shared.b32 [%r2], {%r0};", "st.shared.b32 [%r5], {%r0};", "writes what another warp wrote"),
        ("ld.shared.b32 {%r3}, [%r2];", "ld.shared.b32 {%r3}, [%r5];", None),
        ("st.shared.b32 [%r2], {%r0};", "ld.shared.b32 {%r3}, [%r2];", None),
        ("st.shared.b32 [%r2], {%r9};", "st.shared.b32 [%r5], {%r9};", None),
    ],
)
def test_warps_meet_at_a_barrier(first: str, second: str, what: str | None) -> None:
    body = OTHER + "st.shared.b32 [%r2], {%r9};\nbar.sync 0;\n"
    run(OWN + body + first + "\nbar.sync 0;\n" + second, numbers())
    if what is None:
        run(OWN + body + first + "\n" + second, numbers())
    else:
        message = fault(body + first + "\n" + second, numbers())
        assert f"{what} since the last barrier (program 0, threads" in message
        assert "snippet.py:10" in message


def test_a_read_by_two_warps_is_kept() -> None:
    """The last of them to read must not hide the first."""
    body = """
st.shared.b32 [%r2], {%r9};
bar.sync 0;
ld.shared.b32 {%r3}, [0];
setp.eq.b32 %p1, %r0, 32;
@%p1 st.shared.b32 [0], {%r0};
"""
    assert "writes what another warp read" in fault(body, numbers())


# Asynchronous copies

COPY = "cp.async.ca.shared.global [%r2], [%d2], 4;\n"


def test_a_copy_is_waited_for() -> None:
    assert "reads what an asynchronous copy may not have delivered" in fault(
        COPY + "cp.async.commit_group;\nld.shared.b32 {%r3}, [%r2];\ncp.async.wait_group 0;", numbers()
    )
    assert "ends before its asynchronous copies are waited for" in fault(COPY + "cp.async.commit_group;", numbers())


def test_a_copy_without_a_group_is_not_waited_for() -> None:
    body = COPY + "cp.async.wait_group 0;\nld.shared.b32 {%r3}, [%r2];"
    assert "reads what an asynchronous copy may not have delivered" in fault(body, numbers())


@pytest.mark.parametrize("pending", [0, 1, 2])
def test_a_wait_leaves_the_last_groups_under_way(pending: int) -> None:
    copies = COPY + "cp.async.commit_group;\ncp.async.ca.shared.global [%r2+256], [%d2], 4;\ncp.async.commit_group;\n"
    read = "ld.shared.b32 {%r3}, [%r2];\nld.shared.b32 {%r4}, [%r2+256];"
    body = copies + f"cp.async.wait_group {pending};\n" + read + "\ncp.async.wait_group 0;"
    if pending == 0:
        run(OWN + body, numbers())
    else:
        assert f"snippet.py:{11 + (pending == 1)}: ld.shared" in fault(body, numbers())


def test_a_copy_that_is_waited_for_is_the_waiting_warp_s_until_a_barrier() -> None:
    body = OTHER + COPY + "cp.async.commit_group;\ncp.async.wait_group 0;\n"
    run(OWN + body + "bar.sync 0;\nld.shared.b32 {%r3}, [%r5];", numbers())
    assert "reads what another warp wrote" in fault(body + "ld.shared.b32 {%r3}, [%r5];", numbers())


def test_nothing_is_written_over_a_copy() -> None:
    body = COPY + "cp.async.commit_group;\nst.shared.b32 [%r2], {%r0};\ncp.async.wait_group 0;"
    assert "writes where an asynchronous copy is under way" in fault(body, numbers())


def test_a_copy_reads_within_a_tensor_and_checks_no_more_than_it_fills() -> None:
    body = "setp.lt.u32 %p1, %r0, 60;\nselp.b32 %r6, 4, 0, %p1;\ncp.async.ca.shared.global [%r2], [%d2+16], 4, %r6;\n"
    body += "cp.async.commit_group;\ncp.async.wait_group 0;\nbar.sync 0;\nld.shared.b32 {%r3}, [%r2];\n"
    body += "st.global.b32 [%d2], {%r3};"
    memory = numbers() + 1
    run(OWN + body, memory)
    assert memory.tolist() == [*range(5, 65), 0, 0, 0, 0]
    message = fault(body.replace(", %r6;", ";"), numbers())
    assert "cp.async.ca.shared.global reads outside the tensors of the launch (program 0, threads 60-63" in message


# Synchronisation


@pytest.mark.parametrize(
    ("limit", "instruction", "what"),
    [
        (32, "bar.sync 0;", "of the program (program 0, threads 0-31)"),
        (16, "bar.warp.sync -1;", "of the warp (program 0, threads 0-15)"),
        (48, "shfl.sync.bfly.b32 %r3, %r0, 1, 31, -1;", "of the warp (program 0, threads 32-47)"),
        (16, "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r3}, [%r2];", "of the warp (program 0, threads 0-15)"),
        (
            16,
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r3,%r4,%r5,%r6}, {%r0,%r0,%r0,%r0}, {%r0,%r0}, "
            "{%r0,%r0,%r0,%r0};",
            "of the warp (program 0, threads 0-15)",
        ),
    ],
)
@pytest.mark.parametrize("how", ["predicate", "branch"])
def test_every_thread_is_there(limit: int, instruction: str, what: str, how: str) -> None:
    test = f"setp.lt.u32 %p1, %r0, {limit};\n"
    if how == "predicate":
        body = test + f"@%p1 {instruction}"
    else:
        body = test + f"@!%p1 bra $past;\n{instruction}\n$past:\nmov.u32 %r7, %r0;"
    assert f"is not reached by every thread {what}" in fault(body, numbers())


# What the parser and the translator do not know


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("atom.global.add.u32 %r3, [%d2], %r0;", "snippet, snippet.py:6: atom.global.add.u32: no such form"),
        ("ld.global.L1::evict_last.b32 {%r3}, [%d2];", "no such form"),
        ("ld.global.v2.b32 {%r3}, [%d2];", "1 registers"),
        ("ld.global.b32 {%r99}, [%d2];", "%r99"),
        ("ld.global.b32 {%r3}, [%d2*4];", "cannot read the address"),
        ("bar.sync 1;", "a barrier of a part of the program"),
        ("bar.sync 0, 32;", "a barrier of a part of the program"),
        ("bar.warp.sync 15;", "a barrier of a part of the warp"),
        ("shfl.sync.bfly.b32 %r3, %r0, 1, 31, 15;", "a part of the warp"),
        ("cp.async.cg.shared.global [%r2], [%d2], 4;", "copies 4 bytes"),
        (".maxntid 4;", "cannot read '.maxntid 4'"),
        (".reg .f16 %q<2>;", "register %q0 of type f16"),
    ],
)
def test_what_is_not_known_is_an_error(line: str, what: str) -> None:
    with pytest.raises(UnsupportedError) as error:
        run(OWN + line, numbers())
    assert what in str(error.value)
    assert "snippet.py:6" in str(error.value)


def test_two_functions_in_a_module() -> None:
    with pytest.raises(UnsupportedError, match="2 functions in one module: f, g"):
        parse(".func f(.param .b32 x) { ret; } .entry g(.param .u32 g_0) .reqntid 32 { ret; }")


def test_a_place_tells_who_called() -> None:
    kernel = parse(
        ".entry k(.param .u64 k_0) .reqntid 32 {\n .loc 2 43 13, function_name $L__info_string0, inlined_at 1 55 35\n"
        ' ret;\n}\n.file 1 "/a/kernel.py"\n.file 2 "/b/standard.py"\n'
    )
    assert kernel.blocks[0][0].place == "standard.py:43 (called from kernel.py:55)"
