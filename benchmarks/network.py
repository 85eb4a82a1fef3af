"""PSPNet-50 as a whole: the training step and prediction of pspnet_fast/bench/network.py, as network.json of a GPU.

    PYTHONPATH=. python benchmarks/network.py [--json FILE] [--compile]

"stock" is plain torch, "fused" this package; --compile adds torch.compile of both.
"""

import argparse
import json
import re
from pathlib import Path

from cases_of import DEVICE
from tables import network_report

from pspnet_fast.bench.cases import all_cases
from pspnet_fast.bench.providers import chosen_providers
from pspnet_fast.bench.record import machine
from pspnet_fast.bench.runner import Options, Run

IMPLEMENTATIONS = {"eager": "stock", "ours": "fused", "compile": "stock, compiled", "ours-compile": "fused, compiled"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything to FILE")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of both: minutes more")
    args = parser.parse_args()
    names = list(IMPLEMENTATIONS)[: 4 if args.compile else 2]
    run = Run(DEVICE, *chosen_providers(",".join(names), DEVICE), True, Options(most=12))
    rows = []
    for case in all_cases(DEVICE):
        if case.group != "network":
            continue
        batch = int(re.findall(r"batch (\d+)", case.name)[0])
        for name, result in run.measure(case)["providers"].items():
            row = {"case": case.name, "batch": batch, "implementation": IMPLEMENTATIONS[name]}
            if "median" not in result:
                print(f"{case.name}, {name}: {result['error']}", flush=True)
                continue
            replays = DEVICE.type == "cuda" and batch == 1  # allocate nothing
            rows.append(row | {"seconds": result["median"], "bytes": 0 if replays else result.get("peak_bytes", 0)})
            print(f"{case.name}, {name}: {result['median'] * 1e3:.1f} ms", flush=True)
    print(f"\n{network_report(rows)}")
    if args.json:
        text = json.dumps({"machine": machine(DEVICE), "rows": rows}, indent=1) + "\n"
        args.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
