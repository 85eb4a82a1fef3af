"""The tests that an installed package passes with torch, click, numpy and pytest alone, away from its sources.

usage: python scripts/installed_tests.py FOLDER   copies the tests there, away from the checkout, whose package would be
imported instead, and prints their files
"""

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
OPERATORS = ("test_pyramid_*.py", "test_upsample_*.py", "test_confusion_matrix.py")
ABOVE = ("test_modules.py", "test_head*.py", "test_losses.py", "test_region_losses.py", "test_portable.py")
ABOVE += ("test_derivatives*.py", "test_functional_transforms.py", "test_batch_invariance.py", "test_fuse*.py")
ON_CPU = "not cuda"  # by name: neither on a GPU nor the CUDA sources on the CPU
WITHOUT_COMPILER = f"{ON_CPU} and not compile"  # which torch.compile needs


def files(patterns: tuple[str, ...] = OPERATORS + ABOVE) -> list[str]:
    """Their names in tests/."""
    return sorted({path.name for pattern in patterns for path in (ROOT / "tests").glob(pattern)})


def copy(folder: Path) -> None:
    """All of tests/*.py, for they share much."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in (ROOT / "tests").glob("*.py"):
        shutil.copy(path, folder)


if __name__ == "__main__":
    copy(Path(sys.argv[1]))
    print(*files())
