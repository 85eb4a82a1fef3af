"""Peak memory and time of predicting one large image under a bound: ``python benchmarks/large_image.py``.

A fresh process, random weights of the demo's network, a drawn image. Exits with 1 if the peak exceeds the bound.
"""

import argparse
import sys
import time

import cv2
import numpy as np
import torch

from pspnet_fast.files import megabytes
from pspnet_fast.inference.memory import fit, measure, parse_bytes, peak_memory
from pspnet_fast.inference.protocol import PRESETS, Protocol
from pspnet_fast.inference.sliding import Segmenter
from pspnet_fast.models import PSPNet
from pspnet_fast.models.small import SmallBackbone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=8192)
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--memory", type=parse_bytes, default=parse_bytes("4G"))
    parser.add_argument("--protocol", choices=PRESETS, default="semseg")
    parser.add_argument("--crop", type=int, default=473, help="of the windows; 0 for none")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0])
    arguments = parser.parse_args()
    crop = (arguments.crop, arguments.crop) if arguments.crop else None
    protocol = Protocol.of(arguments.protocol, crop=crop, scales=tuple(arguments.scales))
    model = PSPNet(arguments.classes, SmallBackbone(), aux=False, head_channels=32).eval()
    blocks = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    image = cv2.resize(blocks, (arguments.side, arguments.side), interpolation=cv2.INTER_NEAREST)
    segmenter = Segmenter(model, arguments.classes, [0.5] * 3, [0.25] * 3, protocol)
    plan = fit(segmenter, measure(segmenter, *image.shape[:2]), 1, *image.shape[:2], arguments.memory)
    start = time.perf_counter()
    plan.segmenter([image])
    seconds, peak = time.perf_counter() - start, peak_memory(torch.device("cpu"))
    print("; ".join(protocol.describe()))
    print(f"{plan.segmenter.batch} windows at a time, estimated {megabytes(plan.device_bytes)} beside image and model")
    print(f"{seconds:.0f} s on {torch.get_num_threads()} threads, peak of the process {megabytes(peak or 0)}")
    sys.exit(peak is None or peak > arguments.memory)


if __name__ == "__main__":
    main()
