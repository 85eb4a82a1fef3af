"""Integer operations of the machine code, moves and predicates (semantics.py)."""

import numpy as np
from known import expect
from machine_code import Instruction
from operands import (
    COMPARE,
    F32,
    F64,
    I64,
    MASK32,
    U32,
    U64,
    Array,
    Do,
    Read,
    Registers,
    as_signed,
    floating,
    integer,
    is_predicate,
    low32,
    next_register,
    predicate,
    writer,
)


def outputs(operands: list[str]) -> tuple[str, list[str], list[str]]:
    """The destination, the predicates after it, and the rest."""
    rest = operands[1:]
    carries = []
    while rest and is_predicate(rest[0]) and not rest[0].startswith("!"):
        carries.append(rest.pop(0))
    return operands[0], carries, rest


def carry_in(operands: list[str], extended: bool) -> list[Read]:
    return [predicate(text) for text in operands if is_predicate(text)] if extended else []


def as_unsigned(value: Array) -> Array:
    return np.asarray(value).astype(U64)


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


def logic(instruction: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    put = None
    if is_predicate(operands[0]):
        put, operands = writer(operands[0]), operands[1:]
    expect(instruction, operands[5:] in ([], ["!PT"], ["!UPT"]))
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
        if "RELU" in modifiers:
            value = np.maximum(value, 0)
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


def zeros(instruction: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    """CS2R of a pair of registers, and of no clock."""
    expect(instruction, operands[1:] == ["SRZ"])
    writes = [writer(operands[0]), writer(next_register(operands[0]))]

    def do(r: Registers, mask: Array) -> None:
        for write in writes:
            write(r, mask, U32(0))

    return do


def pack_predicates(instruction: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    expect(instruction, operands[1] == "PR")
    write, keep, which = writer(operands[0]), integer(operands[2]), int(operands[3], 0)

    def do(r: Registers, mask: Array) -> None:
        bits = sum((r.predicates[i].astype(U64) << U64(i) for i in range(7) if which >> i & 1), start=U64(0))
        write(r, mask, low32(keep(r) & U64(~which & 0xFFFFFFFF) | bits))

    return do


def unpack_predicates(instruction: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    """The bits of a mask, out of a register's lowest byte or that which is named (.B3)."""
    expect(instruction, operands[0] == "PR")
    register, _, byte = operands[1].partition(".")
    read, which, shift = integer(register), int(operands[2], 0), U64(8 * int(byte[1:] or "0"))

    def do(r: Registers, mask: Array) -> None:
        bits = read(r) >> shift
        for i in range(7):
            if which >> i & 1:
                np.copyto(r.predicates[i], (bits >> U64(i) & U64(1)).astype(bool), where=mask)

    return do


def population(_: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    write, read = writer(operands[0]), integer(operands[1])
    return lambda r, mask: write(r, mask, np.bitwise_count(low32(read(r))))


def leading(instruction: Instruction, operands: list[str], modifiers: set[str]) -> Do:
    """The position of the highest bit, or with SH its distance from bit 31."""
    expect(instruction, "U32" in modifiers)
    write, read = writer(operands[0]), integer(operands[1])

    def do(r: Registers, mask: Array) -> None:
        value = low32(read(r)).astype(F64)
        position = np.where(value > 0, np.floor(np.log2(np.maximum(value, 1))), -1).astype(I64)
        write(r, mask, low32((31 - position if "SH" in modifiers else position).view(U64)))

    return do
