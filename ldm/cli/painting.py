"""What the painting scripts share: their options, checks before anything is loaded, and painting itself.

torch is imported only when painting begins, so that `--help` and a wrong option answer at once.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import limits
from ldm.cli.parser import Parser, integer, number, seed
from ldm.cli.prompts import RNGS, Line, read_prompts
from ldm.cli.running import say
from ldm.errors import AbsentError, FormatError, UsageError, nearest_file, refuse_elsewhere, shown

if TYPE_CHECKING:
    from PIL import Image

    from ldm.pipeline import StableDiffusion
    from ldm.request import Request
    from ldm.results import GenerationResult

# Words for what is computed in; torch's names for them.
PRECISIONS = {"full": "float32", "half": "float16", "bfloat16": "bfloat16"}
DEFAULT_PROMPT = "a large red circle above a small blue square on a white background"
COMPVIS_PROMPT = "a painting of a virus monster playing guitar"
GRID_AT_MOST = 64  # pictures in one grid
SEED_HELP = "picture i has seed + i; -1 or 'random' draws one; 32 bits count: 2^32 + 5 paints what 5 paints"
# What trades a little fidelity for time, in the words of StableDiffusion.plan: docs/knobs.md.
KNOBS = ("guidance_interval", "cache_interval", "cache_depth", "merge_ratio", "merge_seed")


# What a script needs beside a prompt.
EXAMPLES = {"img2img.py": "--init-img a.png ", "inpaint.py": "--init-img a.png --mask m.png "}
# Other programs' names of options -> ours; "_" stands for "-" as well.
OTHER_FLAGS = {
    "cfg": "scale",
    "guidance": "scale",
    "model": "ckpt",
    "weights": "ckpt",
    "checkpoint": "ckpt",
    "ckpt_path": "ckpt",
    "model_path": "ckpt",
    "num_images": "n_iter",
    "num_images_per_prompt": "n_iter",
    "batch_count": "n_iter",
    "num_inference_steps": "ddim_steps",
    "num_steps": "ddim_steps",
    "sampler_name": "sampler",
    "scheduler": "sampler",
    "n_prompt": "negative_prompt",
    "negative": "negative_prompt",
    "image": "init_img",
    "init_image": "init_img",
    "mask_image": "mask",
    "denoising_strength": "strength",
    "denoise": "strength",
    "prompts_file": "from_file",
    "prompt_file": "from_file",
    "output": "outdir",
    "output_dir": "outdir",
    "out_dir": "outdir",
    "low_vram": "lowvram",
}
FORMATS = {"png": ".png", "jpg": ".jpg", "jpeg": ".jpg", "webp": ".webp"}


def add_optimize(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--optimize", action="store_true", help="compute faster on this machine, same numbers up to rounding"
    )


# long: one option after the other, in the order of --help; nothing is decided here.
def painting_parser(name: str, about: str, *, outdir: str, scale: float) -> Parser:
    """Make the parser of a painting script: CompVis's options by their names, others' names beside them.

    Args:
        scale: the guidance that CompVis's script has for Stable Diffusion v1: where neither options nor model say one.
    """
    beside = EXAMPLES.get(name, "")
    usage = (
        f"{name} {beside}--prompt TEXT [options]\n       {name} {beside}--prompt 'a red circle' --steps 20"
    )
    p = _PaintingParser(prog=name, description=about, usage=usage)
    p.also = OTHER_FLAGS
    p.set_defaults(v1_scale=scale)
    words = p.add_argument_group("what to paint")
    words.add_argument(
        "--prompt",
        help="what to paint (default: one that suits the model); one that begins with - as --prompt=-x",
    )
    words.add_argument("--negative_prompt", "--negative-prompt", default="", help="what to keep away from")
    words.add_argument(
        "--from-file", "--from_file", metavar="FILE",
        help="prompts, one a line, also with options (--prompt a cat --steps 20), or .jsonl; # begins a comment",
    )  # fmt: skip
    words.add_argument(
        "--like", metavar="PICTURE",
        help="paint as this picture says it was painted; options given beside it go before",
    )  # fmt: skip
    words.add_argument("--H", "--height", type=integer(*limits.SIDE), help="pixels (default: the model's)")
    words.add_argument("--W", "--width", type=integer(*limits.SIDE), help="pixels (default: the model's)")
    words.add_argument(
        "--n_samples",
        "--batch_size",
        type=integer(*limits.BATCH_SIZE),
        default=1,
        help="pictures painted at once",
    )
    words.add_argument(
        "--n_iter", type=integer(*limits.N_ITER), default=1, help="how often to paint n_samples"
    )
    words.add_argument("--seed", type=seed, default=42, help=SEED_HELP)

    how = p.add_argument_group("how")
    how.add_argument(
        "--ddim_steps", "--steps", type=integer(*limits.STEPS),
        help="denoising steps (default: the model's; for Stable Diffusion v1: 50)",
    )  # fmt: skip
    how.add_argument(
        "--scale", "--cfg-scale", "--cfg_scale", "--guidance_scale", type=number(*limits.GUIDANCE_SCALE),
        help="guidance: how strictly to follow the prompt (default: the model's; for Stable Diffusion v1: "
        f"{scale:g})",
    )  # fmt: skip
    how.add_argument("--sampler", help="ddim, plms, ddpm, dpm_solver or dpmpp_2m (default: ddim)")
    how.add_argument("--plms", action="store_true", help="the same as --sampler plms")
    how.add_argument("--dpm_solver", action="store_true", help="goes before --plms")
    how.add_argument(
        "--ddim_eta", "--eta", type=number(*limits.SHARE), default=0.0, help="fresh noise in each DDIM step"
    )
    how.add_argument("--fixed_code", action="store_true", help="begin every batch with the same noise")
    how.add_argument(
        "--rng", choices=RNGS, default="image",
        help="a generator for each picture, or one for all in the order of CompVis's scripts",
    )  # fmt: skip

    knobs = p.add_argument_group("faster, for a little fidelity (docs/knobs.md)")
    knobs.add_argument(
        "--guidance_interval", nargs=2, metavar=("LOW", "HIGH"), type=number(*limits.SHARE), default=(0.0, 1.0),
        help="guide only levels of this part of the noise schedule; 0 is its clean end",
    )  # fmt: skip
    knobs.add_argument(
        "--cache_interval",
        type=integer(*limits.CACHE_INTERVAL),
        default=1,
        help="steps from one whole UNet to the next",
    )
    knobs.add_argument(
        "--cache_depth",
        type=integer(*limits.CACHE_DEPTH),
        default=1,
        help="blocks computed at the steps between",
    )
    knobs.add_argument(
        "--merge_ratio",
        type=number(*limits.MERGE_RATIO),
        default=0.0,
        help="share of tokens merged where most are",
    )
    knobs.add_argument(
        "--merge_seed", type=integer(*limits.SEED), help="draws the tokens that others are merged into"
    )

    model = p.add_argument_group("with what")
    model.add_argument("--ckpt", help="model file or diffusers folder (default: the model in the box)")
    model.add_argument("--config", help="its YAML file (default: the one beside it, or read off the weights)")
    model.add_argument(
        "--ignore-keys", "--ignore_keys", action="append", default=[], metavar="PATTERN",
        help="leave out of --ckpt the tensors with this name, beginning or shell pattern; may be repeated",
    )  # fmt: skip
    model.add_argument("--vae", help="file whose VAE replaces the model's")
    model.add_argument("--tokenizer", help="folder or file of the tokenizer (default: the one in ldm)")
    model.add_argument("--device", default="auto", help="cuda, mps, cpu, or auto for the best there is")
    model.add_argument(
        "--precision", choices=("autocast", *PRECISIONS), default="autocast",
        help="of the UNet; autocast is full where there is no CUDA",
    )  # fmt: skip
    add_optimize(model)
    model.add_argument(
        "--compile", action="store_true", help="the same by torch.compile, which takes minutes at first"
    )
    model.add_argument(
        "--tiled_vae",
        action="store_true",
        help="--optimize, and large pictures through the VAE in strips, exactly",
    )
    model.add_argument(
        "--sliced_vae", action="store_true", help="--optimize, and a batch through the VAE picture by picture"
    )
    model.add_argument(
        "--lowvram",
        action="store_true",
        help="leave the weights in the machine's memory; they visit the GPU part by part (slow)",
    )
    model.add_argument(
        "--vae_precision",
        choices=tuple(PRECISIONS),
        default="full",
        help="what the VAE computes in; one that overflows goes on in full precision",
    )
    model.add_argument("--C", type=integer(1, 64), help="latent channels; checked against the model")
    model.add_argument("--f", type=integer(1, 64), help="pixels a latent cell; checked against the model")

    out = p.add_argument_group("where to")
    out.add_argument("--outdir", default=outdir, help="folder for pictures and grids")
    out.add_argument("--format", choices=tuple(FORMATS), default="png", help="of the pictures and grids")
    out.add_argument("--skip_grid", action="store_true", help="save no grid of all pictures")
    out.add_argument("--skip_save", action="store_true", help="save no single pictures")
    out.add_argument(
        "--n_rows", type=integer(0, 1024), default=0, help="pictures in a grid row; 0 = n_samples"
    )
    out.add_argument("--no_metadata", action="store_true", help="pictures tell nothing about their making")
    return p


# What a picture tells of its making -> the option that says it. What no option says goes to the plan as it is.
LIKE = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "seed": "seed",
    "steps": "ddim_steps",
    "sampler": "sampler",
    "guidance_scale": "scale",
    "eta": "ddim_eta",
    "height": "H",
    "width": "W",
    "rng": "rng",
    "strength": "strength",
    **{name: name for name in KNOBS},
}
LIKE_ALSO = ("spacing", "guidance_rescale")


class _PaintingParser(Parser):
    """A parser whose --like fills in what the command line leaves open."""

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        found = super().parse_args(args, namespace)
        found.like_also = {}
        if found.like is not None:
            self._repeat(found, self.given(args))
        return found

    def _repeat(self, found: argparse.Namespace, given: set[str]) -> None:
        from ldm.metadata import read_metadata

        told_by = read_metadata(found.like)
        if not told_by.get("prompt") and "seed" not in told_by:
            raise FormatError(
                f"--like '{found.like}' does not say how it was painted; give a picture that does"
            )
        if told_by.get("mode") in ("img2img", "inpaint") and not hasattr(found, "strength"):
            script = told_by["mode"]
            raise UsageError(
                f"--like '{found.like}' was painted from another picture; use {script}.py and give that one "
                "as --init-img"
            )
        if "from_file" in given:
            given = given | {"prompt"}
        if given & {"plms", "dpm_solver"}:
            given = given | {"sampler"}
        for name, option in LIKE.items():
            value = told_by.get(name)
            if option in given or value is None or not hasattr(found, option):
                continue
            if name == "rng" and value not in RNGS:  # A1111's word for where it draws
                continue
            setattr(found, option, value)
        found.like_also = {name: told_by[name] for name in LIKE_ALSO if told_by.get(name) is not None}
        if told_by.get("rng") == "compvis" and told_by.get("batch_index"):
            say(
                f"{found.like}: was number {told_by['batch_index'] + 1} of its batch, and depends on that place; what "
                "is painted here is the first"
            )


def check(args: argparse.Namespace) -> None:
    """Refuse what needs no model to be seen to be wrong, before the seconds or minutes that loading one takes."""
    for name in ("config", "ignore_keys"):
        if args.ckpt is None and getattr(args, name):
            option = "--" + name.replace("_", "-")
            raise UsageError(f"{option} {getattr(args, name)} needs --ckpt, the file with the weights")
    for name in ("ckpt", "config", "vae", "tokenizer", "from_file"):  # open_image says so of pictures
        refuse_elsewhere(f"--{name}", getattr(args, name, None), hub=name in ("ckpt", "vae", "tokenizer"))
    if args.config is not None:
        from ldm.checkpoints.configs import find_config

        find_config(args.config)
    for name in ("ckpt", "vae", "tokenizer"):
        given = getattr(args, name)
        if given and not os.path.lexists(given):
            near = nearest_file(given)
            hint = f"did you mean {near!r}?" if near else "check the path; nothing is downloaded here"
            raise AbsentError(f"--{name} {shown(given)} is not there; {hint}")
    if args.lowvram and args.compile:
        raise UsageError(
            "--lowvram moves weights that --compile's code expects to stay; leave one of the two out"
        )
    from ldm.models.diffusion.samplers import SAMPLERS, check_eta, check_interval

    check_eta(SAMPLERS[sampler_of(args)], args.ddim_eta)
    check_interval(args.guidance_interval)
    if args.ckpt is None:  # of another model the cell is known when it is loaded
        from ldm.request import check_size

        for name, side in (("height", args.H), ("width", args.W)):
            if side is not None:
                check_size(name, side, 8)


def load_model(args: argparse.Namespace) -> StableDiffusion:
    """Load the model that the options name, or the one in the box."""
    say(f"loading {args.ckpt or 'the model in the box'} ...")
    import torch

    from ldm.devices import pick_device
    from ldm.models.introspect import downsampling
    from ldm.pipeline import StableDiffusion

    device = pick_device(args.device)
    options: dict[str, Any] = {"device": device, "dtype": torch.float32}
    options |= {"vae": args.vae, "tokenizer": args.tokenizer, "low_vram": args.lowvram}
    options["vae_dtype"] = getattr(torch, PRECISIONS[args.vae_precision])
    if args.precision == "autocast" and device.type == "cuda":
        options["autocast"] = torch.float16
    elif args.precision in ("half", "bfloat16"):
        options["dtype"] = getattr(torch, PRECISIONS[args.precision])
    if args.ckpt is None:
        sd = StableDiffusion.default(**options)
    else:
        options["ignore"] = args.ignore_keys
        sd = StableDiffusion.from_single_file(args.ckpt, config=args.config, **options)
    for name, given, own in (("C", args.C, sd.model.channels), ("f", args.f, downsampling(sd.model))):
        if given not in (None, own):
            raise UsageError(f"--{name} {given} does not fit this model, whose {name} is {own}; leave it out")
    ways = {name: getattr(args, name) for name in ("compile", "tiled_vae", "sliced_vae")}
    if any(ways.values()) or (args.optimize and not args.lowvram):  # low_vram alone is the loader's work
        sd.optimize(**ways, low_vram=device if args.lowvram else None)
    return sd


def sampler_of(args: argparse.Namespace) -> str:
    """Choose the sampler as CompVis does: dpm_solver before plms before ddim; --sampler says it by name."""
    flag = "dpm_solver" if args.dpm_solver else "plms" if args.plms else None
    if args.sampler is None:
        return flag or "ddim"
    if flag is not None:
        raise UsageError(f"--sampler {args.sampler} and --{flag} name two samplers; give one")
    from ldm.models.diffusion.samplers import resolve_sampler

    return resolve_sampler(args.sampler)


def lines_of(args: argparse.Namespace) -> list[Line]:
    """List what is to be painted: the lines of the file, or the one prompt."""
    if args.from_file is not None:
        if args.prompt is not None:
            raise UsageError("--prompt and --from-file name two sources of prompts; give one")
        return read_prompts(args.from_file)
    prompt = args.prompt
    if prompt is None:
        prompt = DEFAULT_PROMPT if args.ckpt is None else COMPVIS_PROMPT
    return [Line(prompt, {"batch_size": args.n_samples})]


@dataclass
class _Group:
    """Pictures that differ in prompt, negative prompt and seed only, and so may share batches."""

    options: dict[str, Any]
    prompts: list[str] = field(default_factory=list)
    negatives: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    place: str = ""  # of its first line


def _groups(args: argparse.Namespace, lines: list[Line]) -> list[_Group]:
    """Lay out the whole run, picture by picture, in CompVis's order: all prompts, then all again, n_iter times."""

    from ldm.request import draw_seed

    def start(seed: int | None) -> int:
        return draw_seed() if seed is None else seed

    shared = itertools.count(start(args.seed))  # lines without a seed of their own share one count
    seeds = [
        itertools.count(start(line.options["seed"])) if "seed" in line.options else shared for line in lines
    ]
    groups: list[_Group] = []
    for _ in range(args.n_iter):
        for line, numbers in zip(lines, seeds, strict=True):
            options = {name: value for name, value in line.options.items() if name != "seed"}
            count = options.pop("n_iter", 1) * options.pop("batch_size", 1)
            negative = options.pop("negative_prompt", args.negative_prompt)
            if not groups or groups[-1].options != options:
                groups.append(_Group(options, place=line.place))
            groups[-1].prompts += [line.prompt] * count
            groups[-1].negatives += [negative] * count
            groups[-1].seeds += itertools.islice(numbers, count)
    return groups


def paint(
    args: argparse.Namespace,
    *wishes: dict[str, Any],
    save: Callable[[GenerationResult, int], list[Path]] | None = None,
) -> None:
    """Paint all that the options ask for, saving every batch as soon as it is finished.

    Args:
        wishes: options of StableDiffusion.plan beyond the common ones (picture, mask, strength); the whole
            run is painted for each.
        save: saves a batch of the i-th wish; default: `outdir/samples/00000.png` and on.
    """
    from ldm.images import prepare_folder
    from ldm.results import with_bar

    check(args)
    lines, sampler = lines_of(args), sampler_of(args)
    outdir = prepare_folder(args.outdir)
    if save is None:
        samples = prepare_folder(outdir / "samples")

        def save(result: GenerationResult, wish: int) -> list[Path]:
            pattern = "{:05}" + FORMATS[args.format]
            return result.save(samples, pattern, metadata=not args.no_metadata)

    sd = load_model(args)
    scale = args.scale
    if scale is None and (sd.report is None or sd.report.sampling.guidance_scale is None):
        scale = args.v1_scale
    jobs: list[tuple[int, Request]] = []
    for i, wish in enumerate(wishes or ({},)):
        for group in _groups(args, lines):
            options = {"steps": args.ddim_steps, "guidance_scale": scale, "sampler": sampler}
            options |= {"height": args.H, "width": args.W, "eta": args.ddim_eta, "rng": args.rng}
            options |= {name: getattr(args, name) for name in KNOBS}
            options |= {"batch_size": args.n_samples, "fixed_code": args.fixed_code, **args.like_also}
            options |= wish | group.options
            # All is checked here, before the first picture is begun.
            try:
                job = sd.plan(group.prompts, negative_prompt=group.negatives, seed=group.seeds, **options)
            except UsageError as error:
                if any(name in str(error) for name in group.options):
                    raise UsageError(f"{group.place}: {error}") from None
                raise
            jobs.append((i, job))
    sd.advise([job for _, job in jobs])
    finished: list[tuple[Image.Image, dict[str, Any]]] = []
    for i, job in jobs:
        for result in (step.result for step in with_bar(sd.paint(job)) if step.result is not None):
            if not args.skip_save:
                for path, number in zip(save(result, i), result.seeds, strict=True):
                    say(f"{path} (seed {number})")
            if not args.skip_grid:
                finished += [(image, result.metadata(j)) for j, image in enumerate(result)]
    if len(finished) > 1 or (finished and args.skip_save):  # a grid of one is the picture once more
        _save_grids(args, finished, outdir)
    say(f"Your samples are ready and waiting for you here: {outdir}")


def _save_grids(
    args: argparse.Namespace, finished: list[tuple[Image.Image, dict[str, Any]]], outdir: Path
) -> None:
    """Save grids of all pictures, each with the metadata of its first."""
    from ldm.images import grid, save_numbered
    from ldm.metadata import Painted, png_info

    nrow = args.n_rows or args.n_samples
    at_most = max(nrow, GRID_AT_MOST // nrow * nrow)
    for start in range(0, len(finished), at_most):
        part = finished[start : start + at_most]
        told_first = part[0][1]
        info = None if args.no_metadata else png_info(told_first)
        whole = Painted.of(grid([image for image, _ in part], nrow), lambda told=told_first: told)
        say(str(save_numbered(whole, outdir, "grid-{:04}" + FORMATS[args.format], info)))
