"""Who runs a case: this package, plain torch, torch.compile, and runtimes that read an exported graph."""

import importlib.util
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pspnet_fast.bench.cases import Case, Step

GRAPH = "stock.onnx"
TOLERANCE = 1e-2  # of a runtime's result, relative to the largest of plain torch: it must compute the same thing


@dataclass(frozen=True)
class Provider:
    """One column of the tables.

    Args:
        name: as on the command line.
        prepare: (case, device) -> the step, or None where the provider has nothing for the case.
        missing: the device type -> why it cannot run there; None if it can.
        unasked: (case, device) -> whether a run that names no providers includes it.
    """

    name: str
    prepare: Callable[[Case, torch.device], Step | None]
    missing: Callable[[str], str | None] = lambda _: None
    unasked: Callable[[Case, torch.device], bool] = lambda *_: True


def as_it_is(function: Any) -> Any:
    """The compiler of providers that have none."""
    return function


def _compiled(mode: str) -> Callable[..., Any]:
    return partial(torch.compile, dynamic=False, mode=mode)


def _made(ours: bool, compiler: Callable[..., Any] = as_it_is) -> Callable[[Case, torch.device], Step]:
    return lambda case, device: case.make(device, ours, compiler)


def _no_compiler(device: str) -> str | None:
    found = device != "cpu" or any(map(shutil.which, ("g++", "c++", "clang++")))
    return None if found else "torch.compile needs a C++ compiler"


def _cheap_to_compile(case: Case, device: torch.device) -> bool:
    return device.type != "cpu" or case.compiles


def _absent(*packages: str) -> Callable[[str], str | None]:
    """What a runtime needs: these packages, and a CPU."""

    def missing(device: str) -> str | None:
        if device != "cpu":
            return "runs on the CPU only"
        lacking = [name for name in packages if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(lacking)}" if lacking else None

    return missing


def _exported(run: Callable[[Path, Tensor], Callable[[], Any]]) -> Callable[[Case, torch.device], Step | None]:
    """A runtime on the stock module as torch.onnx exports it, of float32, which is what it is exported for."""

    def prepare(case: Case, device: torch.device) -> Step | None:
        if case.stock is None or case.dtype != torch.float32:
            return None
        graph = _export(case, device)
        call, expected = run(Path(graph.folder.name, GRAPH), graph.input), graph.output
        result = torch.as_tensor(call()).to(expected.dtype)
        if expected.is_floating_point():
            wrong = (result - expected).abs().max().item() / expected.abs().max().item()
        else:
            wrong = (result != expected).double().mean().item()
        if not wrong <= TOLERANCE:
            raise ValueError(f"its result differs from plain torch's by {wrong:.2g}")
        step = case.make(device, False, as_it_is)  # for what there is to do
        return Step(call, step.floor_bytes, step.operations)

    return prepare


class _Graph(NamedTuple):
    """A file of the stock module in a folder that lives as long as this, an input, and plain torch's output of it."""

    folder: tempfile.TemporaryDirectory[str]
    input: Tensor
    output: Tensor


@lru_cache(maxsize=1)  # for all runtimes of a case
def _export(case: Case, device: torch.device) -> _Graph:
    assert case.stock is not None
    module, x = case.stock(device)
    folder = tempfile.TemporaryDirectory()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of what is not installed
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated parts of torch in the exporter
        torch.onnx.export(module.eval(), (x,), Path(folder.name, GRAPH), dynamo=True, verbose=False)
        return _Graph(folder, x.contiguous(), module(x))  # these runtimes know no other layout


def _onnxruntime(path: Path, x: Tensor) -> Callable[[], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, inputs)[0]


def _openvino(path: Path, x: Tensor) -> Callable[[], Any]:
    import openvino

    core = openvino.Core()
    config = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(core.read_model(path), "CPU", config).create_infer_request()
    inputs = [openvino.Tensor(x.numpy(), shared_memory=True)]
    return lambda: request.infer(inputs, share_outputs=True)[0]


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("ours", _made(True)),
        Provider("eager", _made(False)),
        Provider("compile", _made(False, _compiled("default")), _no_compiler, _cheap_to_compile),
        Provider("max-autotune", _made(False, _compiled("max-autotune")), _no_compiler, _cheap_to_compile),
        Provider("ours-compile", _made(True, _compiled("default")), _no_compiler, lambda *_: False),
        Provider("onnxruntime", _exported(_onnxruntime), _absent("onnx", "onnxscript", "onnxruntime")),
        Provider("openvino", _exported(_openvino), _absent("onnx", "onnxscript", "openvino")),
    )
}


def chosen_providers(names: str | None, device: torch.device) -> tuple[list[Provider], dict[str, str]]:
    """Those that a run uses, and why others that are meant cannot run.

    Args:
        names: with commas between them; None for all that are used unasked.

    Raises:
        ValueError: there is no such provider.
    """
    wanted = list(PROVIDERS) if names is None else names.split(",")
    if wrong := [name for name in wanted if name not in PROVIDERS]:
        raise ValueError(f"--providers must be some of {', '.join(PROVIDERS)}, got {', '.join(map(repr, wrong))}")
    reasons = {name: reason for name in wanted if (reason := PROVIDERS[name].missing(device.type))}
    return [PROVIDERS[name] for name in wanted if name not in reasons], reasons
