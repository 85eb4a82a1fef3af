"""The files of each runtime, of one exported program; a writer returns what runs its file, where that can be."""

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from . import any_size

Run = Callable[[Tensor], Tensor]  # images -> logits or classes
OPSET = 18  # what ONNX Runtime 1.14 and OpenVINO 2023 read already


def write_onnx(program: ExportedProgram, path: Path, dynamic: bool) -> Run | None:
    """One file; weights beyond 2 GB, which it cannot hold, lie beside it."""
    with _quiet():
        found: Any = torch.onnx.export(
            program,
            (),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=["image"],
            output_names=["output"],
            custom_translation_table=any_size.translations(),
        )
    size = sum(t.nbytes for t in (*program.state_dict.values(), *program.constants.values()) if isinstance(t, Tensor))
    found.save(path, external_data=size > 1.9e9)
    try:
        return onnx_runner(path)
    except ModuleNotFoundError:
        return None


def onnx_runner(path: Path) -> Run:
    """Runs a file by ONNX Runtime on the CPU."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda image: torch.from_numpy(session.run(None, {name: image.numpy()})[0])


def write_openvino(program: ExportedProgram, path: Path, dynamic: bool) -> Run | None:
    """By way of ONNX."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        write_onnx(program, file, dynamic)
        write_openvino_of(file, path)
    return openvino_runner(path)


def write_openvino_of(file: Path, path: Path) -> None:
    """Converts an ONNX file; weights stay as they are, whatever a device computes in."""
    import openvino

    openvino.save_model(openvino.convert_model(file), path, compress_to_fp16=False)


def openvino_runner(path: Path) -> Run:
    """Runs a file by OpenVINO on the CPU, in float32."""
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda image: torch.from_numpy(compiled(image.numpy())[0])


def write_torch_export(program: ExportedProgram, path: Path, dynamic: bool) -> Run:
    """What torch.export.load reads."""
    torch.export.save(program, path)
    return torch.export.load(path).module()


def write_aoti(program: ExportedProgram, path: Path, dynamic: bool) -> Run:
    """What torch._inductor.aoti_load_package, or C++, loads on a machine like this."""
    with torch.no_grad():  # the compiler calls the operators, some of which are for inference
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    loaded: Any = torch._inductor.aoti_load_package(str(path))
    return loaded


def write_coreml(program: ExportedProgram, path: Path, dynamic: bool) -> None:
    """An ML program in float16; only a Mac runs it."""
    import coremltools

    converted = coremltools.convert(program.run_decompositions({}), minimum_deployment_target=coremltools.target.iOS17)
    converted.save(str(path))


WRITERS: dict[str, Callable[[ExportedProgram, Path, bool], Run | None]] = {
    "onnx": write_onnx,
    "openvino": write_openvino,
    "torch-export": write_torch_export,
    "aoti": write_aoti,
    "coreml": write_coreml,
}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter says of packages that are not needed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
