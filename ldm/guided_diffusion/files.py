"""OpenAI's pixel models (improved-diffusion, guided-diffusion): from a file's names and shapes to flags and a model.

Their files are bare state dicts of the UNet. What built it, the flags of ldm.guided_diffusion.script_util, is not in
the file; most of them show in the shapes.
"""

import contextlib
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from ldm.checkpoints import families
from ldm.checkpoints.files import Weights, open_weights
from ldm.checkpoints.load import memory_named
from ldm.checkpoints.matching import match
from ldm.checkpoints.report import LoadReport, TensorInfo
from ldm.checkpoints.tensors import assign_state, check_dtype, check_finite, choose_dtypes, load_tensors
from ldm.devices import pick_device
from ldm.errors import MismatchError, escaped
from ldm.guided_diffusion import script_util
from ldm.guided_diffusion.script_util import COLOURS, parse_attention_resolutions, parse_channel_mult
from ldm.modules.diffusionmodules.openaimodel import EncoderUNetModel, UNetModel

logger = logging.getLogger(__name__)

TORSO = ("input_blocks.", "middle_block.", "output_blocks.")

# What OpenAI published, by the name of its file, and the flags beyond the defaults that its READMEs give for it (but
# for use_fp16, which is a matter of the machine). lsun_cat and lsun_horse are like lsun_bedroom.
_ADM = {"attention_resolutions": "32,16,8", "learn_sigma": True, "resblock_updown": True}
_IDDPM = {"learn_sigma": True, "diffusion_steps": 4000, "noise_schedule": "cosine"}
_IMPROVED = script_util.IMPROVED_DIFFUSION
PUBLISHED: dict[str, dict[str, Any]] = {
    "64x64_diffusion": {
        **_ADM,
        "image_size": 64,
        "class_cond": True,
        "num_channels": 192,
        "num_head_channels": 64,
        "num_res_blocks": 3,
        "dropout": 0.1,
        "use_new_attention_order": True,
        "noise_schedule": "cosine",
    },
    "128x128_diffusion": {**_ADM, "image_size": 128, "class_cond": True, "num_channels": 256, "num_heads": 4},
    "256x256_diffusion": {
        **_ADM,
        "image_size": 256,
        "class_cond": True,
        "num_channels": 256,
        "num_head_channels": 64,
    },
    "256x256_diffusion_uncond": {**_ADM, "image_size": 256, "num_channels": 256, "num_head_channels": 64},
    "512x512_diffusion": {
        **_ADM,
        "image_size": 512,
        "class_cond": True,
        "num_channels": 256,
        "num_head_channels": 64,
    },
    "lsun_bedroom": {
        **_ADM,
        "image_size": 256,
        "num_channels": 256,
        "num_head_channels": 64,
        "dropout": 0.1,
    },
    "64_256_upsampler": {
        **_ADM,
        "large_size": 256,
        "small_size": 64,
        "class_cond": True,
        "num_channels": 192,
        "num_heads": 4,
    },
    "128_512_upsampler": {
        **_ADM,
        "large_size": 512,
        "small_size": 128,
        "attention_resolutions": "32,16",
        "class_cond": True,
        "num_channels": 192,
        "num_head_channels": 64,
    },
    "imagenet64_uncond_100M_1500K": {**_IDDPM, "image_size": 64, **_IMPROVED, "num_res_blocks": 3},
    "imagenet64_uncond_vlb_100M_1500K": {
        **_IDDPM,
        "image_size": 64,
        **_IMPROVED,
        "num_res_blocks": 3,
        "use_kl": True,
    },
    "imagenet64_cond_270M_250K": {
        **_IDDPM,
        "image_size": 64,
        "num_channels": 192,
        "num_res_blocks": 3,
        "class_cond": True,
    },
    "cifar10_uncond_50M_500K": {
        **_IDDPM,
        **_IMPROVED,
        "image_size": 32,
        "num_res_blocks": 3,
        "dropout": 0.3,
    },
    "cifar10_uncond_vlb_50M_500K": {
        **_IDDPM,
        **_IMPROVED,
        "image_size": 32,
        "num_res_blocks": 3,
        "dropout": 0.3,
        "use_kl": True,
    },
    "upsample_cond_500K": {
        "large_size": 256,
        "small_size": 64,
        "learn_sigma": True,
        "diffusion_steps": 4000,
        "num_channels": 192,
        "class_cond": True,
    },
    "lsun_uncond_100M": {
        "image_size": 256,
        "num_heads": 1,
        "learn_sigma": True,
        "use_scale_shift_norm": False,
        "attention_resolutions": "16",
    },
}
# Flags that no tensor shows, but that come with a published model's layout.
UNSEEN = (
    "num_heads",
    "num_head_channels",
    "use_new_attention_order",
    "large_size",
    "small_size",
    "diffusion_steps",
    "noise_schedule",
    "rescale_timesteps",
)
HEADS = ("num_heads", "num_head_channels")


@dataclass(frozen=True)
class Kind:
    """A kind of network and the functions and flags that it is described by.

    sizes: the usual channel_mult of each picture size. flags: word that all kinds share -> this kind's flag.
    optional: flags beyond the defaults.
    """

    name: str
    create: Callable[..., UNetModel | EncoderUNetModel]
    defaults: Callable[[], dict[str, Any]]
    sizes: Mapping[int, tuple[float, ...]]
    flags: Mapping[str, str]
    optional: tuple[str, ...]


_WORDS = (
    "num_channels",
    "num_res_blocks",
    "attention_resolutions",
    "use_scale_shift_norm",
    "resblock_updown",
)
MODEL = Kind(
    "OpenAI pixel model",
    script_util.create_model,
    script_util.model_and_diffusion_defaults,
    script_util.CHANNEL_MULT,
    {"size": "image_size", "use_fp16": "use_fp16", **{word: word for word in _WORDS}},
    ("num_classes", "sigma_small"),
)
SUPER_RESOLUTION = Kind(
    "OpenAI super-resolution model",
    script_util.sr_create_model,
    script_util.sr_model_and_diffusion_defaults,
    script_util.SR_CHANNEL_MULT,
    {**MODEL.flags, "size": "large_size"},
    ("channel_mult", "use_new_attention_order", *MODEL.optional),
)
CLASSIFIER = Kind(
    "OpenAI classifier",
    script_util.create_classifier,
    script_util.classifier_and_diffusion_defaults,
    script_util.CHANNEL_MULT,
    {
        "size": "image_size",
        "use_fp16": "classifier_use_fp16",
        "num_channels": "classifier_width",
        "num_res_blocks": "classifier_depth",
        **{word: f"classifier_{word}" for word in _WORDS[2:]},
    },
    ("channel_mult", "num_classes"),
)


@dataclass(frozen=True)
class Layout:
    """What names and shapes say about a network.

    kind; num_channels; widths: channels of each level; num_res_blocks: of each level; factors: of downsampling,
    where attention follows the blocks; use_scale_shift_norm; resblock_updown: None for a single level;
    num_classes: of the labels, taken or predicted, or None; learn_sigma: None for a classifier;
    pool: of a classifier; image_size: where the pool shows it.
    """

    kind: Kind
    num_channels: int
    widths: tuple[int, ...]
    num_res_blocks: int
    factors: tuple[int, ...]
    use_scale_shift_norm: bool
    resblock_updown: bool | None
    num_classes: int | None
    learn_sigma: bool | None = None
    pool: str | None = None
    image_size: int | None = None

    @classmethod
    def of_flags(cls, kind: Kind, flags: Mapping[str, Any]) -> Self:
        """Say what a full set of flags makes.

        Raises:
            UsageError: channel_mult or attention_resolutions do not work out.
        """
        size, channels, depth, attention, norm, updown = (flags[kind.flags[w]] for w in ("size", *_WORDS))
        widths = _widths(parse_channel_mult(flags.get("channel_mult", ""), size, kind.sizes), channels)
        factors = parse_attention_resolutions(attention, size)
        classes = flags.get("num_classes")
        labelled = kind is CLASSIFIER or flags["class_cond"]
        pool = flags["classifier_pool"] if kind is CLASSIFIER else None
        return cls(
            kind=kind,
            num_channels=channels,
            widths=widths,
            num_res_blocks=depth,
            factors=tuple(2**level for level in range(len(widths)) if 2**level in factors),
            use_scale_shift_norm=norm,
            resblock_updown=updown if len(widths) > 1 else None,
            num_classes=(script_util.NUM_CLASSES if classes is None else classes) if labelled else None,
            learn_sigma=None if kind is CLASSIFIER else flags["learn_sigma"],
            pool=pool,
            image_size=size if pool == "attention" else None,
        )

    def to_flags(self, size: int) -> dict[str, Any]:
        """Say it in the kind's flags, for pictures of this side."""
        common = {
            "size": self.image_size or size,
            "num_channels": self.num_channels,
            "num_res_blocks": self.num_res_blocks,
            "attention_resolutions": ",".join(str(size // factor) for factor in self.factors),
            "use_scale_shift_norm": self.use_scale_shift_norm,
            "resblock_updown": bool(self.resblock_updown),
        }
        flags = {self.kind.flags[word]: value for word, value in common.items()}
        multiples = (f"{width / self.num_channels!r}".removesuffix(".0") for width in self.widths)
        flags |= {"channel_mult": ",".join(multiples), "num_classes": self.num_classes}
        if self.kind is CLASSIFIER:
            return {**flags, "classifier_pool": self.pool}
        return {**flags, "class_cond": self.num_classes is not None, "learn_sigma": self.learn_sigma}

    def usual_sizes(self) -> list[int]:
        """List the sides of pictures for which these are the usual widths, the smallest first."""
        sizes = sorted(self.kind.sizes.items())
        return [size for size, mult in sizes if _widths(mult, self.num_channels) == self.widths]


def _widths(multiples: Iterable[float], num_channels: int) -> tuple[int, ...]:
    return tuple(int(multiple * num_channels) for multiple in multiples)


class _FileTensors:
    """The tensors of a file, looked up by the shape that is expected of them."""

    def __init__(self, path: str, infos: Mapping[str, TensorInfo]):
        self.path, self.infos = escaped(path), infos

    def __contains__(self, name: str) -> bool:
        return name in self.infos

    def shape(self, name: str, dims: int) -> tuple[int, ...]:
        """Give a tensor's shape, or raise MismatchError if it is not there or has other dimensions."""
        found = self.infos[name].shape if name in self else None
        if found is None or len(found) != dims or 0 in found:
            came = "is missing" if found is None else f"has the shape {list(found)}"
            raise MismatchError(f"'{self.path}' is no whole OpenAI model: '{name}' {came}")
        return found

    def numbers(self, part: str) -> range:
        """Count the blocks of a part, or raise MismatchError if one is left out."""
        found = {int(m[1]) for name in self.infos if (m := re.match(rf"{part}\.(\d{{1,6}})\.", name))}
        gaps = set(range(len(found))) - found
        if gaps:
            raise MismatchError(f"'{self.path}' is no whole OpenAI model: '{part}.{min(gaps)}' is missing")
        return range(len(found))

    def refuse_others(self) -> None:
        """Raise MismatchError for another family of file, with its name."""
        family = families.family_of(self.infos)
        wanted = "a bare state dict of OpenAI's UNet is needed (model*.pt or ema_*.pt)"
        if family != "UNet" or "input_blocks.0.0.weight" not in self:
            kind = families.REFUSED.get(
                family, "a full Stable Diffusion model; load_latent_diffusion reads it"
            )
            raise MismatchError(f"'{self.path}' is {kind}; {wanted}")
        if any(".transformer_blocks." in name for name in self.infos):
            raise MismatchError(f"'{self.path}' is the UNet of a latent diffusion model; {wanted}")


def read_layout(path: str, infos: Mapping[str, TensorInfo], depth: int | None = None) -> Layout:
    """Read a network's layout from what a file holds.

    Args:
        path: for messages.
        depth: residual blocks per level, for a classifier whose shapes leave that open.

    Raises:
        MismatchError: no network of this family, or one that these flags cannot describe.
    """
    tensors = _FileTensors(path, infos)
    tensors.refuse_others()
    blocks, ups = tensors.numbers("input_blocks"), tensors.numbers("output_blocks")
    convolved = {
        i for i in blocks if f"input_blocks.{i}.0.op.weight" in tensors
    }  # halved by a strided convolution
    # (out, in, 3, 3) of the others' first convolutions; residual blocks that halve have the same names as the rest.
    shapes = {
        i: tensors.shape(f"input_blocks.{i}.0.in_layers.2.weight", 4)
        for i in blocks
        if i and i not in convolved
    }
    attending = {i for i in blocks if f"input_blocks.{i}.1.qkv.weight" in tensors}
    second = [f"{j}.{leaf}.weight" for j in (1, 2) for leaf in ("conv", "in_layers.2")]
    doubling = {i for i in ups if any(f"output_blocks.{i}.{name}" in tensors for name in second)}

    def fits(period: int) -> bool:
        """Tell whether the blocks are levels of this length, counting the one before that halves."""
        halving = set(range(period, len(blocks), period))
        levels = [range(start + 1, start + period) for start in range(0, len(blocks), period)]
        if convolved and convolved != halving:
            return False
        if ups and (len(ups) != len(blocks) or doubling != {i - 1 for i in halving}):
            return False
        keeping = {*(halving - convolved), *(i for level in levels for i in level[1:])}
        return (
            not attending & halving
            and all(shapes[i][0] == shapes[i][1] for i in keeping)
            and all(len({i in attending for i in level}) == 1 for level in levels)
        )

    periods = [n for n in range(2, len(blocks) + 1) if len(blocks) % n == 0 and fits(n)]
    if not periods:
        raise MismatchError(
            f"'{tensors.path}' holds {len(blocks)} input blocks in an order that no flags of OpenAI's describe"
        )
    layouts = [
        Layout(
            num_channels=tensors.shape("time_embed.0.weight", 2)[1],
            widths=tuple(shapes[i][0] for i in range(1, len(blocks), period)),
            num_res_blocks=period - 1,
            factors=tuple(
                2**level for level, i in enumerate(range(1, len(blocks), period)) if i in attending
            ),
            use_scale_shift_norm=tensors.shape("input_blocks.1.0.emb_layers.1.weight", 2)[0]
            == 2 * shapes[1][0],
            resblock_updown=None if period == len(blocks) else not convolved,
            **(_unet_ends(tensors) if ups else _classifier_ends(tensors, 2 ** (len(blocks) // period - 1))),
        )
        for period in periods
    ]
    for wanted in (
        [layout for layout in layouts if layout.num_res_blocks == depth],
        [layout for layout in layouts if layout.usual_sizes()],
    ):
        layouts = wanted if len(layouts) > 1 and wanted else layouts
    if len(layouts) > 1:
        depths = " or ".join(str(layout.num_res_blocks) for layout in layouts)
        raise MismatchError(
            f"'{tensors.path}' may have {depths} residual blocks per level, its shapes allow each; "
            f"give {layouts[0].kind.flags['num_res_blocks']}"
        )
    return layouts[0]


def _unet_ends(tensors: _FileTensors) -> dict[str, Any]:
    """Read from the first and last layers which of the two kinds of UNet it is, and its labels and variances."""
    taken, given = tensors.shape("input_blocks.0.0.weight", 4)[1], tensors.shape("out.2.weight", 4)[0]
    if taken not in (COLOURS, 2 * COLOURS) or given not in (COLOURS, 2 * COLOURS):
        raise MismatchError(
            f"'{tensors.path}' has {taken} input and {given} output channels; OpenAI's flags describe pictures of "
            f"{COLOURS}: {COLOURS} in, or {2 * COLOURS} with a small picture, and {COLOURS} out, or {2 * COLOURS} "
            "with a learned variance"
        )
    labels = "label_emb.weight"
    return {
        "kind": MODEL if taken == COLOURS else SUPER_RESOLUTION,
        "num_classes": tensors.shape(labels, 2)[0] if labels in tensors else None,
        "learn_sigma": given == 2 * COLOURS,
    }


def _classifier_ends(tensors: _FileTensors, factor: int) -> dict[str, Any]:
    """Read a classifier's pool and classes from its last layers, and its picture size where the pool shows it.

    Args:
        factor: between the sides of the pictures and of the smallest maps.
    """
    taken = tensors.shape("input_blocks.0.0.weight", 4)[1]
    if taken != COLOURS:
        raise MismatchError(
            f"'{tensors.path}' is a classifier of {taken} channels; OpenAI's flags describe {COLOURS}"
        )
    ends: dict[str, Any] = {"kind": CLASSIFIER, "learn_sigma": None}
    positions = "out.2.positional_embedding"
    if positions in tensors:
        side = math.isqrt(tensors.shape(positions, 2)[1] - 1)
        classes = tensors.shape("out.2.c_proj.weight", 3)[0]
        return {**ends, "pool": "attention", "num_classes": classes, "image_size": side * factor}
    if "out.2.weight" in tensors:
        return {**ends, "pool": "spatial", "num_classes": tensors.shape("out.2.weight", 2)[0]}
    if "out.1.weight" in tensors:
        return {**ends, "pool": "spatial_v2", "num_classes": tensors.shape("out.3.weight", 2)[0]}
    return {**ends, "pool": "adaptive", "num_classes": tensors.shape("out.3.weight", 4)[0]}


def settle_flags(
    path: str, infos: Mapping[str, TensorInfo], given: Mapping[str, Any]
) -> tuple[Kind, dict[str, Any], list[str]]:
    """Complete the flags that are given by those that a file shows, and those by the originals' defaults.

    Args:
        path: for messages.
        infos: what the file holds.
        given: flags of the caller, which win where the file is silent.

    Returns:
        The kind of network, its flags with those of the diffusion process, and what was taken from elsewhere.

    Raises:
        UsageError: an unknown flag or an impossible value.
        MismatchError: no network of this family, or flags that contradict the file.
    """
    script_util.check_kinds(given)
    layout = read_layout(path, infos, given.get("classifier_depth"))
    kind, defaults = layout.kind, layout.kind.defaults()
    script_util.refuse_unknown(given, [*defaults, *kind.optional], f"an {kind.name}")
    unseen, notes = _unseen_flags(layout, given)

    size_flag, usual = kind.flags["size"], layout.usual_sizes()
    size = given.get(size_flag) or layout.image_size or unseen.get(size_flag) or next(iter(usual), None)
    if size is None:
        widths = ", ".join(map(str, layout.widths))
        raise MismatchError(
            f"'{escaped(path)}' has levels of {widths} channels, which are no size's usual ones; give {size_flag}"
        )
    if len(usual) > 1 and size_flag not in {**given, **unseen} and layout.image_size is None:
        notes.append(f"{size_flag}={size} was assumed; the tensors allow {' or '.join(map(str, usual))}")
    odd = [factor for factor in layout.factors if size % factor]
    if odd:
        raise MismatchError(
            f"'{escaped(path)}' has attention where sides are divided by {odd[0]}, and {size_flag}={size} is not "
            "divisible by that"
        )

    seen = layout.to_flags(size)
    flags = {**defaults, **unseen, **seen, **given}
    stated = Layout.of_flags(kind, flags).to_flags(size)
    wrong = [
        f"{name} is {seen[name]!r} there, not {stated[name]!r}" for name in seen if seen[name] != stated[name]
    ]
    if wrong:
        raise MismatchError(
            f"'{escaped(path)}' contradicts the flags: {'; '.join(wrong)}; leave out what the file shows by itself"
        )
    if size in usual and "channel_mult" not in given:
        flags["channel_mult"] = ""
    # Flags that the original has no name for are listed only where they are not the default.
    silent = {"channel_mult": ("",), "num_classes": (None, script_util.NUM_CLASSES)}
    listed = {*defaults, *given}
    return kind, {n: v for n, v in flags.items() if n in listed or v not in silent[n]}, notes


def _unseen_flags(layout: Layout, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Find flags that no tensor shows: those of the published models that have this layout, if there are any."""
    kind, defaults = layout.kind, layout.kind.defaults()
    if kind is CLASSIFIER:
        return {}, []
    published = {
        name: {**defaults, **own}
        for name, own in PUBLISHED.items()
        if own.keys() <= defaults.keys() and Layout.of_flags(kind, {**defaults, **own}) == layout
    }
    decided = {*given, *(HEADS if given.keys() & set(HEADS) else ())}  # one of the two decides for both
    if published:
        first = next(iter(published.values()))  # those of one layout differ only in how they were trained
        unseen = {name: first[name] for name in UNSEEN if name in first and name not in decided}
        whose = f"taken from OpenAI's {', '.join(published)}, which has this layout; no tensor shows it"
    else:
        unseen = {name: defaults[name] for name in HEADS if name not in decided}
        whose = "the original's default; no tensor shows it, so give it if the model was trained otherwise"
    by_number = unseen.get("num_head_channels") == -1  # and then no default goes without saying
    unusual = [
        f"{name}={value}"
        for name, value in unseen.items()
        if value != defaults.get(name, value) or (name == "num_heads" and by_number)
    ]
    return unseen, [f"{', '.join(unusual)}: {whose}"] if unusual else []


def infer_flags(path: str | Path, **given: Any) -> dict[str, Any]:
    """Say with which flags the network in a file was built, as far as its shapes show it.

    Args:
        path: .pt, .safetensors.
        given: flags that are known, for what no tensor shows.

    Returns:
        Every flag of model_and_diffusion_defaults(), sr_model_and_diffusion_defaults() or
        classifier_and_diffusion_defaults(), whichever the network needs, and "channel_mult" and "num_classes" where
        they are not the usual ones.

    Raises:
        As load_openai_model.
    """
    with contextlib.closing(open_weights(path)) as source:
        return settle_flags(source.path, source.infos, given)[1]


def load_openai_model(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    source: Weights | None = None,
    **given: Any,
) -> tuple[UNetModel | EncoderUNetModel, dict[str, Any], LoadReport]:
    """Load a pixel diffusion model, upsampler or classifier of improved-diffusion or guided-diffusion.

    Args:
        path: .pt (through the restricted reader) or .safetensors with the bare names of the network.
        device: where the model goes.
        dtype: of the weights; None = float32, whatever the file has.
        source: the file `path`, opened by open_weights; whoever opened it closes it. None opens it here.
        given: flags, by the names of ldm.guided_diffusion.script_util. What shapes show need not be given; the
            heads of the attention, use_new_attention_order and the diffusion process show in none: they are
            those of the published model with this layout, or else the originals' defaults, and the report's
            notes say which. use_fp16 runs the blocks in half precision.

    Returns:
        The model in evaluation mode, all its flags (for diffusion_from_flags), and the account of every tensor.

    Raises:
        AbsentError, FormatError, UnsafeFileError: the file cannot be had, read or trusted.
        MismatchError: no model of this family, tensors that do not match, or flags that contradict the file.
        NumericError: weights that are not finite, or would not be in half precision.
        UsageError: an unknown flag (the nearest one is named), an impossible value, device or dtype.
        ResourceError: out of memory.
    """
    check_dtype(dtype)
    device = pick_device(device)
    opened = contextlib.closing(open_weights(path)) if source is None else contextlib.nullcontext(source)
    with opened as source:
        kind, flags, notes = settle_flags(source.path, source.infos, given)
        with torch.device("meta"):
            model = kind.create(**script_util.flags_for(kind.create, flags))
        report = LoadReport(path=escaped(source.path), family=kind.name, notes=[*source.notes, *notes])
        report.ignored = {
            name: families.PROFILED for name in source.infos if families.why_unused(name) == families.PROFILED
        }
        report.assigned = match(
            source.path,
            infos=source.infos,
            wanted={name: tuple(value.shape) for name, value in model.state_dict().items()},
            rename={},
            ignored=report.ignored,
            initialised={},
        )
        with memory_named(path, model):
            state = load_tensors(model, report, source, device, choose_dtypes(model, dtype, dtype))
            assign_state(model, state, report, device)
    if flags[kind.flags["use_fp16"]]:
        for name, weight in model.named_parameters():
            if name.startswith(TORSO):
                check_finite(report.path, name, weight, torch.float16)
        model.convert_to_fp16()
    logger.info("%s", report.summary())
    return model, flags, report
