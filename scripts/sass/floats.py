"""Float operations of the machine code and conversions (semantics.py)."""

from collections.abc import Callable

import numpy as np
from known import expect
from machine_code import Instruction
from operands import (
    COMPARE,
    F32,
    F64,
    I64,
    REGISTER,
    U32,
    U64,
    Array,
    Do,
    Registers,
    as_signed,
    floating,
    half_pair,
    integer,
    is_predicate,
    low32,
    next_register,
    predicate,
    writer,
)


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


def without_denormals(value: Array) -> Array:
    return np.where(np.abs(value) < np.finfo(F32).tiny, np.copysign(F32(0), value), value)


def float_result(operands: list[str], modifiers: set[str], compute: Callable[..., Array]) -> Do:
    write, reads = writer(operands[0]), [floating(text) for text in operands[1:] if not is_predicate(text)]
    flush = without_denormals if "FTZ" in modifiers else np.asarray

    def do(r: Registers, mask: Array) -> None:
        value = flush(np.asarray(compute(*(flush(read(r)) for read in reads)), F32))
        if "SAT" in modifiers:
            value = np.where(np.isnan(value), F32(0), np.clip(value, F32(0), F32(1)))
        write(r, mask, value.view(U32))

    return do


def fma(_: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    """Rounded to the nearest, or down (RM), up (RP) or towards zero (RZ)."""
    directed = modifiers & {"RM", "RP", "RZ"}

    def compute(a: Array, b: Array, c: Array) -> Array:
        product = a.astype(F64) * b.astype(F64)  # exact
        total = product + c
        value = total.astype(F32)
        if not directed:
            return value
        of_c = total - product
        lost = (product - (total - of_c)) + (c - of_c)  # what rounding to double took
        beyond = (value - total) - lost  # of the exact sum
        down = np.where(beyond > 0, np.nextafter(value, F32(-np.inf)), value)
        up = np.where(beyond < 0, np.nextafter(value, F32(np.inf)), value)
        return down if "RM" in directed else up if "RP" in directed else np.where(value > 0, down, up)

    return float_result(operands, modifiers, compute)


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


def to_integer(instruction: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    write, read = writer(operands[0]), floating(operands[1])
    turn = {"TRUNC": np.trunc, "FLOOR": np.floor, "CEIL": np.ceil}
    round_ = next((turn[m] for m in turn if m in modifiers), np.rint)
    low, high = (0, 2**32 - 1) if "U32" in modifiers else (-(2**31), 2**31 - 1)
    expect(instruction, "NTZ" in modifiers or bool(modifiers & {"U64", "S64"}))
    unknown = F64(0 if "NTZ" in modifiers else 2.0**63 if "U64" in modifiers else -(2.0**63))  # of NaN
    if modifiers & {"U64", "S64"}:
        low, high = (0, 2**64 - 2048) if "U64" in modifiers else (-(2**63), 2**63 - 1024)
    write_high = writer(next_register(operands[0])) if modifiers & {"U64", "S64"} else None

    def do(r: Registers, mask: Array) -> None:
        value = np.clip(round_(read(r).astype(F64)), low, high)
        value = np.where(np.isnan(value), unknown, value)
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
            below = (value < 2.0**63) & (value.astype(exact.dtype) < exact)
            value = np.where(below, np.nextafter(value, F32(np.inf)), value)
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
    """HFMA2 as a move of two constants, or what it is."""
    if operands[1:3] != ["-RZ", "RZ"]:
        return half_fma(instruction, operands, modifiers)
    expect(instruction, len(operands) == 5 and not modifiers - {"MMA"})
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
    expect(instruction, all(REGISTER.match(text) for text in operands[1:]))
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
