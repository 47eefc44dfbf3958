"""Which part of a picture belongs to which word: `StableDiffusion.explain`, a heat map for each word."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import ldm
from ldm import images as pictures
from ldm.adapters.use import prompt_reader
from ldm.adapters.word_maps import WordMaps
from ldm.edit_parts import encode_picture, joined
from ldm.edit_pictures import invert_picture
from ldm.errors import UsageError, nearest, shown
from ldm.labels import labelled, plain
from ldm.limits import is_real
from ldm.prompt.alignment import expect_word, tokens_of_words

GLOW = torch.tensor([1.0, 0.25, 0.0]).view(3, 1, 1)  # of an overlay where a word is looked for most


@dataclass(eq=False)
class Explained:
    """Where a picture looks for the words of its prompt; a notebook shows the overlays beside one another.

    Attributes:
        image: the picture.
        prompt: its prompt.
        words: in the order of the prompt, each once, or those that were asked for.
        maps: (words, height, width) for each word what share of a pixel's attention its tokens have.
    """

    image: Image.Image
    prompt: str
    words: list[str]
    maps: Tensor = field(repr=False)

    def map(self, word: str) -> Tensor:
        """Give the map (height, width) of a word, from 0 to 1, its largest value.

        Raises:
            UsageError: a word that is not among them.
        """
        if word not in self.words:
            near = nearest(word, self.words)
            hint = f"; did you mean {shown(near)}?" if near else f"; there are {', '.join(self.words):.200}"
            raise UsageError(f"there is no map of {shown(word)}{hint}")
        found = self.maps[self.words.index(word)]
        return found / found.max().clamp(min=1e-12)

    def heat(self, word: str) -> Image.Image:
        """Give the map of a word as a picture, white where it is looked for most."""
        return pictures.unit_to_pil(self.map(word).expand(1, 3, -1, -1))[0]

    def overlay(self, word: str, strength: float = 0.6) -> Image.Image:
        """Give the picture, darkened, with the map of a word glowing in it.

        Args:
            strength: how much of the picture the map covers, 0 to 1.
        """
        if not is_real(strength, 0, 1):
            raise UsageError(f"strength must be from 0 to 1, got {shown(strength)}")
        unit = pictures.given_unit(pictures.to_tensor(pictures.to_rgb(self.image)))[0]
        mixed = (1 - strength) * unit + strength * self.map(word) * GLOW
        return pictures.unit_to_pil(mixed[None].clamp(0, 1))[0]

    def sheet(self) -> Image.Image:
        """Lay the picture and the overlays of all words out in one row, with labels."""
        row = [pictures.to_rgb(self.image), *map(self.overlay, self.words)]
        return labelled(row, plain([self.prompt, *self.words]), [[]])

    def _repr_png_(self) -> bytes | None:
        return self.sheet()._repr_png_()


def explain(
    sd: ldm.StableDiffusion,
    what: Any,
    prompt: str | None = None,
    *,
    words: str | Sequence[str] | None = None,
    span: tuple[float, float] = (0.0, 1.0),
    **options: Any,
) -> Explained:
    """Show where a picture looks for the words of its prompt: `StableDiffusion.explain`.

    Args:
        what: a prompt, which is painted; or a picture, as `edit` takes it, with `prompt`: what it shows.
        words: those to show, each as it stands in the prompt, or a part of it such as "cat" in "a cat, sitting"; None =
            all.
        span: part of the steps that is watched.
        options: of txt2img; with a picture, of ldm.edit.invert_picture: steps, guidance_scale, adapters, ...

    Raises:
        UsageError: a word that is not in the prompt, or what txt2img and invert refuse.
    """
    watching = WordMaps(span)
    text = what if prompt is None else prompt
    if not isinstance(text, str):
        raise UsageError(
            f"explain wants a prompt, or a picture and the prompt of what it shows; got {shown(text)} for the prompt"
        )
    if prompt is None and os.path.isfile(text):
        raise UsageError(f"{shown(text)} is a file here; give what it shows as well, by prompt=")
    if (syntax := options.get("prompt_syntax", "plain")) != "plain":
        raise UsageError(f"explain reads plain prompts, got prompt_syntax={shown(syntax)}; leave it out")
    given = options.pop("adapters", ())
    with prompt_reader(sd.model, joined(sd, given)) as encoder:
        chosen = [words] if isinstance(words, str) else words
        if not isinstance(chosen, list | tuple | None) or chosen in ([], ()):
            raise UsageError(f"words should be a word or a list of them, got {shown(words)}")
        if chosen is None:
            chosen = dict.fromkeys(word for word, places in tokens_of_words(encoder, text) if places)
        places = {word: expect_word(encoder, [text], word, "words")[0] for word in chosen}
    adapters = [*given, watching]
    if not places:
        raise UsageError(f"there is no word to show in the prompt {shown(text)}")
    if prompt is None:
        if "output_type" in options or options.get("num_images", 1) != 1:
            raise UsageError("explain shows one picture; leave output_type and num_images out")
        image = sd.txt2img(text, adapters=adapters, **options)[0]
    else:
        invert_picture(
            sd, what, text, adapters=adapters, **{"guidance_scale": 1.0, "measure": False, **options}
        )
        image = pictures.unit_to_pil(encode_picture(sd, what)[1])[0]
    average = watching.average[0].cpu()
    maps = torch.stack([average[own].sum(0) for own in places.values()])
    size = (image.height, image.width)
    whole = F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]
    return Explained(image, text, list(places), whole)
