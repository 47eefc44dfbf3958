"""Painting a picture again from what it says of itself, and saying what could not be done as it says, item by item."""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import options
from ldm.cli.editing_options import TOLD, fill, said_by
from ldm.cli.replay_files import Account, Files, text_in
from ldm.cli.told import asked_for, by_us
from ldm.errors import AbsentError, FormatError, LdmError, UsageError, shown
from ldm.limits import BATCH_SIZE, is_whole
from ldm.metadata import HASHES, png_info, read_parameters
from ldm.presets import PRESETS

if TYPE_CHECKING:
    from PIL import Image

    from ldm.pipeline import StableDiffusion
    from ldm.request import Request

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
# What a picture says under `extra` that changes no pixel, or is looked after here.
HARMLESS = {
    *(*HASHES, "App", "Operations", "Pipeline", "Parser", "User", "Hashes", "Created Date"),
    *("app_version", "app_id", "swarm_version", "software", "image", "generator"),
}
MODES = ("txt2img", "img2img", "inpaint")
MOST_THREADS = 256  # of a picture's word, which anybody may have written
LOSS = {"JPEG": (2.0, 64), "WEBP": (2.0, 64)}  # mean and largest difference of 255 that coding may make


class Replayer:
    """Paints pictures again; the model of the picture before is kept.

    Args:
        models, vaes, loras, embeddings: folders or files that pictures name, each a list.
        inits, masks: pictures to begin with and masks, files or folders of them.
        device: as the scripts' --device.

    Raises:
        AbsentError: a folder or file is not there.
    """

    def __init__(
        self,
        *,
        models: Sequence[str] = (),
        vaes: Sequence[str] = (),
        loras: Sequence[str] = (),
        embeddings: Sequence[str] = (),
        inits: Sequence[str] = (),
        masks: Sequence[str] = (),
        device: str = "auto",
    ):
        self.files = Files(models, vaes, loras, embeddings, device)
        self.inits, self.masks = _pictures("--init", inits), _pictures("--mask", masks)

    def replay(self, path: str | os.PathLike, outdir: str | os.PathLike) -> Account:
        """Paint a picture again into a folder, under its name.

        Raises:
            LdmError: it cannot be painted at all: it does not say how it was, or a file is not here without which it
                would be another picture.
        """
        from ldm.images import open_image, prepare_folder, save_png

        parameters = read_parameters(path)
        if not parameters.get("prompt") and "seed" not in parameters:
            unread = "".join(f"; {line}" for line in parameters.get("unread", ()))
            raise FormatError(f"it does not say how it was painted{unread}")
        if by_us(
            parameters
        ):  # it is compared; damaged or of too many pixels it is refused before it is painted
            open_image(path)
        if parameters.get("embeds_hash") is not None:
            raise FormatError(
                "it was painted from prompt_embeds, which no picture holds; it cannot be painted again"
            )
        account = Account()
        account.lost += parameters.get("unread", [])
        values, lines = asked_for(parameters)
        account.lost += lines.values()
        if parameters["source"] in PRESETS and not by_us(parameters):
            values.setdefault(options.PRESET, parameters["source"])
            account.notes.append(f"what it does not say is as preset {parameters['source']!r} has it")
        account.lost += _of_extra(parameters)
        said = said_by(parameters, "it") if parameters.get("mode") == "edit" else None
        pictures = {} if said is None else self._pictures_of(said)
        sd = self.files.model(parameters, account)
        with _threads(parameters), self.files.adapters(sd, parameters, values, account) as adapters:
            values["adapters"] = adapters
            if said is None:
                image, told = self._paint(sd, parameters, values, account)
            else:
                image, told = _edit(sd, said, pictures, adapters)
        name = prepare_folder(outdir) / f"{Path(path).stem}.png"
        account.saved = save_png(image, name, png_info(told), rename=True)
        if by_us(parameters):
            account.verdict, account.is_same = compare(path, image)
            account.notes += _otherwise(parameters, told)
            if not account.is_same and parameters.get("rng") == "compvis":
                account.notes.append(
                    "with rng 'compvis' noise follows on from batch to batch; this may be of a later one"
                )
        return account

    # --- an edit ----------------------------------------------------------------------------------

    def _pictures_of(self, said: Mapping[str, Any]) -> dict[str, Image.Image]:
        """Find the picture that was edited, and its mask if it had one, among those that are given.

        Raises:
            AbsentError: one is not there.
        """
        from ldm.cli.editing import hash_of
        from ldm.images import open_image

        found = {}
        for name, what, option, files in (
            ("image", "picture that was edited", "--init", self.inits),
            ("mask", "mask", "--mask", self.masks),
        ):
            digits = said.get(f"{name}_hash")
            if name == "mask" and digits is None:
                continue
            for path in files:
                with contextlib.suppress(LdmError):  # one that cannot be read is none that is meant
                    picture = open_image(path)
                    if hash_of(picture) == digits:
                        found[name] = picture
                        break
            else:
                raise AbsentError(
                    f"it needs the {what}, hash {shown(digits, 20)}; {len(files)} pictures were tried; give it as "
                    f"{option} FILE, or its folder"
                )
        return found

    # --- the request ------------------------------------------------------------------------------

    def _paint(
        self, sd: StableDiffusion, parameters: Mapping[str, Any], values: dict[str, Any], account: Account
    ) -> tuple[Image.Image, dict[str, Any]]:
        """Paint a picture, among its neighbours; gives it, and what it says."""
        request, place = self.plan(sd, parameters, values, account)
        for result in (step.result for step in sd.paint(request) if step.result is not None):
            if place < len(result):  # a batch that does not fit into memory comes in parts
                break
            place -= len(result)
        return result.images[place], result.metadata(place)

    def plan(
        self, sd: StableDiffusion, parameters: Mapping[str, Any], values: dict[str, Any], account: Account
    ) -> tuple[Request, int]:
        """Check what a picture asks for; an option that cannot be is left out and said.

        Returns:
            the request, of as many pictures as were painted together, and the picture's place among them.
        """
        count, place = 1, 0
        if by_us(parameters):  # its neighbours' number decides the last bits
            told = parameters.get("batch_size"), parameters.get("batch_index")
            if is_whole(told[0], *BATCH_SIZE) and is_whole(told[1], 0, told[0] - 1):
                count, place = told
        mode = parameters.get("mode")
        if mode not in MODES:
            if mode is not None:
                account.lost.append(f"its mode {shown(mode)} is not known here")
            masks = {one.name for one in options.options() if one.group == options.MASK}
            mode = (
                "txt2img" if "strength" not in values else "inpaint" if masks & values.keys() else "img2img"
            )
        if mode == "txt2img":
            values.pop("strength", None)
        else:
            self._begin_with(sd, parameters, values, mode, account)
        each = {one.name for one in options.options() if one.each}
        given = {name: value for name, value in values.items() if name not in each}
        lists = {name: [values[name]] * count for name in each & values.keys()}
        prompts = lists.pop("prompt", [""] * count)
        while True:
            try:
                return sd.plan(prompts, batch_size=count, **given, **lists), place
            except UsageError as error:
                words = re.findall(r"\w+", str(error))
                named = next((word for word in words if word in given and word not in _KEPT), None)
                if named is None:
                    raise
                account.lost.append(f"{error}; painted without it")
                del given[named]

    def _begin_with(
        self,
        sd: StableDiffusion,
        parameters: Mapping[str, Any],
        values: dict[str, Any],
        mode: str,
        account: Account,
    ) -> None:
        """Find the picture to begin with, and its mask, among those that are given."""
        from ldm.results import tensor_hash

        extra = parameters.get("extra")
        name = text_in(extra.get("image") if isinstance(extra, dict) else None)
        # What is made of a picture depends on these.
        groups = (options.START, options.MASK)
        names = {
            one.name for one in options.options() if one.group in groups or one.name in _BESIDE
        } - _COUNTED
        of_it = {name: values[name] for name in names & values.keys()}
        begun = text_in(parameters.get("init_image_hash"))
        images = (
            self.inits if begun else [_only("picture to begin with", "--init", self.inits, name, account)]
        )
        masks: list[Path | None] = [None]
        marked = text_in(parameters.get("mask_hash")) if mode == "inpaint" else None
        if marked:  # outpainting marks what is new, with a mask or without
            masks = [*([None] if any(values.get("outpaint") or ()) else []), *self.masks]
        elif mode == "inpaint" and not any(values.get("outpaint") or ()):
            masks = [_only("mask", "--mask", self.masks, None, account)]
        for image, mask in itertools.product(images, masks):
            pair = {"image": image} | ({} if mask is None else {"mask": mask})
            if begun or marked:
                try:
                    request = sd.plan("", **pair, **of_it)
                except LdmError:  # of no size that can be painted
                    continue
                if begun not in (None, request.image_hash):
                    continue
                if marked is not None and (request.mask is None or tensor_hash(request.mask) != marked):
                    continue
            values.update(pair)
            return
        wanted = f"the picture to begin with, hash {begun}" + (
            f", and the mask, hash {marked}" if marked else ""
        )
        raise AbsentError(
            f"it needs {wanted:.90}; {len(images)} pictures and {len(masks)} masks were tried; give them as --init "
            "FILE and --mask FILE, or their folders"
        )


_BESIDE = ("width", "height", "upscaler_dir")
_COUNTED = {"strength", "strength_rule"}  # of steps, which may be refused with other steps than the picture's
_KEPT = ("image", "mask", "adapters", "lora_dir")  # never left out


def _edit(
    sd: StableDiffusion, said: Mapping[str, Any], pictures: Mapping[str, Image.Image], adapters: Sequence[Any]
) -> tuple[Image.Image, dict[str, Any]]:
    """Edit a picture as another one says; gives it, and what it says."""
    from ldm.cli.editing import edit_with, parameters_of

    args = argparse.Namespace(**dict.fromkeys(TOLD))
    fill(args, said)
    done = edit_with(args, sd, pictures, adapters)
    return done.images[0], parameters_of(args, 0, sd, pictures, adapters, done)


def compare(path: str | os.PathLike, image: Image.Image) -> tuple[str, bool]:
    """Compare a picture's file with what was painted again: words, and whether they are the same.

    Of a JPEG and a lossy WebP the new picture is coded in the same way first, a JPEG with the file's own tables.
    """
    import numpy as np
    from PIL import Image, JpegImagePlugin

    from ldm.containers import read_file
    from ldm.images import QUALITY

    with Image.open(io.BytesIO(read_file(path).pixels)) as theirs:
        kind = theirs.format
        is_lossless = kind == "PNG" or (kind == "WEBP" and b"VP8L" in read_file(path).pixels[:64])
        pixels = np.asarray(theirs.convert("RGB")).astype(np.int16)
        ours = Image.fromarray(np.asarray(image.convert("RGB")))
        if not is_lossless:
            how: dict[str, Any] = {"quality": QUALITY}
            if kind == "JPEG":
                how = {"qtables": theirs.quantization, "subsampling": JpegImagePlugin.get_sampling(theirs)}
            buffer = io.BytesIO()
            ours.save(buffer, kind, **how)
            ours = Image.open(buffer)
    again = np.asarray(ours.convert("RGB")).astype(np.int16)
    if again.shape != pixels.shape:
        return f"another size, {again.shape[1]} x {again.shape[0]}", False
    off = np.abs(again - pixels)
    count, total = int((off.max(axis=2) > 0).sum()), off.shape[0] * off.shape[1]
    coded = "" if is_lossless else f" after {kind} coding"
    if not count:
        return f"the same pixels, byte for byte{coded}, all {total}", True
    differs = f"{count} of {total} pixels differ, by at most {off.max()} of 255"
    if is_lossless:
        return differs, False
    mean, most = LOSS[kind]
    is_near = bool(off.mean() <= mean and off.max() <= most)
    limits = f"a mean of {mean:g} and at most {most} are taken for {kind}'s loss"
    return f"{differs}, {off.mean():.2g} in the mean ({limits})", is_near


# --- small steps ----------------------------------------------------------------------------------


def _pictures(option: str, places: Sequence[str]) -> list[Path]:
    found: list[Path] = []
    for place in map(Path, places):
        if not place.exists():
            raise AbsentError(f"{option} '{place}' is not there; give a picture, or a folder of pictures")
        inside = sorted(place.rglob("*")) if place.is_dir() else [place]
        found += [one for one in inside if place == one or one.suffix.lower() in PICTURES]
    return found


def _only(what: str, option: str, files: Sequence[Path], name: str | None, account: Account) -> Path:
    """Choose one of the given pictures where none is told by a hash: the one of this name, else the only one.

    Raises:
        AbsentError: there is none.
    """
    named = [path for path in files if name is not None and path.name == name]
    if not named and len(files) != 1:
        called = f" {shown(name)}" if name else ""
        raise AbsentError(f"it needs the {what}{called}; give the one as {option} FILE")
    account.notes.append(f"the {what} is not told by a hash; '{(named or files)[0].name}' is taken")
    return (named or files)[0]


def _of_extra(parameters: Mapping[str, Any]) -> list[str]:
    """List what a picture says that no option of ours takes, a line each."""
    from ldm.results import GenerationParameters

    known = {"source", "extra", "unread", "model_hash", *GenerationParameters.__annotations__}
    known |= {one.name for one in options.TABLE} | ({"edit"} if parameters.get("mode") == "edit" else set())
    found = [f"{name} {shown(parameters[name])} is no option here" for name in parameters.keys() - known]
    extra = parameters.get("extra")
    for key, value in extra.items() if isinstance(extra, dict) else ():
        if key == "nodes":
            found += [
                f"ComfyUI's node {one}" + ("" if ": its " in one else " is not known here")
                for one in str(value).split(", ")
            ]
        elif key not in HARMLESS:
            found.append(f"{key}: {shown(value)} is no option here")
    return found


@contextlib.contextmanager
def _threads(parameters: Mapping[str, Any]) -> Iterator[None]:
    """Compute with as many threads as one of our pictures says, which decides the last bits."""
    import torch

    before, told = torch.get_num_threads(), parameters.get("threads")
    if by_us(parameters) and is_whole(told, 1, MOST_THREADS):
        torch.set_num_threads(told)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _otherwise(parameters: Mapping[str, Any], told: Mapping[str, Any]) -> list[str]:
    """Say in what the machine differs from the one that painted, where that may decide the last bits."""
    names = [
        name
        for name in ("device", "dtype", "vae_dtype", "optimize", "threads", "torch", "version")
        if name in parameters and by_us(parameters) and parameters["source"] == "ldm"
    ]
    return [
        f"{name} was {parameters[name]}, now {told[name]}" for name in names if parameters[name] != told[name]
    ]
