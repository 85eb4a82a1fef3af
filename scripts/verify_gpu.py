"""Builds, tests and measures the CUDA kernels on this machine's GPU; needs torch >= 2.11, pytest and nvcc, no network.

Parts, all of them by default, each ended after 8 minutes (--seconds):
  build     the kernels in place, for the GPUs that are visible
  test      every test of operators and modules on the GPU, against the float64 reference too; at once by pytest-xdist
  twice     a sample of them in which every operator is called twice and must give the same bits
  sanitize  another sample under compute-sanitizer: memcheck, racecheck and initcheck, all three at once
  kernels   the time of each operator on its own, against the bytes that it must move
  network   PSPNet-50 as a whole, training and prediction, against plain torch layers, eager and compiled
  bench     each operator and module against eager PyTorch, torch.compile and the floor of this GPU's own rates

Without a GPU, test and twice run a sample over the CUDA sources executed on the CPU, and what follows is skipped.
OUTDIR gets summary.json, each part's log, JUnit XML of the tests, kernels.json, network.json, bench.json and bench.md.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import torch

ROOT = Path(__file__).parents[1]
COMPILE_UNTIL = 0.6  # of the time of bench: later cases go without torch.compile
GRACE = 15  # seconds to end in
TOOLS = ("memcheck", "racecheck", "initcheck")
PROCESSES = min(12, os.cpu_count() or 1)  # of the tests, where pytest-xdist is there
GPU = torch.cuda.is_available()


@dataclass
class Outcome:
    """How a part ended: passed, failed or skipped; why; and its tests that failed."""

    result: str
    why: str
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)


class Verification:
    """The parts, and the folder that their files go to."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds = folder, seconds

    def build(self) -> Outcome:
        cuda = "1" if GPU else "auto"
        code = self.run("build", [sys.executable, "setup.py", "build_ext", "--inplace"], {"USE_CUDA": cuda})
        if code != 0:
            return Outcome("failed", f"exit code {code}: see build.log")
        command = [sys.executable, "-c", "from pspnet_fast import info; print(info.collect()['built']['cuda'])"]
        version = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        return Outcome(
            "passed", f"CUDA kernels: {version}" if version != "None" else "CPU kernels alone: see build.log"
        )

    def test(self) -> Outcome:
        at_once = ["-n", str(PROCESSES)] if importlib.util.find_spec("xdist") else []
        return self.pytest("test", at_once if GPU else ["--sample=0", "--small"])

    def twice(self) -> Outcome:
        return self.pytest("twice", ["--twice", "--sample=1", "--small", *only_plain_calls()])

    def sanitize(self) -> Outcome:
        home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
        sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=f"{home}/bin")
        if not GPU:
            return Outcome("skipped", "no GPU; on a CPU `make test` runs the CUDA sources under sanitizers")
        if sanitizer is None:
            return Outcome("skipped", "compute-sanitizer is neither on PATH nor in CUDA_HOME/bin")
        with ThreadPoolExecutor(len(TOOLS)) as pool:
            outcomes = dict(zip(TOOLS, pool.map(lambda tool: self.sanitized(sanitizer, tool), TOOLS), strict=True))
        bad = [tool for tool, outcome in outcomes.items() if outcome.result != "passed"]
        why = "; ".join(f"{tool}: {outcome.why}" for tool, outcome in outcomes.items())
        failures = [failure for outcome in outcomes.values() for failure in outcome.failures]
        return Outcome("failed" if bad else "passed", why, failures=failures)

    def sanitized(self, sanitizer: str, tool: str) -> Outcome:
        """A sample under one tool of compute-sanitizer."""
        command = [sanitizer, f"--tool={tool}", "--error-exitcode=9"]
        options = [f"--sample={2 + TOOLS.index(tool)}", "--small", *only_plain_calls()]
        if tool == "initcheck":  # has to see torch's kernels write; poison would hide what none wrote
            options.append("--no-poison")
        else:
            command.append("--kernel-regex=kns=pspnet_fast")
        no_cache = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor has an end that memcheck knows
        # racecheck breaks down in cuDNN's kernels, filtered or not: the operators' tests call none
        return self.pytest(tool, options, command, no_cache, operators=tool == "racecheck")

    def bench(self) -> Outcome:
        if not GPU:
            return Outcome("skipped", "no GPU; `make bench` measures the CPU")
        out = self.folder / "bench.json"
        options = [
            f"--json={out}",
            f"--markdown={out.with_suffix('.md')}",
            f"--compile-until={COMPILE_UNTIL * self.seconds}",
        ]
        code = self.run("bench", [sys.executable, "-m", "pytest", "benchmarks", "-q", *options])
        if code != 0 or not out.exists():
            return Outcome("failed", f"exit code {code}: see bench.log")
        return Outcome("passed", f"to keep the figures: python benchmarks/tables.py --keep {self.folder} --readme")

    def network(self) -> Outcome:
        command = ["benchmarks/network.py", f"--json={self.folder / 'network.json'}", "--compile"]
        return self.script("network", command, "in network.json")

    def kernels(self) -> Outcome:
        command = ["scripts/sass/measure.py", f"--json={self.folder / 'kernels.json'}"]
        return self.script("kernels", command, "in kernels.json")

    def script(self, name: str, command: list[str], told: str) -> Outcome:
        if not GPU:
            return Outcome("skipped", "no GPU")
        code = self.run(name, [sys.executable, *command], {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"})
        return Outcome("failed", f"exit code {code}: see {name}.log") if code else Outcome("passed", told)

    def pytest(
        self,
        name: str,
        options: list[str],
        before: list[str] | None = None,
        environment: dict[str, str] | None = None,
        operators: bool = False,
    ) -> Outcome:
        """The operators' and modules' tests, or those of operators alone, on the GPU or over the CUDA sources."""
        xml = self.folder / f"{name}.xml"
        xml.unlink(missing_ok=True)
        command = [*(before or []), sys.executable, "-m", "pytest", "-q", *tests_of_kernels(operators)]
        command += [f"--device={'cuda' if GPU else 'cuda_on_cpu'}", f"--junitxml={xml}", *options]
        code = self.run(name, command, environment)
        where = "" if GPU else "no GPU, so a sample over the CUDA sources on the CPU: "
        if not xml.exists():
            return Outcome("failed", f"{where}exit code {code}: see {name}.log")
        counts, failures = read_junit(xml)
        passed = code == 0 and not failures and counts["passed"] > 0
        told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        return Outcome("passed" if passed else "failed", where + told, failures=failures)

    def run(self, name: str, command: list[str], environment: dict[str, str] | None = None) -> int:
        """Runs it in the checkout, with all that it prints in NAME.log; 124 if it was ended for its time."""
        print(f"verify_gpu: {name} ...", flush=True)
        path = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        with (self.folder / f"{name}.log").open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | path | (environment or {}),
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that what it started can be ended with it
            )
            try:
                return process.wait(self.seconds)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGINT)  # pytest then tells what failed so far
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                log.write(f"\nverify_gpu: ended after {self.seconds:.0f} s\n")
                return 124


def tests_of_kernels(operators: bool) -> list[str]:
    """The files of tests that take a device: of the operators, and else of what stands on them and needs only torch."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    if operators:
        files = [path for path in files if (ROOT / "csrc" / f"{path.stem.removeprefix('test_')}.cpp").exists()]
    return [f"tests/{path.name}" for path in files if re.search(r"def test_\w+\(device\b", path.read_text("utf-8"))]


def only_plain_calls() -> list[str]:
    """Without the tests that call the kernels no differently, only through torch's machinery or more often."""
    return ["-k", "not opcheck and not gradcheck and not compile and not same_bits and not memory and not inference"]


def read_junit(path: Path) -> tuple[dict[str, int], list[str]]:
    """How many tests passed, failed and were skipped, and the failures with their first line."""
    counts, failures = {"passed": 0, "failed": 0, "skipped": 0}, []
    for case in ElementTree.parse(path).iter("testcase"):
        problem = next((child for child in case if child.tag in ("failure", "error")), None)
        skipped = case.find("skipped") is not None
        counts["failed" if problem is not None else "skipped" if skipped else "passed"] += 1
        if problem is not None:
            failures.append(f"{case.get('name')}: {problem.get('message', '').splitlines()[0]}")
    return counts, failures


def main() -> None:
    parts = ["build", "test", "twice", "sanitize", "kernels", "network", "bench"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outdir", type=Path, metavar="OUTDIR")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)}; all by default")
    help = "of each part; what is not done then fails (%(default)s)"
    parser.add_argument("--seconds", type=float, default=480.0, help=help)
    args = parser.parse_intermixed_args()
    if unknown := [part for part in args.parts if part not in parts]:
        parser.error(f"no such part: {', '.join(unknown)} (of {', '.join(parts)})")
    args.outdir.mkdir(parents=True, exist_ok=True)

    verification = Verification(args.outdir.resolve(), args.seconds)
    outcomes: dict[str, Outcome] = {}
    for part in args.parts or parts:
        start = time.monotonic()
        method: Callable[[], Outcome] = getattr(verification, part)
        outcomes[part] = method()
        outcomes[part].seconds = round(time.monotonic() - start, 1)
        summary = {
            "gpu": torch.cuda.get_device_name() if GPU else None,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "parts": {name: asdict(outcome) for name, outcome in outcomes.items()},
        }
        (args.outdir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")

    print(
        f"\n{torch.cuda.get_device_name() if GPU else 'no GPU'}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    )
    for part, outcome in outcomes.items():
        print(f"{part:9} {outcome.result:8} {outcome.seconds:6.1f} s  {outcome.why}")
        for failure in outcome.failures[:20]:
            print(f"{'':10}{failure}")
    if (bench := args.outdir / "bench.md").exists() and outcomes.get("bench", Outcome("", "")).result == "passed":
        print(f"\n{bench.read_text(encoding='utf-8')}")
    sys.exit(any(outcome.result == "failed" for outcome in outcomes.values()))


if __name__ == "__main__":
    main()
