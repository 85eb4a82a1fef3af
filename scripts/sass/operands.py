"""Operands of machine code: text to functions that read or write the registers of all threads of a block at once."""

import re
import struct
from collections.abc import Callable

import numpy as np

Array = np.ndarray
Read = Callable[["Registers"], Array]
Do = Callable[["Registers", Array], None]
U32, I32, U64, I64, F32, F64 = np.uint32, np.int32, np.uint64, np.int64, np.float32, np.float64
MASK32 = U64(0xFFFFFFFF)
COMPARE = {"LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal, "EQ": np.equal}
REGISTER = re.compile(r"^([-~!]?)(\|?)(UR|R)(\d+|Z)((?:\.\w+)*)\|?$")
PREDICATE = re.compile(r"^(!?)(UP|P)([T\d])$")
CONSTANT = re.compile(r"^([-~]?)(\|?)c\[0x(\w+)\]\[(?:(U?R\d+|U?RZ)(?:\+)?)?(?:(-?)0x(\w+))?\]\|?$")
TERM = re.compile(r"([-+]?)(UR|R)(\d+|Z)((?:\.\w+)*)|([-+]?)0x([0-9a-f]+)")


class Registers:
    """Of every thread of a block: general and uniform ones, predicates, and the constants that a launch has."""

    def __init__(self, threads: int, constants: bytes) -> None:
        self.general = np.zeros((257, threads), np.uint32)  # the last one is RZ
        self.uniform = np.zeros((65, threads), np.uint32)
        self.predicates = np.zeros((8, threads), bool)
        self.uniform_predicates = np.zeros((8, threads), bool)
        self.predicates[7] = self.uniform_predicates[7] = True
        self.constants = np.frombuffer(constants + bytes(16), np.uint8)

    def bank(self, name: str) -> Array:
        return self.uniform if name == "UR" else self.general

    def constant(self, offset: int, size: int) -> int:
        return int.from_bytes(self.constants[offset : offset + size].tobytes(), "little")


def low32(value: Array) -> Array:
    return (value & MASK32).astype(U32)


def as_signed(value: Array) -> Array:
    return low32(value).view(I32).astype(I64)


def is_predicate(text: str) -> bool:
    return text.lstrip("!")[:1] in "PU" and text.lstrip("!")[:2] in ("PT", "UP", *(f"P{i}" for i in range(7)))


def split(text: str) -> list[str]:
    return [part.strip().replace(".reuse", "") for part in text.split(",")] if text else []


def number(name: str, which: str) -> int:
    return {"R": 256, "UR": 64}[name] if which == "Z" else int(which)


def integer(text: str, pair: bool = False) -> Read:
    """An unsigned 32-bit operand, as uint64; of a register pair, or sign-extended to one, if asked for."""
    if match := REGISTER.match(text):
        sign, _, name, which, _ = match.groups()
        index = number(name, which)

        def register(r: Registers) -> Array:
            bank = r.bank(name)
            value = bank[index].astype(np.uint64)
            if pair and which != "Z":
                value |= bank[index + 1].astype(np.uint64) << np.uint64(32)
            return value

        return negated(register, sign, pair)
    if match := CONSTANT.match(text):
        sign, _, bank, base, minus, offset = match.groups()
        if bank != "0":
            raise NotImplementedError(f"constant bank {bank}")
        at = int(offset or "0", 16) * (-1 if minus else 1)
        if base and "Z" not in base:
            return indexed(base, at, 8 if pair else 4)
        return negated(lambda r: np.uint64(r.constant(at, 8 if pair else 4)), sign, pair)
    value = np.uint64(int(text, 0) & (0xFFFFFFFFFFFFFFFF if pair else 0xFFFFFFFF))
    return lambda r: value


def indexed(base: str, at: int, size: int) -> Read:
    name, which = re.match(r"(UR|R)(\d+)", base).groups()  # type: ignore[union-attr]

    def read(r: Registers) -> Array:
        offsets = r.bank(name)[int(which)].astype(np.int64) + at
        bytes_of = np.clip(offsets[:, None] + np.arange(size), 0, len(r.constants) - 1)
        return (r.constants[bytes_of].astype(np.uint64) << (np.arange(size, dtype=np.uint64) * np.uint64(8))).sum(1)

    return read


def negated(read: Read, sign: str, pair: bool = False) -> Read:
    """Minus is not reduced to 32 bits: what goes beyond them is the carry of the hardware's ~x + 1."""
    if sign == "-":
        if pair:
            return lambda r: ~read(r) + np.uint64(1)
        return lambda r: (~read(r) & MASK32) + np.uint64(1)
    if sign == "~":
        return (lambda r: ~read(r)) if pair else (lambda r: ~read(r) & MASK32)
    return read


def floating(text: str) -> Read:
    """A float operand."""
    if match := REGISTER.match(text):
        sign, absolute, name, which, _ = match.groups()
        index = number(name, which)
        return signed(lambda r: r.bank(name)[index].view(np.float32), sign, absolute)
    if match := CONSTANT.match(text):
        sign, absolute, _, _, _, offset = match.groups()
        at = int(offset, 16)
        return signed(lambda r: np.array([r.constant(at, 4)], np.uint32).view(np.float32), sign, absolute)
    if text.startswith(("0x", "-0x")):
        bits = np.array([int(text, 16) & 0xFFFFFFFF], np.uint32).view(np.float32)
        return lambda r: bits
    value = np.float32(float(text.replace("QNAN", "nan").replace("SNAN", "nan")))
    return lambda r: value


def signed(read: Read, sign: str, absolute: str) -> Read:
    if absolute:
        return (lambda r: -np.abs(read(r))) if sign == "-" else (lambda r: np.abs(read(r)))
    return (lambda r: -read(r)) if sign == "-" else read


def half_pair(high: str, low: str) -> int:
    """Two float16 immediates as one register."""
    return sum(struct.unpack("<H", struct.pack("<e", float(t)))[0] << s for t, s in ((high, 16), (low, 0)))


def predicate(text: str) -> Read:
    match = PREDICATE.match(text)
    if match is None:
        raise NotImplementedError(f"predicate {text}")
    negative, name, which = match.groups()
    index = 7 if which == "T" else int(which)

    def read(r: Registers) -> Array:
        value = (r.uniform_predicates if name == "UP" else r.predicates)[index]
        return ~value if negative else value

    return read


def writer(text: str) -> Callable[[Registers, Array, Array], None]:
    """Writes 32-bit values, or predicates, of the threads in a mask."""
    if match := PREDICATE.match(text):
        if match[3] == "T":
            return lambda r, mask, value: None
        uniform, index = match[2] == "UP", int(match[3])
        return lambda r, mask, value: np.copyto(
            (r.uniform_predicates if uniform else r.predicates)[index], value, where=mask
        )
    name, which = REGISTER.match(text).group(3, 4)  # type: ignore[union-attr]
    if which == "Z":
        return lambda r, mask, value: None
    index = int(which)
    return lambda r, mask, value: np.copyto(r.bank(name)[index], value, where=mask, casting="unsafe")


def next_register(text: str, further: int = 1) -> str:
    name, which = REGISTER.match(text).group(3, 4)  # type: ignore[union-attr]
    return text if which == "Z" else f"{name}{int(which) + further}"


def address(text: str) -> Read:
    """What stands in the last brackets, as int64: a register pair where it says .64."""
    terms: list[Read] = []
    for sign, name, which, suffix, minus, immediate in TERM.findall(text[text.rindex("[") + 1 : -1]):
        if immediate:
            value = np.int64(int(immediate, 16) * (-1 if minus == "-" else 1))
            terms.append(lambda r, value=value: value)
        elif which != "Z":
            pair = ".64" in suffix or (name == "UR" and "desc" in text)
            read = integer(f"{name}{which}", pair=pair)
            scale = np.int64(int(re.search(r"\.X(\d+)", suffix)[1]) if ".X" in suffix else 1)  # type: ignore[index]
            assert sign != "-"
            terms.append(lambda r, read=read, scale=scale: read(r).astype(np.int64) * scale)

    def total(r: Registers) -> Array:
        result = np.zeros(r.general.shape[1], np.int64)
        for term in terms:
            result = result + term(r)
        return result

    return total
