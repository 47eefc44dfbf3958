"""The speed table: ours, plain and with its kernels, against diffusers, as it comes and at its strongest.

One process, identical weights (made up, in the geometry of a real model) and identical inputs. Nobody is timed whose
answer is wrong; then the contestants of a row run in turn, A B A B. Each finished row is saved at once; a second run
does what is missing.

    python bench/speed.py                                       # everything; days on a small CPU, so choose:
    python bench/speed.py --short                               # within ten minutes on two quiet cores
    python bench/speed.py --list
    python bench/speed.py --rows 'unet/*' 'image/20-b1/*' --dtypes bfloat16 --compile
    python bench/speed.py --short --peers openvino              # beside one that is not diffusers
    python bench/speed.py --device cuda

How it is measured, part by part, is in bench/speedlib/: what (rows.py), on which networks (models.py), who runs
(contestants.py, studio.py, peers.py, training.py, process.py), what is wrong (gate.py), clocks and ratios
(timing.py), what the processor's units reach (peak.py), one row from beginning to end (run.py), the files (report.py).
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the tests have the means to make weights up

from bench.quality import choose_rows  # noqa: E402
from bench.speedlib import rows as table  # noqa: E402
from ldm import cli  # noqa: E402
from ldm.errors import AbsentError, UsageError  # noqa: E402

if TYPE_CHECKING:
    import torch

    from bench.speedlib.rows import Row
    from bench.speedlib.run import Effort

MODELS = ("v1", "shapes", "tiny")
# --repeats, --warmup, --budget where they are not given.
EFFORT = {"cpu": (5, 1, 300.0), "cuda": (20, 5, 120.0), "short": (3, 0, 60.0)}
SHORT_DTYPES = ("float32", "bfloat16")


def make_parser() -> cli.Parser:
    parser = cli.Parser(description="Measure speed and memory side by side with diffusers.")
    what = parser.add_argument_group("what to measure")
    what.add_argument("--model", choices=MODELS, default="v1", help="geometry; v1 is Stable Diffusion's")
    what.add_argument("--device", default="auto", help="cpu, cuda or auto")
    what.add_argument(
        "--dtypes", nargs="+", choices=table.DTYPES, help="default: all; with --short the first two"
    )
    what.add_argument(
        "--contestants", nargs="+", choices=table.CONTESTANTS, help="default: all that there are"
    )
    what.add_argument(
        "--peers",
        nargs="*",
        choices=table.PEERS,
        help="also OpenVINO and diffusers by torch.compile with frozen weights, minutes to compile; without "
        "names both",
    )
    what.add_argument("--rows", nargs="+", metavar="PATTERN", help="only rows that match, e.g. 'unet/b2/*'")
    what.add_argument(
        "--compile",
        action="store_true",
        help="rows in which ldm-kernels and diffusers-best are compiled; they stand beside the others",
    )
    what.add_argument(
        "--short", action="store_true", help="few rows, few repeats: within 10 minutes on 2 cores"
    )
    what.add_argument(
        "--list", action="store_true", help="list the rows, and the arithmetic of each, and end"
    )
    how = parser.add_argument_group("how")
    how.add_argument("--repeats", type=cli.integer(1, 10_000), help="rounds of each row")
    how.add_argument("--warmup", type=cli.integer(0, 10_000), help="rounds before them, after the gate's")
    how.add_argument(
        "--budget",
        type=cli.number(0, 1e6),
        help="seconds after which a row that has three rounds begins no more",
    )
    how.add_argument("--threads", type=cli.integer(1, 1024), help="CPU threads (default: torch's choice)")
    how.add_argument(
        "--results", type=Path, help="JSON file; .md goes beside it (default: bench/results/speed-<machine>)"
    )
    how.add_argument(
        "--fresh", action="store_true", help="measure the chosen rows again, whatever --results holds"
    )
    return parser


def choose(opt: Any, px: int, device: str) -> list["Row"]:
    """List the rows that the options ask for.

    Raises:
        UsageError: a pattern that no row matches.
    """
    dtypes = opt.dtypes or (SHORT_DTYPES if opt.short else table.DTYPES)
    rows = table.all_rows(px, device, [name for name in table.DTYPES if name in dtypes], opt.compile)
    patterns = opt.rows
    if opt.short and patterns is None:
        patterns = [f"{pattern}/compiled" if opt.compile else pattern for pattern in table.SHORT]
        patterns = [pattern for pattern in patterns if _matches(rows, pattern)]
    return choose_rows(rows, patterns)


def _matches(rows: list["Row"], pattern: str) -> bool:
    from fnmatch import fnmatchcase

    return any(fnmatchcase(row.key, pattern) for row in rows)


def choose_contestants(asked: list[str] | None, peers: Sequence[str] | None = None) -> list[str]:
    """List who runs; without kernels in this ldm, those who need them do not, and the user is told.

    Args:
        peers: as --peers has them: None or names; an empty list stands for all.

    Raises:
        UsageError: only such were asked for.
    """
    from bench.speedlib.process import need_kernels

    names = [name for name in table.CONTESTANTS if not asked or name in asked]
    if "ldm-kernels" in names:
        try:
            need_kernels()
        except UsageError as error:
            names.remove("ldm-kernels")
            if not names:
                raise
            cli.say(f"ldm-kernels is left out: {error}")
    chosen = [name for name in table.PEERS if peers is not None and name in (peers or table.PEERS)]
    if "openvino" in chosen:
        from bench.speedlib.peers import need_openvino

        try:
            need_openvino()
        except AbsentError as error:
            chosen.remove("openvino")
            cli.say(f"openvino is left out: {error}")
    return names + chosen


def list_rows(rows: list["Row"], shape: Any) -> None:
    """Print each row's key with the TFLOP of one run of one contestant."""
    from bench.speedlib.models import count_flop

    for row in rows:
        work = ""
        if row.part not in table.PROCESSES:
            flop = count_flop(shape, row.part, row.batch, px=row.px, steps=row.steps)
            work = f"{flop / 1e12:12.4g} TFLOP"
        cli.say(f"{row.key:<36}{work}".rstrip())


def is_done(found: dict[str, Any] | None, row: "Row", names: list[str]) -> bool:
    """Tell whether all who should run in a row are in its results."""
    if found is None:
        return False
    return {name for name in names if name in row.contestants} <= {*found["contestants"], *found["left_out"]}


def measure_all(
    rows: list["Row"],
    names: list[str],
    shape: Any,
    device: "torch.device",
    effort: "Effort",
    path: Path,
    fresh: bool,
) -> dict[str, Any]:
    """Measure and save row after row; what is there already stays."""
    import torch

    from bench.speedlib import report
    from bench.speedlib.contestants import tidy
    from bench.speedlib.peak import measure_unit
    from bench.speedlib.run import run_row, unable
    from bench.speedlib.studio import Studio
    from bench.speedlib.timing import measure_copy, measure_gemm

    results = report.load_results(path, report.describe(shape, device), fresh)
    todo = [row for row in rows if fresh or not is_done(results["rows"].get(row.key), row, names)]
    cli.say(f"{len(todo)} rows to measure, {len(rows) - len(todo)} are in {path}")
    studio, measured = Studio(shape, device), set()
    try:
        for number, row in enumerate(todo, 1):
            if row.dtype and row.dtype not in measured:
                # Before a dtype's first row, so that peak and rows saw the same state of the machine.
                dtype = getattr(torch, row.dtype)
                results["peaks"][row.dtype] = measure_gemm(dtype, device) | {
                    "unit": measure_unit(dtype, device),
                    "attention": report.attention_choices(shape, dtype, device),
                }
                results["peaks"]["copy"] = measure_copy(device)
                measured.add(row.dtype)
            peak = results["peaks"].get(row.dtype, {})
            rates = {"gemm": peak.get("tflops"), "unit": peak.get("unit", {}).get("tflops")}
            try:
                found = run_row(studio, row, names, effort, **rates)
            except Exception as error:  # no memory, or a rival's failure: the rows to come still run
                found = unable(row, names, error)
            tidy()
            results["rows"][row.key] = found | {"commit": report.commit()}
            report.save(path, results)
            cli.say(f"[{number}/{len(todo)}] {row.key}: {report.headline(found)}")
    finally:
        studio.close()
    return results


def main(argv: list[str] | None = None) -> None:
    opt = make_parser().parse_args(argv)
    from bench.speedlib import models, report
    from bench.speedlib.process import forbid_tf32
    from bench.speedlib.run import Effort
    from bench.speedlib.timing import threads
    from ldm.devices import pick_device

    device = pick_device(opt.device)
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"the bench has clocks for cpu and cuda, got {device.type}; give --device cpu")
    shape = models.geometry(opt.model)
    rows = choose(opt, shape.px, device.type)
    if opt.list:
        list_rows(rows, shape)
        return
    names = choose_contestants(opt.contestants, opt.peers)
    given = (opt.repeats, opt.warmup, opt.budget)
    usual = EFFORT["short" if opt.short else device.type]
    effort = Effort(*(own if one is None else one for one, own in zip(given, usual, strict=True)))
    forbid_tf32()
    with threads(opt.threads):
        path = opt.results or report.default_path(shape, device)
        results = measure_all(rows, names, shape, device, effort, path, opt.fresh)
    wrong = [
        f"{name} in {key}"
        for key, row in results["rows"].items()
        for name, found in row["contestants"].items()
        if found["gate"] and not found["gate"]["passed"]
    ]
    cli.say(
        f"{path.with_suffix('.md')}: {len(results['rows'])} rows; wrong answers: {', '.join(wrong) or 'none'}"
    )


if __name__ == "__main__":
    cli.run(main)
