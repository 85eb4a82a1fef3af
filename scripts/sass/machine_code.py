"""The machine code of the CUDA sources, as instructions: compiled by nvcc for one architecture, read from nvdisasm."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "sass"

# Operations by kind; what is not named is integer arithmetic.
KINDS = {
    "memory": "LD LDG LDS LDL LDSM LDGSTS LDGDEPBAR DEPBAR ST STG STS STL ATOM ATOMS ATOMG RED CCTL MEMBAR ERRBAR",
    "arithmetic": "FFMA FADD FMUL FMNMX FSEL FSET FSETP FCHK FSWZADD HFMA2 HADD2 HMUL2 HMNMX2 HSET2 HSETP2",
    "special": "MUFU",
    "tensor": "HMMA IMMA DMMA BMMA HGMMA",
    "double": "DFMA DADD DMUL DSETP DMNMX",
    "conversion": "F2F F2FP F2I F2IP FRND I2F I2FP I2I",
    "move": "MOV UMOV CS2R S2R S2UR R2UR LDC ULDC SHFL MOVM P2R R2P VOTE VOTEU REDUX",
    "branch": "BRA BRX JMP CALL RET EXIT BSSY BSYNC BREAK WARPSYNC BAR NOP YIELD BMOV RPCMOV NANOSLEEP ACQBULK",
}
KIND_OF = {operation: kind for kind, operations in KINDS.items() for operation in operations.split()}
ORDER = [*KINDS, "integer"]

LINE = re.compile(r'//## File "([^"]+)", line (\d+)')
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[T\d]) )?\s*([A-Z0-9_]+)((?:\.[A-Z0-9_]+)*)\s*(.*?) ;")
LABEL = re.compile(r"^(\.L\S+|\$\S+):")
SECTION = re.compile(r"^\.text\.(\S+):")
TARGET = re.compile(r"`\(([^)]+)\)")


@dataclass
class Instruction:
    """One of a kernel. The guard is a predicate, such as !P0, or empty."""

    address: int
    guard: str
    operation: str
    modifiers: tuple[str, ...]
    operands: str
    source: tuple[str, int]

    @property
    def kind(self) -> str:
        if self.operation in ("IMAD", "UIMAD") and "MOV" in self.modifiers:
            return "move"
        return KIND_OF.get(self.operation, "double" if self.double else "integer")

    @property
    def double(self) -> bool:
        """Double precision, conversions from and to it included."""
        return KIND_OF.get(self.operation) == "double" or "F64" in self.modifiers

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{self.address:#06x} {guard:>5}{'.'.join([self.operation, *self.modifiers])} {self.operands}"


@dataclass
class Kernel:
    """A kernel's instructions, and where its labels point to (an index)."""

    symbol: str
    name: str = ""
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def target(self, instruction: Instruction) -> int | None:
        """The index that a branch goes to."""
        found = TARGET.search(instruction.operands)
        return self.labels.get(found[1]) if found else None


def find(program: str) -> Path | None:
    """A program of the CUDA toolkit: on PATH, in CUDA_HOME, or from its wheel (nvidia-cuda-cuobjdump, -nvdisasm)."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)])
    if found := shutil.which(program, path=path):
        return Path(found)
    try:
        files = importlib.metadata.files(f"nvidia-cuda-{program}") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(file.locate()) for file in files if file.name == program), None)


def demangle(symbols: list[str]) -> list[str]:
    """Kernel names with their template arguments, without namespaces and parameters."""
    text = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    lines = [line.replace("pspnet_fast::cuda::(anonymous namespace)::", "") for line in text.splitlines()]
    return [re.sub(r"^void |\(pspnet_fast::.*", "", line) for line in lines]


def compile_cubin(source: Path, architecture: int = 90, options: tuple[str, ...] = ()) -> Path:
    nvcc = find("nvcc")
    if nvcc is None:
        sys.exit("no nvcc on PATH or in CUDA_HOME")
    FOLDER.mkdir(parents=True, exist_ok=True)
    cubin = FOLDER / f"{source.stem}.{architecture}.cubin"
    command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-lineinfo", "-cubin", *options, source]
    subprocess.run([*map(str, command), "-o", str(cubin)], check=True)
    return cubin


def extract_cubin(file: Path, architecture: int) -> Path:
    """The machine code for one architecture, out of an object for several."""
    cuobjdump = find("cuobjdump")
    if cuobjdump is None:
        sys.exit("no cuobjdump on PATH, in CUDA_HOME or in this environment: pip install nvidia-cuda-cuobjdump")
    command = [str(cuobjdump), "-xelf", f".sm_{architecture}.", str(file.resolve())]
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:  # others may read what lies beside the object
        said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout
        extracted = re.findall(r"Extracting ELF file.*: (\S+)", said)
        if len(extracted) != 1:
            sys.exit(f"{file} holds no machine code for sm_{architecture}, or more than one: {said}")
        return Path(folder, extracted[0]).replace(file.parent / extracted[0])


def cubin_of(source: Path) -> Path:
    """Its machine code for sm_90, as scripts/compile_cuda.sh made it; compiled if it, or what it includes, is newer."""
    inputs = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.cuh"), source]
    changed = max(path.stat().st_mtime for path in inputs)
    checked = ROOT / "build" / "check_cuda" / f"{source.stem}.sm_90.cubin"
    for cubin in (checked, FOLDER / f"{source.stem}.90.cubin"):
        if cubin.exists() and cubin.stat().st_mtime > changed:
            return cubin
    compiled = checked.parent / f"{source.stem}.o"
    if compiled.exists() and compiled.stat().st_mtime > changed:
        return extract_cubin(compiled, 90)
    return compile_cubin(source)


def resources(cubin: Path) -> dict[str, tuple[int, int]]:
    """symbol -> (registers of a thread, bytes of static shared memory)."""
    cuobjdump = find("cuobjdump")
    if cuobjdump is None:
        sys.exit("no cuobjdump on PATH, in CUDA_HOME or in this environment: pip install nvidia-cuda-cuobjdump")
    command = [str(cuobjdump), "-res-usage", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:\d+ SHARED:(\d+)", text.stdout + text.stderr)
    return {symbol: (int(registers), int(shared)) for symbol, registers, shared in found}


def disassemble(cubin: Path) -> str:
    """The listing; kept beside the cubin, since several scripts read it."""
    listing = cubin.with_suffix(".sass")
    if listing.exists() and listing.stat().st_mtime >= cubin.stat().st_mtime:
        return listing.read_text()
    nvdisasm = find("nvdisasm")
    if nvdisasm is None:
        sys.exit("no nvdisasm on PATH, in CUDA_HOME or in this environment: pip install nvidia-cuda-nvdisasm")
    command = [str(nvdisasm), "-c", "-g", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    new = listing.with_suffix(f".{os.getpid()}")
    new.write_text(text)
    new.replace(listing)
    return text


def kernels_of(listing: str) -> list[Kernel]:
    found: list[Kernel] = []
    source = ("", 0)
    for line in listing.splitlines():
        if match := SECTION.match(line):
            found.append(Kernel(match[1]))
        elif not found:
            continue
        elif match := LINE.search(line):
            source = (match[1].rpartition("/")[2], int(match[2]))
        elif match := LABEL.match(line):
            found[-1].labels[match[1]] = len(found[-1].instructions)
        elif match := INSTRUCTION.search(line):
            address, guard, operation, modifiers, operands = match.groups()
            found[-1].instructions.append(
                Instruction(int(address, 16), guard or "", operation, tuple(modifiers.split(".")[1:]), operands, source)
            )
    for kernel, name in zip(found, demangle([kernel.symbol for kernel in found]), strict=True):
        kernel.name = name
    return found
