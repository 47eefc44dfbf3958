"""The editing table: how often a picture is changed as its new prompt says, and stays as it was otherwise.

200 pictures of shapes that the model in the box has not seen (renders, seed 3) are inverted and edited: 50 changes each
of a colour, a shape, the place and the background. `ldm.shapes.checker` reads what comes out: an edit holds when the
new attribute is there and every other one as it was. How far a picture wanders beside that is measured, too: where the
objects' centres are (not for a change of place), and how far pixels are off where nothing was to change. Each finished
picture is saved at once; a second run does what is missing.

    python bench/editing.py --optimize                   # everything, into bench/results/editing.{json,md,png}
    python bench/editing.py --edits 20 --rows 'swap/*' --results /tmp/e.json
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import quality  # noqa: E402
from ldm import cli  # noqa: E402
from ldm.errors import UsageError  # noqa: E402

if TYPE_CHECKING:
    from PIL import Image

    from ldm.shapes.checker import Sighting
    from ldm.shapes.scenes import Scene

RESULTS = Path(__file__).parent / "results" / "editing.json"
KINDS = ("colour", "shape", "place", "background")
EDITS = 200
STEPS = 10
SEED = 3  # of the scenes
GUIDANCE = 3.0  # the box's own
STRONG = 7.0
SHEET = 3  # edits of each kind on the contact sheet
ADD_NOISE = "add noise (img2img)"
GENTLE = {"cross_replace_steps": 0.4, "self_replace_steps": 0.2}  # of prompt-to-prompt
CONTROLS = ("prompt_to_prompt", "prompt_to_prompt, gentle", "mutual_self_attention", "plug_and_play")


@dataclass(frozen=True)
class Row:
    """A line of the table: a way to edit, how many steps are left out, by which inversion, at which guidance.

    up is the guidance on the way up; None is edit's default: 1, or as on the way down where more than latents is kept.
    """

    name: str
    start_step: int
    inversion: str = "ddim"
    guidance: float = GUIDANCE
    up: float | None = None

    @property
    def key(self) -> str:
        further = [self.inversion] * (self.inversion != "ddim")
        further += [f"g{self.guidance:g}"] * (self.guidance != GUIDANCE)
        further += [] if self.up is None else [f"up {self.up:g}"]
        return f"{self.name}/{self.start_step}" + (f"/{', '.join(further)}" if further else "")


ROWS = [
    *(Row(ADD_NOISE, start) for start in (2, 4)),
    *(Row("swap", start) for start in (0, 1, 2, 3, 4)),
    Row("swap", 0, guidance=STRONG),
    *(Row("swap", start, "edit_friendly") for start in (0, 2, 3)),
    Row("swap", 0, "edit_friendly", up=1.0),
    *(Row("swap", 0, "belm", up=up) for up in (1.0, GUIDANCE)),
    *(Row("swap", 0, other) for other in ("negative_prompt", "null_text")),
    *(Row(name, 0, inversion) for inversion in ("ddim", "edit_friendly") for name in CONTROLS),
    *(Row("diffedit", start, inversion) for start, inversion in ((1, "ddim"), (0, "edit_friendly"))),
    Row("dds", 0),
]


# --- what is changed --------------------------------------------------------------------------------


def plan(count: int) -> list[tuple[str, "Scene", "Scene"]]:
    """List edits: what is changed, the scene, and what is to become of it; the kinds in turn."""
    from ldm.shapes.scenes import evaluation_scenes

    found: list[tuple[str, Scene, Scene]] = []
    rng = np.random.default_rng(SEED)
    for scene in evaluation_scenes(4 * count, SEED):
        kind = KINDS[len(found) % len(KINDS)]
        changed = change(scene, kind, rng)
        if changed is not None:
            found.append((kind, scene, changed))
        if len(found) == count:
            break
    return found


def change(scene: "Scene", kind: str, rng: np.random.Generator) -> "Scene | None":
    """Change one thing of a scene to another that the model has seen; None where this scene cannot."""
    from ldm.shapes.scenes import BACKGROUNDS, COLOURS, HELD_OUT, PLACES, RELATIONS, SHAPES

    def other(options: Any, than: str) -> str:
        options = [one for one in options if one != than]
        return options[int(rng.integers(len(options)))]

    if kind == "background":
        return replace(scene, background=other(BACKGROUNDS, scene.background))
    if kind == "place":
        return replace(scene, where=other(PLACES if len(scene.items) == 1 else RELATIONS, scene.where))
    first, *others = scene.items
    options = COLOURS if kind == "colour" else SHAPES
    first = replace(first, **{kind: other(options, getattr(first, kind))})
    pairs = [(one.colour, one.shape) for one in (first, *others)]
    if len(set(pairs)) < len(pairs) or HELD_OUT & set(pairs):
        return None
    return replace(scene, items=(first, *others))


def judged(picture: "Image.Image", kind: str, before: "Scene", after: "Scene", source: np.ndarray) -> dict:
    """Say how an edit did: whether it holds, how far objects went, how far the rest is off."""
    from ldm.shapes.checker import judge, see

    seen = see(picture)
    wanted = after.claim
    verdict = judge(seen, wanted)
    return {
        "holds": bool(verdict.holds),
        "moved": None if kind == "place" else rounded(moved(seen, before)),
        "off": rounded(off(np.asarray(picture, float), source, before))
        if kind in ("colour", "shape")
        else None,
    }


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def moved(seen: "Sighting", before: "Scene") -> float | None:
    """Measure how far the objects' centres are from where they were, in per cent of the picture; the furthest one."""
    if len(seen.objects) != len(before.items):
        return None
    centres = np.array([(one.x, one.y) for one in seen.objects])
    ways = [centres, centres[::-1]]
    were = np.array([(one.x, one.y) for one in before.items])
    return float(min(100 * np.linalg.norm(way - were, axis=1).max() for way in ways))


def off(picture: np.ndarray, source: np.ndarray, before: "Scene") -> float:
    """Measure how far pixels (0 to 255) are off, on average, away from the object that was to change."""
    side = source.shape[0]
    item = before.items[0]
    reach = (item.extent / 2 + 0.06) * side
    y, x = np.mgrid[:side, :side] + 0.5
    away = (np.abs(x - item.x * side) > reach) | (np.abs(y - item.y * side) > reach)
    return float(np.abs(picture - source)[away].mean())


# --- editing ----------------------------------------------------------------------------------------


def way_up(row: Row) -> float:
    """Give the guidance of a row's way up, as edit chooses it."""
    from ldm.models.diffusion.inversion import resolve_method

    if row.up is not None:
        return row.up
    return 1.0 if resolve_method(row.inversion).from_latents else row.guidance


def edit_all(
    sd: Any, source: str, edit: str, picture: "Image.Image", rows: Sequence[Row]
) -> dict[str, "Image.Image"]:
    """Edit a picture by several rows, which share their inversions."""
    import torch

    from ldm import editing
    from ldm import images as pictures
    from ldm.adapters import PromptToPrompt
    from ldm.edit import scene_of
    from ldm.generate import decode

    editors = {"prompt_to_prompt, gentle": PromptToPrompt(**GENTLE), ADD_NOISE: "add_noise"}
    inversions: dict[str, Any] = {}
    found = []
    for row in rows:
        up = way_up(row)
        if (row.inversion, up) not in inversions:
            inversions[row.inversion, up] = sd.invert(
                picture, source, method=row.inversion, steps=STEPS, guidance_scale=up, measure=False
            )
        scene = scene_of(sd, inversions[row.inversion, up], source, edit, row.start_step, row.guidance)
        found.append(editing.resolve_editor(editors.get(row.name, row.name))(scene))
    with torch.no_grad():
        decoded = pictures.to_pil(decode(sd.model, torch.cat(found)))
    return {row.key: image for row, image in zip(rows, decoded, strict=True)}


def run(sd: Any, opt: argparse.Namespace) -> dict[str, Any]:
    """Edit what is missing in a results file by the rows whose keys match a pattern, and give all of it."""
    from ldm.shapes.scenes import render

    head = {"model": sd.name, "weights": quality.weights_hash(sd.file), "steps": STEPS}
    results = {**head, "rows": {}} if opt.fresh else quality.load_results(opt.results, head)
    done = results["rows"]
    chosen = [row for row in ROWS if any(fnmatchcase(row.key, one) for one in opt.rows)]
    strips = opt.results.with_suffix("")
    strips.mkdir(parents=True, exist_ok=True)
    for number, (kind, before, after) in enumerate(plan(opt.edits)):
        one = done.setdefault(
            str(number), {"kind": kind, "source": before.caption, "edit": after.caption, "ways": {}}
        )
        rows = [row for row in chosen if row.key not in one["ways"]]
        if not rows:
            continue
        began = time.perf_counter()
        picture = render(before, 128)
        source = np.asarray(picture, float)
        images = edit_all(sd, before.caption, after.caption, picture, rows)
        one["ways"] |= {key: judged(image, kind, before, after, source) for key, image in images.items()}
        if number < SHEET * len(KINDS):
            picture.save(strips / f"{number:03d}.png")
            for row in rows:
                images[row.key].save(strips / f"{number:03d}-{ROWS.index(row):02d}.png")
        quality.save_results(opt.results, results)
        cli.say(f"{number + 1}/{opt.edits} {kind}: {time.perf_counter() - began:.1f} s")
    return results


# --- the table --------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """Write the results as Markdown."""
    done = results["rows"]
    lines = [
        "# Edits of pictures of shapes",
        "",
        f"{results['model']}, weights {results['weights'][:10]}: renders of unseen scenes, {results['steps']} steps.",
        "Per cent of edits that hold: the new attribute is there, every other one as it was. `guidance`: on the way",
        "up, down. `moved`: how far the objects' centres are from where they were, median, per cent of a side, not for",
        "a change of place. `off`: of pixels away from the object whose colour or shape was changed, mean of 0 to 255;",
        "the first stage alone leaves about 0.5. Made by `python bench/editing.py --optimize`.",
        "",
        "| way | inversion | guidance | steps left out | edits | all | "
        + " | ".join(KINDS)
        + " | moved | off |",
        "|" + "---|" * (len(KINDS) + 8),
    ]
    for row in ROWS:
        of_row = [(one["kind"], one["ways"][row.key]) for one in done.values() if row.key in one["ways"]]
        if not of_row:
            continue
        shares = [np.mean([one["holds"] for _, one in of_row])]
        for kind in KINDS:
            held = [one["holds"] for what, one in of_row if what == kind]
            shares.append(np.mean(held) if held else float("nan"))
        moves = [one["moved"] for _, one in of_row if one["moved"] is not None]
        offs = [one["off"] for _, one in of_row if one["off"] is not None]
        none = row.name in (ADD_NOISE, "dds")
        inversion, up = ("none", "") if none else (row.inversion, f"{way_up(row):g}, ")
        numbers = " | ".join(f"{100 * share:.0f}" for share in shares)
        lines.append(
            f"| {row.name} | {inversion} | {up}{row.guidance:g} | {row.start_step} of {STEPS} "
            f"| {len(of_row)} | {numbers} | {np.median(moves):.1f} | {np.mean(offs):.1f} |"
        )
    return "\n".join(lines) + "\n"


def contact_sheet(path: Path) -> None:
    """Join the pictures of a run into one beside its results: a line an edit, the source first, then each row."""
    from PIL import Image

    strips = path.with_suffix("")
    sources = sorted(strips.glob("???.png"))
    sheet = Image.new("RGB", (64 * (1 + len(ROWS)), 64 * max(1, len(sources))), "white")
    for line, source in enumerate(sources):
        for column, one in enumerate(
            [source, *(strips / f"{source.stem}-{i:02d}.png" for i in range(len(ROWS)))]
        ):
            if one.exists():
                sheet.paste(Image.open(one).resize((64, 64)), (64 * column, 64 * line))
    sheet.save(path.with_suffix(".png"))


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--edits", type=cli.integer(1, 10_000), default=EDITS, help="how many, default %(default)s"
    )
    parser.add_argument("--rows", nargs="+", default=["*"], help="shell patterns of keys, as 'swap/*'")
    parser.add_argument("--optimize", action="store_true", help="by ldm.kernels; same numbers up to rounding")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file; .md and .png go beside it")
    parser.add_argument("--fresh", action="store_true", help="begin again, whatever --results holds")
    opt = parser.parse_args(argv)
    for pattern in opt.rows:
        if not any(fnmatchcase(row.key, pattern) for row in ROWS):
            raise UsageError(
                f"--rows '{pattern}' matches no row; they are {', '.join(row.key for row in ROWS)}"
            )
    pipeline = quality.load_pipeline(None, None, "cpu")
    results = run(pipeline.optimize() if opt.optimize else pipeline, opt)
    quality.write(opt.results.with_suffix(".md"), table(results).encode())
    contact_sheet(opt.results)
    cli.say(table(results))


if __name__ == "__main__":
    cli.run(main)
