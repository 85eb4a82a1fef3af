"""What each operation of the machine code computes; memory and control flow are in steps.py.

NVIDIA documents the operations by name alone (CUDA Binary Utilities). What they do was read from what nvcc makes of
known sources, and is shown to be right by results: tests/test_sass.py runs the kernels and compares. A modifier that
known.py does not list never comes here.
"""

from collections.abc import Callable

import floats
import integers
from machine_code import Instruction
from operands import Do, split


def decode(instruction: Instruction) -> Do:
    operation = instruction.operation
    name = operation[1:] if operation.startswith("U") and operation[1:] in DECODERS else operation
    if name not in DECODERS:
        raise NotImplementedError(f"{instruction}: add {operation} to scripts/sass/semantics.py")
    return DECODERS[name](instruction, split(instruction.operands), set(instruction.modifiers))


DECODERS: dict[str, Callable[[Instruction, list[str], set[str]], Do]] = {
    "IADD3": integers.add,
    "VIADD": integers.add,
    "IMAD": integers.multiply_add,
    "LEA": integers.shift_add,
    "SHF": integers.shift,
    "LOP3": integers.logic,
    "PLOP3": integers.predicate_logic,
    "ISETP": integers.compare_integers,
    "FSETP": floats.compare_floats,
    "FADD": lambda i, o, m: floats.float_result(o, m, lambda a, b: a + b),
    "FMUL": lambda i, o, m: floats.float_result(o, m, lambda a, b: a * b),
    "FFMA": floats.fma,
    "MUFU": floats.special,
    "FMNMX": floats.least_or_greatest,
    "FMNMX3": floats.least_or_greatest,
    "IMNMX": integers.least_integer,
    "VIMNMX": integers.least_integer,
    "VIMNMX3": integers.least_integer,
    "VIADDMNMX": integers.least_integer,
    "SEL": integers.select,
    "FSEL": integers.select,
    "MOV": integers.move,
    "R2UR": integers.move,
    "PRMT": integers.permute,
    "IABS": integers.absolute,
    "F2FP": floats.pack,
    "F2I": floats.to_integer,
    "I2F": floats.from_integer,
    "I2FP": floats.from_integer,
    "FCHK": floats.division_is_extreme,
    "HFMA2": floats.half_immediates,
    "HADD2": floats.half_fma,
    "HMUL2": floats.half_fma,
    "CS2R": integers.zeros,
    "P2R": integers.pack_predicates,
    "R2P": integers.unpack_predicates,
    "POPC": integers.population,
    "FLO": integers.leading,
}
