"""How evenly two threads share each operator on a CPU: on a busy machine the only figure of it that counts.

    OMP_WAIT_POLICY=passive PYTHONPATH=. python benchmarks/threads.py [--calls N]

For each operator on maps of 60x60 at batch 2: one thread's processor time of a call; with two threads, that of the
one that has more to do, threads that wait asleep; their ratio, which is what two idle cores would gain; and the time of
both threads over that of the busier, which is 2 where they share evenly, also where each slows down the other. Times
are the tenth quantile of all calls, in milliseconds, the share is their median.
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterator
from functools import partial

import torch

from pspnet_fast.bench import loss, ops
from pspnet_fast.bench.cases import Step, maps

CPU = torch.device("cpu")


def cases() -> Iterator[tuple[str, partial[Step]]]:
    """Each operator's name and how to make its step."""
    for map in maps(CPU, (2, 2048, 60, 60)):
        for direction in ops.DIRECTIONS:
            yield f"pyramid_pool {map} {direction}", partial(ops._pool, map, direction)
            yield f"pyramid_upsample_concat_ {map} {direction}", partial(ops._upsample_concat, map, direction)
    for map in maps(CPU, (2, 512, 60, 60)):
        for direction in ops.DIRECTIONS:
            yield f"pyramid_context_ {map} {direction}", partial(ops._context, map, direction)
    for dtype in ops.DTYPES:
        for direction in ops.DIRECTIONS:
            yield f"pyramid_reduce {dtype} {direction}", partial(ops._reduce, 2, 2048, dtype, direction)
            for layout in ops.LAYOUTS:
                split = partial(ops._split_weight, (512, 4096, 3, 3), dtype, layout, direction)
                yield f"pyramid_split_weight {dtype} {layout} {direction}", split
        yield f"pyramid_batch_norm {dtype}", partial(ops._batch_norm, 2, 2048, dtype)
    for map in maps(CPU, (2, 19, 60, 60)):
        yield f"upsample_argmax {map}", partial(ops._argmax, map, (473, 473), False)
        yield f"upsample_softmax_accumulate_ {map}", partial(ops._accumulate, map, (473, 473))
        yield f"upsample_cross_entropy {map}", partial(loss._cross_entropy, map, (473, 473), True)
    yield "confusion_matrix", partial(ops._confusion, 19, 473)


def measure(step: Step, threads: int, calls: int) -> tuple[float, float]:
    """The seconds of the thread that has most to do, and how many such threads' time all take together."""
    torch.set_num_threads(threads)
    found, shares = [], []
    for _ in range(calls + 2):
        step.setup()
        own, all_ = time.thread_time(), time.process_time()
        step.call()
        own, all_ = time.thread_time() - own, time.process_time() - all_
        found.append(max(own, all_ - own))
        shares.append(all_ / found[-1])
    return sorted(found[2:])[calls // 10], statistics.median(shares[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20, help="of each, with one thread and with two (default: 20)")
    calls = parser.parse_args().calls
    if os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive":
        parser.error("OMP_WAIT_POLICY must be passive, or waiting counts as work")
    print("one thread ms, two threads ms, ratio, share, case")
    for name, make in cases():
        step = make(CPU, True, lambda function: function)
        (one, _), (two, share) = (measure(step, threads, calls) for threads in (1, 2))
        print(f"{1e3 * one:9.3f} {1e3 * two:9.3f} {one / two:6.2f} {share:6.2f}  {name}", flush=True)


if __name__ == "__main__":
    main()
