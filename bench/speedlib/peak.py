"""The rate of the processor's own units for products, beside that of torch.mm.

A share of torch.mm says how a network compares with what a library reaches in its best case; a share of the units says
how much of the machine is used.
"""

import ctypes
import functools
import time
from pathlib import Path
from typing import Any

import torch

from ldm.errors import ResourceError
from ldm.kernels.build import build

SOURCES = Path(__file__).resolve().parents[1] / "peak"
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp")
KINDS = {torch.float32: 0, torch.bfloat16: 1}
UNITS = {1: "AVX-512", 2: "AVX512-BF16", 3: "AMX"}
SECONDS = 0.2  # of one run
RUNS = 7


@functools.cache
def library() -> ctypes.CDLL:
    """Build the loops, or find them built.

    Raises:
        ResourceError: no compiler, or one that fails.
    """
    found = ctypes.CDLL(str(build(SOURCES, FLAGS, {"-peak": ("-fopenmp",)})[0]))
    found.peak_run.argtypes = [
        ctypes.c_int,
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_double),
    ]
    found.peak_run.restype = ctypes.c_int64
    return found


def measure_unit(dtype: torch.dtype, device: torch.device, seconds: float = SECONDS) -> dict[str, Any]:
    """Measure what products of a dtype reach on torch's number of threads: {"unit", "tflops"}, the best of some runs.

    Returns:
        {"not_measured": why} on other devices, for other dtypes, and where there is no unit or no compiler.
    """
    if device.type != "cpu":
        return {"not_measured": f"no loop for {device.type}"}
    if dtype not in KINDS:
        return {"not_measured": f"no unit for {str(dtype).removeprefix('torch.')}"}
    try:
        found = library()
    except (ResourceError, OSError) as error:
        return {"not_measured": str(error)}
    kind, threads, sink = KINDS[dtype], torch.get_num_threads(), ctypes.c_double()
    unit = found.peak_unit(kind)
    if not unit:
        return {
            "not_measured": "this processor has no AVX-512"
            if kind == 0
            else "this processor has no unit for it"
        }

    def run(times: int) -> tuple[int, float]:
        began = time.perf_counter()
        operations = found.peak_run(kind, times, threads, ctypes.byref(sink))
        return operations * threads, time.perf_counter() - began

    times = 1000
    while (took := run(times)[1]) < seconds / 4:
        times *= 2
    times = max(1, int(times * seconds / took))
    rates = [operations / taken for operations, taken in (run(times) for _ in range(RUNS))]
    return {"unit": UNITS[unit], "tflops": max(rates) / 1e12}
