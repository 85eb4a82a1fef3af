"""Executes machine code on a CPU: the threads of a block in lockstep, on the process's own memory; and counts.

Threads that stand at the lowest address go first, so that lanes which parted meet again where the compiler meant them
to; BSYNC, WARPSYNC and BAR wait as on a GPU. An instruction counts once for each warp of which a lane is there.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from machine_code import Instruction, Kernel
from memory import WARP, Array, DeviceMemory, SharedMemory, load, sectors, store, wavefronts
from operands import Registers, address, integer, next_register, number, predicate, split, writer
from semantics import decode, from_float16, low32

PARAMETERS = 0x210  # of a kernel, in constant bank 0
SHARED_START = 0x400  # what precedes it is the system's
WAITING = np.int64(1) << 40  # added to the place of a thread that waits
DONE = np.int64(1) << 50
SIZES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


@dataclass
class Counts:
    """Of the warps of the blocks that ran: executions of each instruction, and what memory accesses took."""

    executed: Array
    requested: Counter[str] = field(default_factory=Counter)  # sectors, by "load" and "store"
    requests: Counter[str] = field(default_factory=Counter)
    distinct: Counter[str] = field(default_factory=Counter)  # sectors that a block touches, each once
    passes: int = 0  # of shared memory
    least_passes: int = 0
    blocks: int = 0


@dataclass
class Launch:
    """A kernel's, as cudaLaunchKernelEx gets it."""

    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    parameters: bytes


class Executor:
    """Runs blocks of one launch."""

    def __init__(self, kernel: Kernel, launch: Launch) -> None:
        self.kernel, self.launch = kernel, launch
        dimensions = b"".join(value.to_bytes(4, "little") for value in (*launch.block, *launch.grid))
        self.constants = dimensions.ljust(PARAMETERS, b"\0") + launch.parameters
        self.device = DeviceMemory()
        self.counts = Counts(np.zeros(len(kernel.instructions), np.int64))
        self.index_of = {instruction.address: i for i, instruction in enumerate(kernel.instructions)}
        self.steps: list[Callable[[Block, Array], None] | None] = [None] * len(kernel.instructions)

    def run(self, number: int) -> None:
        """One block."""
        with np.errstate(all="ignore"):
            block = Block(self, number)
            block.run()
        self.counts.blocks += 1
        for kind, touched in block.touched.items():
            self.counts.distinct[kind] += len(np.unique(np.concatenate(touched)))

    def step(self, i: int) -> "Callable[[Block, Array], None]":
        if self.steps[i] is None:
            self.steps[i] = self.compile(self.kernel.instructions[i])
        return self.steps[i]  # type: ignore[return-value]

    def compile(self, instruction: Instruction) -> "Callable[[Block, Array], None]":
        if instruction.operation in SPECIAL:
            return SPECIAL[instruction.operation](self, instruction, split(instruction.operands))
        do = decode(instruction)
        return lambda block, mask: do(block.registers, mask)


class Block:
    """A block at work: where each of its threads stands, their registers and shared memory."""

    def __init__(self, executor: Executor, number: int) -> None:
        self.executor = executor
        x, y, z = executor.launch.block
        self.size = x * y * z
        thread = np.arange(self.size, dtype=np.uint32)
        gx, gy, _ = executor.launch.grid
        self.special = {
            "SR_TID.X": thread % x,
            "SR_TID.Y": thread // x % y,
            "SR_TID.Z": thread // (x * y),
            "SR_LANEID": thread % WARP,
            "SR_CTAID.X": np.uint32(number % gx),
            "SR_CTAID.Y": np.uint32(number // gx % gy),
            "SR_CTAID.Z": np.uint32(number // (gx * gy)),
            "SR_CgaCtaId": np.uint32(0),
            "SR_SWINHI": np.uint32(0),  # of generic addresses of shared memory, of which kernels ask the last bits
        }
        self.registers = Registers(self.size, executor.constants)
        self.shared = SharedMemory()
        self.at = np.zeros(self.size, np.int64)
        self.next = np.zeros(self.size, np.int64)
        self.warp = thread.astype(np.int64) // WARP
        self.warps = (self.size + WARP - 1) // WARP
        self.barriers = np.zeros((16, self.size), np.int64)  # BSSY's: a number of those that meet, 0 for none
        self.waits_for = np.full(self.size, -1)  # which of these, 16 for the warp, 17 for the block
        self.tickets = 0
        self.touched: dict[str, list[Array]] = {}

    def run(self) -> None:
        executed, instructions = self.executor.counts.executed, self.executor.kernel.instructions
        guards = [predicate(i.guard) if i.guard else None for i in instructions]
        while True:
            here = int(self.at.min())
            if here >= WAITING:
                if here >= DONE:
                    return
                raise RuntimeError(f"{self.executor.kernel.name}: deadlock")
            active = self.at == here
            others = self.at[~active]
            until = int(others.min()) if len(others) else int(DONE)
            warps = len(np.unique(self.warp[active]))
            while True:
                executed[here] += warps
                guard = guards[here]
                mask = active if guard is None else active & guard(self.registers)
                if instructions[here].operation in CONTROL:
                    self.at[active] = here + 1
                    if mask.any():
                        self.executor.step(here)(self, mask)
                    break
                if guard is None or mask.any():
                    self.executor.step(here)(self, mask)
                here += 1
                if here >= until:
                    self.at[active] = here
                    break

    def wait(self, mask: Array, which: int) -> None:
        self.waits_for[mask] = which
        self.at[mask] += WAITING
        self.release()

    def release(self) -> None:
        """Lets those go on whose fellows have all come."""
        alive = self.at < DONE
        waiting = alive & (self.at >= WAITING)
        free = np.zeros(self.size, bool)
        for which in np.unique(self.waits_for[waiting]):
            here = waiting & (self.waits_for == which)
            if which == 17:
                groups = np.zeros(self.size, np.int64)
                members = alive
            elif which == 16:
                groups, members = self.warp, alive
            else:
                groups = self.barriers[which]
                members = alive & (groups > 0)
            for group in np.unique(groups[here]):
                fellows = members & (groups == group)
                if (here | ~fellows).all():
                    free |= fellows & here
        self.at[free] -= WAITING
        self.waits_for[free] = -1

    def count(self, kind: str, addresses: Array, mask: Array) -> None:
        requested, touched = sectors(addresses, mask)
        counts = self.executor.counts
        counts.requested[kind] += requested
        counts.requests[kind] += len(np.unique(self.warp[mask]))
        self.touched.setdefault(kind, []).append(touched)

    def count_shared(self, addresses: Array, size: int, mask: Array) -> None:
        passes, least = wavefronts(addresses, size, mask)
        self.executor.counts.passes += passes
        self.executor.counts.least_passes += least


Step = Callable[[Block, Array], None]


def access_size(instruction: Instruction) -> int:
    return next((SIZES[m] for m in instruction.modifiers if m in SIZES), 4)


def load_step(_: Executor, instruction: Instruction, operands: list[str]) -> Step:
    size, where = access_size(instruction), address(operands[1])
    writes = [writer(next_register(operands[0], i)) for i in range(max(1, size // 4))]
    signed, shared = {"S8": np.int8, "S16": np.int16}, instruction.operation == "LDS"
    sign = next((signed[m] for m in instruction.modifiers if m in signed), None)

    def step(block: Block, mask: Array) -> None:
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


def store_step(_: Executor, instruction: Instruction, operands: list[str]) -> Step:
    size, where = access_size(instruction), address(operands[0])
    values = [integer(next_register(operands[1], i)) for i in range(max(1, size // 4))]
    shared = instruction.operation == "STS"

    def step(block: Block, mask: Array) -> None:
        addresses = where(block.registers)
        memory = block.shared if shared else block.executor.device
        if shared:
            block.count_shared(addresses, size, mask)
        else:
            block.count("store", addresses, mask)
        words = [low32(np.broadcast_to(value(block.registers), block.size))[mask] for value in values]
        store(memory, addresses[mask], size, words)

    return step


def copy_step(_: Executor, instruction: Instruction, operands: list[str]) -> Step:
    """LDGSTS: from device memory to shared memory; where a predicate follows and is false, zeros."""
    size, to, source = access_size(instruction), address(operands[0]), address(operands[1])
    chosen = predicate(operands[2]) if len(operands) > 2 else None

    def step(block: Block, mask: Array) -> None:
        target, addresses = to(block.registers), source(block.registers)
        block.count_shared(target, size, mask)
        real = mask if chosen is None else mask & chosen(block.registers)
        words = [np.zeros(block.size, np.uint32) for _ in range(size // 4)]
        if real.any():
            block.count("load", addresses, real)
            for word, value in zip(words, load(block.executor.device, addresses[real], size), strict=True):
                word[real] = value
        store(block.shared, target[mask], size, [word[mask] for word in words])

    return step


def add_step(_: Executor, instruction: Instruction, operands: list[str]) -> Step:
    """Atomic additions without a result; POPC.INC adds one."""
    shared = instruction.operation == "ATOMS"
    where = address(operands[1] if shared else operands[0])
    one = "INC" in instruction.modifiers
    value = None if one else integer(operands[1], pair="64" in instruction.modifiers)
    kind = np.uint64 if "64" in instruction.modifiers else np.uint32
    if "ADD" not in instruction.modifiers and not one:
        raise NotImplementedError(str(instruction))

    def step(block: Block, mask: Array) -> None:
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


def constant_step(_: Executor, instruction: Instruction, operands: list[str]) -> Step:
    size = access_size(instruction)
    read = integer(operands[1], pair=size == 8)
    writes = [writer(operands[0])] + ([writer(next_register(operands[0]))] if size == 8 else [])

    def step(block: Block, mask: Array) -> None:
        value = np.asarray(read(block.registers), np.uint64)
        if size < 4:
            value = value & np.uint64((1 << 8 * size) - 1)
        for i, write in enumerate(writes):
            write(block.registers, mask, low32(value >> np.uint64(32 * i)))

    return step


def special_register(_: Executor, instruction: Instruction, operands: list[str]) -> Step:
    write, name = writer(operands[0]), operands[1]
    return lambda block, mask: write(block.registers, mask, block.special[name])


def shuffle(_: Executor, instruction: Instruction, operands: list[str]) -> Step:
    put, to, value, by = writer(operands[0]), writer(operands[1]), integer(operands[2]), integer(operands[3])
    mode = instruction.modifiers[0]

    def step(block: Block, mask: Array) -> None:
        lane = np.arange(block.size) % WARP
        shift = by(block.registers).astype(np.int64)
        source = {"BFLY": lane ^ shift, "IDX": shift % WARP, "UP": lane - shift, "DOWN": lane + shift}[mode]
        inside = (source >= 0) & (source < WARP)
        source = np.where(inside, source, lane) + block.warp * WARP
        to(block.registers, mask, low32(np.broadcast_to(value(block.registers), block.size))[source])
        put(block.registers, mask, inside)

    return step


def vote(_: Executor, instruction: Instruction, operands: list[str]) -> Step:
    ballot, put = writer(operands[0]), writer(operands[1])
    read = predicate(operands[2])
    every = "ALL" in instruction.modifiers

    def step(block: Block, mask: Array) -> None:
        value = np.broadcast_to(read(block.registers), block.size)
        taken = np.zeros(block.warps * WARP, bool)
        taken[: block.size] = value & mask
        part = np.zeros(block.warps * WARP, bool)
        part[: block.size] = mask
        bits = (taken.reshape(-1, WARP).astype(np.uint64) << np.arange(WARP, dtype=np.uint64)).sum(1)
        rows = taken.reshape(-1, WARP), part.reshape(-1, WARP)
        result = (rows[0] | ~rows[1]).all(1) if every else rows[0].any(1)
        ballot(block.registers, mask, low32(bits)[block.warp])
        put(block.registers, mask, result[block.warp])

    return step


def tensor_product(_: Executor, instruction: Instruction, operands: list[str]) -> Step:
    """HMMA.16816.F32: D (16 x 8) = A (16 x 16) B (16 x 8) + C, spread over a warp's registers as PTX documents."""
    if "16816" not in instruction.modifiers or "F32" not in instruction.modifiers:
        raise NotImplementedError(str(instruction))
    names = [text.split(".")[0] for text in operands[:4]]
    d, a, b, c = (number("R", name[1:]) for name in names)
    bfloat = "BF16" in instruction.modifiers

    def step(block: Block, mask: Array) -> None:
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


def load_matrix(_: Executor, instruction: Instruction, operands: list[str]) -> Step:
    """LDSM: 8 x 8 matrices of 2-byte elements, rows at the addresses of 8 lanes each."""
    where = address(operands[1])
    matrices = next((int(m) for m in instruction.modifiers if m in ("2", "4")), 1)
    transposed, first = any(m.startswith("MT") for m in instruction.modifiers), number("R", operands[0][1:])

    def step(block: Block, mask: Array) -> None:
        addresses = where(block.registers)
        rows = addresses.reshape(block.warps, WARP)
        block.count_shared(addresses, 16, mask)
        for i in range(matrices):
            starts = rows[:, 8 * i : 8 * i + 8].reshape(-1)
            data = block.shared.data[starts[:, None] + np.arange(16)].view(np.uint16).reshape(-1, 8, 8)
            data = data.transpose(0, 2, 1) if transposed else data
            value = np.ascontiguousarray(data).view(np.uint32).reshape(-1)
            np.copyto(block.registers.general[first + i], value, where=mask)

    return step


def nothing(*_: object) -> Step:
    return lambda block, mask: None


def branch(executor: Executor, instruction: Instruction, operands: list[str]) -> Step:
    target = executor.kernel.target(instruction)
    if target is None:
        raise NotImplementedError(str(instruction))
    condition = predicate(operands[0]) if len(operands) > 1 and not operands[0].startswith("`") else None

    def step(block: Block, mask: Array) -> None:
        taken = mask if condition is None else mask & condition(block.registers)
        block.at[taken] = target

    return step


def come_back(executor: Executor, instruction: Instruction, operands: list[str]) -> Step:
    read = integer(operands[0].split()[0])

    def step(block: Block, mask: Array) -> None:
        for value in np.unique(read(block.registers)[mask]):
            block.at[mask & (read(block.registers) == value)] = executor.index_of[int(value)]

    return step


def leave(*_: object) -> Step:
    def step(block: Block, mask: Array) -> None:
        block.at[mask] = DONE
        block.release()

    return step


def barrier_number(operands: list[str]) -> int:
    return int(re.match(r"B(\d+)", operands[0])[1])  # type: ignore[index]


def set_meeting(_: Executor, instruction: Instruction, operands: list[str]) -> Step:
    which = barrier_number(operands)

    def step(block: Block, mask: Array) -> None:
        block.tickets += 1
        np.copyto(block.barriers[which], block.tickets * 4096 + block.warp, where=mask)

    return step


def meet(_: Executor, instruction: Instruction, operands: list[str]) -> Step:
    which = barrier_number(operands)
    return lambda block, mask: block.wait(mask & (block.barriers[which] > 0), which)


def break_off(_: Executor, instruction: Instruction, operands: list[str]) -> Step:
    which = barrier_number(operands[-1:])

    def step(block: Block, mask: Array) -> None:
        block.barriers[which][mask] = 0
        block.release()

    return step


def wait_step(which: int) -> Callable[..., Step]:
    return lambda *_: lambda block, mask: block.wait(mask, which)


CONTROL = {"BRA", "CALL", "RET", "EXIT", "BSYNC", "BREAK", "WARPSYNC", "BAR"}
SPECIAL: dict[str, Callable[[Executor, Instruction, list[str]], Step]] = {
    **dict.fromkeys(("LDG", "LDS", "LD"), load_step),
    **dict.fromkeys(("STG", "STS", "ST"), store_step),
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
    "WARPSYNC": wait_step(16),
    "BAR": wait_step(17),
}
