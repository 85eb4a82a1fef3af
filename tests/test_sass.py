"""scripts/sass: the machine code of the CUDA kernels, executed on the CPU, is right; and what costs are taken from."""

import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
if not (ROOT / "scripts" / "sass").exists():
    pytest.skip("not in a source tree", allow_module_level=True)
sys.path.append(str(ROOT / "scripts" / "sass"))
import known  # noqa: E402
import machine_code  # noqa: E402
import memory  # noqa: E402
import predict  # noqa: E402
from execute import Block, Executor, Launch  # noqa: E402
from launches import backend, observing  # noqa: E402

try:
    backend.cuda_include()
except backend.NotAvailable as error:
    pytest.skip(f"the CUDA sources cannot be built: {error}", allow_module_level=True)
for program in ("nvcc", "cuobjdump", "nvdisasm"):
    if machine_code.find(program) is None:
        pytest.skip(f"there is no {program}", allow_module_level=True)

o = torch.ops.pspnet_fast
BINS = [1, 1, 2, 3]
CELLS = 7
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def maps(*shape: int, dtype: torch.dtype, layout: str) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=LAYOUTS[layout])


def calls(dtype: torch.dtype, layout: str) -> dict:
    """operator -> (its call, the tensors that it is given and may write to)."""

    def a_map(channels: int, height: int = 7, width: int = 9) -> Tensor:
        return maps(1, channels, height, width, dtype=dtype, layout=layout)

    def cells(channels: int, batch: int = 1) -> Tensor:
        return torch.randn(batch, CELLS, channels).to(dtype)

    last = layout == "channels_last"
    weights = [torch.randn(16, 32, 1, 1).to(dtype) for _ in range(2)]
    norm = [torch.rand(16).to(dtype) + 0.5 for _ in range(4)]
    target = torch.randint(0, 19, (1, 21, 25))
    lse, loss, total = torch.full((1, 21, 25), 4.0), torch.ones(()), torch.tensor(1000.0)
    rest = (True, 255, 0.1, 1)
    statistics = torch.rand(2, 2, 16) + 0.5
    of_batch = (cells(16, 2), [torch.ones(16) for _ in range(2)], statistics, [1] * 2, [1e-5] * 2, BINS)
    parts = [torch.randn(8, 16, 3, 3).to(dtype), torch.randn(2, 9 * 8, 8).to(dtype)]
    return {
        "pyramid_pool": (lambda x, y: o.pyramid_pool(x, y, 0, BINS), [a_map(16), a_map(32)]),
        "pyramid_pool_backward": (
            lambda g, y: o.pyramid_pool_backward(g, y, 0, BINS, 7, 9, last),
            [cells(16), a_map(32)],
        ),
        "pyramid_reduce": (
            lambda x: o.pyramid_reduce(x, weights, norm * 2, [1e-5] * 2, True, BINS),
            [cells(32)],
        ),
        "pyramid_reduce_backward": (
            lambda g, x: o.pyramid_reduce_backward(g, x, weights, BINS),
            [cells(16), cells(32)],
        ),
        "pyramid_batch_norm": (
            lambda x, *norm: o.pyramid_batch_norm(
                x, *map(list, zip(norm[:4], norm[4:], strict=True)), [1] * 2, [0.1] * 2, [1e-5] * 2, True, BINS
            ),
            [cells(16, 2), *(torch.rand(16) for _ in range(8))],
        ),
        "pyramid_batch_norm_backward": (
            lambda g, x: o.pyramid_batch_norm_backward(g, x, *of_batch),
            [cells(16, 2), cells(16, 2)],
        ),
        "pyramid_split_weight": (
            lambda w: o.pyramid_split_weight(w, 16, True, 2, dtype),
            [maps(8, 32, 3, 3, dtype=dtype, layout=layout)],
        ),
        "pyramid_split_weight_backward": (
            lambda *parts: o.pyramid_split_weight_backward(*parts, True, last, dtype),
            parts,
        ),
        "pyramid_upsample_concat_": (
            lambda y, z: o.pyramid_upsample_concat_(y, z, 16, BINS, True),
            [a_map(48), cells(16)],
        ),
        "pyramid_upsample_concat_backward": (
            lambda y: o.pyramid_upsample_concat_backward(y, 16, 16, BINS, True),
            [a_map(48)],
        ),
        "pyramid_context_": (
            lambda y, t: o.pyramid_context_(y, t, norm, 1e-5, True, BINS, [3, 3], [1, 1], 1, True),
            [a_map(16), torch.randn(1, CELLS, 9, 16).to(dtype)],
        ),
        "pyramid_context_backward": (
            lambda y: o.pyramid_context_backward(y, BINS, [3, 3], [1, 1], 1),
            [a_map(16)],
        ),
        "upsample_argmax": (lambda z: o.upsample_argmax(z, 21, 25, True, True), [a_map(19)]),
        "upsample_softmax_accumulate_": (
            lambda p, z: o.upsample_softmax_accumulate_(p, z, 1, 2, 21, 25, True, True, 0.5),
            [torch.randn(1, 16, 24, 29), a_map(16)],
        ),
        "upsample_cross_entropy": (lambda z: o.upsample_cross_entropy(z, target, None, *rest), [a_map(24)]),
        "upsample_cross_entropy_backward": (
            lambda z: o.upsample_cross_entropy_backward(loss, z, target, None, lse, total, *rest),
            [a_map(24)],
        ),
        "confusion_matrix_": (
            lambda c, p: o.confusion_matrix_(c, p, target, 255),
            [torch.zeros(19, 19, dtype=torch.int64), target.roll(1).to(torch.uint8)],
        ),
    }


def execute(launch: Launch, operator: str) -> bool:
    executor = Executor(predict.compiled(operator)[0][launch.name], launch)
    for number in range(int(np.prod(launch.grid))):
        executor.run(number)
    return True


def tensors(result: object) -> list[Tensor]:
    return [] if result is None else [result] if isinstance(result, Tensor) else list(result)  # type: ignore[call-overload]


@pytest.mark.parametrize("operator", calls(torch.float32, "contiguous"))
@pytest.mark.parametrize(("dtype", "layout"), [(torch.bfloat16, "contiguous"), (torch.float32, "channels_last")])
def test_machine_code_computes_what_its_source_says(operator: str, dtype: torch.dtype, layout: str) -> None:
    """Against the same source, compiled for the CPU and executed there."""
    torch.manual_seed(0)
    call, given = calls(dtype, layout)[operator]
    here = [tensor.clone() for tensor in given]
    launches: list[Launch] = []
    with backend.instead_of_cpu_kernels():
        expected = [*tensors(call(*here)), *here]
    with observing(lambda launch: launches.append(launch) or execute(launch, operator)):
        found = [*tensors(call(*given)), *given]
    assert launches
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_every_kernel_is_executed_above() -> None:
    sources = {path.stem for path in backend.sources()}
    operators = {name.rstrip("_") for name in calls(torch.float32, "contiguous")}
    assert sources | {"pyramid_batch_norm_backward", "pyramid_split_weight_backward"} == operators


def test_what_accesses_cost() -> None:
    lane, mask = np.arange(32, dtype=np.int64), np.ones(32, bool)
    assert memory.sectors(4 * lane, mask)[0] == 4
    assert memory.sectors(32 * lane, mask)[0] == 32
    assert memory.sectors(16 * lane, lane < 3)[0] == 2
    assert memory.wavefronts(4 * lane, 4, mask) == (1, 1)
    assert memory.wavefronts(0 * lane, 4, mask) == (1, 1)  # one word for all
    assert memory.wavefronts(8 * lane, 4, mask) == (2, 1)
    assert memory.wavefronts(128 * lane, 4, mask) == (32, 1)
    assert memory.wavefronts(16 * lane, 16, mask) == (4, 4)
    assert memory.wavefronts(32 * lane, 16, mask) == (8, 4)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, machine_code.Kernel]:
    """The kernels of sass_kernels.cu."""
    cubin = tmp_path_factory.mktemp("sass") / "kernels.cubin"
    source = Path(__file__).parent / "sass_kernels.cu"
    command = [machine_code.find("nvcc"), "-std=c++17", "-arch=sm_90", "-O3", "-cubin", source, "-o", cubin]
    subprocess.run([str(part) for part in command], check=True)
    found = machine_code.kernels_of(machine_code.disassemble(cubin))
    return {kernel.name.split("(")[0]: kernel for kernel in found}


def run_warp(kernel: machine_code.Kernel, *parameters: Tensor | int) -> Executor:
    numbers = (p.data_ptr() if isinstance(p, Tensor) else p for p in parameters)
    packed = b"".join(number.to_bytes(8, "little") for number in numbers)
    executor = Executor(kernel, Launch(kernel.name, (1, 1, 1), (32, 1, 1), 0, packed))
    executor.run(0)
    return executor


def test_a_loop_counts_once_a_warp_and_step(small: dict[str, machine_code.Kernel]) -> None:
    data, result = torch.rand(32 * 7), torch.zeros(32)
    counts = run_warp(small["sums"], data, result, 32 * 7).counts
    sums = data.view(7, 32).sum(0)
    torch.testing.assert_close(result, torch.where(torch.arange(32) % 2 == 1, sums.sqrt(), sums))
    assert counts.requested == {"load": 7 * 4, "store": 4}
    assert counts.requests == {"load": 7, "store": 1}
    assert counts.distinct == {"load": 7 * 4, "store": 4}
    (read,) = (i for i, instruction in enumerate(small["sums"].instructions) if instruction.operation == "LDG")
    assert counts.executed[read] == 7


def test_double_precision_is_seen(small: dict[str, machine_code.Kernel]) -> None:
    with_double = {name for name, kernel in small.items() if any(i.double for i in kernel.instructions)}
    assert with_double == {"in_double"}


@pytest.mark.parametrize("rows", [16, 11])
def test_asynchronous_copies_and_matrix_products(small: dict[str, machine_code.Kernel], rows: int) -> None:
    a, b, d = torch.randn(16, 16).bfloat16(), torch.randn(8, 16).bfloat16(), torch.zeros(16, 8)
    counts = run_warp(small["product"], a, b, d, rows).counts
    a[rows:] = 0
    torch.testing.assert_close(d, a.float() @ b.float().T + 1)
    assert counts.requested["copy"] == rows + 8


def test_what_lanes_exchange(small: dict[str, machine_code.Kernel]) -> None:
    x, y, votes, lane = torch.rand(32) + 0.5, torch.zeros(32), torch.zeros(32, dtype=torch.int32), torch.arange(32)

    def of(other: Tensor) -> Tensor:
        return x[torch.where((other >= 0) & (other < 32), other, lane)]

    run_warp(small["lanes"], x, y, votes)
    exchanged = of(lane + 3) + 2 * of(lane - 1) + 4 * x[5] + 8 * x[lane ^ 9]
    torch.testing.assert_close(y, 2**x + x.log2() + exchanged)
    ballot = sum(int(v > 1) << i for i, v in enumerate(x)) + int((x > 1.4).any()) + 2
    assert {vote & 0xFFFFFFFF for vote in votes.tolist()} == {ballot & 0xFFFFFFFF}


def test_pairs_of_halves(small: dict[str, machine_code.Kernel]) -> None:
    x, u = torch.randn(3, 64).bfloat16(), torch.randn(3, 64).half()
    y, v = torch.zeros(64).bfloat16(), torch.zeros(64).half()
    run_warp(small["pairs"], x, y, u, v)
    torch.testing.assert_close(y, (x[0].double() * x[1].double() + x[2].double()).bfloat16())
    torch.testing.assert_close(v, (u[0].double() * u[1].double() + u[2].double()).half())


def test_bits_of_a_register_as_predicates(small: dict[str, machine_code.Kernel]) -> None:
    """R2P takes a byte of a register that its operand names, and VIMNMX.RELU no less than 0."""
    assert any("B3" in known.suffixes(i.operands) for i in small["bits"].instructions if i.operation == "R2P")
    assert any("RELU" in i.modifiers for i in small["bits"].instructions)
    x, y = torch.randint(-(2**31), 2**31, (32,), dtype=torch.int32), torch.rand(32, 8)
    result = torch.zeros(32)
    run_warp(small["bits"], x, y, result)
    chosen = x[:, None] >> torch.arange(24, 32) & 1
    torch.testing.assert_close(result, (chosen * y).sum(1) + x.clamp(0, 1000))


def instruction(text: str) -> machine_code.Instruction:
    operation, _, operands = text.partition(" ")
    name, *modifiers = operation.split(".")
    return machine_code.Instruction(0, "", name, tuple(modifiers), operands, ("", 0))


UNKNOWN = [
    "IADD3 R0, R1.H1, R2, RZ",
    "R2P PR, R0.H1, 0x7f",
    "LDG.E.SOMEHOW R0, desc[UR4][R2.64]",
    "LDG.E R0, desc[UR4][R2.S32]",
    "LDG.E R0, desc[UR4][R2.64], P0",
    "REDG.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5",
    "ATOMS.POPC.INC.32 R0, [R2]",
    "ATOMS.ADD R0, [R2], R3",
    "ATOMS.MAX RZ, [R2], R3",
    "VIMNMX3.RELU R0, R1, R2, R3, PT",
    "MUFU.SIN R0, R1",
    "FFMA.RN R0, R1, R2, R3",
    "F2I.TRUNC R0, R1",
    "FLO R0, R1",
    "LOP3.LUT R0, R1, R2, R3, 0x80, P0",
    "HFMA2 R0, R1, 1, 1, R2",
    "HFMA2.BF16_V2 R0, -RZ, RZ, 1.875, 1.875",
    "HMMA.1688.F32.TF32 R0, R4, R8, R0",
    "CS2R R0, SR_CLOCKLO",
    "BAR.SYNC.DEFER_BLOCKING 0x1",
    "BAR.SYNC.DEFER_BLOCKING 0x0, 0x40",
    "BREAK P0, B1",
    "WARPSYNC.COLLECTIVE R4, `(.L_x_1)",
    "REDUX.SUM UR4, R0",
]


@pytest.mark.parametrize("text", UNKNOWN)
def test_what_is_not_known_stops_the_executor(text: str) -> None:
    """A modifier, a suffix or an operand that is overlooked would be a wrong result."""
    executor = Executor(machine_code.Kernel("kernel"), Launch("kernel", (1, 1, 1), (32, 1, 1), 0, b""))
    with pytest.raises(NotImplementedError):
        executor.compile(instruction(text))


def test_a_shuffle_wants_all_its_lanes() -> None:
    executor = Executor(machine_code.Kernel("kernel"), Launch("kernel", (1, 1, 1), (32, 1, 1), 0, b""))
    block, mask = Block(executor, 0), np.arange(32) != 3
    step = executor.compile(instruction("SHFL.BFLY PT, R0, R1, 0x10, 0x1f"))
    step(block, mask | True)
    with pytest.raises(RuntimeError, match="a lane that is elsewhere"):
        step(block, mask)
    with pytest.raises(NotImplementedError):
        executor.compile(instruction("SHFL.BFLY PT, R0, R1, 0x4, 0x181f"))(block, mask | True)


def test_rounding_of_a_multiply_add() -> None:
    executor = Executor(machine_code.Kernel("kernel"), Launch("kernel", (1, 1, 1), (32, 1, 1), 0, b""))
    a, b, c = (np.random.default_rng(0).standard_normal(32).astype(np.float32) for _ in range(3))
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    block, mask = Block(executor, 0), np.ones(32, bool)
    for i, values in enumerate((a, b, c)):
        block.registers.general[i] = values.view(np.uint32)
    found = {}
    for mode in ("", ".RM", ".RP", ".RZ"):
        executor.compile(instruction(f"FFMA{mode} R3, R0, R1, R2"))(block, mask)
        found[mode] = block.registers.general[3].view(np.float32).copy()
    for i, value in enumerate(exact):
        low, high = found[".RM"][i], found[".RP"][i]
        assert Fraction(float(low)) < value < Fraction(float(high))
        assert np.nextafter(low, np.float32(np.inf)) == high
        assert found[".RZ"][i] == (low if value > 0 else high)
        assert found[""][i] == min((low, high), key=lambda end, value=value: abs(Fraction(float(end)) - value))


def test_budget_refuses_what_is_longer() -> None:
    profile = predict.Profile("a case", "vector", 1e-6, 2e-6, "issue", 10.5, {}, 1.0, [])
    assert predict.over_budget([profile], {"a case": 10.5}) == []
    assert predict.over_budget([profile], {"a case": 10.0}) == [
        "a case takes 10.5 instructions a vector, and may take 10.0"
    ]


def test_budgets_name_cases() -> None:
    known = {str(case) for case in predict.cases()}
    assert json.loads(predict.BUDGETS.read_text(encoding="utf-8")).keys() <= known
