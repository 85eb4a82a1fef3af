"""Exported models in OpenVINO and ONNX Runtime: the stock graph against ours, in turn, in one process.

    PYTHONPATH=.:tests python benchmarks/export_speed.py [--runs 15] [--threads 2] [--json FILE]

PSPNet-50, K = 19, 473x473, batch 1, logits at the image's size: "stock" is StockPPM with the concatenated head as
torch.onnx.export writes it, "ours" what pspnet_fast.export writes, "winograd" the same with winograd=True. With
--segformer (of the peers' environment, see fuse_models.py) SegFormer-B2 at 512x512 as well, before and after fuse.
bfloat16 where the processor has it. Medians, and their ratio; the graphs give the same logits, which is checked.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from pspnet_fast import PSPNet, export, fuse
from pspnet_fast.bench.stock import StockPPM
from pspnet_fast.bench.timing import host_seconds
from pspnet_fast.deploy.formats import OPSET
from pspnet_fast.deploy.wrapper import Deployed

CLASSES = 19
GRAPHS = ("stock", "ours", "winograd")


def write_stock(model: nn.Module, example: Tensor, path: Path) -> None:
    """As a user of torch.onnx.export has it."""
    deployed = Deployed(model, argmax=False, normalise=None).eval()
    torch.onnx.export(deployed, (example,), path, dynamo=True, verbose=False, opset_version=OPSET, external_data=False)


def pspnet(backbone: str, example: Tensor, folder: Path) -> None:
    stock, ours = (PSPNet(CLASSES, backbone, head=head, aux=False).eval() for head in ("concat", "fused"))
    ours.load_state_dict(stock.state_dict())
    stock.ppm = StockPPM(stock.ppm)
    write_stock(stock, example, folder / "stock.onnx")
    export(ours, example, path=folder / "ours.onnx")
    export(ours, example, path=folder / "winograd.onnx", winograd=True)


def segformer(example: Tensor, folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from peers import packages

    torch.manual_seed(0)
    model = packages.LARGE["transformers SegFormer-B2"][0]().eval()
    write_stock(model, example, folder / "stock.onnx")
    export(fuse(model, example=example), example, path=folder / "ours.onnx")


def openvino_runner(precision: str, threads: int) -> Callable[[Path], Callable[[Tensor], Tensor]]:
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}

    def load(path: Path) -> Callable[[Tensor], Tensor]:
        compiled = openvino.Core().compile_model(path, "CPU", settings)
        return lambda image: torch.from_numpy(compiled(image.numpy())[0])

    return load


def onnx_runner(threads: int) -> Callable[[Path], Callable[[Tensor], Tensor]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or the last one's threads are in the way

    def load(path: Path) -> Callable[[Tensor], Tensor]:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda image: torch.from_numpy(session.run(None, {name: image.numpy()})[0])

    return load


def has_bfloat16() -> bool:
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def compare(title: str, folder: Path, example: Tensor, arguments: argparse.Namespace) -> list[dict[str, object]]:
    """A row for each runtime."""
    runtimes = {
        "OpenVINO float32": openvino_runner("f32", arguments.threads),
        "ONNX Runtime float32": onnx_runner(arguments.threads),
    }
    if has_bfloat16():
        runtimes["OpenVINO bfloat16"] = openvino_runner("bf16", arguments.threads)
    rows = []
    for name, load in runtimes.items():
        graphs = [which for which in GRAPHS if (folder / f"{which}.onnx").exists()]
        if "float32" not in name and "winograd" in graphs:  # it loses too much there
            graphs.remove("winograd")
        runs = [load(folder / f"{which}.onnx") for which in graphs]
        outputs = [run(example) for run in runs]
        rounds = [[host_seconds(partial(run, example)) for run in runs] for _ in range(arguments.runs)]
        seconds = [statistics.median(column) for column in zip(*rounds, strict=True)]
        for which, output, after in list(zip(graphs, outputs, seconds, strict=True))[1:]:
            difference = ((output - outputs[0]).abs().max() / outputs[0].abs().max()).item()
            row = {"model": title, "runtime": name, "graph": which, "stock": seconds[0], "ours": after}
            rows.append(row | {"ratio": after / seconds[0], "difference": difference})
            print(
                f"| {title} | {name} | {which} | {seconds[0] * 1e3:.0f} ms | {after * 1e3:.0f} ms | "
                f"{after / seconds[0]:.3f} | {difference:.0e} |",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15, help="of each graph, of which the median counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, default=473, help="of the image for PSPNet")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--segformer", action="store_true", help="SegFormer-B2 as well; needs transformers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the times there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        "| model | runtime | graph | stock | ours | ratio | difference |",
        "|---|---|---|---:|---:|---:|---:|",
        sep="\n",
        flush=True,
    )
    rows = []
    with tempfile.TemporaryDirectory() as name:
        example = torch.randn(1, 3, arguments.size, arguments.size)
        pspnet(arguments.backbone, example, Path(name))
        title = f"PSPNet, {arguments.backbone}, {arguments.size}x{arguments.size}"
        rows += compare(title, Path(name), example, arguments)
    if arguments.segformer:
        with tempfile.TemporaryDirectory() as name:
            example = torch.randn(1, 3, 512, 512)
            segformer(example, Path(name))
            rows += compare("SegFormer-B2, 512x512", Path(name), example, arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
