"""The editing table: how often a picture is changed as its new prompt says, and stays as it was otherwise.

200 pictures of shapes that the model in the box has not seen (renders, seed 3) are inverted and edited: 50 changes each
of a colour, a shape, the place and the background. `ldm.shapes.checker` reads what comes out: an edit holds when the
new attribute is there and every other one as it was. How far a picture wanders beside that is measured, too: where the
objects' centres are (not for a change of place), and how far pixels are off where nothing was to change. Each finished
picture is saved at once; a second run does what is missing.

    python bench/editing.py                              # everything, into bench/results/editing.{json,md,png}
    python bench/editing.py --edits 20 --rows 'swap/*' --results /tmp/e.json
"""

import argparse
import json
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
SHEET = 8  # edits of each kind on the contact sheet
ADD_NOISE = "add noise (img2img)"
GENTLE = {"cross_replace_steps": 0.4, "self_replace_steps": 0.2}  # of prompt-to-prompt


@dataclass(frozen=True)
class Row:
    """A line of the table: a way to edit, how many steps are left out, by which inversion, at which guidance."""

    name: str
    start_step: int
    inversion: str = "ddim"
    guidance: float = GUIDANCE

    @property
    def key(self) -> str:
        further = ", ".join(
            [self.inversion] * (self.inversion != "ddim")
            + [f"g{self.guidance:g}"] * (self.guidance != GUIDANCE)
        )
        return f"{self.name}/{self.start_step}" + (f"/{further}" if further else "")


ROWS = [
    *(Row(ADD_NOISE, start) for start in (2, 4)),
    *(Row("swap", start) for start in (0, 1, 2, 4)),
    Row("swap", 0, guidance=STRONG),
    *(Row("swap", start, "edit_friendly") for start in (0, 2)),
    Row("prompt_to_prompt", 0),
    Row("prompt_to_prompt, gentle", 0),
    Row("mutual_self_attention", 0),
    Row("plug_and_play", 0),
    Row("diffedit", 1),
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
        "moved": None if kind == "place" else moved(seen, before),
        "off": off(np.asarray(picture, float), source, before) if kind in ("colour", "shape") else None,
    }


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
        if row.inversion not in inversions:
            how = {"steps": STEPS, "guidance_scale": 1.0, "measure": False}
            inversions[row.inversion] = sd.invert(picture, source, method=row.inversion, **how)
        scene = scene_of(sd, inversions[row.inversion], source, edit, row.start_step, row.guidance)
        found.append(editing.resolve_editor(editors.get(row.name, row.name))(scene))
    with torch.no_grad():
        decoded = pictures.to_pil(decode(sd.model, torch.cat(found)))
    return {row.key: image for row, image in zip(rows, decoded, strict=True)}


def run(count: int, path: Path, patterns: Sequence[str]) -> dict[str, Any]:
    """Edit what is missing in a results file by the rows whose keys match a pattern, and give all of it."""
    import ldm
    from ldm.shapes.scenes import render

    done: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    chosen = [row for row in ROWS if any(fnmatchcase(row.key, one) for one in patterns)]
    sd = ldm.StableDiffusion.default().optimize()
    strips = path.with_suffix("")
    strips.mkdir(parents=True, exist_ok=True)
    for number, (kind, before, after) in enumerate(plan(count)):
        one = done.setdefault(
            str(number), {"kind": kind, "source": before.caption, "edit": after.caption, "rows": {}}
        )
        rows = [row for row in chosen if row.key not in one["rows"]]
        if not rows:
            continue
        began = time.perf_counter()
        picture = render(before, 128)
        source = np.asarray(picture, float)
        images = edit_all(sd, before.caption, after.caption, picture, rows)
        one["rows"] |= {key: judged(image, kind, before, after, source) for key, image in images.items()}
        if number < SHEET * len(KINDS):
            picture.save(strips / f"{number:03d}.png")
            for row in rows:
                images[row.key].save(strips / f"{number:03d}-{ROWS.index(row):02d}.png")
        quality.write(path, json.dumps(done, indent=1).encode())
        print(f"{number + 1}/{count} {kind}: {time.perf_counter() - began:.1f} s", flush=True)
    return done


# --- the table --------------------------------------------------------------------------------------


def table(done: dict[str, Any]) -> str:
    """Write the results as Markdown."""
    lines = [
        "# Edits of pictures of shapes",
        "",
        f"Renders of unseen scenes, {STEPS} steps, inverted at guidance 1. Per cent of edits that hold: the new",
        "attribute is there, and every other one as it was. `moved`: how far the objects' centres are from where they",
        "were, median, per cent of a side, not for a change of place. `off`: of pixels away from the object whose",
        "colour or shape was changed, mean of 0 to 255; the first stage alone leaves about 0.5.",
        "",
        "| way | inversion | guidance | steps left out | edits | all | "
        + " | ".join(KINDS)
        + " | moved | off |",
        "|" + "---|" * (len(KINDS) + 8),
    ]
    for row in ROWS:
        of_row = [(one["kind"], one["rows"][row.key]) for one in done.values() if row.key in one["rows"]]
        if not of_row:
            continue
        shares = [np.mean([one["holds"] for _, one in of_row])]
        for kind in KINDS:
            held = [one["holds"] for what, one in of_row if what == kind]
            shares.append(np.mean(held) if held else float("nan"))
        moves = [one["moved"] for _, one in of_row if one["moved"] is not None]
        offs = [one["off"] for _, one in of_row if one["off"] is not None]
        inversion = "none" if row.name == ADD_NOISE else row.inversion
        numbers = " | ".join(f"{100 * share:.0f}" for share in shares)
        lines.append(
            f"| {row.name} | {inversion} | {row.guidance:g} | {row.start_step} of {STEPS} | {len(of_row)} | {numbers} "
            f"| {np.median(moves):.1f} | {np.mean(offs):.1f} |"
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=EDITS, help="how many, default %(default)s")
    parser.add_argument("--rows", nargs="+", default=["*"], help="shell patterns of keys, as 'swap/*'")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    done = run(options.edits, options.results, options.rows)
    quality.write(options.results.with_suffix(".md"), table(done).encode())
    contact_sheet(options.results)
    print(table(done))


if __name__ == "__main__":
    main()
