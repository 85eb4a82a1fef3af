"""Executes machine code on a CPU: the threads of a block in lockstep, on the process's own memory; and counts.

Threads that stand at the lowest address go first, so that lanes which parted meet again where the compiler meant them
to; BSYNC, WARPSYNC and BAR wait as on a GPU. An instruction counts once for each warp of which a lane is there.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from known import refuse_unknown
from machine_code import Instruction, Kernel
from memory import WARP, Array, DeviceMemory, SharedMemory, sectors, wavefronts
from operands import Registers, predicate, split
from semantics import decode
from steps import CONTROL, DONE, SPECIAL, Step

PARAMETERS = 0x210  # of a kernel, in constant bank 0
WAITING = np.int64(1) << 40  # added to the place of a thread that waits


@dataclass
class Counts:
    """Of the warps of the blocks that ran: executions of each instruction, and what memory accesses took."""

    executed: Array
    requested: Counter[str] = field(default_factory=Counter)  # sectors, by "load", "store" and "copy"
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
        self.steps: list[Step | None] = [None] * len(kernel.instructions)

    def run(self, number: int) -> None:
        """One block."""
        with np.errstate(all="ignore"):
            block = Block(self, number)
            block.run()
        self.counts.blocks += 1
        for kind, touched in block.touched.items():
            self.counts.distinct[kind] += len(np.unique(np.concatenate(touched)))

    def step(self, i: int) -> Step:
        if self.steps[i] is None:
            self.steps[i] = self.compile(self.kernel.instructions[i])
        return self.steps[i]  # type: ignore[return-value]

    def compile(self, instruction: Instruction) -> Step:
        refuse_unknown(instruction)
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
