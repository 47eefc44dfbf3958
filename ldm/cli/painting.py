"""What the painting scripts do: check the whole command line, load the model, plan every picture, paint and save.

torch is imported only when painting begins, so that `--help` and a wrong option answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ldm import presets
from ldm.cli.adapters import Embeddings, check_there, lacking, read_loras
from ldm.cli.controls import Controls, check_controls
from ldm.cli.painting_options import (
    COMPVIS_PROMPT,
    DEFAULT_PROMPT,
    FORMATS,
    GRID_AT_MOST,
    GRID_ROW,
    PRECISIONS,
)
from ldm.cli.prompts import Line, read_prompts
from ldm.cli.running import printable, say
from ldm.errors import AbsentError, LdmError, UsageError, nearest_file, refuse_elsewhere, shown
from ldm.limits import AUTO, SHARED_RNGS
from ldm.options import PRESET, SYNTAX, keywords, options, repeated

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ldm.adapters.lora import LoraFile
    from ldm.pipeline import StableDiffusion
    from ldm.request import Request
    from ldm.results import GenerationResult

SEEDS = ("seed", "variation_seed")
Save = Callable[["GenerationResult", int], list[Path]]


@dataclass
class Group:
    """Pictures of one request: they differ in prompt, negative prompt and seeds only, and so may share batches.

    Attributes:
        source: which of paint's sources they are painted from.
        options: of StableDiffusion.plan, beside the four lists.
        own: those of them that the lines of a prompt file set; place is the first line's.
        tags: of their prompts, which name LoRAs.
        call: the line whose seed is that of the whole call; "" where there is no such one.
    """

    source: int
    options: dict[str, Any]
    own: dict[str, Any]
    place: str
    tags: tuple[Any, ...] = ()
    call: str = ""
    prompts: list[str] = field(default_factory=list)
    negatives: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    variation_seeds: list[int] = field(default_factory=list)  # with variation_strength
    drawn: list[str] = field(default_factory=list)  # of prompts that are templates, what plan() will draw

    @property
    def key(self) -> tuple[Any, ...]:
        """What its pictures have in common."""
        return self.source, self.own, self.tags, self.call


def paint(args: argparse.Namespace, *sources: dict[str, Any], save: Save | None = None) -> None:
    """Paint all that the options ask for, saving every batch as soon as it is finished.

    Args:
        sources: options of StableDiffusion.plan beyond the common ones (picture and mask, as paths, and strength);
            all lines are painted for each.
        save: saves a batch of the i-th source; default: `outdir/samples/00000.png` and on.
    """
    from ldm.devices import pick_device
    from ldm.images import prepare_folder
    from ldm.results import with_bar

    groups = check(args, *sources)
    outdir = Path(args.outdir) if args.explain else prepare_folder(args.outdir)
    if save is None and not args.explain:
        samples = prepare_folder(outdir / "samples")

        def save(result: GenerationResult, source: int) -> list[Path]:
            return result.save(samples, "{:05}" + FORMATS[args.format], metadata=not args.no_metadata)

    sd = load_model(args, pick_device(args.device))
    add_embeddings(groups, Embeddings(sd.model))
    requests: deque[tuple[int, Request]] = deque()
    for group in groups:  # all of them are checked before the first picture is begun
        options = group.options | guidance_of(group, args, sd)
        with placed(group):
            request = sd.plan(
                group.prompts,
                negative_prompt=group.negatives,
                seed=group.seeds,
                variation_seed=group.variation_seeds or None,
                **options,
            )
        requests.append((group.source, request))
    groups.clear()
    if args.explain:
        explain(sd, [request for _, request in requests])
        return
    say_lacking(args, sd, (one for _, request in requests for one in request.adapters))
    sd.advise([request for _, request in requests])
    finished: list[tuple[Image.Image, dict[str, Any]]] = []
    while requests:  # those that are done are let go, and their LoRAs with them
        source, request = requests.popleft()
        for result in (step.result for step in with_bar(sd.paint(request)) if step.result is not None):
            if not args.skip_save:
                for path, number in zip(save(result, source), result.seeds, strict=True):
                    say(f"{path} (seed {number})")
            if not args.skip_grid:
                finished += [(image, result.metadata(j)) for j, image in enumerate(result)]
    if len(finished) > 1 or (finished and args.skip_save):  # a grid of one is the picture once more
        _save_grids(args, finished, outdir)
    say(f"Your samples are ready and waiting for you here: {outdir}")


# --- before anything is loaded --------------------------------------------------------------------


def check(args: argparse.Namespace, *sources: dict[str, Any]) -> list[Group]:
    """Refuse what needs no model to be seen to be wrong, before the seconds or minutes that loading one takes.

    Returns:
        all pictures of the run, in the order in which they are painted.
    """
    from ldm.images import open_image
    from ldm.models.diffusion.samplers import SAMPLERS, check_eta, check_interval, split_sampler
    from ldm.request import check_size

    check_model(args)
    refuse_elsewhere("--from_file", args.from_file, hub=False)
    name = sampler_of(args)
    for side, pixels in (("height", args.height), ("width", args.width)):
        if args.ckpt is None and pixels is not None:  # of another model the cell is not known yet
            check_size(side, pixels, 8)
    sampler, args.spacing = split_sampler(name, args.spacing)
    if args.spacing is not None:  # by its own flag, or by the sampler's
        args.given.add("spacing")
    if {"plms", "dpm_solver"} & args.given:
        args.given.add("sampler")
    if args.eta is not None:
        check_eta(SAMPLERS[sampler], args.eta)
    check_interval(args.guidance_interval)
    sources = sources or ({},)
    groups = lay_out(args, lines_of(args), sampler, sources)
    opened = [
        {what: open_image(source[what]) for what in ("image", "mask") if what in source} for source in sources
    ]
    for group in groups:
        for option in ("lora", "embedding"):
            with placed(group, option):
                check_there(group.options[option])
        with placed(group, "controls"):
            check_controls(group.options["controls"], sources[group.source], group.options)
    files: dict[str, LoraFile] = {}
    flags, loras = None, []
    controls = Controls()
    for group in groups:
        group.options |= opened[group.source]
        # Weights that a LoRA was folded into are kept as long as it is: groups in succession share it, others do not.
        if group.options["lora"] != flags:
            flags = group.options["lora"]
            with placed(group, "lora"):
                loras = read_loras(flags, files)
        del group.options["lora"]
        with placed(group, "controls"):
            parts = group.options.pop("controls")
            found = controls.read(parts, opened[group.source], group.source, group.options)
            group.options["adapters"] = [*loras, *found]
    return groups


def check_model(args: argparse.Namespace) -> None:
    """Refuse what the options of the model (painting_options.add_model) say, where no model is needed to see it."""
    from ldm.checkpoints.configs import find_config

    for option in ("config", "ignore_keys"):
        if args.ckpt is None and getattr(args, option):
            raise UsageError(
                f"--{option.replace('_', '-')} {getattr(args, option)} needs --ckpt, the file with the weights"
            )
    if args.lowvram and args.compile:
        raise UsageError(
            "--lowvram moves weights that --compile's code expects to stay; leave one of the two out"
        )
    if args.config is not None:
        find_config(args.config)
    for name in ("ckpt", "vae", "tokenizer"):
        given = getattr(args, name)
        refuse_elsewhere(f"--{name}", given, hub=True)
        if given and not os.path.lexists(given):
            near = nearest_file(given)
            hint = f"did you mean {near!r}?" if near else "check the path; nothing is downloaded here"
            raise AbsentError(f"--{name} {shown(given)} is not there; {hint}")


@contextlib.contextmanager
def placed(group: Group, *options: str) -> Iterator[None]:
    """Let an error begin with the line of the prompt file that it comes of.

    Args:
        options: those that the work within is for, if it is for some only.
    """
    try:
        yield
    except LdmError as error:
        if not options:  # an error of an option names it, one of a file the file
            named = [name for name in group.own if name in str(error)]
            options = tuple(named) if isinstance(error, UsageError) else repeated()
        if any(option in group.own for option in options):
            raise type(error)(f"{group.place}: {error}") from None
        raise


def sampler_of(args: argparse.Namespace) -> str:
    """Choose the sampler as CompVis does: dpm_solver before plms before ddim; --sampler says it by name."""
    flag = "dpm_solver" if args.dpm_solver else "plms" if args.plms else None
    if args.sampler is not None and flag is not None:
        raise UsageError(f"--sampler {args.sampler} and --{flag} name two samplers; give one")
    return args.sampler if args.sampler is not None else flag or "ddim"


def lines_of(args: argparse.Namespace) -> list[Line]:
    """List what is to be painted: the lines of the file, or the one prompt, with the styles that are put into all."""
    lines = _given_lines(args)
    if not args.style:
        return lines
    if args.styles is None:
        raise UsageError(f"--style {args.style[0]} needs --styles, the CSV that it is in")
    from ldm.prompt.styles import read_styles, with_styles

    refuse_elsewhere("--styles", args.styles)
    styles = read_styles(args.styles)
    styled = []
    for line in lines:
        negative = line.options.get("negative_prompt", args.negative_prompt)
        prompt, negative = with_styles(line.prompt, negative, args.style, styles)
        styled.append(replace(line, prompt=prompt, options={**line.options, "negative_prompt": negative}))
    return styled


def _given_lines(args: argparse.Namespace) -> list[Line]:
    if args.from_file is not None:
        if args.prompt is not None:
            raise UsageError("--prompt and --from-file name two sources of prompts; give one")
        return read_prompts(args.from_file)
    prompt = args.prompt
    if prompt is None:
        prompt = DEFAULT_PROMPT if args.ckpt is None else COMPVIS_PROMPT
    return [Line(prompt, {} if args.batch_size == AUTO else {"batch_size": args.batch_size})]


def lay_out(
    args: argparse.Namespace, lines: list[Line], sampler: str, sources: Sequence[dict[str, Any]]
) -> list[Group]:
    """Lay out the whole run, picture by picture, in CompVis's order: all prompts, then all again, n_iter times."""
    from ldm.checks.seeds import draw_seed, seeds_from
    from ldm.prompting import tags_of

    each = [one.name for one in options() if one.each]
    common = {name: getattr(args, name) for name in keywords() if hasattr(args, name) and name not in each}
    common |= {name: tuple(getattr(args, name)) for name in repeated()} | {"sampler": sampler}

    def start(seed: int | None) -> int:
        return draw_seed() if seed is None else seed

    def numbers_of(name: str, stays: Callable[[Line], bool]) -> list[Iterator[int]]:
        # Lines without a seed of their own share one count, or where it stays one seed.
        def both(first: int) -> dict[bool, Iterator[int]]:
            return {False: seeds_from(first, name), True: itertools.repeat(first)}

        shared = both(start(getattr(args, name)))
        return [
            (both(start(line.options[name])) if name in line.options else shared)[stays(line)]
            for line in lines
        ]

    def varies(line: Line) -> bool:  # variations are of one seed, as in A1111
        return line.options.get("variation_strength", args.variation_strength) > 0

    named = [line for line in lines if line.options.get("variation_seed", args.variation_seed) is not None]
    if named and not args.like and not any(map(varies, named)):
        raise UsageError("--variation_seed needs a --variation_strength above 0, got none; add one, up to 1")
    groups: list[Group] = []
    files: dict[Any, Any] = {}
    for i, source in enumerate(sources):
        seeds = numbers_of("seed", varies)
        others = numbers_of("variation_seed", lambda line: False)
        for _ in range(args.n_iter):
            for line, numbers, variations in zip(lines, seeds, others, strict=True):
                own = {name: value for name, value in line.options.items() if name not in SEEDS}
                count = own.pop("n_iter", 1) * own.pop("batch_size", 1)
                negative = own.pop("negative_prompt", args.negative_prompt)
                whole = common | source | own
                said = whole
                if whole[PRESET] is not None:  # it says what nobody gave
                    open_ = presets.names() - args.given - own.keys()
                    whole = {name: value for name, value in whole.items() if name not in open_}
                    said = presets.values(whole[PRESET], "txt2img", sampler) | whole
                # A line with a seed of its own is a call of its own, where that is the seed of a whole call.
                call = line.place if said["rng"] in SHARED_RNGS and "seed" in line.options else ""
                with _of_line(line):
                    own_seeds = list(itertools.islice(numbers, count))
                    own_variations = list(itertools.islice(variations, count if varies(line) else 0))
                    drawn = _draw(line, negative, own_seeds, whole, files)
                for (seed, text, other), variation in itertools.zip_longest(drawn, own_variations):
                    key = (i, own, tags_of(text, said[SYNTAX]), call)
                    if not groups or groups[-1].key != key:
                        groups.append(Group(i, whole, own, line.place, *key[2:]))
                    groups[-1].prompts.append(line.prompt)
                    groups[-1].negatives.append(negative)
                    groups[-1].drawn += {text, other} - {line.prompt, negative}
                    groups[-1].seeds.append(seed)
                    groups[-1].variation_seeds += [] if variation is None else [variation]
    return groups


@contextlib.contextmanager
def _of_line(line: Line) -> Iterator[None]:
    """Let an error begin with the line that it comes of, if that is one of a file."""
    try:
        yield
    except LdmError as error:
        raise type(error)(f"{line.place}: {error}" if line.place else str(error)) from None


def _draw(
    line: Line, negative: str, seeds: list[int], whole: dict[str, Any], files: dict[Any, Any]
) -> list[tuple[int, str, str]]:
    """Give each picture's seed and its two texts as plan() will draw them: what LoRAs and embeddings they name."""
    from ldm.checks.templates import draw_texts, draws_texts

    given = SimpleNamespace(**whole)
    prompts, negatives = [line.prompt] * len(seeds), [negative] * len(seeds)
    if draws_texts(given):
        prompts, negatives = draw_texts(given, prompts, negatives, seeds, files)
    return list(zip(seeds, prompts, negatives, strict=True))


# --- with the model -------------------------------------------------------------------------------


def load_model(args: argparse.Namespace, device: torch.device) -> StableDiffusion:
    """Load the model that the options name, or the one in the box."""
    say(f"loading {args.ckpt or 'the model in the box'} ...")
    import torch

    from ldm.models.introspect import downsampling
    from ldm.pipeline import StableDiffusion

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


def say_lacking(args: argparse.Namespace, sd: StableDiffusion, adapters: Iterable[Any]) -> None:
    """Say which adapters and which VAE the picture of --like was made with, where they are not given."""
    lines = [lacking(args.like_adapters, adapters) if args.like_adapters else None]
    lines += [other_vae(sd, **args.like_vae) if args.like_vae else None]
    for line in filter(None, lines):
        say(printable(f"{args.like}: {line}"))


def other_vae(sd: StableDiffusion, vae: Any, vae_hash: Any) -> str | None:
    """Say which VAE a picture was painted with, where it is not the one that is here; anything may stand there."""
    from ldm.cli.told import NO_VAE
    from ldm.results import file_hash

    name, digits = (one if isinstance(one, str) and one else None for one in (vae, vae_hash))
    file = getattr(sd.model.first_stage_model, "weights_file", None)
    here = file_hash(file)
    if name is None and digits is None or (name or "").lower() in NO_VAE:
        return None
    if digits is not None and here is not None:
        is_same = here.startswith(digits[:10].lower())
    else:
        is_same = file is not None and name in (file.name, file.stem)
    hashed = f" (hash {shown(digits, 20)})" if digits else ""
    called = f" {shown(name)}" if name else ""
    return None if is_same else f"was painted with the VAE{called}{hashed}, which is not given (--vae FILE)"


def explain(sd: StableDiffusion, requests: Sequence[Request]) -> None:
    """Show how the prompts of requests are read, each once."""
    from ldm.prompting import explanations

    for line in dict.fromkeys(one for request in requests for one in explanations(sd.model, request)):
        for row in line.split("\n"):
            say(" " * (len(row) - len(row.lstrip())) + printable(row))


def guidance_of(group: Group, args: argparse.Namespace, sd: StableDiffusion) -> dict[str, float | None]:
    """Choose the guidance where no line or preset does: what the options say, else the model's own or CompVis's."""
    if "guidance_scale" in group.own or group.options.get(PRESET) is not None:
        return {}
    is_advised = sd.report is not None and sd.report.sampling.guidance_scale is not None
    is_open = args.guidance_scale is None and not is_advised
    return {"guidance_scale": args.v1_scale if is_open else args.guidance_scale}


def add_embeddings(groups: Sequence[Group], embeddings: Embeddings) -> None:
    """Give every group those of its embeddings that its prompts name.

    One that no group names goes to the first that has it, so that plan() says so once.
    """
    for group in groups:
        with placed(group, "embedding"):
            found = embeddings.named(
                group.options["embedding"], [*group.prompts, *group.negatives, *group.drawn]
            )
        group.options["adapters"] += found
    for group in groups:
        group.options["adapters"] += embeddings.pop_unnamed(group.options.pop("embedding"))


def _save_grids(
    args: argparse.Namespace, finished: list[tuple[Image.Image, dict[str, Any]]], outdir: Path
) -> None:
    """Save grids of all pictures, each with the metadata of its first."""
    from ldm.images import grid, save_numbered
    from ldm.metadata import Painted, png_info

    nrow = args.n_rows or (GRID_ROW if args.batch_size == AUTO else args.batch_size)
    at_most = max(nrow, GRID_AT_MOST // nrow * nrow)
    for start in range(0, len(finished), at_most):
        part = finished[start : start + at_most]
        of_first = part[0][1]
        info = None if args.no_metadata else png_info(of_first)
        whole = Painted.of(grid([image for image, _ in part], nrow), lambda parameters=of_first: parameters)
        path = save_numbered(whole, outdir, "grid-{:04}" + FORMATS[args.format], info)
        say(f"{path}")
