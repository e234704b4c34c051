"""Loads, stores, copies, shuffles and tensor cores against their definitions in the PTX manual."""

import numpy as np
import pytest
import torch

from tests.executor.instructions import ACCESSES, MATRIX_LOADS, PARAMETERS, PRODUCTS, SHUFFLES
from tests.executor.launch import execute
from tests.executor.machine import Code
from tests.executor.ptx import TYPES, parse
from tests.executor.snippet import run
from tests.executor.tensor_cores import source_lanes

REGISTERS = {1: "%h", 2: "%h", 4: "%r", 8: "%d"}


def registers(width: int, count: int) -> str:
    return "{" + ", ".join(f"{REGISTERS[width]}{10 + i}" for i in range(count)) + "}"


@pytest.mark.parametrize("opcode", sorted(name for name, form in ACCESSES.items() if not form.store))
def test_a_load_and_the_store_of_its_width(opcode: str) -> None:
    """Thread i reads the (64 - i)-th piece of memory and writes it as the i-th."""
    form = ACCESSES[opcode]
    width = TYPES[form.kind]().itemsize
    size = width * form.count
    vector = f".v{form.count}" if form.count > 1 else ""
    given = torch.randint(0, 256, (64 * size,), dtype=torch.uint8)
    out = torch.zeros(64 * size, dtype=torch.uint8)
    listed = registers(width, form.count)
    body = f"""
mad.wide.u32 %d3, %r0, {size}, %d0;
mad.wide.u32 %d4, %r0, {size}, %d1;
sub.s32 %r1, 63, %r0;
mad.wide.u32 %d5, %r1, {size}, %d0;
mul.lo.s32 %r2, %r0, {size};
mul.lo.s32 %r3, %r1, {size};
"""
    if form.space == "shared":
        body += f"""
ld.global{vector}.b{8 * width} {listed}, [%d3];
st.shared{vector}.b{8 * width} [%r2], {listed};
bar.sync 0;
{opcode} {listed}, [%r3];
"""
    else:
        body += f"{opcode} {listed}, [%d5];\n"
    body += f"st.global{vector}.b{8 * width} [%d4], {listed};"
    run(body, given, out)
    assert torch.equal(out.view(64, size), given.view(64, size).flip(0))


@pytest.mark.parametrize("kind", ["s8", "u8", "b8", "s32", "b32"])
def test_a_wider_register_is_filled_by_the_sign_of_a_signed_type(kind: str) -> None:
    given = torch.arange(-32, 32, dtype=torch.int8 if kind.endswith("8") else torch.int32)
    out = torch.zeros(64, dtype=torch.int16 if kind.endswith("8") else torch.int64)
    register, size = ("%h1", 2) if kind.endswith("8") else ("%d9", 8)
    run(
        f"""
mad.wide.u32 %d3, %r0, {given.element_size()}, %d0;
mad.wide.u32 %d4, %r0, {size}, %d1;
ld.global.{kind} {{{register}}}, [%d3];
st.global.b{8 * size} [%d4], {{{register}}};
""",
        given,
        out,
    )
    bits = 8 * given.element_size()
    assert torch.equal(out, given.to(out.dtype) if kind.startswith("s") else given.to(out.dtype) & ((1 << bits) - 1))


@pytest.mark.parametrize("opcode", sorted(PARAMETERS))
def test_a_parameter(opcode: str) -> None:
    kind = PARAMETERS[opcode]
    bits = 8 * TYPES[kind]().itemsize
    declared = "f32" if kind == "f32" else f"u{bits}"
    value = -1.5 if kind == "f32" else -3
    register, width = ("%d1", 8) if kind != "f32" else ("%r1", 4)
    ptx = f"""
.entry k(.param .u64 k_0, .param .{declared} k_1) .reqntid 32 {{
.reg .b32 %r<4>; .reg .b64 %d<4>;
ld.param.b64 %d0, [k_0];
{opcode} {register}, [k_1];
st.global.b{8 * width} [%d0], {{{register}}};
ret;
}}
"""
    out = torch.zeros(1, dtype=torch.int64)
    execute(Code(parse(ptx)), {"out": out, "value": value}, (1, 1, 1), 0)
    if kind == "f32":
        assert out.view(torch.float32)[0] == -1.5
    else:
        assert out.item() == (-3 if kind.startswith("s") or bits == 64 else 2**32 - 3)


@pytest.mark.parametrize(("cache", "size"), [("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)])
def test_an_asynchronous_copy_fills_the_rest_with_zeros(cache: str, size: int) -> None:
    given = torch.randint(1, 256, (64, size), dtype=torch.uint8)
    out = torch.full((64, size), 255, dtype=torch.uint8)
    words = [f"%r{20 + i}" for i in range(size // 4)]
    vector = {4: "", 8: ".v2", 16: ".v4"}[size]
    run(
        f"""
mad.wide.u32 %d3, %r0, {size}, %d0;
mad.wide.u32 %d4, %r0, {size}, %d1;
mul.lo.s32 %r2, %r0, {size};
and.b32 %r3, %r0, 3;
setp.eq.b32 %p1, %r3, 0;
selp.b32 %r4, 0, {size}, %p1;
cp.async.{cache}.shared.global [%r2], [%d3], {size:#x}, %r4;
cp.async.commit_group;
cp.async.wait_group 0;
ld.shared{vector}.b32 {{{", ".join(words)}}}, [%r2];
st.global{vector}.b32 [%d4], {{{", ".join(words)}}};
""",
        given,
        out,
    )
    given[::4] = 0
    assert torch.equal(out, given)


# Warps


def shuffled(mode: str, values: list[int], operand: list[int], clamp: int) -> list[int]:
    """The manual's own pseudocode of `shfl.sync`."""
    result = []
    for lane in range(32):
        b, c, segment = operand[lane] & 31, clamp & 31, clamp >> 8 & 31
        last, first = lane & segment | c & ~segment, lane & segment
        j, inside = {
            "up": (lane - b, lane - b >= last),
            "down": (lane + b, lane + b <= last),
            "bfly": (lane ^ b, (lane ^ b) <= last),
            "idx": (first | b & ~segment, (first | b & ~segment) <= last),
        }[mode]
        result.append(values[j if inside else lane])
    return result


@pytest.mark.parametrize("mode", sorted(SHUFFLES.values()))
@pytest.mark.parametrize("clamp", [31, 0, 0x1C1F & 0x1C03, 0x181F, 0x100F])
def test_a_shuffle(mode: str, clamp: int) -> None:
    generator = np.random.default_rng(0)
    operand = generator.integers(0, 40, 32)
    lane = np.arange(32)
    source = source_lanes(mode, lane, operand, np.full(32, clamp))
    assert source.tolist() == shuffled(mode, lane.tolist(), operand.tolist(), clamp)


def test_a_shuffle_stays_in_its_warp() -> None:
    out = torch.zeros(64, dtype=torch.int32)
    run(
        """
shfl.sync.bfly.b32 %r3, %r0, 16, 31, -1;
mad.wide.u32 %d3, %r0, 4, %d0;
st.global.b32 [%d3], {%r3};
""",
        out,
    )
    assert out.tolist() == [i ^ 16 for i in range(64)]


@pytest.mark.parametrize("opcode", sorted(MATRIX_LOADS))
def test_a_load_of_matrices(opcode: str) -> None:
    """The manual: thread i of the 8 for matrix m gives the address of row i; thread t gets row t / 4, columns
    2 (t % 4) and the next, or of the transposed matrix."""
    count, transposed = MATRIX_LOADS[opcode]
    halves = torch.randint(0, 1 << 15, (count, 8, 8), dtype=torch.int16)
    out = torch.zeros(count, 32, 2, dtype=torch.int16)
    listed = [f"%r{20 + i}" for i in range(count)]
    # Rows lie in shared memory in reverse, 144 bytes apart for matrices.
    body = """
and.b32 %r1, %r0, 7;
shr.u32 %r2, %r0, 3;
sub.s32 %r3, 7, %r1;
mul.lo.s32 %r4, %r2, 144;
mad.lo.s32 %r5, %r3, 16, %r4;
"""
    body += f"setp.lt.u32 %p1, %r0, {8 * count};\nmad.wide.u32 %d3, %r0, 16, %d0;\n"
    body += "@%p1 ld.global.v4.b32 {%r30, %r31, %r32, %r33}, [%d3];\n"
    body += "@%p1 st.shared.v4.b32 [%r5], {%r30, %r31, %r32, %r33};\nbar.sync 0;\n"
    body += f"{opcode} {{{', '.join(listed)}}}, [%r5];\nmad.wide.u32 %d4, %r0, 4, %d1;\n"
    body += "\n".join(f"st.global.b32 [%d4+{128 * i}], {{{name}}};" for i, name in enumerate(listed))
    run(body, halves, out, threads=32)
    for m in range(count):
        for t in range(32):
            for i in range(2):
                row, column = t // 4, 2 * (t % 4) + i
                assert out[m, t, i] == (halves[m, column, row] if transposed else halves[m, row, column])


@pytest.mark.parametrize("place", ["0", "smem", "smem+16", "%r1+16"])
def test_every_thread_may_give_one_address(place: str) -> None:
    out = torch.zeros(2, 32, dtype=torch.int32)
    run(
        f"""
mov.u32 %r1, smem;
shl.b32 %r2, %r0, 2;
add.s32 %r3, %r2, %r1;
st.shared.b32 [%r3], {{%r0}};
bar.sync 0;
ld.shared.b32 {{%r4}}, [{place}];
ldmatrix.sync.aligned.m8n8.x1.shared.b16 {{%r5}}, [{place}];
mad.wide.u32 %d3, %r0, 4, %d0;
st.global.b32 [%d3], {{%r4}};
st.global.b32 [%d3+128], {{%r5}};
""",
        out,
        threads=32,
    )
    first = 4 if "16" in place else 0
    assert out[0].tolist() == [first] * 32
    assert out[1].tolist() == [first + i % 4 for i in range(32)]


@pytest.mark.parametrize("opcode", sorted(x for x in PRODUCTS if PRODUCTS[x] != "tf32"))
def test_a_product(opcode: str) -> None:
    """Fragments by the formulas of the manual, "Matrix Fragments for mma.m16n8k16 with floating point type"."""
    dtype = torch.bfloat16 if PRODUCTS[opcode] == "bf16" else torch.float16
    a, b = torch.randn(2, 16, 16).to(dtype), torch.randn(2, 16, 8).to(dtype)
    c = torch.randn(2, 16, 8)
    left, right, third = torch.zeros(2, 32, 8).to(dtype), torch.zeros(2, 32, 4).to(dtype), torch.zeros(2, 32, 4)
    places = []
    for t in range(32):
        group, within = t >> 2, t % 4
        for i in range(8):
            row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
            column = within * 2 + (i & 1) if i < 4 else within * 2 + (i & 1) + 8
            left[:, t, i] = a[:, row, column]
        for i in range(4):
            row = within * 2 + (i & 1) if i < 2 else within * 2 + (i & 1) + 8
            right[:, t, i] = b[:, row, group]
        for i in range(4):
            row, column = group if i < 2 else group + 8, within * 2 + (i & 1)
            places.append((row, column))
            third[:, t, i] = c[:, row, column]
    out = torch.zeros(2, 32, 4)
    run(
        f"""
mad.wide.u32 %d4, %r0, 16, %d0;
mad.wide.u32 %d5, %r0, 8, %d1;
mad.wide.u32 %d6, %r0, 16, %d2;
mad.wide.u32 %d7, %r0, 16, %d3;
ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%d4];
ld.global.v2.b32 {{%r14, %r15}}, [%d5];
ld.global.v4.b32 {{%r16, %r17, %r18, %r19}}, [%d6];
{opcode} {{%r20, %r21, %r22, %r23}}, {{%r10, %r11, %r12, %r13}}, {{%r14, %r15}}, {{%r16, %r17, %r18, %r19}};
st.global.v4.b32 [%d7], {{%r20, %r21, %r22, %r23}};
""",
        left,
        right,
        third,
        out,
    )
    exact = a.double() @ b.double() + c.double()
    for t in range(32):
        for i in range(4):
            row, column = places[4 * t + i]
            assert (out[:, t, i] - exact[:, row, column]).abs().max() < 1e-5


def test_a_product_of_tf32() -> None:
    """Fragments by the formulas of the manual, "Matrix Fragments for mma.m16n8k8", of .tf32."""
    a, b, c = torch.randn(2, 16, 8), torch.randn(2, 8, 8), torch.randn(2, 16, 8)
    left, right, third, out = (torch.zeros(2, 32, count) for count in (4, 2, 4, 4))
    places = []
    for t in range(32):
        group, within = t >> 2, t % 4
        for i in range(4):
            left[:, t, i] = a[:, group if i in (0, 2) else group + 8, within if i in (0, 1) else within + 4]
        for i in range(2):
            right[:, t, i] = b[:, within if i == 0 else within + 4, group]
        for i in range(4):
            places.append((group if i < 2 else group + 8, within * 2 + (i & 1)))
            third[:, t, i] = c[:, *places[-1]]
    run(
        """
mad.wide.u32 %d4, %r0, 16, %d0;
mad.wide.u32 %d5, %r0, 8, %d1;
mad.wide.u32 %d6, %r0, 16, %d2;
mad.wide.u32 %d7, %r0, 16, %d3;
ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%d4];
ld.global.v2.b32 {%r14, %r15}, [%d5];
ld.global.v4.b32 {%r16, %r17, %r18, %r19}, [%d6];
mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r20, %r21, %r22, %r23}, {%r10, %r11, %r12, %r13}, {%r14, %r15}, """
        "{%r16, %r17, %r18, %r19};\nst.global.v4.b32 [%d7], {%r20, %r21, %r22, %r23};",
        left,
        right,
        third,
        out,
    )
    # What is below TF32's ten bits of mantissa is not multiplied.
    cut_a, cut_b = ((x.view(torch.int32) & -(1 << 13)).view(torch.float32).double() for x in (a, b))
    exact = cut_a @ cut_b + c.double()
    for t in range(32):
        for i in range(4):
            torch.testing.assert_close(out[:, t, i].double(), exact[:, *places[4 * t + i]], rtol=1e-5, atol=1e-5)


# Counters


@pytest.mark.parametrize(
    ("stride", "sectors", "least"),
    [(4, 4, 4), (8, 8, 4), (32, 32, 4), (0, 1, 1)],
    ids=["side by side", "2", "8", "one"],
)
def test_sectors_of_a_request(stride: int, sectors: int, least: int) -> None:
    memory = torch.zeros(512, dtype=torch.int32)
    counted = run(f"mad.wide.u32 %d3, %r0, {stride}, %d0;\nld.global.b32 {{%r3}}, [%d3];", memory, threads=32)
    traffic = counted.total("global")
    assert (traffic.requests, traffic.moved, traffic.least) == (1, sectors, least)
    assert traffic.bytes == (4 if stride == 0 else 128)


@pytest.mark.parametrize(
    ("width", "stride", "cycles", "least"),
    [
        *((4, 4, 1, 1), (4, 8, 2, 1), (4, 128, 32, 1), (4, 132, 1, 1), (4, 0, 1, 1)),
        *((8, 8, 2, 2), (8, 16, 4, 2), (16, 16, 4, 4), (16, 128, 32, 4), (16, 144, 4, 4)),
    ],
)
def test_bank_conflicts(width: int, stride: int, cycles: int, least: int) -> None:
    vector = {4: "", 8: ".v2", 16: ".v4"}[width]
    listed = ", ".join(["%r10", "%r11", "%r12", "%r13"][: width // 4])
    body = f"mul.lo.s32 %r1, %r0, {stride};\nmov.u32 %r10, 0;\nmov.u32 %r11, 0;\nmov.u32 %r12, 0;\nmov.u32 %r13, 0;\n"
    counted = run(body + f"st.shared{vector}.b32 [%r1], {{{listed}}};", shared=8192, threads=32)
    traffic = counted.total("shared")
    assert (traffic.requests, traffic.moved, traffic.least) == (1, cycles, least)


def test_instructions_are_counted_by_warp() -> None:
    body = "setp.lt.u32 %p1, %r0, 32;\n@%p1 bra $past;\nadd.f32 %r1, %r0, %r0;\nfma.rn.f32 %r1, %r1, %r1, %r1;\n"
    body += "$past:\nmov.u32 %r2, 0;"
    counted = run(body, threads=96, programs=5)
    assert counted.pipes["float"] == 2 * 2 * 5
    assert counted.pipes["integer"] == 3 * 3 * 5  # both moves and the comparison
    assert counted.pipes["control"] == 2 * 3 * 5
