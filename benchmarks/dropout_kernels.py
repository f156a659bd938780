"""Keyed dropout against torch's: forward and backward, interleaved, and the bytes kept in between.

    python benchmarks/dropout_kernels.py

Both are timed in the same rounds. Two ratios of ours to theirs, below 1 is faster than torch: of
the fastest tenth of the rounds (the work alone: other programs add waits, they never take any away)
and the median of each round's own ratio (with whatever else the machine does).
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.dropout.kernels import active_kernel, keyed_attention, keyed_rows
from pipeline.dropout.philox import scale, threshold

RATE = 0.1
SHAPES = {"64 x 768": (64, 1, 768), "1M": (16, 64, 1024), "16M": (128, 128, 1024)}
ATTENTION = (8, 12, 128, 128)
SECONDS = 3.0  # a line of the table
MAX_ROUNDS = 300


def row_tensors(samples: int, positions: int) -> tuple[Tensor, ...]:
    t = threshold(RATE)
    values = (
        torch.tensor(0x0123456789ABCDEF),
        torch.arange(samples)[:, None] + 1000,
        torch.arange(positions),
        torch.tensor(t),
        torch.tensor(scale(t)),
    )
    return tuple(value.expand(samples, positions) for value in values)


def keyed(shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """Our dropout for this shape: its arguments are made once, as a context does for a step."""
    keys, ids, positions, *rest = row_tensors(shape[0], shape[-2])
    if len(shape) == 3:
        return lambda x: keyed_rows(x, keys, ids, positions, *rest)
    columns = torch.arange(shape[3]).expand(shape[0], shape[3])
    return lambda x: keyed_attention(x, keys, ids, positions, columns, *rest)


def stock(x: Tensor) -> Tensor:
    return torch.nn.functional.dropout(x, RATE)


def seconds(dropout: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> float:
    start = time.perf_counter()
    torch.autograd.grad(dropout(x), x, gradient)
    return time.perf_counter() - start


def compare(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[float, float, float]:
    """Seconds of ours and theirs in their fastest tenth, and the median ratio of one round."""
    x = torch.randn(shape).to(dtype).requires_grad_()
    gradient, ours = torch.randn(shape).to(dtype), keyed(shape)
    for dropout in (ours, stock, ours, stock):
        seconds(dropout, x, gradient)
    rounds: list[tuple[float, float]] = []
    end = time.perf_counter() + SECONDS
    while len(rounds) < MAX_ROUNDS and (time.perf_counter() < end or len(rounds) < 5):
        rounds.append((seconds(ours, x, gradient), seconds(stock, x, gradient)))
    mine, torchs = (sorted(column)[len(rounds) // 10] for column in zip(*rounds, strict=True))
    return mine, torchs, statistics.median(a / b for a, b in rounds)


def bytes_kept(dropout: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> int:
    """Bytes of the tensors that autograd holds from forward to backward."""
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(shape, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        dropout(x)
    return sum(storages.values())


def main() -> None:
    print(
        f"Kernel: {active_kernel()}; torch {torch.__version__}; rate {RATE}; forward + backward\n"
    )
    print("| elements | dtype | threads | keyed (us) | torch (us) | ratio | median ratio |")
    print("|---|---|---|---|---|---|---|")
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        for name, shape in {**SHAPES, "attention 8x12x128x128": ATTENTION}.items():
            for dtype in (torch.float32, torch.bfloat16):
                mine, torchs, median = compare(shape, dtype)
                kind = str(dtype).removeprefix("torch.")
                times = f"{mine * 1e6:.0f} | {torchs * 1e6:.0f} | {mine / torchs:.2f}"
                print(f"| {name} | {kind} | {num_threads} | {times} | {median:.2f} |", flush=True)
    print("\n| elements (float32) | kept for backward, keyed | torch |")
    print("|---|---|---|")
    for name, shape in SHAPES.items():
        print(f"| {name} | {bytes_kept(keyed(shape), shape)} B | {bytes_kept(stock, shape)} B |")


if __name__ == "__main__":
    main()
