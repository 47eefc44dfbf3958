"""Bits per dimension of pictures, or of their latents: what guided-diffusion's image_nll.py measures."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.batches import in_batches
from ldm.errors import AbsentError, MismatchError, NumericError, UsageError, escaped
from ldm.guided_diffusion.image_datasets import needs_training
from ldm.guided_diffusion.models import Conditions, LatentModel, Model
from ldm.images import save_file
from ldm.noise import ImageNoise
from ldm.training.listing import class_name

SHAPES_SEED = 2_000_003  # of scenes that no configuration here trains or validates on


@dataclass(frozen=True)
class Pictures:
    """Pictures to measure: `read` gives the i-th as (3, height, width) in [-1, 1]."""

    read: Callable[[int], Tensor]
    captions: list[str]
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.captions)


def shapes_to_measure(model: Model, count: int) -> Pictures:
    """Take scenes of the world of shapes that no training here has seen; a class is the first object's shape or colour.

    Raises:
        UsageError: the model's classes are neither the shapes nor the colours.
    """
    from ldm.shapes.scenes import COLOURS as HUES
    from ldm.shapes.scenes import SHAPES, ShapesDataset

    scenes = ShapesDataset(size=model.size, length=count, seed=SHAPES_SEED, split="train")
    items = [scenes.scene(i).items[0] for i in range(count)]
    labels = None
    if model.num_classes is not None:
        known = {
            len(SHAPES): lambda item: SHAPES.index(item.shape),
            len(HUES): lambda item: list(HUES).index(item.colour),
        }
        if model.num_classes not in known:
            raise UsageError(
                f"the model has {model.num_classes} classes; shapes have {' or '.join(map(str, known))}, their shape "
                "or colour; give a folder of pictures"
            )
        labels = torch.tensor([known[model.num_classes](item) for item in items])
    captions = [scenes.scene(i).caption for i in range(count)]
    return Pictures(lambda i: _channels_first(scenes[i]["image"]), captions, labels)


def folder_to_measure(model: Model, folder: str | os.PathLike, at_most: int) -> Pictures:
    """Take the first pictures of a folder, by name, with their captions where they have some.

    Those that cannot be read are left out, with a warning.

    For a model with classes the class is the first part of the file's name, up to "_", as guided-diffusion has it;
    classes are numbered in the order of their names.

    Raises:
        AbsentError: no folder, or no pictures in it.
        FormatError: pictures or captions that cannot be read.
        MismatchError: the folder has more classes than the model.
        UsageError: a package is missing.
    """
    if not Path(folder).is_dir():
        raise AbsentError(f"picture folder '{escaped(folder)}' does not exist; check --data_dir")
    label = None if model.num_classes is None else "prefix"
    pictures = needs_training("folder").ImageFolder(
        folder, image_size=model.size, needs_captions=False, label=label
    )
    # A folder that is trained on puts the next picture in an unreadable one's place: measured, it would count twice.
    pictures.samples = pictures.samples[:at_most]
    pictures.look(Path(os.devnull), write=False)
    samples, labels = pictures.samples, None
    if model.num_classes is not None:
        if len(pictures.classes) > model.num_classes:
            raise MismatchError(
                f"'{escaped(folder)}' holds {len(pictures.classes)} classes by the names up to '_', the model has "
                f"{model.num_classes}; name the pictures <class>_<anything>"
            )
        labels = torch.tensor(
            [pictures.classes.index(class_name(path, pictures.folder, label)) for path, _ in samples]
        )
    captions = [caption for _, caption in samples]
    return Pictures(lambda i: _channels_first(pictures[i]["image"]), captions, labels)


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)  # (3, height, width)


@torch.no_grad()
def measure(
    model: Model,
    pictures: Pictures,
    *,
    seeds: Sequence[int],
    batch_size: int,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure the variational bound of pictures, or of their latents, in bits per dimension (calc_bpd_loop).

    A batch that does not fit into memory is halved. Noise is drawn once for each picture and level, picture i's from
    seed i.

    Args:
        say: is called with a line about every batch.

    Returns:
        What `save_measures` writes: means over the pictures, of terms per level the noisiest first, and each
        picture's total and prior.

    Raises:
        MismatchError: an upsampler, whose small pictures are not given.
        NumericError: bits that are not finite.
        ResourceError: out of memory with a single picture.
    """
    if model.upscales:
        raise MismatchError(
            "an upsampler judges large pictures by small ones, which are not given; give a model"
        )
    prompts = pictures.captions if model.takes_prompts else None
    conditions = Conditions(labels=pictures.labels, prompts=prompts)

    def work(rows: range, index: int, count: int) -> Iterator[tuple[range, dict[str, Tensor]]]:
        noise = ImageNoise([seeds[i] for i in rows])
        with model.averages():
            x = model.encode(torch.stack([pictures.read(i) for i in rows]), noise)
            conditioned = model.condition(conditions, rows)
            diffusion = model.diffusion.drawing(noise)
            yield rows, diffusion.calc_bpd_loop(conditioned.network, x, model_kwargs=conditioned.kwargs)

    def refusal(count: int) -> str:
        return f"out of memory with {count} pictures of {model.size} pixels at once; use a smaller batch"

    found: dict[str, list[Tensor]] = {}
    for rows, bound in in_batches(range(len(pictures)), batch_size, work, refusal=refusal):
        for name, values in bound.items():
            found.setdefault(name, []).append(values.double().cpu())
        say(f"{rows.stop} of {len(pictures)}: {torch.cat(found['total_bpd']).mean():.4f} bits per dimension")
    terms = {name: torch.cat(values) for name, values in found.items()}  # (n,) or (n, levels)
    if not all(values.isfinite().all() for values in terms.values()):
        raise NumericError("bits per dimension are not finite; nothing was saved; check the model file")
    each = {name: terms[name].tolist() for name in ("total_bpd", "prior_bpd")}
    spread = terms["total_bpd"].std().item() / math.sqrt(len(pictures)) if len(pictures) > 1 else None
    result = {
        "unit": model.unit,
        "pictures": len(pictures),
        "seed": seeds[0],
        "dimensions": math.prod(model.shape),
        "total_bpd_error": spread,
        **{name: values.mean(dim=0).tolist() for name, values in terms.items()},
        "levels": model.diffusion.timestep_map[::-1],
        "each": each,
    }
    if isinstance(model, LatentModel):
        # A density of z / s is s^d times that of z.
        result["total_bpd_unscaled"] = result["total_bpd"] - math.log2(float(model.model.scale_factor))
    return result


def save_measures(folder: Path, result: Mapping[str, Any]) -> Path:
    """Save nll.json; nothing is overwritten.

    Raises:
        OutputError: the folder cannot be written.
    """
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    return save_file(lambda file: file.write(text.encode()), folder / "nll.json", rename=True)
