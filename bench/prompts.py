"""What prompts in A1111's language cost, and what their brackets do to pictures of the model in the box.

Cost: prompts of shapes painted plain and with brackets (a weight and a change of colour each), in turn: calls of the
text encoder, rows that it saw and how many of these were distinct, and the processor's seconds, to which other programs
on the machine add little; and what reading a prompt takes.
With --sheet: pictures by the same seeds for each of ROWS, some of them in a contact sheet with the checker's verdict.

    python bench/prompts.py                          # into bench/results/prompts.{json,md}
    python bench/prompts.py --sheet                  # and prompts.png
    python bench/prompts.py --prompts 8 --steps 5 --results /tmp/p.json
"""

import json
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import quality  # noqa: E402
from ldm import cli  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "prompts.json"
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink")
SHOWN = 6  # pictures of a row in the sheet
HERE = "circle on the left on a white background"
LONG = f"a large red {HERE}"
# What is painted -> what is looked for in the picture.
ROWS = {
    LONG: {"red": LONG},
    f"a large (red:1.4) {HERE}": {"red": LONG},
    f"a large (red:0.4) {HERE}": {"red": LONG},
    **{
        f"a large [red:blue:{when}] {HERE}": {"red": LONG, "blue": LONG.replace("red", "blue")}
        for when in (0.1, 0.5, 0.9)
    },
    "a small red circle on the left on a white background AND a small blue square on the right on a white background": {
        "both": "a small red circle to the left of a small blue square on a white background"
    },
    f"{LONG} AND {LONG.replace('red', 'blue')}": {
        colour: LONG.replace("red", colour) for colour in ("red", "blue", "purple")
    },
    ", ".join([LONG] * 19): {"red": LONG},
}


def with_brackets(caption: str) -> str:
    """Give a caption's first colour a weight and its shape's colour a change half-way to the next one."""
    words = caption.split()
    place = next(i for i, word in enumerate(words) if word in COLOURS)
    colour = words[place]
    after = COLOURS[(COLOURS.index(colour) + 1) % len(COLOURS)]
    words[place] = f"([{colour}:{after}:0.5]:1.2)"
    return " ".join(words)


def rows_seen(encoder: Any, work: Any) -> tuple[int, list[tuple[int, ...]], float]:
    """Run a piece of work, and give the text encoder's calls, its rows of token numbers, and the seconds."""
    calls: list[list[tuple[int, ...]]] = []
    hook = encoder.transformer.register_forward_hook(
        lambda module, args, kwargs, out: calls.append(
            [tuple(row) for row in (kwargs.get("input_ids") if not args else args[0]).tolist()]
        ),
        with_kwargs=True,
    )
    began = time.process_time()
    try:
        work()
    finally:
        hook.remove()
    return len(calls), [row for rows in calls for row in rows], time.process_time() - began


def measure_cost(sd: Any, count: int, steps: int, batch: int, rounds: int) -> dict[str, Any]:
    """Paint `count` captions plain and with brackets, in turn."""
    from ldm.prompt import read
    from ldm.shapes.scenes import shapes_prompts

    plain = shapes_prompts(count, seed=1)
    texts = {"plain": plain, "a1111": [with_brackets(text) for text in plain]}
    found: dict[str, Any] = {name: {"seconds": []} for name in texts}
    encoder = sd.model.cond_stage_model
    for number in range(rounds + 1):  # the first one warms up, with one batch
        for name, prompts in texts.items():
            some = prompts if number else prompts[:batch]
            how = {
                "prompt_syntax": name,
                "steps": steps,
                "seed": 1,
                "batch_size": batch,
                "output_type": "latent",
            }
            calls, rows, seconds = rows_seen(encoder, partial(sd.txt2img, some, progress=False, **how))
            if number:
                found[name]["seconds"].append(seconds)
                found[name] |= {"calls": calls, "rows": len(rows), "distinct": len(set(rows))}
    found["ratio"] = median(found["a1111"]["seconds"]) / median(found["plain"]["seconds"])
    reading = {**texts, "a1111, 200 tokens": [", ".join([LONG] * 19)]}
    found["reading_us"] = {}
    for name, prompts in reading.items():
        times = []
        for _ in range(20):
            for text in prompts:
                began = time.process_time()
                read(text, name.split(",")[0], encoder=encoder, steps=steps)
                times.append(1e6 * (time.process_time() - began))
        found["reading_us"][name] = median(times)
    return found


def paint_sheet(sd: Any, count: int, steps: int, path: Path) -> list[dict[str, Any]]:
    """Paint every row with the same seeds, let the checker judge, and save some of the pictures as a sheet."""
    from ldm.images import save_file
    from ldm.labels import Label, labelled
    from ldm.shapes.checker import check

    rows, pictures, labels = [], [], []
    for prompt, claims in ROWS.items():
        seeds = list(range(1, count + 1))
        how = {"prompt_syntax": "a1111", "steps": steps, "seed": seeds, "num_images": count, "batch_size": 4}
        out = sd.txt2img(prompt, progress=False, **how)
        right = {
            name: sum(check(image, claim).holds for image in out.images) for name, claim in claims.items()
        }
        rows.append({"prompt": prompt, "claims": claims, "right": right, "pictures": count})
        pictures += out.images[:SHOWN]
        told = prompt if len(prompt) < 120 else f"{prompt[:60]} ... ({prompt.count(',') + 1} times)"
        verdict = ", ".join(f"{name} {n} of {count}" for name, n in right.items())
        labels.append([Label(told), Label(verdict)])
        cli.say(f"{told}: {verdict}")
    width = pictures[0].width
    sheet = labelled(pictures, [[] for _ in pictures[:SHOWN]], labels, left=3 * width).quantize(256)
    save_file(lambda file: sheet.save(file, format="PNG", optimize=True), path)
    return rows


def make_table(results: dict[str, Any]) -> str:
    """Lay the figures out as Markdown."""
    lines = [
        "# Prompts in A1111's language",
        "",
        f"{results['model']}, weights {results['weights'][:10]}, {results['prompts']} prompts, {results['steps']} "
        f"steps of DDIM, {results['batch']} at once, medians of {results['rounds']} rounds in turn. Made by "
        f"`python bench/prompts.py` on {results['machine']}.",
        "",
    ]
    if cost := results.get("cost"):
        lines += [
            "| prompts | calls of the text encoder | rows | distinct | processor, s | reading a prompt, us |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for name in ("plain", "a1111"):
            one = cost[name]
            numbers = (one["calls"], one["rows"], one["distinct"], f"{median(one['seconds']):.1f}")
            lines.append(f"| {name} | {' | '.join(map(str, numbers))} | {cost['reading_us'][name]:.0f} |")
        lines += [
            "",
            f"The brackets' time over the plain prompts': {cost['ratio']:.2f}. A prompt of 200 tokens is read",
        ]
        lines += [f"in {cost['reading_us']['a1111, 200 tokens']:.0f} us.", ""]
    if rows := results.get("sheet"):
        lines += ["| painted | the checker sees |", "|---|---|"]
        for row in rows:
            seen = ", ".join(f"{name} {n} of {row['pictures']}" for name, n in row["right"].items())
            text = row["prompt"] if len(row["prompt"]) < 120 else f"{LONG}, 19 times: 200 tokens and more"
            lines.append(f"| `{text}` | {seen} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(description="Measure what A1111's prompts cost, and look at what they do.")
    parser.add_argument("--prompts", type=cli.integer(2, 10_000), default=64)
    parser.add_argument("--steps", type=cli.integer(1, 1000), default=20)
    parser.add_argument("--batch", type=cli.integer(1, 1024), default=16, help="pictures painted at once")
    parser.add_argument("--rounds", type=cli.integer(1, 100), default=2)
    parser.add_argument("--sheet", action="store_true", help="paint the contact sheet as well")
    parser.add_argument("--seeds", type=cli.integer(SHOWN, 1000), default=16, help="pictures of a row")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file; .md and .png go beside it")
    opt = parser.parse_args(argv)
    sd = quality.load_pipeline(None, None, "cpu")
    sd.optimize()
    results = {
        "model": sd.name,
        "weights": quality.weights_hash(sd.file),
        "machine": quality.machine_name(sd),
        **{name: getattr(opt, name) for name in ("prompts", "steps", "batch", "rounds")},
    }
    if opt.results.exists():  # a sheet of the same weights and steps stays
        before = json.loads(opt.results.read_text())
        if all(before.get(name) == results[name] for name in ("weights", "steps")) and "sheet" in before:
            results["sheet"] = before["sheet"]
    if opt.sheet:
        results["sheet"] = paint_sheet(sd, opt.seeds, opt.steps, opt.results.with_suffix(".png"))
    results["cost"] = measure_cost(sd, opt.prompts, opt.steps, opt.batch, opt.rounds)
    quality.write(opt.results, (json.dumps(results, indent=1) + "\n").encode())
    table = make_table(results)
    quality.write(opt.results.with_suffix(".md"), table.encode())
    cli.say(table)


if __name__ == "__main__":
    cli.run(main)
