"""The editing table: how often a picture is changed as its new prompt says, and stays as it was otherwise.

200 pictures of shapes that the model in the box has not seen (renders, seed 3) are inverted and edited: 50 changes each
of a colour, a shape, the place and the background. `ldm.shapes.checker` reads what comes out: an edit holds when the
new attribute is there and every other one as it was. How far a picture wanders beside that is measured, too: where the
objects' centres are (not for a change of place), and how far pixels are off where nothing was to change. Each finished
picture is saved at once; a second run does what is missing.

    python bench/editing.py                              # everything, into bench/results/editing.{json,md,png}
    python bench/editing.py --edits 20 --results /tmp/e.json
"""

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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
SHEET = 8  # edits of each kind on the contact sheet
ADD_NOISE = "add noise (img2img)"
GENTLE = {"cross_replace_steps": 0.4, "self_replace_steps": 0.2}  # of prompt-to-prompt


@dataclass(frozen=True)
class Row:
    """A line of the table: a way to edit, and how many steps are left out."""

    name: str
    start_step: int

    @property
    def key(self) -> str:
        return f"{self.name}/{self.start_step}"


ROWS = [
    *(Row(ADD_NOISE, start) for start in (2, 4)),
    *(Row("swap", start) for start in (0, 1, 2, 4)),
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


def edit_all(sd: Any, source: str, edit: str, picture: "Image.Image") -> dict[str, "Image.Image"]:
    """Edit a picture by every row; the inversion is shared."""
    import torch

    from ldm import editing
    from ldm import images as pictures
    from ldm.adapters import PromptToPrompt
    from ldm.edit import encode_picture, scene_of
    from ldm.generate import decode

    editors = {"prompt_to_prompt, gentle": PromptToPrompt(**GENTLE)}
    inversion = sd.invert(picture, source, steps=STEPS, guidance_scale=1.0, measure=False)
    found = {}
    for row in ROWS:
        if row.name == ADD_NOISE:
            continue
        scene = scene_of(sd, inversion, source, edit, row.start_step, GUIDANCE)
        found[row.key] = editing.resolve_editor(editors.get(row.name, row.name))(scene)
    with torch.no_grad():
        decoded = pictures.to_pil(decode(sd.model, torch.cat(list(found.values()))))
    images = dict(zip(found, decoded, strict=True))
    for row in ROWS:
        if row.name == ADD_NOISE:
            strength = 1 - row.start_step / STEPS
            how = {"steps": STEPS, "guidance_scale": GUIDANCE, "sampler": "ddim", "progress": False}
            images[row.key] = sd.img2img(edit, picture, strength, seed=0, **how)[0]
    z, _ = encode_picture(sd, picture)
    with torch.no_grad():
        images["first stage"] = pictures.to_pil(decode(sd.model, z))[0]
    return images


def run(count: int, path: Path) -> dict[str, Any]:
    """Edit what is missing in a results file, and give all of it."""
    from PIL import Image

    import ldm
    from ldm.shapes.scenes import render

    done: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    sd = ldm.StableDiffusion.default().optimize()
    sheet_folder = path.with_suffix("")
    sheet_folder.mkdir(parents=True, exist_ok=True)
    taken = {kind: 0 for kind in KINDS}
    for number, (kind, before, after) in enumerate(plan(count)):
        taken[kind] += 1
        if str(number) in done:
            continue
        began = time.perf_counter()
        picture = render(before, 128)
        source = np.asarray(picture, float)
        images = edit_all(sd, before.caption, after.caption, picture)
        done[str(number)] = {
            "kind": kind,
            "source": before.caption,
            "edit": after.caption,
            "rows": {key: judged(image, kind, before, after, source) for key, image in images.items()},
            "seconds": round(time.perf_counter() - began, 2),
        }
        if taken[kind] <= SHEET:
            strip = [picture, *images.values()]
            sheet = Image.new("RGB", (128 * len(strip), 128))
            for i, one in enumerate(strip):
                sheet.paste(one, (128 * i, 0))
            sheet.save(sheet_folder / f"{number:03d}.png")
        half = path.with_suffix(".half")
        half.write_text(json.dumps(done, indent=1))
        os.replace(half, path)
        print(f"{number + 1}/{count} {kind}: {done[str(number)]['seconds']} s", flush=True)
    return done


# --- the table --------------------------------------------------------------------------------------


def table(done: dict[str, Any]) -> str:
    """Write the results as Markdown."""
    lines = [
        f"# Edits of {len(done)} pictures",
        "",
        f"Renders of unseen scenes, {STEPS} steps of DDIM, inverted at guidance 1 and edited at guidance {GUIDANCE:g}.",
        "Per cent of edits that hold: the new attribute is there, and every other one as it was. `moved`: how far the",
        "objects' centres are from where they were, median, per cent of a side, not for a change of place. `off`: of",
        "pixels away from the object whose colour or shape was changed, mean of 0 to 255.",
        "",
        "| way | steps left out | all | " + " | ".join(KINDS) + " | moved | off |",
        "|---|---|---|" + "---|" * (len(KINDS) + 2),
    ]
    for row in ROWS:
        of_row = [(one["kind"], one["rows"][row.key]) for one in done.values()]
        shares = [100 * np.mean([one["holds"] for _, one in of_row])]
        for kind in KINDS:
            held = [one["holds"] for what, one in of_row if what == kind]
            shares.append(100 * np.mean(held) if held else float("nan"))
        moves = [one["moved"] for _, one in of_row if one["moved"] is not None]
        offs = [one["off"] for _, one in of_row if one["off"] is not None]
        numbers = " | ".join(f"{share:.0f}" for share in shares)
        lines.append(
            f"| {row.name} | {row.start_step} of {STEPS} | {numbers} | {np.median(moves):.1f} | {np.mean(offs):.1f} |"
        )
    first = [one["rows"]["first stage"] for one in done.values()]
    rest = [one["off"] for one in first if one["off"] is not None]
    lines += ["", f"The first stage alone, with nothing edited, is {np.mean(rest):.1f} off."]
    return "\n".join(lines) + "\n"


def contact_sheet(path: Path) -> None:
    """Join the strips of a run into one picture beside its results: source, then every row in the table's order."""
    from PIL import Image

    strips = [Image.open(one) for one in sorted(path.with_suffix("").glob("*.png"))]
    if not strips:
        return
    sheet = Image.new("RGB", (strips[0].width // 2, len(strips) * 64))
    for i, strip in enumerate(strips):
        sheet.paste(strip.resize((strip.width // 2, 64)), (0, 64 * i))
    sheet.save(path.with_suffix(".png"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edits", type=int, default=EDITS, help="how many, default %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    done = run(options.edits, options.results)
    options.results.with_suffix(".md").write_text(table(done))
    contact_sheet(options.results)
    print(table(done))


if __name__ == "__main__":
    main()
