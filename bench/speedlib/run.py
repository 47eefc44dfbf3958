"""One row from beginning to end: reference, gate, interleaved rounds, and what they say."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.speedlib import gate, models
from bench.speedlib.contestants import Contestant
from bench.speedlib.rows import BASELINE, HAS_DIFFUSERS, OURS, PEERS, PROCESSES, THEIRS, Row
from bench.speedlib.studio import Studio
from bench.speedlib.timing import Figures, compare, count_launches, count_syncs, interleave, spread
from ldm.cli import printable
from ldm.errors import MismatchError

logger = logging.getLogger("ldm.bench")

PICTURES = ("image", "cold-start", "memory")  # parts whose answers are pictures


@dataclass(frozen=True)
class Effort:
    """How much measuring a row gets: see timing.interleave."""

    repeats: int
    warmup: int
    budget: float


def run_row(
    studio: Studio,
    row: Row,
    wanted: Sequence[str],
    effort: Effort,
    gemm: float | None = None,
    unit: float | None = None,
) -> dict[str, Any]:
    """Measure one row: whoever cannot run is left out with the reason, who answers wrongly is not timed.

    Args:
        wanted: contestants, in the order of a round.
        gemm, unit: TFLOP/s in the row's dtype of torch.mm and of the processor's own units, for efficiency.
    """
    names = [name for name in wanted if name in row.contestants]
    reference = studio.reference(row)
    busy = os.getloadavg()[0]
    result: dict[str, Any] = {"merit": row.merit, "contestants": {}, "left_out": {}, "ratios": {}}
    warmup = effort.warmup
    if row.part in PROCESSES:
        # Nothing warms up but the page cache, and the gate has seen to that, if there is one.
        warmup = min(warmup, 1 if reference is None else 0)
    with studio.open(row) as build:
        admitted = _admit(studio, row, names, build, reference, result)
        running = {name: one.measure for name, one in admitted.items()}
        figures = interleave(running, repeats=effort.repeats, warmup=warmup, budget=effort.budget)
        if studio.device.type == "cuda" and row.part not in PROCESSES:
            kind, count = ("syncs", count_syncs) if row.part == "image" else ("launches", count_launches)
            for name, one in admitted.items():
                result["contestants"][name][kind] = count(one.call)
    result["load_average"] = [round(busy, 2), round(os.getloadavg()[0], 2)]
    _add_figures(result, row, figures)
    if row.part not in PROCESSES and HAS_DIFFUSERS:  # whose graph is counted
        result["flop"] = models.count_flop(studio.shape, row.part, row.batch, px=row.px, steps=row.steps)
        _add_efficiency(result, figures, {"gemm": gemm, "unit": unit})
    return result


def _admit(
    studio: Studio,
    row: Row,
    names: Sequence[str],
    build: Callable[[str], Contestant],
    reference: Tensor | None,
    result: dict[str, Any],
) -> dict[str, Contestant]:
    """Build the contestants, hold them to the gate and write its verdicts down; return who may run."""
    half = row.dtype not in ("", "float32")
    yardstick: float | None = None
    if reference is not None and half and BASELINE not in names:
        yardstick = gate.relative_errors(studio.answer(BASELINE, row), reference)[1]
    admitted: dict[str, Contestant] = {}
    verdicts: dict[str, Any] = {}
    # The yardstick is asked first, whoever begins a round.
    for name in sorted(names, key=lambda name: name != BASELINE):
        try:
            one = build(name)
            verdict = None
            if reference is not None:
                if half and name in OURS and name != BASELINE and yardstick is None:
                    raise MismatchError(f"{BASELINE} gave no answer to measure our error by")
                verdict = gate.judge(
                    one.answer(),
                    reference,
                    getattr(torch, row.dtype),
                    pictures=row.part in PICTURES,
                    yardstick=yardstick if name in OURS else None,
                )
        except Exception as error:  # a rival's failure, ours, or the memory's: the others still run
            result["left_out"][name] = _reason(row, error)
            continue
        if name == BASELINE and half and verdict is not None:
            yardstick = verdict.rms_error
        if verdict is None or verdict.passed:
            admitted[name] = one
        verdicts[name] = {"gate": verdict and verdict.as_dict(), **one.notes}
    result["contestants"] = {name: verdicts[name] for name in names if name in verdicts}
    return {name: admitted[name] for name in names if name in admitted}


def unable(row: Row, wanted: Sequence[str], error: Exception) -> dict[str, Any]:
    """Make the result of a row that broke off: everybody is left out for the same reason."""
    reason = _reason(row, error)
    left_out = {name: reason for name in wanted if name in row.contestants}
    return {"merit": row.merit, "contestants": {}, "left_out": left_out, "ratios": {}}


def _reason(row: Row, error: Exception) -> str:
    logger.debug("in %s", row.key, exc_info=error)
    return printable(f"{type(error).__name__}: {error}", limit=200)


def _add_figures(result: dict[str, Any], row: Row, figures: dict[str, list[Figures]]) -> None:
    """Describe each figure of each contestant, and hold theirs against ours."""
    merits = {name: [run[row.merit] for run in runs] for name, runs in figures.items()}
    for name, runs in figures.items():
        one = result["contestants"][name]
        one["figures"] = {figure: spread([run[figure] for run in runs]) for figure in runs[0]}
        one["runs"] = merits[name]
    pairs = [(other, our) for our in OURS for other in (*THEIRS, *PEERS, *OURS) if other != our]
    for other, our in pairs:
        if other in merits and our in merits:
            result["ratios"][f"{other} / {our}"] = compare(merits[other], merits[our])


def _add_efficiency(
    result: dict[str, Any], figures: dict[str, list[Figures]], rates: dict[str, float | None]
) -> None:
    """Say which share of each rate the reference graph's arithmetic makes in each contestant's time."""
    result["peak_tflops"] = {kind: rate for kind, rate in rates.items() if rate is not None}
    for name in figures:
        one = result["contestants"][name]
        done = result["flop"] / one["figures"]["seconds"]["median"]
        one["efficiency"] = {kind: done / (rate * 1e12) for kind, rate in result["peak_tflops"].items()}
