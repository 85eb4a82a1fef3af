"""Memory and control flow of the machine code: what an instruction does to a block of threads (execute.py)."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from floats import from_float16
from known import expect
from machine_code import Instruction
from memory import WARP, Array, load, store
from operands import address, integer, is_predicate, low32, next_register, number, predicate, writer

if TYPE_CHECKING:
    from execute import Block, Executor

DONE = np.int64(1) << 50  # the place of a thread that has ended
SIZES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
Step = Callable[["Block", Array], None]


def access_size(instruction: Instruction) -> int:
    return next((SIZES[m] for m in instruction.modifiers if m in SIZES), 4)


def load_step(_: "Executor", instruction: Instruction, operands: list[str]) -> Step:
    expect(instruction, len(operands) == 2)
    size, where = access_size(instruction), address(operands[1])
    writes = [writer(next_register(operands[0], i)) for i in range(max(1, size // 4))]
    signed, shared = {"S8": np.int8, "S16": np.int16}, instruction.operation == "LDS"
    sign = next((signed[m] for m in instruction.modifiers if m in signed), None)

    def step(block: "Block", mask: Array) -> None:
        addresses = where(block.registers)
        memory = block.shared if shared else block.executor.device
        if shared:
            block.count_shared(addresses, size, mask)
        else:
            block.count("load", addresses, mask)
        for write, value in zip(writes, load(memory, addresses[mask], size), strict=True):
            whole = np.zeros(block.size, np.uint32)
            whole[mask] = value if sign is None else value.view(sign).astype(np.int32).view(np.uint32)
            write(block.registers, mask, whole)

    return step


def store_step(_: "Executor", instruction: Instruction, operands: list[str]) -> Step:
    size, where = access_size(instruction), address(operands[0])
    values = [integer(next_register(operands[1], i)) for i in range(max(1, size // 4))]
    shared = instruction.operation == "STS"

    def step(block: "Block", mask: Array) -> None:
        addresses = where(block.registers)
        memory = block.shared if shared else block.executor.device
        if shared:
            block.count_shared(addresses, size, mask)
        else:
            block.count("store", addresses, mask)
        words = [low32(np.broadcast_to(value(block.registers), block.size))[mask] for value in values]
        store(memory, addresses[mask], size, words)

    return step


def copy_step(_: "Executor", instruction: Instruction, operands: list[str]) -> Step:
    """LDGSTS: from device memory to shared memory; where a predicate follows and is false, zeros."""
    size, to, source = access_size(instruction), address(operands[0]), address(operands[1])
    chosen = predicate(operands[2]) if len(operands) > 2 else None

    def step(block: "Block", mask: Array) -> None:
        target, addresses = to(block.registers), source(block.registers)
        block.count_shared(target, size, mask)
        real = mask if chosen is None else mask & chosen(block.registers)
        words = [np.zeros(block.size, np.uint32) for _ in range(size // 4)]
        if real.any():
            block.count("copy", addresses, real)
            for word, value in zip(words, load(block.executor.device, addresses[real], size), strict=True):
                word[real] = value
        store(block.shared, target[mask], size, [word[mask] for word in words])

    return step


def add_step(_: "Executor", instruction: Instruction, operands: list[str]) -> Step:
    """Atomic additions of integers, whose result is not asked for; POPC.INC adds one."""
    shared = instruction.operation == "ATOMS"
    expect(instruction, not shared or operands[0] == "RZ")
    where = address(operands[1] if shared else operands[0])
    one = "INC" in instruction.modifiers
    value = None if one else integer(operands[-1], pair="64" in instruction.modifiers)
    kind = np.uint64 if "64" in instruction.modifiers else np.uint32
    expect(instruction, one or "ADD" in instruction.modifiers)

    def step(block: "Block", mask: Array) -> None:
        addresses = where(block.registers)
        if shared:
            block.count_shared(addresses, 4, mask)
        else:
            block.count("store", addresses, mask)
        memory = block.shared if shared else block.executor.device
        size = np.dtype(kind).itemsize
        data, at = memory.view(addresses[mask], size)
        base = int(at.min()) // 8 * 8
        elements = data[base : (int(at.max()) + size + 7) // 8 * 8].view(kind)
        summand = np.ones(block.size, kind) if value is None else np.broadcast_to(value(block.registers), block.size)
        np.add.at(elements, (at - base) // size, summand[mask].astype(kind))

    return step


def constant_step(_: "Executor", instruction: Instruction, operands: list[str]) -> Step:
    size = access_size(instruction)
    read = integer(operands[1], pair=size == 8)
    writes = [writer(operands[0])] + ([writer(next_register(operands[0]))] if size == 8 else [])

    def step(block: "Block", mask: Array) -> None:
        value = np.asarray(read(block.registers), np.uint64)
        if size < 4:
            value = value & np.uint64((1 << 8 * size) - 1)
        for i, write in enumerate(writes):
            write(block.registers, mask, low32(value >> np.uint64(32 * i)))

    return step


def special_register(_: "Executor", instruction: Instruction, operands: list[str]) -> Step:
    write, name = writer(operands[0]), operands[1]
    return lambda block, mask: write(block.registers, mask, block.special[name])


def shuffle(_: "Executor", instruction: Instruction, operands: list[str]) -> Step:
    put, to, value, by, limit = writer(operands[0]), writer(operands[1]), *(integer(text) for text in operands[2:])
    mode = instruction.modifiers[0]
    whole_warp = np.uint64(0 if mode == "UP" else WARP - 1)

    def step(block: "Block", mask: Array) -> None:
        lane = np.arange(block.size) % WARP
        expect(instruction, bool((np.broadcast_to(limit(block.registers), block.size)[mask] == whole_warp).all()))
        shift = by(block.registers).astype(np.int64)
        source = {"BFLY": lane ^ shift, "IDX": shift % WARP, "UP": lane - shift, "DOWN": lane + shift}[mode]
        inside = (source >= 0) & (source < WARP)
        source = np.where(inside, source, lane) + block.warp * WARP
        if not mask[source[mask]].all():
            raise RuntimeError(f"{instruction} takes the value of a lane that is elsewhere")
        to(block.registers, mask, low32(np.broadcast_to(value(block.registers), block.size))[source])
        put(block.registers, mask, inside)

    return step


def vote(_: "Executor", instruction: Instruction, operands: list[str]) -> Step:
    expect(instruction, len(operands) in (2, 3))
    ballot = None if is_predicate(operands[0]) else writer(operands[0])
    put, read = writer(operands[-2]), predicate(operands[-1])
    every = "ALL" in instruction.modifiers

    def step(block: "Block", mask: Array) -> None:
        value = np.broadcast_to(read(block.registers), block.size)
        taken = np.zeros(block.warps * WARP, bool)
        taken[: block.size] = value & mask
        part = np.zeros(block.warps * WARP, bool)
        part[: block.size] = mask
        bits = (taken.reshape(-1, WARP).astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(1)
        rows = taken.reshape(-1, WARP), part.reshape(-1, WARP)
        result = (rows[0] | ~rows[1]).all(1) if every else rows[0].any(1)
        if ballot is not None:
            ballot(block.registers, mask, low32(bits)[block.warp])
        put(block.registers, mask, result[block.warp])

    return step


def tensor_product(_: "Executor", instruction: Instruction, operands: list[str]) -> Step:
    """HMMA.16816.F32: D (16 x 8) = A (16 x 16) B (16 x 8) + C, spread over a warp's registers as PTX documents."""
    expect(instruction, {"16816", "F32"} <= set(instruction.modifiers) and len(operands) == 4)
    d, a, b, c = (number("R", name[1:]) for name in operands)
    bfloat = "BF16" in instruction.modifiers

    def step(block: "Block", mask: Array) -> None:
        general, count = block.registers.general, block.warps
        group, four = np.arange(WARP) // 4, np.arange(WARP) % 4

        def halves(register: int) -> tuple[Array, Array]:
            bits = general[register].reshape(count, WARP)
            if bfloat:
                return (bits << np.uint32(16)).view(np.float32), (bits & np.uint32(0xFFFF0000)).view(np.float32)
            return from_float16(bits), from_float16(bits >> np.uint32(16))

        left, right = np.zeros((count, 16, 16), np.float32), np.zeros((count, 16, 8), np.float32)
        for i in range(4):
            for j, value in enumerate(halves(a + i)):
                left[:, group + 8 * (i % 2), four * 2 + j + 8 * (i // 2)] = value
        for i in range(2):
            for j, value in enumerate(halves(b + i)):
                right[:, four * 2 + j + 8 * i, group] = value
        product = left @ right
        for i in range(4):
            part = product[:, group + 8 * (i // 2), four * 2 + i % 2].reshape(-1)
            added = np.float32(0) if c == 256 else general[c + i].view(np.float32)
            np.copyto(general[d + i], (part + added).astype(np.float32).view(np.uint32), where=mask)

    return step


def load_matrix(_: "Executor", instruction: Instruction, operands: list[str]) -> Step:
    """LDSM: 8 x 8 matrices of 2-byte elements, rows at the addresses of 8 lanes each."""
    where = address(operands[1])
    matrices = next((int(m) for m in instruction.modifiers if m in ("2", "4")), 1)
    transposed, first = any(m.startswith("MT") for m in instruction.modifiers), number("R", operands[0][1:])

    def step(block: "Block", mask: Array) -> None:
        addresses = where(block.registers)
        block.count_shared(addresses, 16, mask)
        rows = np.where(mask, addresses, 0).reshape(block.warps, WARP)  # other warps' registers hold anything
        for i in range(matrices):
            starts = rows[:, 8 * i : 8 * i + 8].reshape(-1)
            data = block.shared.data[starts[:, None] + np.arange(16)].view(np.uint16).reshape(-1, 8, 8)
            data = data.transpose(0, 2, 1) if transposed else data
            value = np.ascontiguousarray(data).view(np.uint32).reshape(-1)
            np.copyto(block.registers.general[first + i], value, where=mask)

    return step


def nothing(*_: object) -> Step:
    return lambda block, mask: None


def branch(executor: "Executor", instruction: Instruction, operands: list[str]) -> Step:
    target = executor.kernel.target(instruction)
    expect(instruction, target is not None and len(operands) <= 2)
    if "DIV" in instruction.modifiers:  # where a warp's lanes are not all here, to WARPSYNC.COLLECTIVE

        def diverged(block: "Block", mask: Array) -> None:
            whole = mask.reshape(-1, 32).all(axis=1).repeat(32)
            block.at[mask & ~whole] = target

        return diverged
    condition = predicate(operands[0]) if len(operands) > 1 and not operands[0].startswith("`") else None

    def step(block: "Block", mask: Array) -> None:
        taken = mask if condition is None else mask & condition(block.registers)
        block.at[taken] = target

    return step


def come_back(executor: "Executor", instruction: Instruction, operands: list[str]) -> Step:
    read = integer(operands[0].split()[0])

    def step(block: "Block", mask: Array) -> None:
        for value in np.unique(read(block.registers)[mask]):
            block.at[mask & (read(block.registers) == value)] = executor.index_of[int(value)]

    return step


def leave(_: "Executor", instruction: Instruction, operands: list[str]) -> Step:
    expect(instruction, not operands)

    def step(block: "Block", mask: Array) -> None:
        block.at[mask] = DONE
        block.release()

    return step


def barrier_number(operands: list[str]) -> int:
    return int(re.match(r"B(\d+)", operands[0])[1])  # type: ignore[index]


def set_meeting(_: "Executor", instruction: Instruction, operands: list[str]) -> Step:
    expect(instruction, len(operands) == 2)
    which = barrier_number(operands)

    def step(block: "Block", mask: Array) -> None:
        block.tickets += 1
        np.copyto(block.barriers[which], block.tickets * 4096 + block.warp, where=mask)

    return step


def meet(_: "Executor", instruction: Instruction, operands: list[str]) -> Step:
    expect(instruction, len(operands) == 1)
    which = barrier_number(operands)
    return lambda block, mask: block.wait(mask & (block.barriers[which] > 0), which)


def break_off(_: "Executor", instruction: Instruction, operands: list[str]) -> Step:
    expect(instruction, len(operands) == 1)
    which = barrier_number(operands)

    def step(block: "Block", mask: Array) -> None:
        block.barriers[which][mask] = 0
        block.release()

    return step


def synchronize(_: "Executor", instruction: Instruction, operands: list[str]) -> Step:
    """WARPSYNC.ALL, and BAR of all threads of the block."""
    block_wide = instruction.operation == "BAR"
    expect(instruction, operands == (["0x0"] if block_wide else []))
    return lambda block, mask: block.wait(mask, 17 if block_wide else 16)


CONTROL = {"BRA", "CALL", "RET", "EXIT", "BSYNC", "BREAK", "WARPSYNC", "BAR"}
SPECIAL: dict[str, Callable[["Executor", Instruction, list[str]], Step]] = {
    **dict.fromkeys(("LDG", "LDS"), load_step),
    **dict.fromkeys(("STG", "STS"), store_step),
    **dict.fromkeys(("RED", "REDG", "ATOMS"), add_step),
    **dict.fromkeys(("LDC", "ULDC"), constant_step),
    **dict.fromkeys(("S2R", "S2UR"), special_register),
    **dict.fromkeys(("VOTE", "VOTEU"), vote),
    **dict.fromkeys(("NOP", "LDGDEPBAR", "DEPBAR", "YIELD"), nothing),
    **dict.fromkeys(("BRA", "CALL"), branch),
    "LDGSTS": copy_step,
    "SHFL": shuffle,
    "HMMA": tensor_product,
    "LDSM": load_matrix,
    "RET": come_back,
    "EXIT": leave,
    "BSSY": set_meeting,
    "BSYNC": meet,
    "BREAK": break_off,
    "WARPSYNC": synchronize,
    "BAR": synchronize,
}
