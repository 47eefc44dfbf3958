"""The quality table: how often a picture keeps its caption's promise, by sampler, steps and guidance.

For each row, 500 fixed prompts of seen colour-shape pairs and 500 with never-seen ones are painted, prompt i from
seed i, and read by `ldm.shapes.checker`; a prompt counts when its every attribute holds. Beside it stands a
Frechet distance between the latents painted and those of 2,000 other renders of the same split. Each finished
row is saved at once; a second run does what is missing. The table has some eight million questions to the UNet:
`--precision bfloat16 --compile` asks them in a quarter of the time; results of two precisions never share a file.
`--knob NAME=VALUE` turns one of docs/knobs.md; nor do results of other knobs share a file.

    python bench/quality.py                                  # everything, into bench/results/quality.{json,md,png}
    python bench/quality.py --rows 'ddim-0/20/*' --prompts 100 --results /tmp/q.json
    python bench/quality.py --knob cache_interval=2 --knob guidance_interval=0.2,0.8 --results /tmp/k.json
    python bench/quality.py --grid grid.png                  # 24 prompts, painted, labelled and judged
    python bench/quality.py --samplers --prompts 16          # every sampler, into .../quality-samplers.{json,md}
    python bench/quality.py --samplers --grid docs/samplers.png
"""

import contextlib
import hashlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm import cli  # noqa: E402
from ldm.errors import FormatError, MismatchError, OutputError, UsageError  # noqa: E402

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from ldm.pipeline import StableDiffusion
    from ldm.shapes.scenes import Scene

RESULTS = Path(__file__).parent / "results" / "quality.json"
SPLITS = {"seen": "train", "never-seen": "test"}  # our names and those of ldm.shapes.scenes
SAMPLERS = {
    "ddpm": ("ddpm", 0.0, "DDPM"),
    "ddim-1": ("ddim", 1.0, "DDIM, eta 1"),
    "ddim-0.5": ("ddim", 0.5, "DDIM, eta 0.5"),
    "ddim-0": ("ddim", 0.0, "DDIM, eta 0"),
    "plms": ("plms", 0.0, "PLMS"),
    "dpmpp_2m": ("dpmpp_2m", 0.0, "DPM-Solver++"),
}
STEPS = (5, 10, 20, 50, 100)
# Also at all 1000 levels, where the DDIM paper's table is level. DDIM with eta 1 is DDPM there: a test holds it.
LONG = ("ddpm", "ddim-0")
GUIDANCE = (1.0, 3.0, 5.0, 7.5)
REFERENCE = 2000  # renders that the Frechet distance compares with
REFERENCE_SEED = 1  # of their scenes; the prompts' is 0
POOLED = 4  # latents are averaged to so many cells a side, that 500 pictures can fill a covariance
GRID_PROMPTS = {"seen": 16, "never-seen": 8}
GRID_COLUMNS = 6
GRID_STEPS = 20
# --samplers: every sampler over these spacings, by A1111's words, in so many steps; never-seen pairs, the harder ones.
SPACINGS = {"karras": "karras", "uniform": "normal"}
SPACED_STEPS = (10, 20)
SPACED_SPLIT = "never-seen"
EXACT = ("heun", 30, "karras")  # stands for the exact probability flow
SPACED_LINES = 3  # samplers beside one another in their grid


@dataclass(frozen=True)
class Row:
    """One line of the table: what paints which prompts. steps 0 are the rows that no sampler paints."""

    sampler: str
    steps: int
    guidance: float
    split: str
    spacing: str | None = None  # the sampler's own

    @property
    def key(self) -> str:
        if self.spacing is not None:
            return f"{self.sampler}/{self.spacing}/{self.steps}/g{self.guidance:g}/{self.split}"
        if self.steps == 0:
            return f"{self.sampler}/{self.split}"
        return f"{self.sampler}/{self.steps}/g{self.guidance:g}/{self.split}"


def all_rows(guidance: float) -> list[Row]:
    """List every row, quick ones first; `guidance` is that of the rows that vary sampler and steps."""
    rows = [Row("first-stage", 0, 1.0, split) for split in SPLITS]
    # dict.fromkeys keeps the first of equal rows: 20 steps of DDIM are in both lists.
    painted = [Row("ddim-0", 20, scale, split) for scale in GUIDANCE for split in SPLITS]
    painted += [Row(name, steps, guidance, split) for steps in STEPS for name in SAMPLERS for split in SPLITS]
    painted += [Row(name, 1000, guidance, split) for name in LONG for split in SPLITS]
    return rows + list(dict.fromkeys(painted))


def spaced_rows(guidance: float) -> list[Row]:
    """List the rows of --samplers, the exact flow first, then those of few steps."""
    from ldm.models.diffusion.samplers import SAMPLERS as every

    cells = [(name, steps, spacing) for steps in SPACED_STEPS for spacing in SPACINGS for name in every]
    return [Row(name, steps, guidance, SPACED_SPLIT, spacing) for name, steps, spacing in (EXACT, *cells)]


def choose_rows(rows: list[Row], patterns: list[str] | None) -> list[Row]:
    """Keep the rows whose key matches one of the shell patterns, in their order.

    Raises:
        UsageError: a pattern that no row matches.
    """
    for pattern in patterns or []:
        if not any(fnmatchcase(row.key, pattern) for row in rows):
            raise UsageError(f"--rows '{pattern}' matches no row; --list shows them all")
    return [row for row in rows if not patterns or any(fnmatchcase(row.key, p) for p in patterns)]


# --- painting and judging ---------------------------------------------------------------------------


def paint(
    pipeline: "StableDiffusion",
    prompts: list[str],
    row: Row,
    batch: int,
    known: dict[str, "Tensor"],
    **knobs: Any,
) -> Iterator["Tensor"]:
    """Sample latents (b, c, h, w) for the prompts, `batch` at a time; prompt i starts from seed i, whatever b is.

    Args:
        known: text features of earlier prompts; new ones are added.
        knobs: see KNOBS.
    """
    from ldm.generate import denoise, encode_prompt, initial_latents
    from ldm.models.introspect import native_size
    from ldm.noise import ImageNoise

    model = pipeline.model
    name, eta = SAMPLERS[row.sampler][:2] if row.spacing is None else (row.sampler, None)
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        noise = ImageNoise(range(start, start + len(part)))
        steps = denoise(
            model,
            initial_latents(model, len(part), *native_size(model), noise),
            encode_prompt(model, part, known),
            sampler=name,
            steps=row.steps,
            eta=eta,
            spacing=None if row.spacing is None else SPACINGS[row.spacing],
            guidance_scale=row.guidance,
            unconditional_conditioning=encode_prompt(model, [""] * len(part), known),
            noise=noise,
            autocast=pipeline.autocast,
            **knobs,
        )
        yield deque(steps, maxlen=1).pop().x_t


def encode_renders(pipeline: "StableDiffusion", scenes: list["Scene"], batch: int) -> Iterator["Tensor"]:
    """Encode renders to latents (b, c, h, w), scaled units; the posterior's mode, so nothing is drawn."""
    import torch

    from ldm.models.introspect import native_size
    from ldm.shapes.scenes import render

    model = pipeline.model
    size = native_size(model)[0]
    for start in range(0, len(scenes), batch):
        pixels = np.stack([np.asarray(render(scene, size)) for scene in scenes[start : start + batch]])
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1  # (b, 3, height, width)
        posterior = model.encode_first_stage(x.to(pipeline.device))
        mode = posterior.mode() if hasattr(posterior, "mode") else posterior
        yield model.get_first_stage_encoding(mode)


def pooled(latents: "Tensor") -> np.ndarray:
    """Average latents (b, c, h, w) to (b, c * POOLED²) float64."""
    from torch.nn.functional import adaptive_avg_pool2d

    return adaptive_avg_pool2d(latents.float(), POOLED).flatten(1).cpu().numpy().astype(np.float64)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Measure the peak signal-to-noise ratio of two pictures of bytes, in dB; at most that of half a step."""
    mse = np.square(a.astype(np.float64) - b).mean()
    return float(10 * np.log10(255**2 / max(mse, 0.25)))


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Measure the Frechet distance between the normal laws of two samples (n, d) and (m, d).

    |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), A and B the covariances (Dowson and Landau 1982, Eq. 4).
    """
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    # A B has the eigenvalues of A^(1/2) B A^(1/2), which is symmetric.
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    shift = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(shift + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


class Bench:
    """The model under test with what all rows share: prompts, knobs, reference latents, text features."""

    def __init__(self, pipeline: "StableDiffusion", prompts: int, batch: int, **knobs: Any):
        self.pipeline, self.prompts, self.batch, self.knobs = pipeline, prompts, batch, knobs
        self.known: dict[str, Any] = {}
        self.references: dict[str, np.ndarray] = {}

    def reference(self, split: str) -> np.ndarray:
        """Pooled latents (REFERENCE, d) of renders that no prompt names."""
        from ldm.shapes.scenes import evaluation_scenes

        if split not in self.references:
            scenes = evaluation_scenes(REFERENCE, seed=REFERENCE_SEED, split=SPLITS[split])
            parts = [pooled(z) for z in encode_renders(self.pipeline, scenes, self.batch)]
            self.references[split] = np.concatenate(parts)
        return self.references[split]

    def measure(self, row: Row, kept: list[np.ndarray] | None = None) -> dict[str, Any]:
        """Paint a row's prompts, judge them, and say all about it; the latents, batch by batch, go into `kept`."""
        from ldm.generate import decode
        from ldm.images import to_uint8
        from ldm.shapes.checker import judge, see
        from ldm.shapes.scenes import evaluation_scenes, render

        reference = self.reference(row.split) if row.spacing is None else None  # those are few prompts
        began = time.monotonic()
        scenes = evaluation_scenes(self.prompts, split=SPLITS[row.split])
        if row.steps == 0:
            source = encode_renders(self.pipeline, scenes, self.batch)
        else:
            captions = [scene.caption for scene in scenes]
            source = paint(self.pipeline, captions, row, self.batch, self.known, **self.knobs)
        features, verdicts, decibels = [], [], []
        for latents in source:
            features.append(pooled(latents))
            if kept is not None:
                kept.append(latents.float().cpu().numpy())
            for pixels in to_uint8(decode(self.pipeline.model, latents)):
                scene = scenes[len(verdicts)]
                if row.steps == 0:
                    decibels.append(psnr(pixels, np.asarray(render(scene, pixels.shape[0]))))
                verdicts.append(judge(see(pixels), scene.claim))
        failing: dict[str, int] = {}
        for verdict in verdicts:
            # Both objects' colours count as one kind of attribute.
            for name in {name.split()[0] for name, held in verdict.attributes.items() if not held}:
                failing[name] = failing.get(name, 0) + 1
        return {
            "sampler": row.sampler,
            "steps": row.steps,
            "guidance": row.guidance,
            "split": row.split,
            "prompts": len(verdicts),
            "right": sum(verdict.holds for verdict in verdicts),
            "failing": dict(sorted(failing.items())),
            "wrong": [i for i, verdict in enumerate(verdicts) if not verdict.holds],
            **(
                {}
                if reference is None
                else {"frechet": round(frechet(np.concatenate(features), reference), 5)}
            ),
            **({"psnr": round(sum(decibels) / len(decibels), 2)} if decibels else {}),
            "seconds": round(time.monotonic() - began, 2),
            "machine": machine_name(self.pipeline),
        }


def exact_flow(bench: Bench, row: Row, kept: list[np.ndarray]) -> np.ndarray:
    """Give the latents (n, c, h, w) that stand for the exact flow: a row's own if it is that one."""
    name, steps, spacing = EXACT
    wanted = Row(name, steps, row.guidance, row.split, spacing)
    if row != wanted:
        bench.measure(wanted, kept := [])
    return np.concatenate(kept)


# --- results ------------------------------------------------------------------------------------------


def load_results(path: Path, head: dict[str, Any]) -> dict[str, Any]:
    """Read earlier results, or begin with none.

    Raises:
        FormatError: no results file.
        MismatchError: results of another model, number of prompts, precision or knobs.
    """
    if not path.exists():
        return {**head, "rows": {}}
    try:
        results = {
            "knobs": {},
            **json.loads(path.read_text()),
        }  # files from before there were any say nothing
        earlier = {name: results[name] for name in head}
        results["rows"].items()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FormatError(f"'{path}' is no file of quality results; give another --results") from None
    for name, value in head.items():
        if earlier[name] != value:
            raise MismatchError(
                f"'{path}' has results for {name} {earlier[name]}, this run is for {value}; "
                "give another --results, or --fresh to begin again"
            )
    return results


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise OutputError(f"cannot write '{path}': {error.strerror}; choose another place") from error


def save_results(path: Path, results: dict[str, Any]) -> None:
    """Write results as JSON, a line for each row."""
    lines = [f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in results["rows"].items()]
    head = json.dumps({name: value for name, value in results.items() if name != "rows"}, indent=1)
    write(path, (head.removesuffix("\n}") + ',\n "rows": {\n' + ",\n".join(lines) + "\n }\n}\n").encode())


def make_tables(results: dict[str, Any], guidance: float) -> str:
    """Lay the rows out as Markdown."""
    rows = results["rows"]

    def cell(row: Row) -> str:
        if row.key not in rows:
            return "-"
        found = rows[row.key]
        decibels = f", {found['psnr']:.1f} dB" if "psnr" in found else ""
        return f"{100 * found['right'] / found['prompts']:.1f} % ({found['frechet']:.3f}){decibels}"

    def table(title: str, head: list[str], lines: list[list[str]]) -> list[str]:
        ruler = ["---"] + ["---:"] * (len(head) - 1)
        return [f"### {title}", "", *("| " + " | ".join(line) + " |" for line in (head, ruler, *lines)), ""]

    knobs = "".join(f", {name} {value}" for name, value in results["knobs"].items())
    text = [
        f"# Quality of {results['model']}",
        "",
        f"Share of {results['prompts']} fixed prompts whose every attribute holds; in brackets the Frechet distance",
        f"between their latents, averaged to {POOLED} x {POOLED} cells, and those of {REFERENCE:,} other renders of",
        f"the same split. Weights {results['weights'][:10]}, UNet in {results['precision']}{knobs}. Made by",
        "`python bench/quality.py`.",
        "",
    ]
    steps = (*STEPS, 1000)
    for split in SPLITS:
        lines = [
            [label, *(cell(Row(name, n, guidance, split)) for n in steps)]
            for name, (_, _, label) in SAMPLERS.items()
        ]
        title = f"{split.capitalize()} pairs, guidance {guidance:g}"
        text += table(title, ["steps", *(str(n) for n in steps)], lines)
    lines = [[split, *(cell(Row("ddim-0", 20, scale, split)) for scale in GUIDANCE)] for split in SPLITS]
    text += table("DDIM, eta 0, 20 steps", ["guidance", *(f"{scale:g}" for scale in GUIDANCE)], lines)
    lines = [[split, cell(Row("first-stage", 0, 1.0, split))] for split in SPLITS]
    text += table("Renders through the first stage alone: the best there can be", ["pairs", ""], lines)
    return "\n".join(text)


def make_spaced_table(results: dict[str, Any], guidance: float) -> str:
    """Lay the rows of --samplers out as Markdown."""
    from ldm.models.diffusion.samplers import SAMPLERS as every

    rows = results["rows"]
    cells = [(spacing, steps) for steps in SPACED_STEPS for spacing in SPACINGS]

    def cell(name: str, spacing: str, steps: int) -> str:
        found = rows.get(Row(name, steps, guidance, SPACED_SPLIT, spacing).key)
        if found is None:
            return "-"
        return f"{found['right']} ({found['off_flow']:.2f})"

    text = [
        f"# Every sampler on {results['model']}",
        "",
        f"How many of {results['prompts']} fixed prompts of {SPACED_SPLIT} pairs come out right, guidance "
        f"{guidance:g}; in brackets how far",
        "the latents are from the exact probability flow of the same noise (root mean square; those of samplers with",
        f"fresh noise go elsewhere by design). Weights {results['weights'][:10]}, UNet in {results['precision']}.",
        "Made by `python bench/quality.py --samplers`.",
        "",
        "| sampler | " + " | ".join(f"{spacing}, {steps} steps" for spacing, steps in cells) + " |",
        "|---|" + "---:|" * len(cells),
        *(f"| `{name}` | " + " | ".join(cell(name, *one) for one in cells) + " |" for name in every),
        "",
    ]
    return "\n".join(text)


def draw_plot(results: dict[str, Any], guidance: float, path: Path) -> None:
    """Plot share and distance over steps, and share over guidance, as a PNG."""
    import io

    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("the plot needs matplotlib: pip install faithful-ldm[train]") from error

    rows = results["rows"]
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    share, distance, scales = figure.subplots(1, 3)
    steps = (*STEPS, 1000)
    for number, (name, (_, _, label)) in enumerate(SAMPLERS.items()):
        for split, style in zip(SPLITS, ("-", ":"), strict=True):
            found = [(n, rows.get(Row(name, n, guidance, split).key)) for n in steps]
            found = [(n, row) for n, row in found if row]
            x = [n for n, _ in found]
            look = {"color": f"C{number}", "linestyle": style, "marker": "o", "markersize": 3}
            shown = label if style == "-" else None
            share.plot(x, [100 * row["right"] / row["prompts"] for _, row in found], label=shown, **look)
            distance.plot(x, [row["frechet"] for _, row in found], **look)
    for split, style in zip(SPLITS, ("-", ":"), strict=True):
        found = [(g, rows.get(Row("ddim-0", 20, g, split).key)) for g in GUIDANCE]
        found = [(g, row) for g, row in found if row]
        shares = [100 * row["right"] / row["prompts"] for _, row in found]
        scales.plot([g for g, _ in found], shares, f"k{style}o", markersize=3, label=f"{split} pairs")
    share.set(xscale="log", xlabel="steps", ylabel="% of prompts with every attribute right")
    share.set_title(f"guidance {guidance:g}; dotted: never-seen pairs", fontsize=10)
    distance.set(xscale="log", xlabel="steps", ylabel="Frechet distance of latents")
    if any(len(line.get_xdata()) for line in distance.lines):  # a log scale of nothing is refused
        distance.set_yscale("log")
    scales.set(xlabel="guidance", ylabel="% of prompts with every attribute right")
    scales.set_title("DDIM, eta 0, 20 steps", fontsize=10)
    for axes in (share, distance):
        axes.set_xticks(steps, [str(n) for n in steps])
        axes.minorticks_off()
    for axes in (share, scales):
        axes.set_ylim(0, 102)
        axes.legend(fontsize=8, loc="lower right")
    for axes in (share, distance, scales):
        axes.grid(alpha=0.3)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    write(path, file.getvalue())


def make_grid(bench: Bench, guidance: float) -> tuple["Image.Image", int]:
    """Paint 24 prompts with DDIM, eta 0; a picture with each caption below, and how many hold."""
    import textwrap

    from PIL import Image, ImageDraw

    from ldm.generate import decode
    from ldm.images import to_pil
    from ldm.shapes.checker import check
    from ldm.shapes.scenes import shapes_prompts

    tiles = []
    for split, count in GRID_PROMPTS.items():
        prompts = shapes_prompts(count, split=SPLITS[split])
        row = Row("ddim-0", GRID_STEPS, guidance, split)
        painted = paint(bench.pipeline, prompts, row, bench.batch, bench.known, **bench.knobs)
        pictures = [p for latents in painted for p in to_pil(decode(bench.pipeline.model, latents))]
        for picture, prompt in zip(pictures, prompts, strict=True):
            verdict = check(picture, prompt)
            lacks = [name for name, held in verdict.attributes.items() if not held]
            note = "never seen, " if split == "never-seen" else ""
            note += "wrong: " + ", ".join(lacks) if lacks else "right"
            note = textwrap.shorten(note, (picture.width + 20) // 5, placeholder=" ...")
            tiles.append((picture, prompt, note, verdict.holds))
    size = tiles[0][0].width
    width, height = size + 36, size + 54
    lines = -(-len(tiles) // GRID_COLUMNS)
    sheet = Image.new("RGB", (GRID_COLUMNS * width, lines * height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, prompt, note, holds) in enumerate(tiles):
        x, y = number % GRID_COLUMNS * width + 10, number // GRID_COLUMNS * height + 4
        sheet.paste(picture, (x, y))
        caption = "\n".join(textwrap.wrap(prompt, (size + 20) // 5))
        draw.text((x, y + size + 2), caption, fill=(30, 30, 30), font_size=9, spacing=1)
        draw.text((x, y + size + 37), note, fill=(0, 120, 40) if holds else (200, 0, 0), font_size=9)
    return sheet, sum(tile[3] for tile in tiles)


def make_spaced_grid(bench: Bench, guidance: float) -> "Image.Image":
    """Paint one prompt, from one seed, by every sampler in every cell of --samplers."""
    from PIL import Image, ImageDraw

    from ldm.generate import decode
    from ldm.images import to_pil
    from ldm.shapes.scenes import shapes_prompts

    prompts = shapes_prompts(1, split=SPLITS[SPACED_SPLIT])
    tiles: dict[str, list[tuple[str, Image.Image]]] = {}
    for row in spaced_rows(guidance)[1:]:
        (latents,) = paint(bench.pipeline, prompts, row, 1, bench.known, **bench.knobs)
        words = f"{row.spacing} {row.steps}"
        tiles.setdefault(row.sampler, []).append((words, to_pil(decode(bench.pipeline.model, latents))[0]))
    size = next(iter(tiles.values()))[0][1].width
    width, height = 4 * (size + 4) + 16, size + 32
    lines = -(-len(tiles) // SPACED_LINES)
    sheet = Image.new("RGB", (SPACED_LINES * width, lines * height), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (name, pictures) in enumerate(tiles.items()):
        left, top = number // lines * width + 8, number % lines * height + 2
        draw.text((left, top), name, fill=(0, 0, 0), font_size=11)
        for place, (words, picture) in enumerate(pictures):
            x = left + place * (size + 4)
            sheet.paste(picture, (x, top + 14))
            draw.text((x, top + 14 + size), words, fill=(90, 90, 90), font_size=8)
    return sheet


# --- knobs --------------------------------------------------------------------------------------------

# What may be turned, as StableDiffusion.stream names it, and how its value is read.
KNOBS = {
    "guidance_interval": lambda text: [float(end) for end in text.split(",")],
    "cache_interval": int,
    "cache_depth": int,
    "merge_ratio": float,
    "merge_seed": int,
}


def read_knobs(words: list[str]) -> dict[str, Any]:
    """Read NAME=VALUE words; the values' ranges are left to the library.

    Raises:
        UsageError: an unknown name, one that comes twice, or a value of another kind.
    """
    knobs: dict[str, Any] = {}
    for word in words:
        name, _, text = word.partition("=")
        if name not in KNOBS or name in knobs:
            raise UsageError(f"--knob wants NAME=VALUE once for any of {', '.join(KNOBS)}; got '{word}'")
        try:
            knobs[name] = KNOBS[name](text)
        except ValueError:
            raise UsageError(f"--knob {name} wants a number (guidance_interval two), got '{text}'") from None
    return knobs


# --- the script -----------------------------------------------------------------------------------------


def parse(argv: list[str] | None):
    parser = cli.Parser(description="Measure how often the model's pictures keep their captions' promises.")
    parser.add_argument("--ckpt", help="model file; without it, the model in the box")
    parser.add_argument("--config", help="CompVis YAML file for --ckpt")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto")
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="what the UNet computes in, by autocast; all else is float32",
    )
    parser.add_argument("--compile", action="store_true", help="compile the UNet with torch.compile")
    parser.add_argument(
        "--knob", action="append", metavar="NAME=VALUE", help=f"turn one of {', '.join(KNOBS)}"
    )
    parser.add_argument("--prompts", type=cli.integer(2, 100_000), default=500, help="prompts of each split")
    parser.add_argument("--batch", type=cli.integer(1, 10_000), default=50, help="pictures painted at once")
    parser.add_argument(
        "--guidance", type=cli.number(0, 100), help="of rows that vary the sampler (default: the model's)"
    )
    parser.add_argument(
        "--rows", nargs="+", metavar="PATTERN", help="only rows that match, e.g. 'ddim-0/20/*'"
    )
    parser.add_argument(
        "--samplers", action="store_true", help="every sampler over two spacings, in 10 and 20 steps, instead"
    )
    parser.add_argument("--results", type=Path, help="JSON file; .md and .png go beside it")
    parser.add_argument("--fresh", action="store_true", help="begin again, whatever --results holds")
    parser.add_argument("--list", action="store_true", help="list the rows and end")
    parser.add_argument("--grid", type=Path, metavar="PNG", help="paint 24 prompts into this file and end")
    return parser.parse_args(argv)


def load_pipeline(
    ckpt: str | None, config: str | None, device: str, precision: str = "float32", compiled: bool = False
) -> "StableDiffusion":
    """Load the model in float32, so that devices compare; the UNet alone may compute in less, and compiled."""
    import torch

    from ldm.pipeline import StableDiffusion

    options = {"device": device, "dtype": torch.float32}
    if precision != "float32":
        options["autocast"] = getattr(torch, precision)
    if ckpt is None:
        pipeline = StableDiffusion.default(**options)
    else:
        pipeline = StableDiffusion.from_single_file(ckpt, config=config, **options)
    if compiled:
        import torch._inductor.config as inductor

        inductor.freezing = True  # weights never change here, so they are cast and packed once
        pipeline.model.model.diffusion_model.compile(dynamic=False)
    return pipeline


def weights_hash(path: Path) -> str:
    """Give the sha256 of the model file, by which results know their weights.

    Raises:
        UsageError: a folder.
    """
    if not path.is_file():
        raise UsageError(f"--ckpt wants one file, got the folder '{path}'; convert it to a single file")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def machine_name(pipeline: "StableDiffusion") -> str:
    """Name the processor that paints, with how many threads, and the version of torch."""
    import torch

    name = pipeline.device.type
    if name == "cuda":
        name = torch.cuda.get_device_name(pipeline.device)
    elif name == "cpu":
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        name = f"{name}, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


def main(argv: list[str] | None = None) -> None:
    opt = parse(argv)
    if opt.config and not opt.ckpt:
        raise UsageError("--config describes --ckpt, which is not given; add it or leave --config away")
    knobs = read_knobs(opt.knob or [])
    pipeline = load_pipeline(opt.ckpt, opt.config, opt.device, opt.precision, opt.compile)
    guidance = pipeline.defaults.guidance_scale if opt.guidance is None else opt.guidance
    rows = choose_rows(spaced_rows(guidance) if opt.samplers else all_rows(guidance), opt.rows)
    if opt.results is None:
        opt.results = RESULTS.with_name("quality-samplers.json") if opt.samplers else RESULTS
    if opt.list:
        for row in rows:
            cli.say(row.key)
        return
    pipeline.stream("", **knobs)  # refuses what is out of range, before anything is painted
    bench = Bench(pipeline, opt.prompts, opt.batch, **knobs)
    if opt.grid:
        import io

        if opt.samplers:
            sheet, right = make_spaced_grid(bench, guidance), None
        else:
            sheet, right = make_grid(bench, guidance)
        file = io.BytesIO()
        sheet.save(file, "PNG")
        write(opt.grid, file.getvalue())
        if right is None:
            cli.say(f"{opt.grid}: every sampler in {len(SPACINGS) * len(SPACED_STEPS)} cells")
            return
        cli.say(f"{opt.grid}: {right} of {sum(GRID_PROMPTS.values())} right")
        return

    head = {
        "model": pipeline.name,
        "weights": weights_hash(pipeline.file),
        "prompts": opt.prompts,
        "precision": opt.precision,
        "knobs": knobs,
    }
    results = {**head, "rows": {}} if opt.fresh else load_results(opt.results, head)
    exact: np.ndarray | None = None
    for number, row in enumerate(rows, 1):
        if row.key in results["rows"]:
            continue
        kept: list[np.ndarray] = []
        found = bench.measure(row, kept)
        if row.spacing is not None:
            if exact is None:
                exact = exact_flow(bench, row, kept)
            found["off_flow"] = round(float(np.sqrt(np.square(np.concatenate(kept) - exact).mean())), 4)
        results["rows"][row.key] = found
        save_results(opt.results, results)
        what = (
            f"Frechet {found['frechet']:.3f}"
            if "frechet" in found
            else f"{found['off_flow']:.3f} off the flow"
        )
        cli.say(
            f"[{number}/{len(rows)}] {row.key}: {100 * found['right'] / found['prompts']:.1f} % right, {what}, "
            f"{found['seconds']:.1f} s"
        )
    if opt.samplers:
        table = make_spaced_table(results, guidance)
        write(opt.results.with_suffix(".md"), table.encode())
        cli.say(table)
        return
    tables = make_tables(results, guidance)
    write(opt.results.with_suffix(".md"), tables.encode())
    draw_plot(results, guidance, opt.results.with_suffix(".png"))
    cli.say(tables)


if __name__ == "__main__":
    cli.run(main)
