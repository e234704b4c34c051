"""Every instruction form the executor knows: what its operands are, what it computes, and which pipe it occupies.

A form is an opcode with all its modifiers. One that is not in these tables is an error, so that nothing runs by a
definition that nobody wrote down. Expressions are NumPy, with the operands {0}, {1}, ... as arrays of the types named.
"""

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """A form that computes a register of a thread from its own registers."""

    result: str
    """PTX type."""
    operands: tuple[str, ...]
    """PTX types."""
    expression: str
    pipe: str


@dataclasses.dataclass(frozen=True)
class Access:
    """A load or store of `count` elements a thread."""

    store: bool
    space: str
    """`"global"` or `"shared"`."""
    kind: str
    """PTX type of an element."""
    count: int


_FLOAT, _INTEGER, _MULTIPLY, _SPECIAL, _CONVERT = "float", "integer", "multiply", "special", "convert"
COMPARISONS = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}


def _same(kinds: Iterable[str], name: str, operands: int, expression: str, pipe: str) -> dict[str, Arithmetic]:
    """Forms `name.kind` whose operands and result have that type."""
    return {f"{name}.{kind}": Arithmetic(kind, (kind,) * operands, expression, pipe) for kind in kinds}


def _integers() -> dict[str, Arithmetic]:
    words = ("s32", "s64")
    forms = _same(("b16", "b32", "b64", "pred"), "and", 2, "{0} & {1}", _INTEGER)
    forms |= _same(("b16", "b32", "b64", "pred"), "or", 2, "{0} | {1}", _INTEGER)
    forms |= _same(("b16", "b32", "b64", "pred"), "xor", 2, "{0} ^ {1}", _INTEGER)
    forms |= _same(("b16", "b32", "b64", "pred"), "not", 1, "~{0}", _INTEGER)
    forms |= _same(("s16", *words), "add", 2, "{0} + {1}", _INTEGER)
    forms |= _same(("s16", *words), "sub", 2, "{0} - {1}", _INTEGER)
    forms |= _same(words, "neg", 1, "-{0}", _INTEGER)
    forms |= _same(("s32", "u32", "s64"), "min", 2, "np.minimum({0}, {1})", _INTEGER)
    forms |= _same(("s32", "u32", "s64"), "max", 2, "np.maximum({0}, {1})", _INTEGER)
    forms |= _same(words, "mul.lo", 2, "{0} * {1}", _MULTIPLY)
    forms |= _same(words, "mad.lo", 3, "{0} * {1} + {2}", _MULTIPLY)
    forms |= _same(("u32", "s32"), "mul.hi", 2, "multiply_high({0}, {1})", _MULTIPLY)
    for kind, wide in (("s32", "s64"), ("u32", "u64")):
        product = f"widen({{0}}, '{wide}') * widen({{1}}, '{wide}')"
        forms[f"mul.wide.{kind}"] = Arithmetic(wide, (kind, kind), product, _MULTIPLY)
        forms[f"mad.wide.{kind}"] = Arithmetic(wide, (kind, kind, wide), product + " + {2}", _MULTIPLY)
    forms |= _same(("s32",), "div", 2, "quotient({0}, {1})", _SPECIAL)
    forms |= _same(("s32",), "rem", 2, "remainder({0}, {1})", _SPECIAL)
    for kind in ("b16", "b32", "b64"):
        forms[f"shl.{kind}"] = Arithmetic(kind, (kind, "u32"), "shift_left({0}, {1})", _INTEGER)
    for kind in ("u16", "u32", "u64", "s16", "s32", "s64"):
        forms[f"shr.{kind}"] = Arithmetic(kind, (kind, "u32"), "shift_right({0}, {1})", _INTEGER)
    for kind in ("u32", "s32"):
        forms[f"bfe.{kind}"] = Arithmetic(kind, (kind, "u32", "u32"), "extract({0}, {1}, {2})", _INTEGER)
    forms |= _same(("b32",), "prmt", 3, "permute({0}, {1}, {2})", _INTEGER)
    return forms


def _comparisons() -> dict[str, Arithmetic]:
    """`setp`: ordered comparisons of floats are false where one is NaN."""
    forms = {}
    kinds: dict[str, tuple[str, ...]] = {"b16": ("eq", "ne"), "b32": ("eq", "ne"), "b64": ("eq", "ne")}
    kinds |= dict.fromkeys(("s16", "u16", "s32", "u32", "s64", "u64"), tuple(COMPARISONS))
    for kind, names in kinds.items():
        for name in names:
            forms[f"setp.{name}.{kind}"] = Arithmetic(
                "pred", (kind, kind), f"{{0}} {COMPARISONS[name]} {{1}}", _INTEGER
            )
    for kind, number in (("f32", "{%d}"), ("f16", "from_f16({%d})")):
        a, b = number % 0, number % 1
        expressions = {name: f"{a} {sign} {b}" for name, sign in COMPARISONS.items() if name != "ne"}
        expressions["ne"] = f"({a} < {b}) | ({a} > {b})"
        expressions["neu"] = f"{a} != {b}"
        expressions["equ"] = f"~(({a} < {b}) | ({a} > {b}))"
        for name, opposite in (("ltu", ">="), ("leu", ">"), ("gtu", "<="), ("geu", "<")):
            expressions[name] = f"~({a} {opposite} {b})"
        expressions["nan"] = f"np.isnan({a}) | np.isnan({b})"
        expressions["num"] = f"~(np.isnan({a}) | np.isnan({b}))"
        operand = "f32" if kind == "f32" else "b16"
        for name, expression in expressions.items():
            forms[f"setp.{name}.{kind}"] = Arithmetic("pred", (operand, operand), expression, _INTEGER)
    return forms


def _floats() -> dict[str, Arithmetic]:
    forms = _same(("f32",), "add", 2, "{0} + {1}", _FLOAT)
    forms |= _same(("f32",), "sub", 2, "{0} - {1}", _FLOAT)
    forms |= _same(("f32",), "mul", 2, "{0} * {1}", _FLOAT)
    forms |= _same(("f32",), "fma.rn", 3, "fma({0}, {1}, {2})", _FLOAT)
    forms["fma.rn.ftz.f32"] = Arithmetic("f32", ("f32",) * 3, "flush(fma(flush({0}), flush({1}), flush({2})))", _FLOAT)
    forms |= _same(("f32",), "neg", 1, "-{0}", _FLOAT)
    forms |= _same(("f32",), "abs", 1, "np.abs({0})", _FLOAT)
    forms |= _same(("f32",), "min", 2, "minimum({0}, {1})", _INTEGER)
    forms |= _same(("f32",), "max", 2, "maximum({0}, {1})", _INTEGER)
    for name, function in (("min", "minimum"), ("max", "maximum")):
        for kind in ("f16", "bf16"):
            expression = f"to_{kind}({function}(from_{kind}({{0}}), from_{kind}({{1}})))"
            forms[f"{name}.{kind}"] = Arithmetic("b16", ("b16", "b16"), expression, _INTEGER)
    forms |= _same(("f32",), "copysign", 2, "np.copysign({1}, {0})", _INTEGER)
    # Approximations: the correctly rounded result, from which a GPU may differ within the documented error.
    forms |= _same(("f32",), "div.full", 2, "{0} / {1}", _SPECIAL)
    forms |= _same(("f32",), "div.rn", 2, "{0} / {1}", _SPECIAL)
    forms |= _same(("f32",), "div.approx", 2, "divide_approximately({0}, {1})", _SPECIAL)
    approximations = {"ex2": "np.exp2({})", "lg2": "np.log2({})", "rcp": "F32(1) / {}", "sqrt": "np.sqrt({})"}
    approximations["rsqrt"] = "F32(1) / np.sqrt({})"
    for name, expression in approximations.items():
        forms[f"{name}.approx.f32"] = Arithmetic("f32", ("f32",), expression.format("{0}"), _SPECIAL)
        flushed = f"flush({expression.format('flush({0})')})"
        forms[f"{name}.approx.ftz.f32"] = Arithmetic("f32", ("f32",), flushed, _SPECIAL)
    forms |= _same(("f32",), "sqrt.rn", 1, "np.sqrt({0})", _SPECIAL)
    return forms


def _conversions() -> dict[str, Arithmetic]:
    forms = {}
    for kind in ("f16", "bf16"):
        forms[f"cvt.f32.{kind}"] = Arithmetic("f32", ("b16",), f"from_{kind}({{0}})", _CONVERT)
        forms[f"cvt.rn.{kind}.f32"] = Arithmetic("b16", ("f32",), f"to_{kind}({{0}})", _CONVERT)
        both = f"pack(to_{kind}({{0}}), to_{kind}({{1}}))"
        forms[f"cvt.rn.{kind}x2.f32"] = Arithmetic("b32", ("f32", "f32"), both, _CONVERT)
    forms["cvt.rna.tf32.f32"] = Arithmetic("b32", ("f32",), "to_tf32({0})", _CONVERT)
    for kind in ("s32", "u32"):
        forms[f"cvt.rn.f32.{kind}"] = Arithmetic("f32", (kind,), "{0}.astype(F32)", _CONVERT)
    for pair in ("s64 s32", "u64 u32", "u32 u64", "u32 u16", "u16 u32"):
        to, of = pair.split()
        forms[f"cvt.{to}.{of}"] = Arithmetic(to, (of,), f"widen({{0}}, '{to}')", _INTEGER)
    return forms


def _moves() -> dict[str, Arithmetic]:
    """Moves of one register; a list in braces is read by the translator."""
    forms = _same(("b16", "u16", "b32", "u32", "f32", "b64", "u64", "pred"), "mov", 1, "{0}", _INTEGER)
    for kind in ("b16", "b32", "b64", "f32"):
        forms[f"selp.{kind}"] = Arithmetic(kind, (kind, kind, "pred"), "np.where({2}, {0}, {1})", _INTEGER)
    return forms


ARITHMETIC: dict[str, Arithmetic] = _integers() | _comparisons() | _floats() | _conversions() | _moves()

ACCESSES: dict[str, Access] = {
    f"{'st' if store else 'ld'}.{space}{f'.v{count}' if count > 1 else ''}.{kind}": Access(store, space, kind, count)
    for store in (False, True)
    for space in ("global", "shared")
    for count in (1, 2, 4)
    for kind, width in (("b8", 1), ("s8", 1), ("u8", 1), ("b16", 2), ("b32", 4), ("s32", 4), ("u32", 4), ("b64", 8))
    if count * width <= 16 and not (store and kind in ("s8", "u8"))
}

PARAMETERS = {f"ld.param.{kind}": kind for kind in ("b32", "s32", "u32", "f32", "b64", "u64")}

#: Form -> bytes that it may copy.
COPIES = {"cp.async.ca.shared.global": (4, 8, 16), "cp.async.cg.shared.global": (16,)}

#: Form -> matrices and whether they are transposed.
MATRIX_LOADS = {
    f"ldmatrix.sync.aligned.m8n8.x{count}{'.trans' if trans else ''}.shared.b16": (count, trans)
    for count in (1, 2, 4)
    for trans in (False, True)
}

#: Form -> the operands' dtype.
PRODUCTS = {
    f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32": kind
    for shape, kind in (("m16n8k16", "bf16"), ("m16n8k16", "f16"), ("m16n8k8", "tf32"))
}

SHUFFLES = {f"shfl.sync.{mode}.b32": mode for mode in ("bfly", "idx", "up", "down")}

#: Synchronisation and control.
CONTROL = (
    *("bra", "bra.uni", "ret", "bar.sync", "bar.warp.sync"),
    *("cp.async.commit_group", "cp.async.wait_group"),
)

#: Every form.
FORMS = {*ARITHMETIC, *ACCESSES, *PARAMETERS, *COPIES, *MATRIX_LOADS, *PRODUCTS, *SHUFFLES, *CONTROL}


def pipe(opcode: str) -> str:
    """What executes a form: a key of the counts of a launch."""
    if opcode in ARITHMETIC:
        return ARITHMETIC[opcode].pipe
    if opcode in PRODUCTS:
        return "tensor"
    if opcode in CONTROL or opcode in PARAMETERS:
        return "control"
    return "memory"
