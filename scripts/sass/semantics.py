"""What each operation of the machine code computes; memory and control flow are in execute.py.

NVIDIA documents the operations by name alone (CUDA Binary Utilities). What they do was read from what nvcc makes of
known sources, and is shown to be right by results: tests/test_sass.py runs the kernels and compares.
"""

from collections.abc import Callable

import numpy as np
from machine_code import Instruction
from operands import (
    MASK32,
    Array,
    Read,
    Registers,
    floating,
    half_pair,
    integer,
    next_register,
    predicate,
    split,
    writer,
)

Do = Callable[[Registers, Array], None]
U32, I32, U64, I64, F32, F64 = np.uint32, np.int32, np.uint64, np.int64, np.float32, np.float64
COMPARE = {"LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal, "EQ": np.equal}


def low32(value: Array) -> Array:
    return (value & MASK32).astype(U32)


def as_signed(value: Array) -> Array:
    return low32(value).view(I32).astype(I64)


def is_predicate(text: str) -> bool:
    return text.lstrip("!")[:1] in "PU" and text.lstrip("!")[:2] in ("PT", "UP", *(f"P{i}" for i in range(7)))


def decode(instruction: Instruction) -> Do:
    operation = instruction.operation
    name = operation[1:] if operation.startswith("U") and operation[1:] in DECODERS else operation
    if name not in DECODERS:
        raise NotImplementedError(f"{instruction}: add {operation} to scripts/sass/semantics.py")
    return DECODERS[name](instruction, split(instruction.operands), set(instruction.modifiers))


def outputs(operands: list[str]) -> tuple[str, list[str], list[str]]:
    """The destination, the predicates after it, and the rest."""
    rest = operands[1:]
    carries = []
    while rest and is_predicate(rest[0]) and not rest[0].startswith("!"):
        carries.append(rest.pop(0))
    return operands[0], carries, rest


def carry_in(operands: list[str], extended: bool) -> list[Read]:
    return [predicate(text) for text in operands if is_predicate(text)] if extended else []


def add(_: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    to, carries, rest = outputs(operands)
    write, out = writer(to), [writer(text) for text in carries]
    terms = [integer(text) for text in rest if not is_predicate(text)]
    ins = carry_in(rest, "X" in modifiers)

    def do(r: Registers, mask: Array) -> None:
        total = sum((term(r) for term in terms), start=U64(0)) + sum((c(r).astype(U64) for c in ins), start=U64(0))
        write(r, mask, low32(total))
        for i, put in enumerate(out):
            put(r, mask, (total >> U64(32)) > U64(i))

    return do


def multiply_add(_: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    to, carries, rest = outputs(operands)
    write, put = writer(to), [writer(text) for text in carries]
    signed = "U32" not in modifiers
    wide = bool(modifiers & {"WIDE", "HI"})
    a, b = integer(rest[0]), integer(rest[1])
    c, ins = integer(rest[2], pair=wide), carry_in(rest, "X" in modifiers)
    write_high = writer(next_register(to))

    def do(r: Registers, mask: Array) -> None:
        if not wide:
            total = low32(a(r)).astype(U64) * low32(b(r)).astype(U64)
            total = (total & MASK32) + c(r) + sum((i(r).astype(U64) for i in ins), start=U64(0))
            write(r, mask, low32(total))
            for out in put:
                out(r, mask, (total >> U64(32)) > U64(0))
            return
        if signed:
            product = (as_signed(a(r)) * as_signed(b(r))).view(U64)
        else:
            product = low32(a(r)).astype(U64) * low32(b(r)).astype(U64)
        total = product + c(r)
        if "HI" in modifiers:
            write(r, mask, low32(total >> U64(32)))
            return
        for out in put:
            out(r, mask, total < product)
        write(r, mask, low32(total))
        write_high(r, mask, low32(total >> U64(32)))

    return do


def shift_add(_: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    to, carries, rest = outputs(operands)
    write, put = writer(to), [writer(text) for text in carries]
    ins = carry_in(rest, "X" in modifiers)
    rest = [text for text in rest if not is_predicate(text)]
    shift = U64(int(rest[-1], 0))
    a, b = integer(rest[0]), integer(rest[1])
    high = integer(rest[2]) if "HI" in modifiers and len(rest) == 4 else lambda r: U64(0)

    def do(r: Registers, mask: Array) -> None:
        if "SX32" in modifiers:
            shifted = low32((as_signed(a(r)) << shift.astype(I64)).view(U64) >> U64(32))
        elif "HI" in modifiers:
            shifted = low32((((low32(high(r)).astype(U64) << U64(32)) | low32(a(r))) << shift) >> U64(32))
        else:
            shifted = low32(low32(a(r)).astype(U64) << shift)
        total = shifted.astype(U64) + b(r) + sum((i(r).astype(U64) for i in ins), start=U64(0))
        write(r, mask, low32(total))
        for out in put:
            out(r, mask, (total >> U64(32)) > U64(0))

    return do


def shift(_: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    write, (a, s, c) = writer(operands[0]), (integer(text) for text in operands[1:4])

    def do(r: Registers, mask: Array) -> None:
        count = np.minimum(s(r) & MASK32, U64(63 if modifiers & {"U64", "S64"} else 32))
        low, high = a(r), c(r)
        both = (high << U64(32)) | low
        if "L" in modifiers:
            value = (both << count) >> U64(32) if "HI" in modifiers else low << count
        elif "S64" in modifiers:
            value = (both.view(I64) if both.ndim else I64(both)) >> count.astype(I64)
        elif "U64" in modifiers:
            value = both >> count
        elif "HI" in modifiers:
            value = (as_signed(high) >> count.astype(I64)) if "S32" in modifiers else high >> count
        else:
            value = both >> count
        write(r, mask, np.asarray(value).astype(I64).astype(U32) if "S64" in modifiers else low32(as_unsigned(value)))

    return do


def as_unsigned(value: Array) -> Array:
    return np.asarray(value).astype(U64)


def logic(_: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    put = None
    if is_predicate(operands[0]):
        put, operands = writer(operands[0]), operands[1:]
    write, (a, b, c), table = writer(operands[0]), (integer(t) for t in operands[1:4]), int(operands[4], 0)

    def do(r: Registers, mask: Array) -> None:
        x, y, z = low32(a(r)), low32(b(r)), low32(c(r))
        value = U32(0)
        for i in range(8):
            if table >> i & 1:
                value = value | ((x if i & 4 else ~x) & (y if i & 2 else ~y) & (z if i & 1 else ~z))
        write(r, mask, value)
        if put is not None:
            put(r, mask, value != 0)

    return do


def predicate_logic(_: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    write = writer(operands[0]), writer(operands[1])
    reads, tables = [predicate(t) for t in operands[2:5]], [int(t, 0) for t in operands[5:7]]

    def do(r: Registers, mask: Array) -> None:
        x, y, z = (read(r) for read in reads)
        index = x * 4 + y * 2 + z * 1
        for put, table in zip(write, tables, strict=False):
            put(r, mask, (table >> index & 1).astype(bool))

    return do


def compare_integers(_: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    write, write_not = writer(operands[0]), writer(operands[1])
    a, b, other = integer(operands[2]), integer(operands[3]), predicate(operands[4])
    low = predicate(operands[5]) if "EX" in modifiers else None
    which = next(m for m in ("LT", "LE", "GT", "GE", "EQ", "NE") if m in modifiers)
    view = low32 if "U32" in modifiers else as_signed

    def do(r: Registers, mask: Array) -> None:
        x, y = view(a(r)), view(b(r))
        if low is None:
            result = x != y if which == "NE" else COMPARE[which](x, y)
        elif which == "NE":
            result = (x != y) | low(r)
        else:
            strict = {"LT": np.less, "LE": np.less, "GT": np.greater, "GE": np.greater}.get(which)
            result = ((x == y) & low(r)) | (strict(x, y) if strict else False)
        rest = other(r)
        join = np.logical_or if "OR" in modifiers else np.logical_xor if "XOR" in modifiers else np.logical_and
        write(r, mask, join(result, rest))
        write_not(r, mask, join(~result, rest))

    return do


def compare_floats(_: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    write, write_not = writer(operands[0]), writer(operands[1])
    a, b, other = floating(operands[2]), floating(operands[3]), predicate(operands[4])
    which = next(m for m in modifiers if m[:2] in COMPARE or m in ("NE", "NEU", "NUM", "NAN"))

    def do(r: Registers, mask: Array) -> None:
        x, y = a(r), b(r)
        unordered = np.isnan(x) | np.isnan(y)
        if which in ("NUM", "NAN"):
            result = unordered if which == "NAN" else ~unordered
        else:
            result = x != y if which[:2] == "NE" else COMPARE[which[:2]](x, y)
            result = result | unordered if which.endswith("U") else result & ~unordered
        rest = other(r)
        join = np.logical_or if "OR" in modifiers else np.logical_xor if "XOR" in modifiers else np.logical_and
        write(r, mask, join(result, rest))
        write_not(r, mask, join(~result, rest))

    return do


def float_result(operands: list[str], modifiers: set[str], compute: Callable[..., Array]) -> Do:
    write, reads = writer(operands[0]), [floating(text) for text in operands[1:] if not is_predicate(text)]

    def do(r: Registers, mask: Array) -> None:
        value = np.asarray(compute(*(read(r) for read in reads)), F32)
        if "SAT" in modifiers:
            value = np.where(np.isnan(value), F32(0), np.clip(value, F32(0), F32(1)))
        write(r, mask, value.view(U32))

    return do


def fma(_: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    return float_result(operands, modifiers, lambda a, b, c: (a.astype(F64) * b.astype(F64) + c).astype(F32))


def special(_: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    functions = {"EX2": np.exp2, "LG2": np.log2, "RCP": np.reciprocal, "SQRT": np.sqrt, "TANH": np.tanh}
    functions["RSQ"] = lambda x: 1 / np.sqrt(x)
    function = functions[next(m for m in modifiers if m in functions)]
    return float_result(operands, modifiers, lambda a: function(a.astype(F64)).astype(F32))


def least_or_greatest(_: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    least, propagates = predicate(operands[-1]), "NAN" in modifiers
    write, reads = writer(operands[0]), [floating(text) for text in operands[1:-1]]

    def do(r: Registers, mask: Array) -> None:
        values = [read(r) for read in reads]
        value = values[0]
        for other in values[1:]:
            low, high = (np.minimum, np.maximum) if propagates else (np.fmin, np.fmax)
            value = np.where(least(r), low(value, other), high(value, other))
        write(r, mask, np.asarray(value, F32).view(U32))

    return do


def least_integer(instruction: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    view = low32 if "U32" in modifiers else as_signed
    adds = instruction.operation.startswith("VIADD")
    write, least, reads = writer(operands[0]), predicate(operands[-1]), [integer(text) for text in operands[1:-1]]

    def do(r: Registers, mask: Array) -> None:
        values = [read(r) for read in reads]
        if adds:
            values = [values[0] + values[1], *values[2:]]
        value, *others = (view(value) for value in values)
        for other in others:
            value = np.where(least(r), np.minimum(value, other), np.maximum(value, other))
        write(r, mask, low32(np.asarray(value).astype(I64).view(U64)))

    return do


def select(instruction: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    if instruction.operation == "FSEL":
        a, b, chosen = floating(operands[1]), floating(operands[2]), predicate(operands[3])
        write = writer(operands[0])
        return lambda r, mask: write(r, mask, np.where(chosen(r), a(r), b(r)).astype(F32).view(U32))
    write, a, b, chosen = writer(operands[0]), integer(operands[1]), integer(operands[2]), predicate(operands[3])
    return lambda r, mask: write(r, mask, low32(np.where(chosen(r), a(r), b(r))))


def move(_: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    write, read = writer(operands[0]), integer(operands[1])
    return lambda r, mask: write(r, mask, low32(read(r)))


def permute(_: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    write, (a, selector, b) = writer(operands[0]), (integer(text) for text in operands[1:4])

    def do(r: Registers, mask: Array) -> None:
        both, which = (b(r) << U64(32)) | a(r), selector(r)
        value = U64(0)
        for i in range(4):
            nibble = which >> U64(4 * i) & U64(15)
            byte = both >> ((nibble & U64(7)) * U64(8)) & U64(255)
            byte = np.where(nibble & U64(8), (byte >> U64(7)) * U64(255), byte)
            value = value | byte.astype(U64) << U64(8 * i)
        write(r, mask, low32(value))

    return do


def absolute(_: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    write, read = writer(operands[0]), integer(operands[1])
    return lambda r, mask: write(r, mask, low32(np.abs(as_signed(read(r))).view(U64)))


def bits_of(value: Array) -> Array:
    return np.ascontiguousarray(np.broadcast_to(np.asarray(value, F32), np.shape(value) or (1,))).view(U32)


def to_bfloat16(value: Array) -> Array:
    bits = bits_of(value).astype(U64)
    rounded = (bits + U64(0x7FFF) + (bits >> U64(16) & U64(1))) >> U64(16)
    return np.where(np.isnan(value), U64(0x7FFF), rounded & U64(0xFFFF))


def to_float16(value: Array) -> Array:
    return np.asarray(value, F32).astype(np.float16).view(np.uint16).astype(U64)


def from_float16(bits: Array) -> Array:
    return (bits & U32(0xFFFF)).astype(np.uint16).view(np.float16).astype(F32)


def pack(_: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    narrow = to_bfloat16 if "BF16" in modifiers else to_float16
    write, high, low = writer(operands[0]), floating(operands[1]), floating(operands[2])
    return lambda r, mask: write(r, mask, low32(narrow(high(r)) << U64(16) | narrow(low(r))))


def to_integer(_: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    write, read = writer(operands[0]), floating(operands[1])
    turn = {"TRUNC": np.trunc, "FLOOR": np.floor, "CEIL": np.ceil}
    round_ = next((turn[m] for m in turn if m in modifiers), np.rint)
    low, high = (0, 2**32 - 1) if "U32" in modifiers else (-(2**31), 2**31 - 1)
    if modifiers & {"U64", "S64"}:
        low, high = (0, 2**64 - 2048) if "U64" in modifiers else (-(2**63), 2**63 - 1024)
    write_high = writer(next_register(operands[0])) if modifiers & {"U64", "S64"} else None

    def do(r: Registers, mask: Array) -> None:
        value = np.nan_to_num(np.clip(round_(read(r).astype(F64)), low, high))
        bits = value.astype(U64) if low == 0 else value.astype(I64).view(U64)
        write(r, mask, low32(bits))
        if write_high is not None:
            write_high(r, mask, low32(bits >> U64(32)))

    return do


def from_integer(_: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    pair = bool(modifiers & {"U64", "S64"})
    write, read = writer(operands[0]), integer(operands[1], pair=pair)

    def do(r: Registers, mask: Array) -> None:
        bits = np.asarray(read(r))
        exact = bits if modifiers & {"U32", "U64"} else bits.view(I64) if pair else as_signed(bits)
        value = exact.astype(F32)
        if "RP" in modifiers:
            value = np.where(value.astype(F64) < exact, np.nextafter(value, F32(np.inf)), value)
        write(r, mask, np.asarray(value, F32).view(U32))

    return do


def division_is_extreme(_: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    write, a, b = writer(operands[0]), floating(operands[1]), floating(operands[2])

    def do(r: Registers, mask: Array) -> None:
        x, y = np.abs(a(r).astype(F64)), np.abs(b(r).astype(F64))
        fits = (y > 2.0**-120) & (y < 2.0**120) & (x < 2.0**120) & ((x == 0) | (x / y > 2.0**-100) & (x / y < 2.0**120))
        write(r, mask, ~fits)

    return do


def half_immediates(instruction: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    if operands[1:3] != ["-RZ", "RZ"]:
        return half_fma(instruction, operands, modifiers)
    write, value = writer(operands[0]), U32(half_pair(operands[3], operands[4]))
    return lambda r, mask: write(r, mask, value)


def halves(text: str, bfloat: bool) -> Callable[[Registers], tuple[Array, Array]]:
    """(low, high) of a register as float32."""
    sign, text = (text[0], text[1:]) if text[0] == "-" else ("", text)
    which = [text.split(".")[1]] if "." in text else []
    read = integer(text.split(".")[0])

    def both(r: Registers) -> tuple[Array, Array]:
        bits = low32(read(r))
        if bfloat:
            low, high = ((bits << U32(16)).view(F32), (bits & U32(0xFFFF0000)).view(F32))
        else:
            low, high = (
                (b & U32(0xFFFF)).astype(np.uint16).view(np.float16).astype(F32) for b in (bits, bits >> U32(16))
            )
        low, high = {"H0_H0": (low, low), "H1_H1": (high, high)}.get("".join(which), (low, high))
        return (-low, -high) if sign else (low, high)

    return both


def half_fma(instruction: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    """HFMA2, HADD2, HMUL2 on two halves; HADD2.F32 widens one."""
    bfloat = bool(modifiers & {"BF16", "BF16_V2"})
    write, reads = writer(operands[0]), [halves(text, bfloat) for text in operands[1:]]
    if "F32" in modifiers:
        return lambda r, mask: write(r, mask, (reads[0](r)[0] + reads[1](r)[0]).view(U32))
    narrow = to_bfloat16 if bfloat else to_float16
    operation = instruction.operation

    def do(r: Registers, mask: Array) -> None:
        parts = []
        for values in zip(*(read(r) for read in reads), strict=True):
            if operation == "HADD2":
                parts.append(narrow(values[0] + values[1]))
            else:
                parts.append(narrow(values[0] * values[1] + (values[2] if len(values) > 2 else F32(0))))
        write(r, mask, low32(parts[0] | parts[1] << U64(16)))

    return do


def zeros(_: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    if operands[1] != "SRZ":
        raise NotImplementedError(f"CS2R of {operands[1]}")
    writes = [writer(operands[0])] + ([] if "32" in modifiers else [writer(next_register(operands[0]))])

    def do(r: Registers, mask: Array) -> None:
        for write in writes:
            write(r, mask, U32(0))

    return do


def pack_predicates(_: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    write, keep, which = writer(operands[0]), integer(operands[2]), int(operands[3], 0)

    def do(r: Registers, mask: Array) -> None:
        bits = sum((r.predicates[i].astype(U64) << U64(i) for i in range(7) if which >> i & 1), start=U64(0))
        write(r, mask, low32(keep(r) & U64(~which & 0xFFFFFFFF) | bits))

    return do


def unpack_predicates(_: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    read, which = integer(operands[1]), int(operands[2], 0)

    def do(r: Registers, mask: Array) -> None:
        bits = read(r)
        for i in range(7):
            if which >> i & 1:
                np.copyto(r.predicates[i], (bits >> U64(i) & U64(1)).astype(bool), where=mask)

    return do


def population(_: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    write, read = writer(operands[0]), integer(operands[1])
    return lambda r, mask: write(r, mask, np.bitwise_count(low32(read(r))))


def leading(_: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    """The position of the highest bit, or with SH its distance from bit 31."""
    write, read = writer(operands[0]), integer(operands[1])

    def do(r: Registers, mask: Array) -> None:
        value = low32(read(r)).astype(F64)
        position = np.where(value > 0, np.floor(np.log2(np.maximum(value, 1))), -1).astype(I64)
        write(r, mask, low32((31 - position if "SH" in modifiers else position).view(U64)))

    return do


DECODERS: dict[str, Callable[[Instruction, list[str], set[str]], Do]] = {
    "IADD3": add,
    "VIADD": add,
    "IMAD": multiply_add,
    "LEA": shift_add,
    "SHF": shift,
    "LOP3": logic,
    "PLOP3": predicate_logic,
    "ISETP": compare_integers,
    "FSETP": compare_floats,
    "FADD": lambda i, o, m: float_result(o, m, lambda a, b: a + b),
    "FMUL": lambda i, o, m: float_result(o, m, lambda a, b: a * b),
    "FFMA": fma,
    "MUFU": special,
    "FMNMX": least_or_greatest,
    "FMNMX3": least_or_greatest,
    "IMNMX": least_integer,
    "VIMNMX": least_integer,
    "VIMNMX3": least_integer,
    "VIADDMNMX": least_integer,
    "SEL": select,
    "FSEL": select,
    "MOV": move,
    "R2UR": move,
    "PRMT": permute,
    "IABS": absolute,
    "F2FP": pack,
    "F2I": to_integer,
    "I2F": from_integer,
    "I2FP": from_integer,
    "FCHK": division_is_extreme,
    "HFMA2": half_immediates,
    "HADD2": half_fma,
    "HMUL2": half_fma,
    "CS2R": zeros,
    "P2R": pack_predicates,
    "R2P": unpack_predicates,
    "POPC": population,
    "FLO": leading,
}
