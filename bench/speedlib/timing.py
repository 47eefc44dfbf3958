"""Time and its arithmetic: clocks, interleaved rounds, medians with their spread, and ratios over the rounds."""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

ENOUGH = 3  # rounds that a row has at least, whatever its budget says, unless fewer were asked for

Figures = dict[str, float]  # what one run of one contestant gives: "seconds" and whatever else was read off


def interleave(
    contestants: Mapping[str, Callable[[], Figures]],
    *,
    repeats: int,
    warmup: int = 0,
    budget: float = float("inf"),
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[Figures]]:
    """Run all contestants in turn, A B A B, `repeats` rounds after `warmup` rounds that are thrown away.

    A machine's speed drifts by more than the differences that matter; within a round it hardly does.

    Args:
        budget: seconds from the first round that counts, after which no new one is begun once there are
            min(repeats, ENOUGH).

    Returns:
        the figures of each, round by round, as many for one as for another.
    """
    for _ in range(warmup):
        for run in contestants.values():
            run()
    figures: dict[str, list[Figures]] = {name: [] for name in contestants}
    began = clock()
    for done in range(repeats):
        if done >= ENOUGH and clock() - began >= budget:
            break
        for name, run in contestants.items():
            figures[name].append(run())
    return figures


def spread(values: Sequence[float]) -> dict[str, float]:
    """Describe a sample by its five numbers, quartiles interpolated linearly, and its size."""
    low, q1, median, q3, high = np.quantile(
        np.asarray(values, dtype=np.float64), (0, 0.25, 0.5, 0.75, 1)
    ).tolist()
    return {"min": low, "q1": q1, "median": median, "q3": q3, "max": high, "n": len(values)}


def compare(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """Say how many times as much theirs is as ours: the ratio of medians, and the spread of the rounds' ratios.

    Args:
        theirs, ours: of the same rounds, in their order.
    """
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    return {"of_medians": spread(theirs)["median"] / spread(ours)["median"], "rounds": spread(ratios)}


# --- clocks -------------------------------------------------------------------------------------------


def clocked(call: Callable[[], Any], device: torch.device) -> Figures:
    """Time one call: wall clock to the end of the device's work, and on CUDA the device's own clock beside it."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return {"seconds": time.perf_counter() - began}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    began = time.perf_counter()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "device_seconds": start.elapsed_time(end) / 1e3}


def count_launches(call: Callable[[], Any]) -> int:
    """Count what one call sends to the GPU: kernels and whole graphs, each for one."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    launches = ("LaunchKernel", "GraphLaunch")  # cudaLaunchKernel, cuLaunchKernelEx, cudaGraphLaunch, ...
    return sum(event.count for event in seen.key_averages() if any(name in event.key for name in launches))


def count_syncs(call: Callable[[], Any]) -> int:
    """Count how often one call lets the CPU wait for the GPU, as torch's sync debug mode sees it."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in seen)


# --- what the machine can do at best ------------------------------------------------------------------

GEMM_SIDE = {"cpu": 2048, "cuda": 4096}
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}  # beyond any cache
PEAK_RUNS = {"cpu": 7, "cuda": 30}


def measure_gemm(dtype: torch.dtype, device: torch.device, side: int | None = None) -> Figures:
    """Measure the rate of a square matrix product, in TFLOP/s: the best of some runs, and their median."""
    side = side or GEMM_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds = _runs(lambda: torch.mm(a, b, out=out), device)
    return {
        "side": side,
        "tflops": 2e-12 * side**3 / min(seconds),
        "median": 2e-12 * side**3 / float(np.median(seconds)),
    }


def measure_copy(device: torch.device, size: int | None = None) -> Figures:
    """Measure how fast memory is copied, in GB/s read and written, the best of some runs and their median."""
    size = size or COPY_BYTES[device.type]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _runs(lambda: target.copy_(source), device)
    return {
        "bytes": size,
        "gbps": 2e-9 * size / min(seconds),
        "median": 2e-9 * size / float(np.median(seconds)),
    }


def _runs(call: Callable[[], Any], device: torch.device) -> list[float]:
    for _ in range(2):
        call()
    runs = [clocked(call, device) for _ in range(PEAK_RUNS[device.type])]
    return [run.get("device_seconds", run["seconds"]) for run in runs]


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch compute with so many threads, and put its own number back; None changes nothing."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
