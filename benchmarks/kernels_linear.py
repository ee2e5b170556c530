"""The native linear layer against torch's own: `python benchmarks/kernels_linear.py`.

Both sides run in turn in one process, each call on the next of several copies of the weight, so that weights come
from memory as they do in a model. Time is the best of many calls. torch rounds the activations to the weight's dtype,
the native layer keeps them in float32.

`--threads 1` measures processor time instead of elapsed time and so bears a busy machine.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from sagellm_backend.cpu.native import NativeOps, supported_isas

# (N, K): gate and up, down and fused q, k, v of a 0.5 B model; a square one of a 7 B model
SHAPES = [(9728, 896), (896, 4864), (1152, 896), (4096, 4096)]
WORKING_SET = 100 << 20  # bytes of weight to go round: more than the last-level cache holds


def best_seconds(calls: dict[str, Callable[[int], object]], seconds: float, clock: Callable[[], float]) -> list[float]:
    """The shortest call of each, called in turn with a running number until the time is over."""
    best = dict.fromkeys(calls, float("inf"))
    end = time.perf_counter() + seconds
    for number in itertools.count():
        for name, call in calls.items():
            start = clock()
            call(number)
            best[name] = min(best[name], clock() - start)
        if number >= 3 and time.perf_counter() > end:
            return list(best.values())
    raise AssertionError("unreachable")


def compare(ops: NativeOps, n: int, k: int, dtype: torch.dtype, rows: list[int], args: argparse.Namespace) -> None:
    """One line for each number of rows."""
    copies = max(2, WORKING_SET // (n * k * dtype.itemsize))
    weights = [torch.randn(n, k).to(dtype) for _ in range(copies)]
    packed = [ops.pack_linear(weight) for weight in weights]
    clock = time.thread_time if args.threads == 1 else time.perf_counter
    for m in rows:
        x = torch.randn(m, k)
        narrow = x.to(dtype)

        def native(i: int, x: Tensor = x) -> Tensor:
            return ops.linear(x, packed[i % copies])

        def plain(i: int, x: Tensor = narrow) -> Tensor:
            return torch.nn.functional.linear(x, weights[i % copies])

        ours, theirs = best_seconds({"native": native, "torch": plain}, args.seconds, clock)
        rate, bandwidth = 2 * m * n * k / ours / 1e9, n * k * dtype.itemsize / ours / 1e9
        print(
            f"{n:5} x {k:4} {str(dtype).removeprefix('torch.'):8} m={m:<4}"
            f" {ours * 1e3:9.3f} ms {rate:6.1f} GFLOP/s {bandwidth:5.1f} GB/s"
            f"   torch {theirs * 1e3:9.3f} ms   {theirs / ours:5.2f} x",
            flush=True,
        )


def main() -> None:
    """Print a table for the shapes and rows asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="1,2,4,8,16,32,128,512", help="rows of x, separated by commas")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="of the weights, separated by commas")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.5, help="for each line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    isas = supported_isas()
    ops = NativeOps(len(isas) - 1)
    print(f"native[{ops.name}] and torch {torch.__version__}, {args.threads} threads")
    for (n, k), dtype in itertools.product(SHAPES, args.dtypes.split(",")):
        compare(ops, n, k, getattr(torch, dtype), [int(m) for m in args.rows.split(",")], args)


if __name__ == "__main__":
    main()
