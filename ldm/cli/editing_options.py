"""The options of scripts/edit.py, and what --like fills in of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ldm import options
from ldm.cli.adapters import told_adapters
from ldm.cli.painting_options import OTHER_FLAGS, add_model, add_option
from ldm.cli.parser import Parser, integer, number, seed
from ldm.cli.running import printable, say
from ldm.errors import FormatError, UsageError, shown
from ldm.limits import GUIDANCE_SCALE

# What a picture says of its edit, and --like takes from it: destination -> default.
TOLD: dict[str, Any] = {
    "prompt": None,
    "edit_prompt": [],
    "method": "swap",
    "inversion": "edit_friendly",
    "inversion_scale": None,
    "steps": 50,
    "start_step": None,
    "scale": None,
    "negative_prompt": "",
    "seed": 0,
    "cross_replace": None,
    "self_replace": None,
    "weight": [],
    "blend": None,
    "feather": 0.0,
    "method_option": [],
    "inversion_option": [],
}
ADAPTERS = ("lora", "embedding", "controls")  # what the flags of adapters fill
# Of prompt_to_prompt: flag -> its argument.
OF_PROMPT_TO_PROMPT = {
    "cross_replace": "cross_replace_steps",
    "self_replace": "self_replace_steps",
    "weight": "equalizer",
    "blend": "local_blend",
}
# What --method-option and --inversion-option may set, beside what has a flag of its own: whose -> its arguments.
OF_METHODS = {
    "prompt_to_prompt": ("kind", "self_cells"),
    "mutual_self_attention": ("start", "start_layer"),
    "plug_and_play": ("attention_steps", "feature_steps", "feature_block"),
    "diffedit": ("strength", "draws", "threshold"),
    "dds": ("iterations", "rate"),
}
OF_INVERSIONS = {
    "fixed_point, anderson": ("tolerance", "iterations", "history"),
    "edict": ("mix_weight",),
    "bdia": ("gamma",),
    "edit_friendly": ("eta",),
    "proximal": ("quantile", "prox"),
    "null_text": ("iterations", "learning_rate", "early_stop"),
}


def edit_parser() -> Parser:
    """Make the parser; what --like may fill in has no default in it."""
    p = Parser(
        prog="edit.py",
        description="Change a picture by its prompt: invert it, and sample it under another (docs/editing.md).",
        usage="edit.py --image FILE --prompt 'what it shows' --edit-prompt 'what it is to show' [options]",
    )
    p.also = {
        **OTHER_FLAGS,
        "init_image": "image",
        "init_img": "image",
        "guidance_scale": "scale",
        "editor": "method",
        "n_steps": "steps",
    }
    for flag, table in (("--inversion-option", OF_INVERSIONS), ("--method-option", OF_METHODS)):
        p.instead = {
            **p.instead,
            **{name: f"{flag} {name}=..." for names in table.values() for name in names},
        }
    p.set_defaults(**dict.fromkeys(TOLD))
    what = p.add_argument_group("what to change")
    what.add_argument("--image", required=True, help="the picture")
    what.add_argument("--prompt", help="what it shows")
    what.add_argument("--edit-prompt", action="append", help="what it is to show; repeated, a picture each")
    what.add_argument("--negative-prompt", help="what guidance leads away from")
    what.add_argument("--mask", help="a picture: white is changed, black stays as it is")
    what.add_argument("--feather", type=number(0, 256), help="pixels over which the mask fades to each side")
    what.add_argument(
        "--like",
        metavar="PICTURE",
        help="take what is not given here from an edited picture's metadata, prompts included",
    )
    _add_how(p.add_argument_group("how"))
    _add_prompt_to_prompt(p.add_argument_group("of prompt_to_prompt"))
    besides = p.add_argument_group(options.WITH)
    for option in options.options():
        if option.dest in ADAPTERS:
            add_option(besides, option)
            p.also |= {name: option.flags[0].lstrip("-") for name in option.also}
    add_model(p.add_argument_group("with what"))
    out = p.add_argument_group("where to")
    out.add_argument("--outdir", default="outputs/edits", help="folder for the pictures")
    out.add_argument("--no-sheet", action="store_true", help="save no contact sheet")
    return p


def _add_how(how: argparse._ArgumentGroup) -> None:
    how.add_argument(
        "--method",
        help="swap (default), prompt_to_prompt (default with one of its options), mutual_self_attention, "
        "plug_and_play, diffedit, dds, add_noise",
    )
    how.add_argument(
        "--inversion", help="edit_friendly (default), or another of ldm.models.diffusion.inversion.METHODS"
    )
    for flag, table, others in (
        ("--method-option", OF_METHODS, ""),
        ("--inversion-option", OF_INVERSIONS, "; a sampler's own by their names"),
    ):
        known = "; ".join(f"{', '.join(names)} ({whose})" for whose, names in table.items())
        how.add_argument(
            flag, action="append", metavar="NAME=VALUE", help=f"{known}{others}; may be repeated"
        )
    how.add_argument(
        "--inversion-scale",
        type=number(*GUIDANCE_SCALE),
        help="of guidance on the way up (default: 1; by edit_friendly --scale, whose noise stays noise under it)",
    )
    how.add_argument("--steps", type=integer(1, 1000), help="of the way up, and down again (default: 50)")
    how.add_argument("--start-step", type=integer(0, 999), help="steps that are left out (default: 3 in 10)")
    how.add_argument("--scale", type=number(*GUIDANCE_SCALE), help="of guidance (default: the model's own)")
    how.add_argument(
        "--seed",
        type=seed,
        help="of the noise that dds, diffedit, add_noise and the inversion edit_friendly draw (default: 0)",
    )


def _add_prompt_to_prompt(p2p: argparse._ArgumentGroup) -> None:
    p2p.add_argument(
        "--cross-replace", type=number(0, 1), help="share of steps with the source's looks at words"
    )
    p2p.add_argument("--self-replace", type=number(0, 1), help="share of steps with the source's layout")
    p2p.add_argument(
        "--weight",
        action="append",
        metavar="WORD=FACTOR",
        help="a word that counts more, or less; may be repeated",
    )
    p2p.add_argument(
        "--blend", metavar="WORD", help="stay as the source is where no prompt is about this word"
    )


def said_by(parameters: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    """Give what a picture's metadata say of its edit, by the names of TOLD; anybody may have written them.

    Args:
        what: the picture, as an error begins.

    Raises:
        FormatError: they say nothing, or not what it should be.
    """
    said = parameters.get("edit")
    if not isinstance(said, dict) or not isinstance(said.get("prompt"), str):
        raise FormatError(f"{what} does not say how it was edited; give a picture of edit.py")
    for name, default in TOLD.items():
        value = said.get(name, default)
        fits = isinstance(value, (str, int, float, type(None))) or (
            isinstance(value, list) and all(isinstance(one, str) for one in value)
        )
        if not fits or (isinstance(default, list) and not isinstance(value, list)):
            raise FormatError(
                f"{what} says the {name} {shown(value)}, which is none; give it on the command line"
            )
    return said


def fill(args: argparse.Namespace, said: Mapping[str, Any]) -> None:
    """Fill in what the command line leaves open by what a picture says, else by the defaults.

    What is of the picture's method or inversion does not come along to another one, which is said.
    """
    from ldm.editing import OTHER_NAMES
    from ldm.models.diffusion.inversion import spelt

    wanted = TOLD | {name: said[name] for name in TOLD.keys() & said.keys()}
    own = [value for name in OF_PROMPT_TO_PROMPT for value in (getattr(args, name), wanted[name])]
    if wanted["method"] == "swap" and any(value not in (None, []) for value in own):
        wanted["method"] = "prompt_to_prompt"  # whose options these are
    for whose, own in (
        ("method", (*OF_PROMPT_TO_PROMPT, "method_option")),
        ("inversion", ("inversion_option",)),
    ):
        given = getattr(args, whose)
        now, then = (OTHER_NAMES.get(name, name) for name in map(spelt, (given, wanted[whose])))
        if given is not None and now != then:
            lost = [name for name in own if wanted[name] != TOLD[name] and getattr(args, name) is None]
            wanted |= {name: TOLD[name] for name in own}
            if lost:
                names = ", ".join(name.replace("_", " ") for name in lost)
                say(printable(f"{args.like}: its {names} left out: of its {whose}, {wanted[whose]}"))
    for name in ("method_option", "inversion_option"):
        given = getattr(args, name) or []
        if given and wanted[name]:  # each goes before the picture's of the same name
            names = {_name_of(one) for one in given}
            setattr(args, name, [one for one in wanted[name] if _name_of(one) not in names] + given)
    for name, value in wanted.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def options_of(flag: str, given: Sequence[str]) -> dict[str, Any]:
    """Read what a flag says as NAME=VALUE: a value is JSON, and a text where it is none.

    Raises:
        UsageError: one that is not of this form, one given twice, or the seed, which has a flag of its own.
    """
    found: dict[str, Any] = {}
    for text in given:
        name, (_, equals, value) = _name_of(text), text.partition("=")
        if not (name and equals and value):
            raise UsageError(f"{flag} should be such as threshold=0.3, got {shown(text)}")
        if name in found:
            raise UsageError(f"{flag} {name} was given twice; give it once")
        if name == "seed":
            raise UsageError(f"{flag} seed is given as --seed {value:.40}")
        try:
            found[name] = json.loads(value)
        except (ValueError, RecursionError):
            found[name] = value
    return found


def _name_of(text: str) -> str:
    return text.partition("=")[0].strip().replace("-", "_")


def weight_of(text: str) -> tuple[str, float]:
    """Read "word=2.5".

    Raises:
        UsageError: it is not of this form.
    """
    word, equals, factor = text.rpartition("=")
    try:
        return word, float(factor if equals and word else "none")
    except ValueError:
        raise UsageError(f"--weight should be such as snowy=2.5, got {shown(text)}") from None


def repeat(args: argparse.Namespace) -> Mapping[str, Any]:
    """Read what the edited picture of --like says of its edit, and of adapters and VAE; {} where there is none.

    Raises:
        FormatError: it says nothing, or not what it should be.
    """
    from ldm.metadata import read_parameters

    path, args.like_adapters, args.like_vae = args.like, [], None
    if path is None:
        return {}
    parameters = read_parameters(path)
    said = said_by(parameters, f"--like '{path}'")
    args.like_adapters = told_adapters(parameters)
    args.like_vae = {name: parameters.get(name) for name in ("vae", "vae_hash")}
    return said
