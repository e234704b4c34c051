"""Every arithmetic form against its definition in the PTX manual, in Python's own integers, fractions and floats."""

import math
import struct
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.executor.instructions import ARITHMETIC
from tests.executor.ptx import TYPES, Instruction, Kernel, UnsupportedError
from tests.executor.translate import translate

THREADS = 640

FLOATS = [0x00000000, 0x00000001, 0x007FFFFF, 0x00800000, 0x3F800000, 0x3F800001, 0x3EFFFFFF, 0x3F7FFFFF, 0x7EFFFFFF]
FLOATS += [0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7F800001, 0x33800000, 0x4B800001, 0x3F808000, 0x3F818000, 0x477FF000]
FLOATS += [0x7E800000, 0x7F000000, 0x38800000, 0x387FC000, 0x33000000, 0x42800000, 0xC2FC0000 & 0x7FFFFFFF, 0x43160000]
HALVES = [
    0x0000,
    0x0001,
    0x03FF,
    0x0400,
    0x3C00,
    0x3C01,
    0x7BFF,
    0x7C00,
    0x7E00,
    0x7F80,
    0x7F81,
    0x7FC0,
    0x7F7F,
    0x0080,
]
SPECIAL = {
    "f32": [0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000],
    "b16": [0x0000, 0x8000, 0x7C00, 0xFC00, 0x7E00, 0x7F80, 0xFF80, 0x7FC0],
}


def one_instruction(opcode: str, kinds: tuple[str, ...], result: str, extra: dict[str, str] | None = None) -> Kernel:
    """A kernel of one instruction, whose registers are its result and its operands."""
    registers = {"%d": result} | {f"%s{i}": kind for i, kind in enumerate(kinds)}
    instruction = Instruction(opcode, tuple(registers), None, False, "here:1")
    return Kernel("k", {}, THREADS, registers | (extra or {}), frozenset(), [[instruction]], {})


def storage(kind: str) -> str:
    """The type that a register is declared with to hold this one."""
    return "pred" if kind == "pred" else f"b{max(16, 8 * TYPES[kind]().itemsize)}"


def inputs(kind: str, generator: np.random.Generator) -> np.ndarray[Any, Any]:
    """Bits of operands: edges, and random ones."""
    if kind == "pred":
        return generator.integers(0, 2, THREADS).astype(bool)
    bits = 8 * TYPES[kind]().itemsize
    edges = [0, 1, 2, 3, 5, 31, 32, 33, (1 << bits - 1) - 1, 1 << bits - 1, (1 << bits) - 1, (1 << bits) - 2]
    if kind == "f32":
        edges = [*FLOATS, *(bits | 0x80000000 for bits in FLOATS)]
    elif kind == "b16":
        edges = [*HALVES, *(bits | 0x8000 for bits in HALVES)]
    random = generator.integers(0, 1 << bits, THREADS, np.uint64)
    if kind == "f32":  # of like size, so that sums and products are rounded
        random[: THREADS // 2] = (
            random[: THREADS // 2] & 0x80FFFFFF | generator.integers(0x7C, 0x82, THREADS // 2, np.uint64) << 23
        )
    count = min(len(edges) * 8, THREADS)
    random[:count] = generator.choice(np.array(edges, np.uint64), count)
    if kind in ("f32", "b16"):  # zeros and infinities of both signs and NaN, often enough to meet one another
        random[:100] = generator.choice(np.array(SPECIAL[kind], np.uint64), 100)
    return random.astype(TYPES[storage(kind)])


# Numbers of the manual


def to_int(bits: int, kind: str) -> int:
    width = 8 * TYPES[kind]().itemsize
    bits &= (1 << width) - 1
    return bits - (1 << width) if kind.startswith("s") and bits >> width - 1 else bits


def nearest(exact: Fraction, precision: int, least: int, greatest: float) -> float:
    """To nearest even, with a mantissa of `precision` bits and exponents from `least` on; past `greatest` infinity."""
    if exact == 0:
        return 0.0
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > size
    unit = Fraction(2) ** (max(exponent, least) - precision + 1)
    units = round(size / unit)  # Python's own is to nearest even
    value = float(units * unit)
    return math.copysign(math.inf if value > greatest else value, exact)


FORMATS = {
    "f32": (24, -126, 3.4028234663852886e38),
    "f16": (11, -14, 65504.0),
    "bf16": (8, -126, 3.3895313892515355e38),
}


def round_to(kind: str, value: Fraction | float) -> float:
    if isinstance(value, float) and (not math.isfinite(value) or value == 0):
        return value
    sign = -1.0 if value < 0 else 1.0
    return math.copysign(nearest(Fraction(value), *FORMATS[kind]), sign)


def float_of(kind: str, bits: int) -> float:
    if kind == "f16":
        return struct.unpack("<e", struct.pack("<H", bits))[0]
    return struct.unpack("<f", struct.pack("<I", bits if kind == "f32" else bits << 16))[0]


def bits_of(kind: str, value: float) -> int:
    if math.isnan(value):
        return 0x7FFFFFFF if kind == "f32" else 0x7FFF
    if kind == "f16":
        return struct.unpack("<H", struct.pack("<e", value))[0]
    return struct.unpack("<I", struct.pack("<f", value))[0] >> (0 if kind == "f32" else 16)


def exactly(name: str, *x: float) -> float:
    """add, sub, mul or fma of float32 numbers, rounded once."""
    if name == "sub":
        return exactly("add", x[0], -x[1])
    a, b, c = (x[0], x[1], 0.0) if name == "mul" else (1.0, *x) if name == "add" else x
    if not all(map(math.isfinite, (a, b, c))):
        return a * b if name == "mul" else a * b + c
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if exact == 0:
        return (
            a * b
            if name == "mul"
            else (math.copysign(0.0, a) * math.copysign(1.0, b) + c if c == 0 and a * b == 0 else 0.0)
        )
    return round_to("f32", exact)


def flushed(x: float) -> float:
    return math.copysign(0.0, x) if abs(x) < 2.0**-126 else x


def ordered(name: str, a: float, b: float) -> bool:
    unordered = math.isnan(a) or math.isnan(b)
    if name in ("nan", "num"):
        return unordered == (name == "nan")
    if len(name) == 3:  # unordered or ...
        return unordered or ordered(name[:2], a, b)
    relations = {"lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b, "eq": a == b, "ne": a != b}
    return not unordered and relations[name]


def extreme(name: str, a: float, b: float) -> float:
    if math.isnan(a) or math.isnan(b):
        return b if math.isnan(a) else a
    lower, upper = sorted((a, b), key=lambda x: (x, math.copysign(1.0, x)))
    return lower if name == "min" else upper


def shifted(left: bool, kind: str, x: int, count: int) -> int:
    width = 8 * TYPES[kind]().itemsize
    return 0 if left and count >= width else x << count if left else to_int(x, kind) >> min(count, 2 * width)


def bit_field(kind: str, a: int, b: int, c: int) -> int:
    """The manual's own loop for `bfe`."""
    position, length, top = b & 0xFF, c & 0xFF, 31
    sign = 0
    if kind == "s32" and length:
        sign = a >> min(position + length - 1, top) & 1
    value = 0
    for i in range(32):
        value |= (a >> position + i & 1 if i < length and position + i <= top else sign) << i
    return value


def permuted(a: int, b: int, selector: int) -> int:
    source = [(b << 32 | a) >> 8 * i & 255 for i in range(8)]
    value = 0
    for i in range(4):
        choice = selector >> 4 * i & 15
        byte = source[choice & 7]
        value |= ((255 if byte & 128 else 0) if choice & 8 else byte) << 8 * i
    return value


def whole_numbers(name: str, kind: str, x: list[int]) -> int:
    """Integer arithmetic before it is cut to the width of the result."""
    a, b, c = (*(to_int(v, kind) for v in x), 0, 0)[:3]
    product = {"mul.lo": a * b, "mad.lo": a * b + c, "mul.wide": a * b, "mul.hi": a * b >> 32}
    if name == "mad.wide":
        return a * b + x[2]
    if name in ("div", "rem"):
        towards_zero = (abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)) if b else -1
        return towards_zero if name == "div" else a - towards_zero * b
    simple = {"and": a & b, "or": a | b, "xor": a ^ b, "not": ~a, "add": a + b, "sub": a - b, "neg": -a}
    return (product | simple | {"min": min(a, b), "max": max(a, b)})[name]


def definition(opcode: str, x: list[int]) -> int:
    """Bits of the result, from bits of the operands."""
    *parts, kind = opcode.split(".")
    name = ".".join(parts)
    if name in ("shl", "shr"):
        return shifted(name == "shl", kind, x[0], x[1])
    if name == "bfe":
        return bit_field(kind, x[0], x[1], x[2])
    if name == "prmt":
        return permuted(x[0], x[1], x[2])
    if name == "mov":
        return x[0]
    if name == "selp":
        return x[0] if x[2] else x[1]
    if parts[0] == "setp":
        if kind in ("f32", "f16"):
            return ordered(parts[1], *(float_of(kind, v) for v in x))
        return ordered(parts[1], *(to_int(v, kind) for v in x))
    if parts[0] == "cvt":
        to = parts[-1]
        if to == "tf32":  # ten bits of mantissa, ties away from zero, which is up in what stands for the size
            if math.isnan(float_of("f32", x[0])):
                return 0x7FFFFFFF
            return x[0] if math.isinf(float_of("f32", x[0])) else x[0] + (1 << 12) >> 13 << 13
        if to in ("f16x2", "bf16x2"):
            high, low = (bits_of(to[:-2], round_to(to[:-2], float_of("f32", v))) for v in x)
            return high << 16 | low
        if to in FORMATS:
            value = float_of(kind, x[0]) if kind in FORMATS else float(to_int(x[0], kind))
            return bits_of(to, round_to(to, value))
        return to_int(x[0], kind)
    if kind in ("f16", "bf16"):
        return bits_of(kind, extreme(name, *(float_of(kind, v) for v in x)))
    if kind != "f32":
        return whole_numbers(name, kind, x)
    values = [float_of("f32", v) for v in x]
    if name == "fma.rn.ftz":
        return bits_of("f32", flushed(exactly("fma", *map(flushed, values))))
    if name in ("add", "sub", "mul", "fma.rn"):
        return bits_of("f32", exactly(name.split(".")[0], *values))
    if name in ("neg", "abs"):
        return x[0] ^ 0x80000000 if name == "neg" else x[0] & 0x7FFFFFFF
    if name == "copysign":
        return x[0] & 0x80000000 | x[1] & 0x7FFFFFFF
    return bits_of("f32", extreme(name, *values))


#: Approximations and correctly rounded functions are below.
FUNCTIONS = ("ex2", "lg2", "rcp", "sqrt", "rsqrt", "div.full", "div.approx", "div.rn")


def run(opcode: str, operands: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """The form's result on registers of its own types."""
    form = ARITHMETIC[opcode]
    kernel = one_instruction(opcode, tuple(map(storage, form.operands)), storage(form.result))
    registers = [np.zeros(THREADS, TYPES[storage(form.result)]), *operands]
    with np.errstate(all="ignore"):
        translate(kernel, 0, whole=True)(registers, SimpleNamespace(lanes=THREADS), None)
    assert registers[0].dtype == TYPES[storage(form.result)]
    return registers[0]


@pytest.mark.parametrize(
    "opcode", sorted(name for name in ARITHMETIC if not (name.startswith(FUNCTIONS) and name.endswith("f32")))
)
def test_a_form_is_its_definition(opcode: str) -> None:
    form = ARITHMETIC[opcode]
    generator = np.random.default_rng(0)
    operands = [inputs(kind, generator) for kind in form.operands]
    if opcode.startswith(("shl", "shr", "bfe")):
        for counts in operands[1:]:
            counts[100:] %= 70
    got = run(opcode, operands)
    wanted = [definition(opcode, [int(o[i]) for o in operands]) for i in range(THREADS)]
    width = 1 if form.result == "pred" else 8 * got.dtype.itemsize
    for i, want in enumerate(wanted):
        have, want = int(got[i]), int(want) & (1 << width) - 1
        if form.result == "f32" and math.isnan(float_of("f32", want)):
            assert math.isnan(float_of("f32", have)), (opcode, [hex(int(o[i])) for o in operands])
        else:
            assert have == want, (opcode, [hex(int(o[i])) for o in operands], hex(have), hex(want))


@pytest.mark.parametrize(
    "opcode", sorted(name for name in ARITHMETIC if name.startswith(FUNCTIONS) and name.endswith("f32"))
)
def test_an_approximation_is_within_its_documented_error(opcode: str) -> None:
    generator = np.random.default_rng(0)
    operands = [inputs("f32", generator) for _ in ARITHMETIC[opcode].operands]
    if opcode.startswith("ex2"):
        operands[0][:400] = generator.uniform(-150, 130, 400).astype(np.float32).view(np.uint32)
    got = run(opcode, operands)
    name, ftz = opcode.split(".approx")[0], ".ftz" in opcode
    for i in range(THREADS):
        x = [float_of("f32", int(o[i])) for o in operands]
        x = [flushed(v) for v in x] if ftz else x
        want = wanted_function(name, x)
        have = float_of("f32", int(got[i]))
        if ftz and abs(want) < 2.0**-126:
            want = math.copysign(0.0, want)
        if math.isnan(want) or math.isinf(want) or want == 0:
            assert repr(have) == repr(want), (opcode, x)
        else:
            unit = max(abs(want), 2.0**-126) * 2.0**-22  # the widest of the manual's bounds
            assert abs(have - want) <= unit or (math.isinf(have) and abs(want) > 3.4028235e38), (opcode, x, have, want)


def wanted_function(name: str, x: list[float]) -> float:
    """The exact value in float64, with the manual's table of special values."""
    (a, *rest) = x
    if any(map(math.isnan, x)):
        return math.nan
    if name in ("ex2", "lg2"):
        if name == "ex2":
            value = 0.0 if a < -200 else math.inf if a >= 128 else 2.0**a
            return 0.0 if value <= 2.0**-150 else value
        return -math.inf if a == 0 else math.nan if a < 0 else math.inf if math.isinf(a) else math.log2(a)
    if name in ("sqrt", "sqrt.rn.f32", "rsqrt"):
        if a < 0:
            return math.nan
        if name != "rsqrt":
            return math.sqrt(a)
        return math.copysign(math.inf, a) if a == 0 else 0.0 if math.isinf(a) else 1 / math.sqrt(a)
    if name == "rcp":
        a, b = 1.0, a
    else:
        b = rest[0]
    if name == "div" and 2.0**126 <= abs(b) < math.inf:
        return math.nan if math.isinf(a) else math.copysign(0.0, a) * math.copysign(1.0, b)
    if b == 0:
        return math.nan if a == 0 else math.copysign(math.inf, a) * math.copysign(1.0, b)
    value = a / b
    if abs(value) <= 2.0**-150:
        return math.copysign(0.0, value)
    return math.copysign(math.inf, value) if abs(value) > 3.4028235677973366e38 else value


def test_a_fused_sum_is_rounded_once() -> None:
    """(1 + 2^-12)^2 lies halfway between two float32 numbers, and 2^-60, which float64 cannot add, decides."""
    factor, term = np.float32(1 + 2.0**-12), np.float32(2.0**-60)
    assert np.float32(np.float64(factor) * factor + term) == np.float32(1 + 2.0**-11)
    operands = [np.full(THREADS, x.view(np.uint32)) for x in (factor, factor, term)]
    assert (run("fma.rn.f32", operands).view(np.float32) == np.float32(1 + 2.0**-11 + 2.0**-23)).all()


@pytest.mark.parametrize(
    ("opcode", "operands", "message"),
    [
        ("add.sat.s32", ("%d", "%s0", "%s1"), "add.sat.s32: no such form"),
        ("add.s32", ("%d", "%s0", "%x"), "invalid literal"),
        ("add.s32", ("%d", "%s0"), "2 operands"),
        ("add.s64", ("%d", "%s0", "%s1"), "%s0 is no s64"),
        ("add.f32", ("%d", "%s0", "1"), "1 is no f32"),
        ("and.pred", ("%d", "%s0", "%s1"), "%s0 is no pred"),
    ],
)
def test_what_is_not_known_fails_with_its_place(opcode: str, operands: tuple[str, ...], message: str) -> None:
    kernel = one_instruction("add.s32", ("b32", "b32"), "b32")
    kernel.blocks[0][0] = Instruction(opcode, operands, None, False, "here:1")
    with pytest.raises(UnsupportedError, match="k, here:1: ") as error:
        translate(kernel, 0, whole=True)
    assert message in str(error.value)


def test_only_threads_that_are_here_write() -> None:
    kernel = one_instruction("add.s32", ("b32", "b32"), "b32", {"%p": "pred"})
    kernel.blocks[0][0] = Instruction("add.s32", ("%d", "%s0", "7"), "%p", True, "here:1")
    numbers = np.arange(THREADS, dtype=np.uint32)
    registers = [np.zeros(THREADS, np.uint32), numbers, numbers, numbers % 3 == 0]
    translate(kernel, 0, whole=False)(registers, SimpleNamespace(lanes=THREADS), numbers < 100)
    assert (registers[0] == np.where((numbers < 100) & (numbers % 3 != 0), numbers + 7, 0)).all()


def test_registers_are_taken_apart_and_put_together() -> None:
    registers = {"%d": "b32", "%low": "b16", "%high": "b16", "%again": "b32"}
    code = [("{%low, %high}", "%d"), ("%again", "{%low, %high}")]
    block = [Instruction("mov.b32", operands, None, False, "here:1") for operands in code]
    kernel = Kernel("k", {}, THREADS, registers, frozenset(), [block], {})
    numbers = np.arange(THREADS, dtype=np.uint32) * np.uint32(0x9E3779B9)
    values = [numbers, *(np.zeros(THREADS, TYPES[kind]) for kind in ("b16", "b16", "b32"))]
    translate(kernel, 0, whole=True)(values, SimpleNamespace(lanes=THREADS), None)
    assert (values[1] == numbers & 0xFFFF).all()
    assert (values[2] == numbers >> 16).all()
    assert (values[3] == numbers).all()
