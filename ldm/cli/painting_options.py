"""The options of the painting scripts, and what --like fills in of them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from ldm import options
from ldm.cli.adapters import told_adapters
from ldm.cli.parser import Parser, integer
from ldm.cli.running import printable, say
from ldm.cli.told import asked_for
from ldm.errors import FormatError, UsageError
from ldm.limits import SHARED_RNGS
from ldm.options import Option
from ldm.presets import rules

# Words for what is computed in; torch's names for them.
PRECISIONS = {"full": "float32", "half": "float16", "bfloat16": "bfloat16"}
DEFAULT_PROMPT = "a large red circle above a small blue square on a white background"
COMPVIS_PROMPT = "a painting of a virus monster playing guitar"
GRID_AT_MOST = 64  # pictures in one grid
GRID_ROW = 8  # pictures in its row, where no option says
SEED_HELP = options.SEED_WORDS


# What a script needs beside a prompt.
EXAMPLES = {"img2img.py": "--init-img a.png ", "inpaint.py": "--init-img a.png --mask m.png "}
# Other programs' names of what concerns the run -> ours; "_" stands for "-" as well. Those of options: ldm.options.
OTHER_FLAGS = {
    "model": "ckpt",
    "weights": "ckpt",
    "checkpoint": "ckpt",
    "ckpt_path": "ckpt",
    "model_path": "ckpt",
    "image": "init_img",
    "init_image": "init_img",
    "mask_image": "mask",
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


def painting_parser(
    name: str,
    about: str,
    *,
    outdir: str,
    scale: float,
    strength: float | None = None,
    any_start: bool = False,
) -> Parser:
    """Make the parser of a painting script: CompVis's options by their names, others' names beside them.

    Args:
        scale: the guidance that CompVis's script has for Stable Diffusion v1: where neither options nor model say one.
        strength: of a script that begins with a picture, its default.
        any_start: the script begins with a picture or without.
    """
    beside = EXAMPLES.get(name, "")
    usage = (
        f"{name} {beside}--prompt TEXT [options]\n       {name} {beside}--prompt 'a red circle' --steps 20"
    )
    p = _PaintingParser(prog=name, description=about, usage=usage)
    p.set_defaults(v1_scale=scale)
    groups: dict[str, argparse._ArgumentGroup] = {}
    also = dict(OTHER_FLAGS)
    for option in options.options():
        # Some groups are for scripts that begin with a picture, one for those that do not.
        not_here = (options.START, options.MASK) if strength is None else (options.HIRES,)
        if not option.flags or (option.group in not_here and not any_start):
            continue
        if option.group not in groups:
            groups[option.group] = p.add_argument_group(option.group)
        add_option(groups[option.group], option, scale=f"{scale:g}")
        also |= {name: option.flags[0].lstrip("-") for name in option.also}
    p.also = also
    if strength is not None:
        p.set_defaults(strength=strength)
    _add_run(groups[options.WHAT])
    add_model(p.add_argument_group("with what"))
    _add_output(p.add_argument_group("where to"), outdir)
    return p


def add_option(group: argparse._ActionsContainer, option: Option, **words: str) -> None:
    """Add the flags of an option.

    Args:
        words: that its help has places for.
    """
    help = option.words.format(**words)
    named = {"dest": option.dest, "help": help}
    default = option.default if option.script is options.SAME else option.script
    if option.kind.is_switch:
        group.add_argument(*option.flags, action="store_true", default=default, **named)
    elif option.kind.is_repeated:
        group.add_argument(
            *option.flags,
            action="append",
            default=[],
            type=option.kind.parse,
            metavar=option.metavar,
            **named,
        )
    else:
        nargs = option.kind.parts if option.kind.parts > 1 else None
        parse = option.kind.part.parse if nargs else option.kind.parse
        group.add_argument(
            *option.flags, type=parse, default=default, nargs=nargs, metavar=option.metavar, **named
        )


def _add_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--from-file", "--from_file", metavar="FILE",
        help="prompts, one a line, also with options (--prompt a cat --steps 20), or .jsonl; # begins a comment",
    )  # fmt: skip
    group.add_argument(
        "--like", metavar="PICTURE",
        help="paint as this picture says it was painted; options given beside it go before",
    )  # fmt: skip
    group.add_argument(
        "--style", action="append", default=[], metavar="NAME",
        help="put this style of --styles into every prompt; may be repeated",
    )  # fmt: skip
    group.add_argument("--styles", metavar="FILE", help="a CSV of styles, as A1111 writes it")
    group.add_argument("--explain", action="store_true", help="show how prompts are read, and paint nothing")


def add_model(group: argparse._ArgumentGroup) -> None:
    """Add the flags of the model, where it is and what it computes in."""
    group.add_argument("--ckpt", help="model file or diffusers folder (default: the model in the box)")
    group.add_argument("--config", help="its YAML file (default: the one beside it, or read off the weights)")
    group.add_argument(
        "--ignore-keys", "--ignore_keys", action="append", default=[], metavar="PATTERN",
        help="leave out of --ckpt the tensors with this name, beginning or shell pattern; may be repeated",
    )  # fmt: skip
    group.add_argument("--vae", help="file whose VAE replaces the model's")
    group.add_argument("--tokenizer", help="folder or file of the tokenizer (default: the one in ldm)")
    group.add_argument("--device", default="auto", help="cuda, mps, cpu, or auto for the best there is")
    group.add_argument(
        "--precision", choices=("autocast", *PRECISIONS), default="autocast",
        help="of the UNet; autocast is full where there is no CUDA",
    )  # fmt: skip
    add_optimize(group)
    group.add_argument(
        "--compile", action="store_true", help="the same by torch.compile, which takes minutes at first"
    )
    group.add_argument(
        "--tiled_vae",
        action="store_true",
        help="--optimize, with VAE tiling, exact, for large pictures",
    )
    group.add_argument(
        "--sliced_vae", action="store_true", help="--optimize, with VAE slicing: picture by picture"
    )
    group.add_argument(
        "--lowvram",
        action="store_true",
        help="sequential CPU offload: copy the weights to the GPU part by part (slow)",
    )
    group.add_argument(
        "--vae_precision",
        choices=tuple(PRECISIONS),
        default="full",
        help="what the VAE computes in; one that overflows goes on in full precision",
    )
    group.add_argument("--C", type=integer(1, 64), help="latent channels; checked against the model")
    group.add_argument("--f", type=integer(1, 64), help="pixels a latent cell; checked against the model")


def _add_output(group: argparse._ArgumentGroup, outdir: str) -> None:
    group.add_argument("--outdir", default=outdir, help="folder for pictures and grids")
    group.add_argument("--format", choices=tuple(FORMATS), default="png", help="of the pictures and grids")
    group.add_argument("--skip_grid", action="store_true", help="save no grid of all pictures")
    group.add_argument("--skip_save", action="store_true", help="save no single pictures")
    group.add_argument(
        "--n_rows", type=integer(0, 1024), default=0, help="pictures in a grid row; 0 = n_samples"
    )
    group.add_argument("--no_metadata", action="store_true", help="save no metadata in the pictures")


class _PaintingParser(Parser):
    """A parser whose --like fills in what the command line leaves open."""

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        found = super().parse_args(args, namespace)
        found.like_adapters, found.like_vae = [], None
        found.given = self.given(args)
        if found.like is not None:
            self._repeat(found, set(found.given))
        return found

    def _repeat(self, found: argparse.Namespace, given: set[str]) -> None:
        from ldm.metadata import read_metadata

        parameters = read_metadata(found.like)
        if not parameters.get("prompt") and "seed" not in parameters:
            raise FormatError(
                f"--like '{found.like}' does not say how it was painted; give a picture that does"
            )
        mode = parameters.get("mode")
        if mode == "edit" or (mode in ("img2img", "inpaint") and not _begins(found)):
            script, flag = ("edit.py", "--image") if mode == "edit" else (f"{mode}.py", "--init-img")
            raise UsageError(
                f"--like '{found.like}' was painted from another picture; use {script} and give that one as {flag}"
            )
        if "from_file" in given:
            given = given | {"prompt"}
        if given & {"plms", "dpm_solver"}:
            given = given | {"sampler"}
        if "sampler" in given:  # these were the other sampler's
            given = given | {"spacing", "eta", *options.of_samplers()}
        sizes = {"hires_scale", "hires_size"}
        if given & sizes:  # each says it in place of the other
            given = given | sizes
        if options.PRESET in given:  # as a program does it, in place of how the picture's did
            given = given | rules()
        values, lines = asked_for(parameters, found.upscaler_dir is not None)
        here = {option.name for option in options.told() if hasattr(found, option.name)} - given
        for name in here & values.keys():
            setattr(found, name, values[name])
            found.given.add(name)
        for name in sorted(here & lines.keys()):
            say(printable(f"{found.like}: {lines[name]}; left as it is"))
        self._leave_out(found, given, values, mode)
        self._leave_alone(found, given)
        found.like_adapters = told_adapters(parameters)
        found.like_vae = {name: parameters.get(name) for name in ("vae", "vae_hash")}
        if parameters.get("embeds_hash") is not None:
            say(
                f"{found.like}: was painted from prompt_embeds, which no picture holds; its prompt says nothing"
            )
        place = parameters.get("batch_index")
        if parameters.get("rng") in SHARED_RNGS and isinstance(place, int) and place > 0:
            say(
                f"{found.like}: was number {place + 1} of its batch, and depends on that place; "
                "what is painted here is the first"
            )

    def _leave_out(
        self, found: argparse.Namespace, given: set[str], values: Mapping[str, Any], mode: str | None
    ) -> None:
        """Leave out what a picture says of what is not here, and say so: of a mask where there is none.

        Args:
            given: by the command line, which is refused where that is so.
            values: of options, which the picture says; mode: how it was painted.
        """
        has_mask = any(getattr(found, name, None) is not None for name in ("mask", "indir", "outpaint"))
        needs = {
            options.HIRES: ("of hires fix (txt2img.py)", hasattr(found, "hires_scale")),
            options.START: ("of a picture to begin with (img2img.py --init-img)", _begins(found)),
            options.MASK: ("of a mask (inpaint.py --mask)", _begins(found) and has_mask),
        }
        for group, (of_what, is_here) in needs.items():
            others = [one for one in options.options() if one.group == group and one.name not in given]
            lost = [one for one in others if values.get(one.name, one.default) != one.default and not is_here]
            for one in lost:
                if hasattr(found, one.name):
                    setattr(found, one.name, one.default)
            names = ["mask"] if group == options.MASK and mode == "inpaint" and not is_here else []
            names += [one.infotext for one in lost]
            if names:
                say(printable(f"{found.like}: its {', '.join(names)} left out: {of_what}, which is not here"))

    def _leave_alone(self, found: argparse.Namespace, given: set[str]) -> None:
        """Leave out what a picture says of loops or tiles that are not asked for: A1111 writes no number of loops.

        Args:
            given: by the command line, which is refused where that is so.
        """
        for option in options.options():
            if option.group not in (options.START, options.MASK) or not option.beside or option.name in given:
                continue
            is_said = option.name in found.given and getattr(found, option.name) != option.default
            if is_said and all(
                getattr(found, name) == options.option(name).default for name in option.beside
            ):
                setattr(found, option.name, option.default)
                of = f"its {option.infotext} is of {option.beside[0]}, which is not asked for"
                say(printable(f"{found.like}: {of}; left out"))


def _begins(found: argparse.Namespace) -> bool:
    """Tell whether options name a picture to begin with, or a folder of such."""
    return any(getattr(found, name, None) is not None for name in ("init_img", "indir"))
