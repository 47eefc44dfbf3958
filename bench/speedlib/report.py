"""The results file: what it begins with, how it is taken up again, and the table beside it."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from bench.load import versions
from bench.quality import save_results, write
from bench.speedlib.models import Geometry
from bench.speedlib.rows import CONTESTANTS, OURS, PEERS, THEIRS
from ldm.errors import FormatError, MismatchError

FOLDER = Path(__file__).resolve().parents[1] / "results"
# What must be the same for rows to stand in one file.
SAME = ("model", "machine", "device", "threads", "versions")
# SDPA's choices by their numbers in torch._C's SDPBackend.
BACKENDS = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn", 4: "overrideable"}


def machine_name(device: torch.device) -> str:
    """Name the processor that computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "cpu")


def default_path(shape: Geometry, device: torch.device) -> Path:
    """Name a results file after geometry (v1 goes without saying), hardware and torch."""
    machine = re.sub(r"\((r|tm)\)", "", machine_name(device).lower())
    slug = re.sub(r"[^a-z0-9]+", "-", machine).strip("-")
    if device.type == "cpu":
        slug += f"-{torch.get_num_threads()}-threads"
    release = ".".join(torch.__version__.split(".")[:2])
    model = "" if shape.name == "v1" else f"{shape.name}-"
    return FOLDER / f"speed-{model}{slug}-torch{release}.json"


def describe(shape: Geometry, device: torch.device) -> dict[str, Any]:
    """Say on what the rows were measured: SAME, and what else explains figures."""
    onednn = re.search(r"MKL-DNN v([\d.]+)", torch.__config__.show())
    environment = {
        name: os.environ[name]
        for name in ("LD_LIBRARY_PATH", "LD_PRELOAD", "OMP_NUM_THREADS", "KMP_AFFINITY", "ONEDNN_MAX_CPU_ISA")
        if name in os.environ
    }
    head = {
        "model": shape.name,
        "machine": machine_name(device),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "onednn": onednn[1] if onednn else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "environment": environment,
    }
    if device.type == "cuda":
        head |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return head


def attention_choices(shape: Geometry, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """Tell which kernel torch takes for the attention of each level of a guided step: "tokens x head width"."""
    unet = shape.settings["model"]["params"]["unet_config"]["params"]
    chosen = {}
    for level, factor in enumerate(unet["channel_mult"]):
        if 2**level not in unet["attention_resolutions"]:
            continue
        tokens = (shape.px // shape.f // 2**level) ** 2
        width = unet["model_channels"] * factor
        heads = unet["num_heads"] if unet.get("num_heads", -1) != -1 else width // unet["num_head_channels"]
        q = torch.empty(2, heads, tokens, width // heads, dtype=dtype, device=device)
        for keys in (tokens, shape.tokens):
            k = torch.empty(2, heads, keys, width // heads, dtype=dtype, device=device)
            number = torch._fused_sdp_choice(q, k, k)
            chosen[f"{tokens}x{keys}x{width // heads}"] = BACKENDS.get(number, str(number))
    return chosen


def commit() -> str | None:
    """Name the commit that is checked out, "-dirty" where files differ from it; None without git."""
    words = ["git", "-C", str(FOLDER), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def load_results(path: Path, head: dict[str, Any], fresh: bool = False) -> dict[str, Any]:
    """Read earlier results to go on with, or begin with none.

    Args:
        fresh: begin with none, too, where the earlier ones do not fit.

    Raises:
        FormatError: no results of this bench.
        MismatchError: results of another model, machine, number of threads or version.
    """
    empty = {**head, "peaks": {}, "made_by": "python bench/speed.py", "rows": {}}
    if not path.exists():
        return empty
    try:
        results = json.loads(path.read_text())
        earlier = {name: results[name] for name in SAME}
        results["rows"].items()
        results["peaks"].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FormatError(f"'{path}' is no file of speed results; give another --results") from None
    for name, value in earlier.items():
        if value != head[name]:
            if fresh:
                return empty
            raise MismatchError(
                f"'{path}' has results for {name} {value}, this run is for {head[name]}; "
                "give another --results, or --fresh to begin again"
            )
    for row in results["rows"].values():
        for found in row["contestants"].values():
            if isinstance(found.get("efficiency"), float):  # of torch.mm alone, as files had it once
                found["efficiency"] = {"gemm": found["efficiency"]}
    return {**empty, "peaks": results["peaks"], "rows": results["rows"]}


def save(path: Path, results: dict[str, Any]) -> None:
    """Write the results as JSON, a line for each row, and the table beside them."""
    save_results(path, results)
    write(path.with_suffix(".md"), make_table(results).encode())


# --- the table ------------------------------------------------------------------------------------------


def amount(figure: str, value: float) -> str:
    """Write a figure for people: seconds as s or ms, memory in GB."""
    if figure == "gb":
        return f"{value:.2f} GB"
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.{1 if value < 0.1 else 0}f} ms"


def make_table(results: dict[str, Any]) -> str:
    """Lay all rows out as Markdown, a line for each contestant."""
    threads = f", {results['threads']} threads" if results["device"] == "cpu" else ""
    found = ", ".join(f"{name} {value}" for name, value in results["versions"].items() if name != "cpus")
    text = [
        f"# Speed of {results['model']} on {results['machine']}{threads}",
        "",
        f"{found}. Made by `python bench/speed.py`, contestants interleaved within a row. A line gives the",
        "median with its quartiles, how the answer differs from diffusers' float32 (max relative; rms relative;",
        "dB for pictures), the share that the reference graph's arithmetic makes of torch.mm's measured rate and of",
        "that of the processor's own units (bench/peak/peak.cpp, with nothing to load), and its figure divided by",
        "ours: above 1, ours takes less. Quartiles of ratios are over the rounds.",
        "",
    ]
    for name, peak in results["peaks"].items():
        rate = f"{peak['gbps']:.1f} GB/s" if name == "copy" else f"torch.mm {peak['tflops']:.3f} TFLOP/s"
        text.append(f"- {name}: {rate}{_unit(peak.get('unit'))}")
    head = [
        "row",
        "who",
        "median",
        "quartiles",
        "runs",
        "error",
        "of mm",
        "of units",
        *(f"/ {name}" for name in OURS),
    ]
    text += ["", "| " + " | ".join(head) + " |", "| --- | --- |" + " ---: |" * (len(head) - 2)]
    for key, row in results["rows"].items():
        lines = [_line(row, name) for name in (*CONTESTANTS, *PEERS) if name in row["contestants"]]
        lines += [[name, f"left out: {reason}"] for name, reason in row["left_out"].items()]
        for number, cells in enumerate(lines):
            cells = [f"`{key}`" if number == 0 else "", *cells]
            text.append("| " + " | ".join(cells + [""] * (len(head) - len(cells))) + " |")
    return "\n".join([*text, ""])


def _unit(unit: dict[str, Any] | None) -> str:
    """Say what the processor's own units reach, or why that is not known."""
    if unit is None:
        return ""
    if "not_measured" in unit:
        return f", units not measured: {unit['not_measured']}"
    return f", {unit['unit']} {unit['tflops']:.3f} TFLOP/s"


def _line(row: dict[str, Any], name: str) -> list[str]:
    """The cells of one contestant."""
    found, merit = row["contestants"][name], row["merit"]
    gate = found["gate"]
    error = "-"
    if gate is not None:
        error = ", ".join(
            [
                *(
                    f"{gate[kind]:.1e}" if gate[kind] is not None else "inf"
                    for kind in ("max_error", "rms_error")
                ),
                *(
                    [f"{gate['psnr']:.1f} dB" if gate["psnr"] is not None else "no dB"]
                    if "psnr" in gate
                    else []
                ),
            ]
        )
        if not gate["passed"]:
            return [name, "**wrong**", f"wanted {gate['rule']}", "", error]
    figures = found["figures"][merit]
    quartiles = f"{amount(merit, figures['q1'])} - {amount(merit, figures['q3'])}"
    shares = [
        f"{100 * share:.1f} %" if share is not None else "-"
        for share in (found.get("efficiency", {}).get(kind) for kind in ("gemm", "unit"))
    ]
    ratios = [_ratio(row["ratios"].get(f"{name} / {our}")) for our in OURS]
    return [name, amount(merit, figures["median"]), quartiles, str(figures["n"]), error, *shares, *ratios]


def _ratio(ratio: dict[str, Any] | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio['of_medians']:.2f} ({ratio['rounds']['q1']:.2f} - {ratio['rounds']['q3']:.2f})"


def headline(row: dict[str, Any]) -> str:
    """Say a finished row in one line."""
    merit = row["merit"]
    words = []
    for name, found in row["contestants"].items():
        passed = found["gate"] is None or found["gate"]["passed"]
        words.append(
            f"{name} " + (amount(merit, found["figures"][merit]["median"]) if passed else "WRONG, not timed")
        )
    words += [
        f"{pair} {_ratio(ratio)}"
        for pair, ratio in row["ratios"].items()
        if pair.split(" / ")[0] in (*THEIRS, *PEERS)
    ]
    words += [f"{name} left out: {reason}" for name, reason in row["left_out"].items()]
    return "; ".join(words)
