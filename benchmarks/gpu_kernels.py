"""Keyed dropout on a GPU: its bits against the CPU's, its time against torch's and against a copy.

    python benchmarks/gpu_kernels.py

Times are medians of forward and backward together, interleaved, each after the cache was flushed.
Keyed dropout moves four times the tensor (reads and writes, forward and backward), a copy twice:
`of copy` is the share of the measured copy bandwidth that keyed dropout reaches.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pipeline.dropout.kernels import active_kernel, attention, keyed_attention, keyed_rows, rows
from pipeline.dropout.kernels.flash import flash_attention
from pipeline.dropout.philox import scale, threshold

RATE = 0.1
NUM_ROUNDS = 60
FLUSHED_BYTES = 1 << 30  # more than any cache; writing it also hides the time of the launches
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ROWS = (128, 128, 1024)
SMALL = (8, 64, 768)
ATTENTION = (16, 16, 256, 256)
Dropout = Callable[[Tensor], Tensor]


def row_tensors(samples: int, length: int, device: str) -> tuple[Tensor, ...]:
    t = threshold(RATE)
    values = (
        torch.tensor(0x0123456789ABCDEF),
        torch.arange(samples)[:, None] + 1000,
        torch.arange(length),
        torch.tensor(t),
        torch.tensor(scale(t)),
    )
    return tuple(value.to(device).expand(samples, length) for value in values)


def columns_of(shape: tuple[int, ...], padding: str, device: str) -> Tensor:
    """Key positions: none padded, or every sample by another length."""
    samples, num_keys = shape[0], shape[-1]
    positions, lengths = torch.arange(num_keys), num_keys - 5 * torch.arange(samples)[:, None]
    if padding == "left":
        return (positions - (num_keys - lengths)).clamp(min=0).to(device)
    kept = torch.minimum(positions, lengths - 1) if padding == "right" else positions
    return kept.to(device).expand(samples, num_keys)


def keyed(shape: tuple[int, ...], padding: str = "", group: int = 1) -> Dropout:
    """Our dropout for this shape: its arguments are made once, as a context does for a step."""
    row = row_tensors(shape[0], shape[-2], "cuda")
    if len(shape) == 3:
        return lambda x: keyed_rows(x, *row, group)
    columns = columns_of(shape, padding, "cuda")
    return lambda x: keyed_attention(x, *row[:3], columns, *row[3:])


def stock(x: Tensor) -> Tensor:
    return torch.nn.functional.dropout(x, RATE)


def same_bits(dtype: torch.dtype) -> bool:
    """Whether rows and attention equal the CPU kernel's, each value bit for bit."""
    x, scores = torch.randn(7, 33, 1000).to(dtype), torch.randn(7, 3, 33, 100).to(dtype)
    on_cpu, on_gpu = row_tensors(7, 33, "cpu"), row_tensors(7, 33, "cuda")
    equal = all(
        rows(x, *on_cpu, group).equal(rows(x.cuda(), *on_gpu, group).cpu())
        for group in (1, 3, 4, 16, 1000)
    )
    for padding in ("", "left", "right"):
        columns = columns_of(tuple(scores.shape), padding, "cpu")
        expected = attention(scores, *on_cpu[:3], columns, *on_cpu[3:], head_offset=5)
        masked = attention(scores.cuda(), *on_gpu[:3], columns.cuda(), *on_gpu[3:], head_offset=5)
        equal = equal and masked.cpu().equal(expected)
    return equal


def medians(works: list[Callable[[], object]]) -> list[float]:
    """Seconds of each piece of work on the GPU."""
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    times: list[list[float]] = [[] for _ in works]
    for round_number in range(NUM_ROUNDS + 5):
        for work, seconds in zip(works, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flushed.zero_()
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            if round_number >= 5:
                seconds.append(start.elapsed_time(end) / 1e3)
    return [statistics.median(seconds) for seconds in times]


def line(name: str, shape: tuple[int, ...], dtype: torch.dtype, ours: Dropout) -> str:
    x = torch.randn(shape, device="cuda").to(dtype).requires_grad_()
    gradient, target = torch.randn_like(x), torch.empty_like(x)
    mine, torchs, copy = medians(
        [
            lambda: torch.autograd.grad(ours(x), x, gradient),
            lambda: torch.autograd.grad(stock(x), x, gradient),
            lambda: target.copy_(gradient),
        ]
    )
    size = x.numel() * x.element_size()
    cells = f"{mine * 1e6:.0f} | {torchs * 1e6:.0f} | {mine / torchs:.2f}"
    speed = f"{4 * size / mine / 1e9:.0f} | {2 * size / copy / 1e9:.0f} | {2 * copy / mine:.0%}"
    return f"| {name} | {str(dtype).removeprefix('torch.')} | {cells} | {speed} |"


def launch_microseconds(dropout: Dropout) -> float:
    """What the processor spends on one small forward and backward, in the fastest tenth."""
    x = torch.randn(SMALL, device="cuda", requires_grad=True)
    gradient, times = torch.randn_like(x), []
    for _ in range(300):
        torch.cuda.synchronize()
        start = time.perf_counter()
        torch.autograd.grad(dropout(x), x, gradient)
        times.append(time.perf_counter() - start)
    return sorted(times)[30] * 1e6


def attentions(heads: int, length: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Forward and backward of whole attention: fused, by keyed probabilities, torch's own two."""
    shape = (16, heads, length, 64)
    q, k, v, gradient = (torch.randn(shape, device="cuda").to(dtype) for _ in range(4))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    row, columns = row_tensors(16, length, "cuda"), columns_of((16, length), "", "cuda")
    coordinates = (*row[:3], columns, *row[3:])

    def by_probabilities(dropout: Dropout) -> Tensor:
        return dropout(torch.softmax(q @ k.mT * 0.125, -1)) @ v

    sdpa = torch.nn.functional.scaled_dot_product_attention
    ways: dict[str, Callable[[], Tensor]] = {
        "fused": lambda: flash_attention(q, k, v, None, coordinates, 0.125),
        "keyed": lambda: by_probabilities(lambda p: keyed_attention(p, *coordinates)),
        "eager": lambda: by_probabilities(stock),
        "sdpa": lambda: sdpa(q, k, v, dropout_p=RATE),
    }
    works = {name: partial(_backward, way, (q, k, v), gradient) for name, way in ways.items()}
    error = (ways["fused"]() - ways["keyed"]()).abs().max()
    print(f"Largest difference of fused and keyed: {float(error):.2e}")
    return works


def _backward(way: Callable[[], Tensor], inputs: tuple[Tensor, ...], gradient: Tensor) -> None:
    torch.autograd.grad(way(), inputs, gradient)


def main() -> None:
    if not torch.cuda.is_available():
        print("There is no CUDA device here: run this where torch.cuda.is_available() is true.")
        return
    name, kernel = torch.cuda.get_device_name(), active_kernel("cuda:0")
    print(f"Card: {name}; kernel: {kernel}; torch {torch.__version__}; rate {RATE}\n")
    for dtype in DTYPES:
        print(f"Bits equal to {active_kernel()} in {dtype}: {same_bits(dtype)}")
    print("\n| work | dtype | keyed (us) | torch (us) | ratio | keyed GB/s | copy GB/s | of copy |")
    print("|---|---|---|---|---|---|---|---|")
    for dtype in DTYPES:
        print(line("rows 16M", ROWS, dtype, keyed(ROWS)), flush=True)
        print(line("rows 16M, token", ROWS, dtype, keyed(ROWS, group=1024)), flush=True)
        for padding in ("", "left", "right"):
            what = f"attention 16M, {padding or 'no'} padding"
            print(line(what, ATTENTION, dtype, keyed(ATTENTION, padding)), flush=True)
    print("\n| attention, 16 samples of 64 features | dtype | fused, keyed, eager, sdpa (us) |")
    for heads, length in ((12, 128), (12, 512), (16, 2048)):
        for dtype in DTYPES:
            times = medians(list(attentions(heads, length, dtype).values()))
            shown = ", ".join(f"{seconds * 1e6:.0f}" for seconds in times)
            print(f"| {heads} heads, {length} positions | {dtype} | {shown} |", flush=True)
    mine, torchs = launch_microseconds(keyed(SMALL)), launch_microseconds(stock)
    print(
        f"\nHost time of one small forward and backward: keyed {mine:.0f} us, torch {torchs:.0f} us"
    )


if __name__ == "__main__":
    main()
