"""Editing at full size: every inversion and every editor once, on the shapes of Stable Diffusion v1, on a CPU.

What it shows is that they run there, that exact inversions come back, and what each holds in memory: at its peak above
the loaded model, of the inversion, and of attention maps from one call of the UNet to the next. The weights
are made up as the speed table's are, so the pictures show nothing; the noise predicted has a root mean square
near 1, as a trained model's has. Each finished row is saved at once; a second run does what is missing.

    python bench/full_size_edits.py --optimize --precision bfloat16   # into bench/results/full-size-edits.{json,md}
    python bench/full_size_edits.py --rows 'invert/*' --results /tmp/f.json
    python bench/full_size_edits.py --ckpt v1-5-pruned-emaonly.safetensors --results /tmp/real.json
"""

import contextlib
import ctypes
import functools
import gc
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the tests have the means to make weights up

from bench import quality  # noqa: E402
from ldm import cli  # noqa: E402
from ldm.errors import UsageError  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "full-size-edits.json"
STEPS = 4
START_STEP = 1  # of the edits, as an edit's own default leaves three in ten out
GUIDANCE = 3.0
SOURCE = "a large red circle on the left on a white background"
EDIT = "a large blue circle on the left on a white background"
# At most so many iterations of a step, so that a row ends: no more is to be seen in these than that they run.
FEW = {"fixed_point": {"iterations": 3}, "anderson": {"iterations": 3}, "null_text": {"iterations": 1}}
PLAIN = (
    "ddim",
    "fixed_point",
    "anderson",
    "dpmpp_2m",
)  # unguided: guidance is what they do not come back from
Row = Callable[["Bench"], dict[str, Any]]


# --- what a process and its objects hold --------------------------------------------------------------


def memory(field: str) -> int:
    """Give a figure of this process's memory in bytes, as Linux counts it: VmRSS now, VmHWM at the most.

    Raises:
        UsageError: another system.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        raise UsageError(
            "this bench reads a process's peak memory from /proc, which Linux has; run it there"
        ) from None
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def forget_peak() -> None:
    """Give freed memory back to the system and begin to watch for a new peak."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def tensors_in(thing: Any, but: Sequence[str] = ()) -> Iterator[Any]:
    """Walk through lists, tuples, dictionaries and the fields of ldm's own objects, and give every tensor.

    Args:
        but: names of fields that are left out.
    """
    from torch import Tensor, nn

    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for name, one in thing.items():
            if name not in but:
                yield from tensors_in(one, but)
    elif isinstance(thing, list | tuple):
        for one in thing:
            yield from tensors_in(one, but)
    elif type(thing).__module__.startswith("ldm.") and not isinstance(thing, nn.Module):
        yield from tensors_in(getattr(thing, "__dict__", {}), but)


def bytes_in(thing: Any, but: Sequence[str] = ()) -> int:
    """Add up what the tensors in a thing take, each memory once."""
    storages = [one.untyped_storage() for one in tensors_in(thing, but)]
    return sum({one.data_ptr(): one.nbytes() for one in storages}.values())


def bytes_of_maps(control: Any) -> int:
    """Add up what a control of attention keeps of attention: all but what it is told of a batch and a step."""
    return bytes_in(control, but=("_of_batch", "_step", "masks", "chosen", "kept"))


# --- the rows ---------------------------------------------------------------------------------------


class Bench:
    """The model, and what is counted while a row is measured.

    Attributes:
        asked: pictures that the UNet was asked about; a guided one counts twice.
        controls: those of attention that were attached.
    """

    def __init__(self, sd: Any, steps: int = STEPS):
        from ldm.adapters.attention_control import AttentionControl
        from ldm.models.introspect import native_size
        from ldm.shapes.scenes import evaluation_scenes, render

        self.sd, self.steps = sd, steps
        self.size = native_size(sd.model)
        self.picture = render(evaluation_scenes(1)[0], self.size[0])
        self.asked, self.controls = 0, []
        sd.model.model.diffusion_model.register_forward_pre_hook(self._count)
        begin = AttentionControl.begin

        def begun(control: Any) -> Any:
            mine = begin(control)
            self.controls.append(mine)
            return mine

        AttentionControl.begin = begun
        self.close = lambda: setattr(AttentionControl, "begin", begin)

    def _count(self, unet: Any, args: tuple[Any, ...]) -> None:
        self.asked += len(args[0])

    @functools.cached_property
    def latents(self) -> Any:
        from ldm.edit import encode_picture

        return encode_picture(self.sd, self.picture)[0]

    @functools.cached_property
    def inversion(self) -> Any:
        """What the editors begin with; no row pays for it."""
        return self.sd.invert(self.picture, SOURCE, steps=self.steps, guidance_scale=1.0, measure=False)

    def decoded(self, x: Any) -> list[Any]:
        import torch

        from ldm.generate import decode
        from ldm.images import to_pil

        with torch.no_grad():
            return to_pil(decode(self.sd.model, x))  # which refuses values that are not finite

    def measure(self, key: str) -> dict[str, Any]:
        """Run a row and say what it took."""
        row = ROWS[key]
        if key.startswith("edit/"):
            self.inversion  # noqa: B018 (made before it is measured)
        self.latents  # noqa: B018
        forget_peak()
        before, began = memory("VmRSS"), time.process_time()
        self.asked, self.controls = 0, []
        found = row(self)
        seconds, peak = time.process_time() - began, memory("VmHWM") - before
        images = found.pop("images")
        sizes = sorted({one.size for one in images})
        if sizes != [self.size]:
            raise UsageError(f"{key} gave pictures of {sizes}, wanted {self.size}")
        maps = [bytes_of_maps(one) for one in self.controls]
        return {
            "asked": self.asked,
            "seconds": round(seconds, 1),
            "peak": peak,
            "maps": max(maps) if maps else None,
            "pictures": len(images),
            **found,
        }


def inverted(name: str, guidance: float) -> Row:
    """Invert and walk down again, by the functions with the tutorial's names."""

    def row(bench: Bench) -> dict[str, Any]:
        from ldm import edit

        inversion = edit.invert(
            bench.latents, SOURCE, guidance, bench.steps, sd=bench.sd, method=name, **FEW.get(name, {})
        )
        return {
            "images": bench.decoded(inversion.reconstruction),
            "guidance": guidance,
            "error": inversion.error.item(),
            "signal": bench.latents.square().mean().sqrt().item(),
            "states": bytes_in([inversion.states, inversion.memory]),
        }

    return row


def tutorial(bench: Bench) -> dict[str, Any]:
    """The tutorial's three functions, with its levels."""
    from ldm import edit

    how = {"num_inference_steps": bench.steps, "sd": bench.sd, "method": edit.TUTORIAL}
    latents = edit.invert(bench.latents, SOURCE, 1.0, **how)
    if len(latents) != bench.steps - 2:
        raise UsageError(
            f"the tutorial's invert gave {len(latents)} latents of {bench.steps} steps, wanted 2 fewer"
        )
    images = edit.sample(SOURCE, START_STEP, latents[-(START_STEP + 1)][None], 1.0, **how)
    images.append(
        edit.edit(
            bench.picture,
            SOURCE,
            EDIT,
            bench.steps,
            START_STEP,
            GUIDANCE,
            sd=bench.sd,
            method=edit.TUTORIAL,
        )
    )
    return {"images": images, "guidance": GUIDANCE, "states": bytes_in(latents)}


def edited(make: Callable[[], Any]) -> Row:
    """Edit what was inverted once for all of them."""

    def row(bench: Bench) -> dict[str, Any]:
        from ldm.edit import scene_of
        from ldm.editing import resolve_editor

        scene = scene_of(bench.sd, bench.inversion, SOURCE, EDIT, START_STEP, GUIDANCE)
        return {"images": bench.decoded(resolve_editor(make())(scene)), "guidance": GUIDANCE}

    return row


def masked(bench: Bench) -> dict[str, Any]:
    """The whole of `StableDiffusion.edit`, with a feathered mask: encoding, inversion, measuring, edit."""
    import numpy as np
    from PIL import Image

    feather = 8
    mask = Image.new("L", bench.size)
    mask.paste(255, (0, 0, bench.size[0] // 2, bench.size[1]))
    how = {"steps": bench.steps, "start_step": START_STEP, "guidance_scale": GUIDANCE}
    done = bench.sd.edit(bench.picture, SOURCE, EDIT, mask=mask, feather=feather, **how)
    outside = slice(bench.size[0] // 2 + 2 * feather, None)
    kept, source = (np.asarray(one)[:, outside] for one in (done.images[0], done.source))
    if not (kept == source).all():
        raise UsageError("pixels outside of the mask changed")
    return {
        "images": [*done.images, done.reconstruction],
        "guidance": GUIDANCE,
        "error": done.inversion.error.item(),
        "states": bytes_in([done.inversion.states, done.inversion.memory]),
    }


def explained(picture: bool) -> Row:
    """Maps of words, of a prompt that is painted and of a picture."""

    def row(bench: Bench) -> dict[str, Any]:
        how = {"steps": bench.steps, "guidance_scale": 1.0 if picture else GUIDANCE}
        what = [bench.picture, SOURCE] if picture else [SOURCE]
        seen = bench.sd.explain(*what, **how)
        return {"images": [seen.image, *map(seen.overlay, seen.words)], "guidance": how["guidance_scale"]}

    return row


def prompt_to_prompt() -> Any:
    from ldm.adapters import LocalBlend, PromptToPrompt

    return PromptToPrompt(equalizer={"blue": 2.0}, local_blend=LocalBlend("circle", start=0.0))


def mutual(masked: bool) -> Any:
    import torch

    from ldm.adapters import MutualSelfAttention

    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :5] = 1
    return MutualSelfAttention(start_layer=0, mask=mask if masked else None)


def diffedit() -> Any:
    from ldm.editing import DiffEdit

    return DiffEdit(draws=1)


def dds() -> Any:
    from ldm.editing import DDS

    return DDS(iterations=2)


def all_rows() -> dict[str, Row]:
    """Name the rows: each inversion that is no other one's name, each editor, and what else reads a real picture."""
    from ldm.editing import EDITORS
    from ldm.models.diffusion.inversion import METHODS

    options: dict[str, Callable[[], Any]] = {
        "prompt_to_prompt": prompt_to_prompt,
        "mutual_self_attention": lambda: mutual(False),
        "diffedit": diffedit,
        "dds": dds,
    }
    rows: dict[str, Row] = {"tutorial": tutorial}
    rows |= {
        f"invert/{name}": inverted(name, 1.0 if name in PLAIN else GUIDANCE)
        for name in (*METHODS, "dpmpp_2m")
    }
    rows |= {f"edit/{name}": edited(options.get(name, functools.partial(str, name))) for name in EDITORS}
    rows["edit/mutual_self_attention, masked"] = edited(lambda: mutual(True))
    rows["edit/swap, masked and feathered"] = masked
    return rows | {"explain/prompt": explained(False), "explain/picture": explained(True)}


ROWS: dict[str, Row] = all_rows()


def choose_rows(patterns: Iterable[str] | None) -> list[str]:
    """Keep the rows that match one of the patterns.

    Raises:
        UsageError: a pattern that no row matches.
    """
    for pattern in patterns or []:
        if not any(fnmatchcase(key, pattern) for key in ROWS):
            raise UsageError(f"--rows '{pattern}' matches no row; they are {', '.join(ROWS)}")
    return [key for key in ROWS if not patterns or any(fnmatchcase(key, one) for one in patterns)]


# --- the table --------------------------------------------------------------------------------------


def make_table(results: dict[str, Any]) -> str:
    """Lay the rows out as Markdown."""
    rows = {key: results["rows"][key] for key in ROWS if key in results["rows"]}

    def size(number: int | None) -> str:
        return "-" if number is None else f"{number / 1e6:.2f} MB" if number >= 1e4 else f"{number} B"

    lines = [
        "# Editing at full size",
        "",
        f"{results['model']}, pictures of {results['pixels']} pixels, {results['steps']} steps; "
        f"{next(iter(rows.values()))['machine'] if rows else ''}.",
        f"The root mean square of the noise predicted is {results['eps']:.2f}. `asked`: pictures that the UNet was "
        "asked about, a guided one twice. `seconds` are",
        "the processor's, of a machine that others used as well. `peak`: resident memory above that before the row, "
        "the model in it. `inversion`: what is kept of",
        "the way up, over all steps. `maps`: what a control of attention keeps of it from one call to the next. "
        "`error`: root mean square of the latents that",
        "come back, `signal` that of the picture's. Made by `python bench/full_size_edits.py`.",
        "",
        "| row | guidance | networks | asked | seconds | peak | inversion | maps | error | signal | pictures |",
        "|---|" + "---:|" * 10,
    ]
    for key, row in rows.items():
        error, signal = (f"{row[name]:.1e}" if name in row else "-" for name in ("error", "signal"))
        cells = [f"{row['guidance']:g}", row["networks"], str(row["asked"]), f"{row['seconds']:.0f}"]
        cells += [f"{row['peak'] / 1e9:.2f} GB", size(row.get("states")), size(row["maps"])]
        lines.append(f"| `{key}` | {' | '.join([*cells, error, signal, str(row['pictures'])])} |")
    return "\n".join(lines) + "\n"


# --- the script -------------------------------------------------------------------------------------


def made_up(dtype: Any) -> Any:
    """Build Stable Diffusion v1 of made-up weights.

    Of the layers' own the spread is that of a network at its beginning. The last ones of the first stage and of the
    UNet are scaled so that latents and noise have a root mean square of 1, and pictures one of 0.5.
    """
    import torch

    from bench.speedlib.models import Geometry, build_ours, make_weights
    from ldm import StableDiffusion
    from ldm.checkpoints.configs import read_settings
    from ldm.paths import shipped

    shape = Geometry("v1", read_settings(shipped("configs/v1-inference.yaml")))
    model = build_ours(shape, make_weights(shape, torch.float32, torch.device("cpu")), torch.device("cpu"))
    model.eval().requires_grad_(False)
    first, f = model.first_stage_model, shape.f
    noise = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    small = 16  # cells a side
    with torch.no_grad():
        scaled(first.quant_conv, first.encode(noise(1, 3, small * f, small * f)).mean, 1 / model.scale_factor)
        z = noise(1, shape.channels, small, small)
        scaled(first.decoder.conv_out, first.decode(z / model.scale_factor), 0.5)
        context = noise(1, shape.tokens, shape.width)
        unet = model.model.diffusion_model
        scaled(unet.out[-1], unet(z, torch.tensor([501]), context=context), 1.0)
    return StableDiffusion(model, name="Stable Diffusion v1 of made-up weights", vae_dtype=dtype).to(
        dtype=dtype
    )


def scaled(layer: Any, out: Any, wanted: float) -> None:
    """Scale a last layer so that what comes out of it has a root mean square."""
    factor = float(wanted / out.float().square().mean().sqrt())
    for weight in (layer.weight, layer.bias):
        weight.mul_(factor)


def eps_of(bench: Bench) -> float:
    """Measure the root mean square of the noise predicted for a picture's latents, halfway up."""
    from ldm.edit import context_of, network_of

    level = bench.inversion.levels[bench.steps // 2]
    x = bench.inversion[-(bench.steps // 2 + 1)]
    return network_of(bench.sd)(x, level, context_of(bench.sd, SOURCE)).square().mean().sqrt().item()


def parse(argv: list[str] | None) -> Any:
    parser = cli.Parser(
        description="Run every inversion and editor once on the shapes of Stable Diffusion v1."
    )
    parser.add_argument("--ckpt", help="model file; without it, Stable Diffusion v1 of made-up weights")
    parser.add_argument("--config", help="CompVis YAML file for --ckpt")
    parser.add_argument("--optimize", action="store_true", help="by ldm.kernels; same numbers up to rounding")
    parser.add_argument(
        "--precision", choices=("float32", "bfloat16"), default="float32", help="of the networks"
    )
    parser.add_argument("--steps", type=cli.integer(4, 1000), default=STEPS)
    parser.add_argument("--rows", nargs="+", metavar="PATTERN", help="shell patterns, such as 'invert/*'")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file; .md goes beside it")
    parser.add_argument("--fresh", action="store_true", help="measure the chosen rows again")
    return parser.parse_args(argv)


def run(
    sd: Any, keys: Sequence[str], path: Path, steps: int, networks: str, fresh: bool = False
) -> dict[str, Any]:
    """Measure those of the rows that a results file lacks, and give all of it.

    Args:
        networks: what the table says of them: their precision.
        fresh: measure all of the rows.
    """
    with contextlib.closing(Bench(sd, steps)) as bench:
        head = {"model": sd.name, "pixels": f"{bench.size[0]} x {bench.size[1]}", "steps": steps}
        results = quality.load_results(path, head)
        results.setdefault("eps", eps_of(bench))
        for number, key in enumerate(keys, 1):
            if key in results["rows"] and not fresh:
                continue
            found = bench.measure(key)
            results["rows"][key] = {**found, "networks": networks, "machine": quality.machine_name(sd)}
            quality.save_results(path, results)
            quality.write(path.with_suffix(".md"), make_table(results).encode())
            cli.say(
                f"[{number}/{len(keys)}] {key}: {found['seconds']:.0f} s, peak {found['peak'] / 1e9:.2f} GB"
            )
    return results


def main(argv: list[str] | None = None) -> None:
    opt = parse(argv)
    import torch

    if opt.config and not opt.ckpt:
        raise UsageError("--config describes --ckpt, which is not given; add it or leave --config away")
    keys = choose_rows(opt.rows)
    dtype = getattr(torch, opt.precision)
    if opt.ckpt is None:
        sd = made_up(dtype)
    else:
        sd = quality.load_pipeline(opt.ckpt, opt.config, "cpu").to(dtype=dtype)
    if opt.optimize:
        sd.optimize()
    networks = opt.precision + (", optimized" if opt.optimize else "")
    cli.say(make_table(run(sd, keys, opt.results, opt.steps, networks, opt.fresh)))


if __name__ == "__main__":
    cli.run(main)
