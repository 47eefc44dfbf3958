"""Pixel diffusion models from the flags of OpenAI's scripts, by the names and with the defaults of guided-diffusion.

Improved DDPM (arXiv:2102.09672) and ADM (arXiv:2105.05233) describe a model by flat flags: pictures' sizes instead of
downsampling factors, texts such as "1,2,3,4" instead of lists. Here they become a UNet and a diffusion process.
"""

import argparse
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from ldm.errors import MismatchError, UsageError, nearest, shown
from ldm.models.diffusion import gaussian_diffusion as gd
from ldm.models.diffusion.respace import SpacedDiffusion, space_timesteps
from ldm.modules.diffusionmodules.openaimodel import EncoderUNetModel, SuperResModel, UNetModel
from ldm.values import RANGES, bounded, check_value

# Classes of ImageNet. Read when a model is made, so that rebinding it takes effect.
NUM_CLASSES = 1000
COLOURS = 3  # channels of a picture; the networks of these flags know no others
NORM_GROUPS = 32  # every width is normalised in so many groups
CLASSIFIER_HEAD_WIDTH = 64

# channel_mult where the flag is left empty, by the pictures' side; that of 32 is from improved-diffusion.
CHANNEL_MULT: dict[int, tuple[float, ...]] = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}
# The same for super-resolution, by the side of the large pictures.
SR_CHANNEL_MULT: dict[int, tuple[float, ...]] = {
    512: (1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    64: (1, 2, 3, 4),
}
TRUE_WORDS, FALSE_WORDS = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
# Where improved-diffusion's defaults differ: lay them over model_and_diffusion_defaults() for its checkpoints.
IMPROVED_DIFFUSION = {"rescale_timesteps": True, "rescale_learned_sigmas": True}


def diffusion_defaults() -> dict[str, Any]:
    """Return the flags of the diffusion process with their defaults."""
    return {
        "learn_sigma": False,
        "diffusion_steps": 1000,
        "noise_schedule": "linear",
        "timestep_respacing": "",
        "use_kl": False,
        "predict_xstart": False,
        "rescale_timesteps": False,
        "rescale_learned_sigmas": False,
    }


def classifier_defaults() -> dict[str, Any]:
    """Return the flags of a classifier of noisy pictures with their defaults."""
    return {
        "image_size": 64,
        "classifier_use_fp16": False,
        "classifier_width": 128,
        "classifier_depth": 2,
        "classifier_attention_resolutions": "32,16,8",
        "classifier_use_scale_shift_norm": True,
        "classifier_resblock_updown": True,
        "classifier_pool": "attention",
    }


def model_and_diffusion_defaults() -> dict[str, Any]:
    """Return the flags of a model and its diffusion process with their defaults."""
    return {
        "image_size": 64,
        "num_channels": 128,
        "num_res_blocks": 2,
        "num_heads": 4,
        "num_heads_upsample": -1,
        "num_head_channels": -1,
        "attention_resolutions": "16,8",
        "channel_mult": "",
        "dropout": 0.0,
        "class_cond": False,
        "use_checkpoint": False,
        "use_scale_shift_norm": True,
        "resblock_updown": False,
        "use_fp16": False,
        "use_new_attention_order": False,
        **diffusion_defaults(),
    }


def classifier_and_diffusion_defaults() -> dict[str, Any]:
    """Return the flags of a classifier and its diffusion process with their defaults."""
    return {**classifier_defaults(), **diffusion_defaults()}


def sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """Return the flags of a super-resolution model and its diffusion process with their defaults."""
    not_for_these = ("image_size", "channel_mult", "use_new_attention_order")
    shared = {k: v for k, v in model_and_diffusion_defaults().items() if k not in not_for_these}
    return {**shared, "large_size": 256, "small_size": 64}


# The kind of value that each flag takes: its default's. timestep_respacing is not among them, for it may be a list.
FLAG_KINDS = {
    name: type(value)
    for name, value in {
        **model_and_diffusion_defaults(),
        **sr_model_and_diffusion_defaults(),
        **classifier_defaults(),
        "steps": 1000,
        "sigma_small": False,
        "num_classes": NUM_CLASSES,
    }.items()
    if name != "timestep_respacing"
}


def refuse_unknown(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise UsageError for the first name that is not known, with the nearest one that is.

    Args:
        where: what the names are given to, for the message.
    """
    known = list(known)
    for name in names:
        if name not in known:
            near = nearest(name, known)
            hint = f"did you mean '{near}'?" if near else f"it has {', '.join(known)}"
            raise UsageError(f"{where} has no flag '{name}'; {hint}")


def check_kinds(flags: Mapping[str, Any]) -> None:
    """Raise UsageError for a value of the wrong kind, such as the text "False", which would count as true.

    So it is for a number beyond `ldm.values.RANGES`, before anything is built of it.
    """
    for name, value in flags.items():
        if name in FLAG_KINDS and not (name == "num_classes" and value is None):
            check_value(value, FLAG_KINDS[name], name, RANGES.get(name))


def _by_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function refuse unknown, missing and wrong flags in one line each, before it does anything."""
    signature = inspect.signature(function)
    name = function.__name__

    @functools.wraps(function)
    def checked(*args: Any, **flags: Any) -> Any:
        refuse_unknown(flags, signature.parameters, name)
        given = signature.bind_partial(*args, **flags).arguments
        check_kinds(given)
        missing = [n for n, p in signature.parameters.items() if p.default is p.empty and n not in given]
        if missing:
            raise UsageError(
                f"{name} lacks {', '.join(missing)}; lay your flags over the defaults, such as "
                "model_and_diffusion_defaults()"
            )
        return function(*args, **flags)

    checked.__signature__ = (
        signature  # inspect.getfullargspec looks here, and other people's scripts call that
    )
    return checked


def flags_for(function: Callable[..., Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Pick those of the flags that a function takes."""
    return {name: flags[name] for name in inspect.signature(function).parameters if name in flags}


def parse_channel_mult(
    text: str, image_size: int, sizes: Mapping[int, tuple[float, ...]] = CHANNEL_MULT
) -> tuple[float, ...]:
    """Read the widths of the levels, as multiples: "1,2,3,4"; fractions are allowed, whole ones become int.

    Args:
        text: the flag; empty for the usual one of this size.
        image_size: side of the (large) pictures.
        sizes: the usual ones.

    Raises:
        UsageError: no usual one, or not numbers above 0; a size below 1.
    """
    if image_size < 1:
        raise UsageError(f"the pictures' size should be at least 1, got {image_size}")
    if text == "":
        if image_size not in sizes:
            known = ", ".join(map(str, sorted(sizes)))
            raise UsageError(
                f"size {image_size} has no usual channel_mult ({known} have); give one, such as '1,2,2'"
            )
        return sizes[image_size]
    try:
        multiples = [float(part) for part in text.split(",")]
    except ValueError:
        multiples = []
    within = RANGES["channel_mult"]
    if not 0 < len(multiples) <= within.most or not all(within.has(m) for m in multiples):
        raise UsageError(
            f"channel_mult should be numbers above 0, at most {within.high} and {within.most} of them, such as "
            f"'1,2,3,4', got {shown(text)}"
        )
    return tuple(int(m) if m.is_integer() else m for m in multiples)


def parse_attention_resolutions(text: str, image_size: int) -> tuple[int, ...]:
    """Turn the sides of the maps that have attention ("32,16,8") into downsampling factors.

    Args:
        text: the flag; empty for none but the middle's.
        image_size: side of the (large) pictures.

    Raises:
        UsageError: not whole numbers, or none that the side divides by.
    """
    factors = []
    for part in text.split(",") if text else []:
        side = int(part) if len(part) < 9 and part.strip().isdecimal() else 0
        if side < 1 or image_size % side:
            raise UsageError(
                f"attention_resolutions should be sides of maps such as '16,8', each a divisor of {image_size}, "
                f"got {shown(text)}"
            )
        factors.append(image_size // side)
    return tuple(factors)


def _check_widths(num_channels: int, num_res_blocks: int, multiples: tuple[float, ...]) -> None:
    if num_res_blocks < 1:
        raise UsageError(f"each level needs at least 1 residual block, got {num_res_blocks}")
    for multiple in multiples:
        width = int(multiple * num_channels)
        if width < NORM_GROUPS or width % NORM_GROUPS:
            raise UsageError(
                f"{num_channels} channels times {multiple:g} make a level of {width}; "
                f"every level needs a multiple of {NORM_GROUPS}"
            )


def _unet(
    kind: type[UNetModel], size: int, sizes: Mapping[int, tuple[float, ...]], flags: Mapping[str, Any]
) -> UNetModel:
    multiples = parse_channel_mult(flags["channel_mult"], size, sizes)
    _check_widths(flags["num_channels"], flags["num_res_blocks"], multiples)
    num_classes = flags["num_classes"]
    if num_classes is not None and not flags["class_cond"]:
        raise MismatchError(f"num_classes={num_classes} needs class_cond=True")
    as_they_are = (
        "num_res_blocks",
        "dropout",
        "use_checkpoint",
        "use_fp16",
        "num_heads",
        "num_head_channels",
        "num_heads_upsample",
        "use_scale_shift_norm",
        "resblock_updown",
        "use_new_attention_order",
    )
    with bounded("the model's flags"):
        return kind(
            image_size=size,
            in_channels=COLOURS,
            model_channels=flags["num_channels"],
            out_channels=2 * COLOURS if flags["learn_sigma"] else COLOURS,
            attention_resolutions=parse_attention_resolutions(flags["attention_resolutions"], size),
            channel_mult=multiples,
            num_classes=(NUM_CLASSES if num_classes is None else num_classes)
            if flags["class_cond"]
            else None,
            **{name: flags[name] for name in as_they_are},
        )


@_by_flags
def create_model(
    image_size: int,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str = "",
    learn_sigma: bool = False,
    class_cond: bool = False,
    use_checkpoint: bool = False,
    attention_resolutions: str = "16",
    num_heads: int = 1,
    num_head_channels: int = -1,
    num_heads_upsample: int = -1,
    use_scale_shift_norm: bool = False,
    dropout: float = 0,
    resblock_updown: bool = False,
    use_fp16: bool = False,
    use_new_attention_order: bool = False,
    *,
    num_classes: int | None = None,
) -> UNetModel:
    """Make the UNet of a pixel diffusion model.

    Args:
        image_size: side of the pictures.
        num_channels: of the first level; the others' are `channel_mult` times that, rounded down.
        num_res_blocks: in each level.
        channel_mult: "1,2,3,4"; empty for the usual one of 32, 64, 128, 256 and 512 pixels.
        learn_sigma: predict the variance, too: 6 instead of 3 output channels.
        class_cond: the model takes labels y.
        use_checkpoint: recompute in the backward pass instead of keeping activations.
        attention_resolutions: sides of the maps that have attention, "32,16,8".
        num_heads, num_head_channels, num_heads_upsample: number of heads, their width where that is not -1, and
            their number on the way up where that is not -1 (and no width is given).
        use_scale_shift_norm: the level's embedding scales and shifts norms instead of being added.
        dropout: in the residual blocks.
        resblock_updown: resample in residual blocks.
        use_fp16: blocks in half precision; call convert_to_fp16() after loading, as the original's scripts do.
        use_new_attention_order: q, k and v outside the heads in the attention's weights.
        num_classes: of the labels, if not NUM_CLASSES. Ours.

    Raises:
        UsageError: an unknown flag (the nearest one is named) or a value out of range.
        MismatchError: values that do not fit together.
    """
    return _unet(UNetModel, image_size, CHANNEL_MULT, dict(locals()))


@_by_flags
def sr_create_model(
    large_size: int,
    small_size: int,
    num_channels: int,
    num_res_blocks: int,
    learn_sigma: bool,
    class_cond: bool,
    use_checkpoint: bool,
    attention_resolutions: str,
    num_heads: int,
    num_head_channels: int,
    num_heads_upsample: int,
    use_scale_shift_norm: bool,
    dropout: float,
    resblock_updown: bool,
    use_fp16: bool,
    *,
    channel_mult: str = "",
    use_new_attention_order: bool = False,
    num_classes: int | None = None,
) -> SuperResModel:
    """Make the UNet that paints large pictures from small ones.

    Args:
        large_size, small_size: sides of the pictures; the small ones may have any.
        channel_mult, use_new_attention_order, num_classes: as for create_model. Ours.
        The others are create_model's.

    Raises:
        UsageError, MismatchError: as create_model.
    """
    return _unet(SuperResModel, large_size, SR_CHANNEL_MULT, dict(locals()))


@_by_flags
def create_classifier(
    image_size: int,
    classifier_use_fp16: bool,
    classifier_width: int,
    classifier_depth: int,
    classifier_attention_resolutions: str,
    classifier_use_scale_shift_norm: bool,
    classifier_resblock_updown: bool,
    classifier_pool: str,
    *,
    channel_mult: str = "",
    num_classes: int | None = None,
) -> EncoderUNetModel:
    """Make a classifier of noisy pictures, for guidance.

    Args:
        classifier_width, classifier_depth: channels of the first level, residual blocks of each.
        classifier_pool: "adaptive", "attention", "spatial" or "spatial_v2"; see EncoderUNetModel.
        channel_mult, num_classes: as for create_model. Ours.
        The others are create_model's. Heads are 64 channels wide.

    Raises:
        UsageError, MismatchError: as create_model.
    """
    multiples = parse_channel_mult(channel_mult, image_size)
    _check_widths(classifier_width, classifier_depth, multiples)
    with bounded("the classifier's flags"):
        return EncoderUNetModel(
            image_size=image_size,
            in_channels=COLOURS,
            model_channels=classifier_width,
            out_channels=NUM_CLASSES if num_classes is None else num_classes,
            num_res_blocks=classifier_depth,
            attention_resolutions=parse_attention_resolutions(classifier_attention_resolutions, image_size),
            channel_mult=multiples,
            use_fp16=classifier_use_fp16,
            num_head_channels=CLASSIFIER_HEAD_WIDTH,
            use_scale_shift_norm=classifier_use_scale_shift_norm,
            resblock_updown=classifier_resblock_updown,
            pool=classifier_pool,
        )


@_by_flags
def create_gaussian_diffusion(
    *,
    steps: int = 1000,
    learn_sigma: bool = False,
    sigma_small: bool = False,
    noise_schedule: Literal["linear", "cosine"] = "linear",
    use_kl: bool = False,
    predict_xstart: bool = False,
    rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False,
    timestep_respacing: str | list[int] = "",
) -> SpacedDiffusion:
    """Make the diffusion process.

    Args:
        steps: of training.
        learn_sigma: the model predicts a variance between the two fixed ones.
        sigma_small: where it does not: the posterior's variance instead of beta.
        noise_schedule: "linear" or "cosine", as OpenAI's programs mean them.
        use_kl: train on the variational bound, scaled by the number of steps.
        predict_xstart: the model predicts the clean picture instead of the noise.
        rescale_timesteps: the model sees levels between 0 and 1000, whatever the number of steps.
        rescale_learned_sigmas: scale the bound's part in the loss that is not the bound alone.
        timestep_respacing: levels of the chain: "250", "ddim50", "10,20,30"; empty for all.

    Raises:
        UsageError: an unknown flag or schedule, or a respacing that does not work out.
    """
    loss_type = gd.LossType.RESCALED_MSE if rescale_learned_sigmas else gd.LossType.MSE
    fixed = gd.ModelVarType.FIXED_SMALL if sigma_small else gd.ModelVarType.FIXED_LARGE
    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, timestep_respacing or [steps]),
        betas=gd.get_named_beta_schedule(noise_schedule, steps),
        model_mean_type=gd.ModelMeanType.START_X if predict_xstart else gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.LEARNED_RANGE if learn_sigma else fixed,
        loss_type=gd.LossType.RESCALED_KL if use_kl else loss_type,
        rescale_timesteps=rescale_timesteps,
    )


def diffusion_from_flags(flags: Mapping[str, Any]) -> SpacedDiffusion:
    """Make the diffusion process that a full set of flags describes; the model's flags among them are passed over."""
    named = {name: flags[name] for name in diffusion_defaults()}
    steps = named.pop("diffusion_steps")
    return create_gaussian_diffusion(steps=steps, sigma_small=flags.get("sigma_small", False), **named)


@_by_flags
def create_model_and_diffusion(
    image_size: int,
    class_cond: bool,
    learn_sigma: bool,
    num_channels: int,
    num_res_blocks: int,
    channel_mult: str,
    num_heads: int,
    num_head_channels: int,
    num_heads_upsample: int,
    attention_resolutions: str,
    dropout: float,
    diffusion_steps: int,
    noise_schedule: Literal["linear", "cosine"],
    timestep_respacing: str | list[int],
    use_kl: bool,
    predict_xstart: bool,
    rescale_timesteps: bool,
    rescale_learned_sigmas: bool,
    use_checkpoint: bool,
    use_scale_shift_norm: bool,
    resblock_updown: bool,
    use_fp16: bool,
    use_new_attention_order: bool,
    *,
    num_classes: int | None = None,
    sigma_small: bool = False,
) -> tuple[UNetModel, SpacedDiffusion]:
    """Make a model and its diffusion process from the flags of model_and_diffusion_defaults().

    `num_classes` is ours; `sigma_small` is a flag of improved-diffusion.

    Raises:
        UsageError, MismatchError: as create_model and create_gaussian_diffusion.
    """
    flags = dict(locals())
    return create_model(**flags_for(create_model, flags)), diffusion_from_flags(flags)


@_by_flags
def sr_create_model_and_diffusion(
    large_size: int,
    small_size: int,
    class_cond: bool,
    learn_sigma: bool,
    num_channels: int,
    num_res_blocks: int,
    num_heads: int,
    num_head_channels: int,
    num_heads_upsample: int,
    attention_resolutions: str,
    dropout: float,
    diffusion_steps: int,
    noise_schedule: Literal["linear", "cosine"],
    timestep_respacing: str | list[int],
    use_kl: bool,
    predict_xstart: bool,
    rescale_timesteps: bool,
    rescale_learned_sigmas: bool,
    use_checkpoint: bool,
    use_scale_shift_norm: bool,
    resblock_updown: bool,
    use_fp16: bool,
    *,
    channel_mult: str = "",
    use_new_attention_order: bool = False,
    num_classes: int | None = None,
    sigma_small: bool = False,
) -> tuple[SuperResModel, SpacedDiffusion]:
    """Make a super-resolution model and its diffusion process from sr_model_and_diffusion_defaults().

    Raises:
        UsageError, MismatchError: as sr_create_model and create_gaussian_diffusion.
    """
    flags = dict(locals())
    return sr_create_model(**flags_for(sr_create_model, flags)), diffusion_from_flags(flags)


@_by_flags
def create_classifier_and_diffusion(
    image_size: int,
    classifier_use_fp16: bool,
    classifier_width: int,
    classifier_depth: int,
    classifier_attention_resolutions: str,
    classifier_use_scale_shift_norm: bool,
    classifier_resblock_updown: bool,
    classifier_pool: str,
    learn_sigma: bool,
    diffusion_steps: int,
    noise_schedule: Literal["linear", "cosine"],
    timestep_respacing: str | list[int],
    use_kl: bool,
    predict_xstart: bool,
    rescale_timesteps: bool,
    rescale_learned_sigmas: bool,
    *,
    channel_mult: str = "",
    num_classes: int | None = None,
) -> tuple[EncoderUNetModel, SpacedDiffusion]:
    """Make a classifier and the process that makes its pictures noisy, from classifier_and_diffusion_defaults().

    Raises:
        UsageError, MismatchError: as create_classifier and create_gaussian_diffusion.
    """
    flags = dict(locals())
    return create_classifier(**flags_for(create_classifier, flags)), diffusion_from_flags(flags)


def add_dict_to_argparser(parser: argparse.ArgumentParser, default_dict: Mapping[str, Any]) -> None:
    """Give a parser one option for each flag, of the kind that its default has.

    An ldm.cli.Parser refuses a misspelt option with the nearest one, where argparse's own only refuses it.
    """
    for name, value in default_dict.items():
        kind = str if value is None else str2bool if isinstance(value, bool) else type(value)
        parser.add_argument(f"--{name}", default=value, type=kind)


def args_to_dict(args: argparse.Namespace, keys: Iterable[str]) -> dict[str, Any]:
    """Pick the flags of these names from parsed arguments.

    Raises:
        UsageError: the arguments have no such flag; the nearest one is named.
    """
    keys = list(keys)
    refuse_unknown(keys, vars(args), "the command line")
    return {key: getattr(args, key) for key in keys}


def str2bool(v: str | bool) -> bool:
    """Read "yes", "true", "t", "y", "1" and their opposites, in any case, as an argparse type.

    Raises:
        argparse.ArgumentTypeError: none of them.
    """
    if isinstance(v, bool):
        return v
    word = v.lower()
    if word not in TRUE_WORDS + FALSE_WORDS:
        raise argparse.ArgumentTypeError(f"wanted true or false, got {v!r}")
    return word in TRUE_WORDS
