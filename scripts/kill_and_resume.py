#!/usr/bin/env python3
"""Kill training runs by SIGKILL at random moments, resume them, and compare bits with runs that nothing stopped.

    OMP_NUM_THREADS=1 python scripts/kill_and_resume.py --kills 60

Weights, optimiser, averages, scaler, scores and log must be equal; it ends with an error where they are not.
docs/checkpoints.md has what it gave.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from killing import RUNS, assert_same_runs, kill_and_resume
from toy_data import write_toy_data
from toy_training import train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=60, help="at least so many in all, spread over the runs")
    parser.add_argument("--delay", type=float, default=1.5, help="each falls into so many seconds from a start")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    counts, places, seed = dict.fromkeys(RUNS, 0), {name: set() for name in RUNS}, arguments.seed
    with tempfile.TemporaryDirectory() as folder, tqdm(total=arguments.kills, unit="kill", disable=None) as bar:
        root = write_toy_data(Path(folder) / "data")
        for name, config in RUNS.items():
            train(root, Path(folder) / name, config)
        while sum(counts.values()) < arguments.kills:
            for name, config in RUNS.items():
                seed += 1
                out = Path(folder) / f"{name} {seed}"
                kills, steps = kill_and_resume(root, out, config, seed, arguments.kills // len(RUNS), arguments.delay)
                assert_same_runs(Path(folder) / name, out)
                counts[name] += kills
                places[name] |= steps
                bar.update(kills)
    for name, count in counts.items():
        print(f"{name}: {count} kills; went on at {len(places[name])} different iterations; equal bits")


if __name__ == "__main__":
    main()
