"""A small list-file data set on disk."""

from pathlib import Path

import cv2
import numpy as np

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
