"""A small list-file data set on disk, and a backbone that trains in milliseconds."""

from pathlib import Path

import cv2
import numpy as np
from torch import Tensor, nn

NAMES = ["red", "green", "blue"]
COLORS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
SIZE = (40, 48)  # height, width


def write_toy_data(root: Path, train: int = 8, val: int = 3) -> Path:
    """Write images of noisy colour blocks whose label is their colour, with the lists, names and colours."""
    rng = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("val", val)):
        lines = []
        for index in range(count):
            label = rng.integers(len(NAMES), size=(2, 2)).astype(np.uint8).repeat(SIZE[0] // 2, 0)
            label = label.repeat(SIZE[1] // 2, 1)
            image = np.clip(np.asarray(COLORS)[label] + rng.normal(0, 30, (*SIZE, 3)), 0, 255).astype(np.uint8)
            label[:2] = 255
            names = f"{split}_{index}.png", f"{split}_{index}_label.png"
            cv2.imwrite(str(root / names[0]), image[..., ::-1])
            cv2.imwrite(str(root / names[1]), label)
            lines.append(" ".join(names))
        (root / f"{split}.txt").write_text("\n".join(lines) + "\n")
    (root / "names.txt").write_text("\n".join(NAMES) + "\n")
    (root / "colors.txt").write_text("".join("{} {} {}\n".format(*color) for color in COLORS))
    return root


class ToyBackbone(nn.Module):
    """Stride 4, 8 channels: the children that a PSPNet needs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer0 = _layer(3, 8, stride=2)
        self.layer1 = _layer(8, 8, stride=2)
        self.layer2, self.layer3, self.layer4 = (_layer(8, 8) for _ in range(3))
        self.out_channels = (8, 8)

    def forward(self, input: Tensor) -> Tensor:
        return self.layer4(self.layer3(self.layer2(self.layer1(self.layer0(input)))))


def _layer(in_channels: int, channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
    )
