"""What the executor knows the meaning of: an operation's modifiers and its operands' suffixes. Others stop it.

One that is overlooked is a wrong result that looks right: R2P R4.B3 takes bits 24 to 31 of R4, R2P R4 bits 0 to 7.
"""

import re

from machine_code import Instruction

COMPARISONS = "LT LE GT GE EQ NE AND OR XOR"
MODIFIERS = {
    "ATOMS": "ADD POPC INC 32",
    "BAR": "SYNC DEFER_BLOCKING",
    "BRA": "DIV",
    "CALL": "REL NOINC",
    "DEPBAR": "LE",
    "F2FP": "F16 BF16 F32 PACK_AB",
    "F2I": "FTZ U32 S32 U64 S64 TRUNC FLOOR CEIL NTZ",
    "FADD": "FTZ SAT",
    "FFMA": "FTZ SAT RM RP RZ",
    "FLO": "U32 SH",
    "FMNMX": "NAN",
    "FMNMX3": "NAN",
    "FMUL": "FTZ SAT",
    "FSETP": f"{COMPARISONS} LTU LEU GTU GEU EQU NEU NUM NAN FTZ",
    "HADD2": "F32 BF16_V2",
    "HFMA2": "MMA BF16_V2",
    "HMMA": "16816 F32 BF16",
    "HMUL2": "BF16_V2",
    "I2F": "RP U32 S32 U64 S64",
    "I2FP": "F32 U32 S32",
    "IADD3": "X",
    "IMAD": "IADD MOV SHL U32 WIDE HI X",
    "ISETP": f"{COMPARISONS} U32 EX",
    "LDC": "64 U8 U16",
    "LDG": "E 64 128 U8 S8 U16 S16 CONSTANT",
    "LDGSTS": "E BYPASS 128",
    "LDS": "64 128 U8 S8 U16 S16",
    "LDSM": "16 M88 MT88 2 4",
    "LEA": "HI X SX32",
    "LOP3": "LUT",
    "MUFU": "RCP RSQ SQRT EX2 LG2 TANH",
    "PLOP3": "LUT",
    "RED": "E ADD 64 STRONG GPU",
    "REDG": "E ADD 64 STRONG GPU",
    "RET": "REL NODEC",
    "SHF": "L R U32 S32 U64 S64 HI",
    "SHFL": "BFLY IDX UP DOWN",
    "STG": "E 64 128 U8 U16 STRONG SM",
    "STS": "64 128 U8 U16",
    "VIMNMX": "U32 RELU",
    "VOTE": "ANY ALL",
    "VOTEU": "ANY ALL",
    "WARPSYNC": "ALL",
}
SUFFIXES = {"R2P": "B0 B1 B2 B3", **dict.fromkeys(("HADD2", "HFMA2", "HMUL2"), "H0_H0 H1_H1")}
OF_ADDRESSES = "64 X4 X8 X16"  # in brackets
SUFFIX = re.compile(r"\bU?R(?:\d+|Z)((?:\.\w+)+)")
ADDRESS = re.compile(r"\[[^\]]*\]")


def suffixes(text: str) -> set[str]:
    return {part for found in SUFFIX.findall(text) for part in found[1:].split(".")} - {"reuse"}


def refuse_unknown(instruction: Instruction) -> None:
    """NotImplementedError for what nothing here gives its meaning."""
    operation = instruction.operation
    name = operation[1:] if operation.startswith("U") else operation
    unknown = set(instruction.modifiers) - set(MODIFIERS.get(name, "").split())
    addresses = " ".join(ADDRESS.findall(instruction.operands))
    unknown |= suffixes(addresses) - set(OF_ADDRESSES.split())
    unknown |= suffixes(ADDRESS.sub("", instruction.operands)) - set(SUFFIXES.get(name, "").split())
    if unknown:
        raise NotImplementedError(f"{instruction}: what is .{', .'.join(sorted(unknown))}? (scripts/sass/known.py)")


def expect(instruction: Instruction, holds: bool) -> None:
    """Of operands, where only one form has its meaning here."""
    if not holds:
        raise NotImplementedError(f"{instruction}: these operands are not known to scripts/sass")
