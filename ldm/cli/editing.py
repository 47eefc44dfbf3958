"""What scripts/edit.py does: invert the picture, edit it, save the edits and a contact sheet."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.cli.adapters import Embeddings, check_there, read_loras
from ldm.cli.controls import Controls, check_controls, gather
from ldm.cli.editing_options import OF_PROMPT_TO_PROMPT, TOLD, fill, options_of, repeat, weight_of
from ldm.cli.painting import check_model, load_model, say_lacking
from ldm.cli.running import printable, say
from ldm.errors import MismatchError, UsageError, shown

if TYPE_CHECKING:
    from PIL import Image

    from ldm.edit import Edited
    from ldm.editing import Editor
    from ldm.models.diffusion.inversion import Method
    from ldm.pipeline import StableDiffusion


def edit(args: argparse.Namespace) -> None:
    """Edit the picture that the options name.

    Raises:
        UsageError: what is missing, or does not go together. MismatchError: another picture than --like's.
    """
    said, wants_seed = repeat(args), args.seed is not None
    fill(args, said)
    if args.prompt is None or not args.edit_prompt:
        missing = (
            "--prompt, what the picture shows,"
            if args.prompt is None
            else "--edit-prompt, what it is to show,"
        )
        raise UsageError(f"an edit needs {missing} and got none; give it, or a picture with both as --like")
    ways = editor_of(args), inversion_of(args)
    if wants_seed and not any(hasattr(one, "seed") for one in ways):
        raise UsageError(
            f"--seed is of noise, and neither the method {shown(args.method)} nor the inversion "
            f"{shown(args.inversion)} draws any; leave it out"
        )

    from ldm.devices import pick_device
    from ldm.images import open_image, save_numbered
    from ldm.metadata import Painted, png_info

    check_model(args)
    paths = {name: getattr(args, name) for name in ("image", "mask") if getattr(args, name) is not None}
    check_adapters(args, paths)
    pictures = {name: open_image(path) for name, path in paths.items()}
    marks = hashes_of(pictures)
    for name, given in marks.items():
        new_mask = name == "mask_hash" and said.get(name) is None  # where there was none, one may be given
        if said and said.get(name) != given and not new_mask:
            what = name.removesuffix("_hash")
            raise MismatchError(
                f"--like '{args.like}' was made of another {what} (hash {shown(said.get(name))}) than --{what} "
                f"{shown(getattr(args, what))} (hash {shown(given)}); give that one, or leave --like out"
            )
    adapters = [*read_loras(args.lora, {}), *Controls().read(args.controls, pictures, 0)]
    with folder_of(args.outdir) as outdir:
        sd = load_model(args, pick_device(args.device))
        adapters += embeddings_of(args, sd)
        say_lacking(args, sd, adapters)
        done = edit_with(args, sd, pictures, adapters)
    say(f"the picture comes back at {done.psnr:.1f} dB, the first stage alone at {done.ceiling:.1f}")
    for i, one in enumerate(done.images):
        parameters = parameters_of(args, i, sd, pictures, adapters, done)
        path = save_numbered(Painted.of(one, lambda said=parameters: said), outdir, info=png_info(parameters))
        say(f"{path} ({printable(args.edit_prompt[i])})")
    if not args.no_sheet:
        say(f"{save_numbered(done.sheet(), outdir, 'sheet-{:04}.png')}")


@contextlib.contextmanager
def folder_of(path: str) -> Iterator[Path]:
    """Make the folder for what is made within, and take new ones away again where nothing was."""
    from ldm.images import prepare_folder

    new = [one for one in (Path(path), *Path(path).parents) if not os.path.lexists(one)]
    folder = prepare_folder(path)
    try:
        yield folder
    except BaseException:
        with contextlib.suppress(OSError):
            for one in new:
                one.rmdir()
        raise


def edit_with(
    args: argparse.Namespace,
    sd: StableDiffusion,
    pictures: Mapping[str, Image.Image],
    adapters: Sequence[Any],
) -> Edited:
    """Edit a picture as the options say that `fill` has filled in.

    Args:
        pictures: the picture ("image"), and its mask where it has one.
    """
    return sd.edit(
        pictures["image"],
        args.prompt,
        args.edit_prompt,
        method=inversion_of(args),
        inversion_scale=args.inversion_scale,
        editor=editor_of(args),
        steps=args.steps,
        start_step=args.start_step,
        guidance_scale=args.scale,
        negative_prompt=args.negative_prompt,
        mask=pictures.get("mask"),
        feather=args.feather,
        adapters=adapters,
    )


def check_adapters(args: argparse.Namespace, paths: Mapping[str, str]) -> None:
    """Refuse what flags of adapters say, where no model is needed to see it.

    Args:
        paths: of the picture and its mask, of which hints are made where none is given.

    Raises:
        LdmError: as check_there and check_controls; several hints, which are of as many pictures.
    """
    check_there([*args.lora, *args.embedding])
    check_controls(args.controls, paths)
    for one in gather(args.controls):
        if one.kind != "ip_adapter" and len(one.hints) > 1:
            raise UsageError(
                f"{one} has {len(one.hints)} hints, and an edit is of one picture; give one --hint"
            )


def embeddings_of(args: argparse.Namespace, sd: StableDiffusion) -> list[Any]:
    """List the embeddings that the prompts name, and those given one by one, of which it is said if none does."""
    from ldm.checks.sampling import warn_unnamed

    prompts, embeddings = [args.prompt, *args.edit_prompt, args.negative_prompt], Embeddings(sd.model)
    found = embeddings.named(args.embedding, prompts) + embeddings.pop_unnamed(args.embedding)
    warn_unnamed(sd.model, found, prompts)
    return found


def editor_of(args: argparse.Namespace) -> Editor:
    """Make the way to edit that the options name.

    Raises:
        UsageError: an unknown one, options of another one, or one said twice.
    """
    from ldm.adapters import LocalBlend, PromptToPrompt
    from ldm.editing import Controlled, resolve_editor

    editor, options = resolve_editor(args.method), options_of("--method-option", args.method_option)
    flags = {
        name: getattr(args, name) for name in OF_PROMPT_TO_PROMPT if getattr(args, name) not in (None, [])
    }
    is_p2p = isinstance(editor, Controlled) and isinstance(editor.control, PromptToPrompt)
    for name, value in flags.items():
        if not is_p2p:
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(
                f"{flag} is of prompt_to_prompt, and the method is {shown(args.method)}; leave it out"
            )
        if OF_PROMPT_TO_PROMPT[name] in options:
            raise UsageError(
                f"--{name.replace('_', '-')} and --method-option {OF_PROMPT_TO_PROMPT[name]}=... say the same; give one"
            )
        made = {"weight": lambda given: dict(map(weight_of, given)), "blend": LocalBlend}
        options[OF_PROMPT_TO_PROMPT[name]] = made.get(name, lambda given: given)(value)
    if hasattr(editor, "seed"):
        options["seed"] = args.seed
    return resolve_editor(args.method, **options)


def inversion_of(args: argparse.Namespace) -> Method:
    """Make the inversion that the options name.

    Raises:
        UsageError: an unknown one, or an option that it does not have.
    """
    from ldm.models.diffusion.inversion import resolve_method

    options = options_of("--inversion-option", args.inversion_option)
    if hasattr(resolve_method(args.inversion), "seed"):
        options["seed"] = args.seed
    return resolve_method(args.inversion, **options)


def hash_of(image: Image.Image) -> str:
    """Hash the pixels of a picture."""
    return hashlib.sha256(image.convert("RGBA").tobytes()).hexdigest()[:10]


def hashes_of(pictures: Mapping[str, Image.Image]) -> dict[str, str | None]:
    """Hash the picture and its mask; None where there is none."""
    return {
        f"{name}_hash": hash_of(pictures[name]) if name in pictures else None for name in ("image", "mask")
    }


def parameters_of(
    args: argparse.Namespace,
    index: int,
    sd: StableDiffusion,
    pictures: Mapping[str, Image.Image],
    adapters: Sequence[Any],
    done: Edited,
) -> dict[str, Any]:
    """Collect what the picture of an edit prompt says: all that makes it again, and how well its source came back."""
    from ldm.adapters.use import described
    from ldm.finishing import computed_with
    from ldm.results import file_hash

    marks, prompt = hashes_of(pictures), args.edit_prompt[index]
    told = {name: getattr(args, name) for name in TOLD} | {"edit_prompt": [prompt], **marks}
    return {
        "mode": "edit",
        "prompt": prompt,
        "negative_prompt": args.negative_prompt,
        "seed": args.seed,
        "steps": args.steps,
        "init_image_hash": marks["image_hash"],
        "edit": told | {"psnr": round(done.psnr, 2)},
        "model": sd.name,
        "model_hash": file_hash(sd.file),
        "adapters": described(adapters),
        **computed_with(sd.model, sd.autocast),
    }
