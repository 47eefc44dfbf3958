"""What the values of a configuration may be: kinds by a constructor's annotations, ranges by name, a size for all.

A constructor says itself what each of its parameters is; `RANGES` says how far its numbers may go. Both are looked at
before anything is built, because a configuration is untrusted text and torch's own answer to `model_channels: 10**9`
is to fill the memory.
"""

import contextlib
import inspect
import math
import os
import re
import threading
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from ldm.errors import UnsafeFileError, UsageError, shown

# Of all that one configuration builds; the largest UNet that is published for these classes has 2.6e9 and 1,700.
MAX_PARAMETERS, MAX_TENSORS = 3_000_000_000, 10_000
GIANT = 5e8  # of the estimate `may_be_giant`: from here on a model is first built without memory
MAX_WHOLE = 1 << 63
# Digits of a number, as text. Python itself gives up at 4,300.
MAX_DIGITS = 100
# Numbers that YAML 1.1 takes for text, because they have an exponent but no dot: 1e-4.
EXPONENT = re.compile(r"[-+]?\d{1,20}(\.\d{0,20})?[eE][-+]?\d{1,3}", re.ASCII)


@dataclass(frozen=True)
class Range:
    """How far a number may go.

    Args:
        low, high: the ends, which belong to it; with `above`, low does not.
        least, most: how many there may be, where a list of them is wanted.
    """

    low: float
    high: float
    above: bool = False
    least: int = 0
    most: int = 1000

    def has(self, number: float) -> bool:
        return (self.low < number if self.above else self.low <= number) and number <= self.high

    @property
    def words(self) -> str:
        """The range in words: "from 1 to 8"; ends that only keep slips of the pen out are left away."""
        low = f"above {_plain(self.low)}" if self.above else f"from {_plain(self.low)}"
        return f"{low} and up to {_plain(self.high)}" if self.above else f"{low} to {_plain(self.high)}"


def _plain(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


WIDTH, DEPTH, SIDE, LEVELS = Range(1, 1 << 16), Range(1, 256), Range(1, 1 << 16), Range(1, 100_000)
STEPS, SOME_STEPS, WEIGHT, SHARE = Range(0, 10**15), Range(1, 10**15), Range(0, 1e9), Range(0, 1)
FACTOR = Range(0, 1e6)
# Name of a parameter -> its range; `Class.name` goes before `name`.
RANGES: dict[str, Range] = {
    name: within
    for names, within in (
        # Networks
        (
            "in_channels model_channels out_channels ch out_ch z_channels channels num_channels embed_dim e_dim",
            WIDTH,
        ),
        (
            "context_dim disc_in_channels disc_ndf ndf input_nc classifier_width num_groups query_dim dim_head",
            WIDTH,
        ),
        (
            "dim dim_in dim_out heads n_heads d_head emb_channels output_dim num_heads_channels width mult",
            WIDTH,
        ),
        ("num_heads num_head_channels num_heads_upsample", Range(-1, 1 << 16)),
        ("num_res_blocks transformer_depth depth classifier_depth", DEPTH),
        ("num_attention_blocks n_layers disc_num_layers n_stages padding", Range(0, 256)),
        ("ks", Range(1, 64)),
        ("temb_channels keep_finetune_dims", Range(0, 1 << 16)),
        ("channel_mult", Range(0, 1024, above=True, least=1, most=16)),
        ("ch_mult", Range(1, 1024, least=1, most=16)),
        ("attention_resolutions attn_resolutions", Range(1, 1 << 20, most=64)),
        ("n_embed n_e n_classes num_classes colorize_nlabels", Range(1, 1 << 24)),
        ("resolution", Range(1, 1 << 20)),
        ("image_size large_size small_size crop_size low_resolution size in_size out_size", SIDE),
        ("reshuffle_patch_size", Range(1, 1 << 12)),
        ("spacial_dim", Range(1, 1 << 12)),
        ("dims", Range(1, 3)),
        ("dropout paraphrase decay ucg_rate", SHARE),
        ("max_length", Range(1, 1 << 16)),
        ("layer_idx c_concat_log_start c_concat_log_end", Range(-(1 << 16), 1 << 16)),
        ("multiplier", Range(0, 64, above=True)),
        ("factor rescale_factor", Range(0, 64, above=True)),
        ("mid_channels n_channels emb_dim context hint_channels hidden inner", WIDTH),
        ("T2IAdapterModel.levels T2IAdapterModel.blocks AdapterLevel.blocks", DEPTH),
        ("AdapterBlock.first AdapterBlock.second", Range(1, 1 << 16, most=4)),  # shapes of weights
        ("AdapterLevel.shapes T2IAdapterModel.shapes", Range(1, 1 << 16, most=4)),
        ("n_layer layers rescale_module_depth", DEPTH),
        ("vocab_size vocabulary num_tokens", Range(1, 1 << 24)),
        ("max_seq_len", Range(1, 1 << 16)),
        ("embedding_dropout emb_dropout flip_p", SHARE),
        ("n_repeat num_memory_tokens", Range(0, 1 << 16)),
        # Diffusion and losses
        ("timesteps num_timesteps_cond diffusion_steps steps max_noise_level", LEVELS),
        ("linear_start linear_end cosine_s v_posterior", SHARE),
        ("given_betas", Range(0, 1, least=1, most=100_000)),
        ("log_every_t", SOME_STEPS),
        ("original_elbo_weight l_simple_weight kl_weight perceptual_weight disc_weight disc_factor", WEIGHT),
        ("pixelloss_weight beta", WEIGHT),
        ("logvar_init posterior_logvar_start", Range(-80, 80)),
        ("scale_factor", Range(0, 1e6, above=True)),
        ("batch_resize_range", Range(16, 1 << 16)),
        # Training
        ("f_start f_min f_max lr_start lr_min lr_max lr_g_factor", FACTOR),
        ("warm_up_steps disc_start verbosity_interval lr_anneal_steps curve_every crowd_until_step", STEPS),
        ("crop_until_step timestep_respacing", STEPS),
        (
            "cycle_lengths max_decay_steps checkpoint_every validate_every batch_frequency max_steps every",
            SOME_STEPS,
        ),
        ("total", SOME_STEPS),
        ("print_every", Range(0, 1e9)),
        ("weight_decay", Range(0, 1000)),
        ("ema_rate", SHARE),
        ("base_learning_rate lr", Range(0, 10)),
        ("betas momentum alpha rho", Range(0, 1)),
        ("eps", Range(0, 1)),
        ("momentum_decay lr_decay dampening lambd", Range(0, 1000)),
        ("cond_stage_rate", Range(0, 1000, above=True)),
        ("image_guidance", Range(0, 1000)),
        ("image_steps", Range(1, 1000)),
        ("validation_batches batches", Range(0, 1_000_000)),
        ("max_images", Range(1, 4096)),
        ("accumulate_grad_batches accumulate", Range(1, 1_000_000)),
        ("devices num_nodes world", Range(1, 1024)),
        ("rank", Range(0, 1023)),
        ("gradient_clip_val clip", Range(0, 1e12, above=True)),
        # Data
        ("batch_size", Range(1, 1 << 20)),
        ("num_workers", Range(0, 256)),
        ("num_records", Range(0, 1 << 62)),
        ("classes", Range(0, 1 << 24, most=1 << 26)),  # one for each picture
        ("shard", Range(0, 1023)),
        ("num_shards", Range(1, 1024)),
        ("downscale_f", Range(1, 64)),
        ("min_crop_f max_crop_f", Range(0, 1, above=True)),
        ("cache_latents", Range(-1, 1 << 40)),
        ("length", Range(1, 1 << 62)),
        ("seed", Range(0, (1 << 63) - 1)),
        ("Shapes.image_size", Range(16, 4096)),
        ("ImageFolder.image_size", Range(8, 1 << 14)),
    )
    for name in names.split()
}


class Unfit(ValueError):
    """A value is not of the kind, or not in the range, that is wanted."""


def parameters_of(kind: Any) -> dict[str, inspect.Parameter]:
    """List a constructor's (or function's) parameters by name, with those of the bases that it hands its own on to.

    A class whose last keywords go to something else names that as `HANDS_ON_TO`.
    """
    if not inspect.isclass(kind):
        return dict(inspect.signature(kind).parameters)
    return _parameters_of_class(kind)[0]


def takes_anything(kind: type) -> bool:
    """Whether a class takes keywords that neither it nor a base names, as torch.nn.Identity does."""
    return _parameters_of_class(kind)[1]


def _parameters_of_class(kind: type) -> tuple[dict[str, inspect.Parameter], bool]:
    found: dict[str, inspect.Parameter] = {}
    for base in kind.__mro__:
        # nn.Module's own takes anything and refuses it later.
        if "__init__" not in base.__dict__ or base is object or base.__qualname__ == "Module":
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        found = {**{p.name: p for p in named}, **found}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return found, False
        if "HANDS_ON_TO" in base.__dict__:
            return {**parameters_of(base.__dict__["HANDS_ON_TO"]), **found}, False
    return found, True


def is_annotated(kind: Any) -> bool:
    """Whether annotations bind: in ldm and in torch. Those of other people's classes are their own business."""
    return getattr(kind, "__module__", "").split(".")[0] in ("ldm", "torch")


def check(params: Mapping[str, Any], kind: Any, where: str = "") -> dict[str, Any]:
    """Hold values against the annotations of a constructor and their ranges; unknown names are left alone.

    Args:
        params: name -> value.
        kind: a class or function of ldm or torch.
        where: what goes before the names in messages, such as "model.params".

    Returns:
        The values, numbers that YAML reads as text (1e-4) turned into numbers.

    Raises:
        UsageError: a value is of another kind or out of range.
    """
    known = parameters_of(kind)
    name_of_kind = getattr(kind, "__name__", "")
    checked = dict(params)
    for name, value in params.items():
        if name not in known:
            continue
        within = RANGES.get(f"{name_of_kind}.{name}", RANGES.get(name))
        checked[name] = check_value(
            value, known[name].annotation, f"{where}.{name}" if where else name, within
        )
    return checked


def check_value(value: Any, annotation: Any, name: str, within: Range | None = None) -> Any:
    """Hold one value against an annotation and a range; see `check`."""
    try:
        return fit(value, annotation, within)
    except Unfit:
        wanted = words_for(annotation, within)
        raise UsageError(f"{name:.120} should be {wanted:.160}, got {shown(value)}") from None


def fit(value: Any, annotation: Any, within: Range | None = None) -> Any:
    """Return a value as the annotation wants it.

    Raises:
        Unfit: it cannot be had so.
    """
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _fit_any(value, parts, within)
    if origin is typing.Literal:
        if value not in parts:
            raise Unfit
        return value
    base = origin or annotation
    if base is bool:
        if not isinstance(value, bool) and value not in (0, 1):
            raise Unfit
        return value
    if base in (int, float):
        return _fit_number(value, base, within)
    if base is str or base is os.PathLike or (inspect.isclass(base) and issubclass(base, os.PathLike)):
        if not isinstance(value, str | os.PathLike):
            raise Unfit
        return value
    if base is types.NoneType:
        if value is not None:
            raise Unfit
        return value
    if base in (list, tuple, Sequence, Iterable, Collection):
        return _fit_list(value, base, parts, within)
    if base in (dict, Mapping):
        if not hasattr(value, "keys"):
            raise Unfit
        return value
    if inspect.isclass(base) and base not in (Any, inspect.Parameter.empty) and not isinstance(value, base):
        raise Unfit
    return value  # also where the annotation is None: the class itself says what it thinks of others


def _fit_any(value: Any, parts: tuple[Any, ...], within: Range | None) -> Any:
    for part in parts:
        with contextlib.suppress(Unfit):
            return fit(value, part, within)
    raise Unfit


def _fit_number(value: Any, base: type, within: Range | None) -> Any:
    if isinstance(value, str) and EXPONENT.fullmatch(value):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, Real) or not _is_finite(value):
        raise Unfit
    if base is int and not isinstance(value, Integral):
        if value != int(value):
            raise Unfit
        value = int(value)
    if (isinstance(value, Integral) and abs(value) > MAX_WHOLE) or not (within is None or within.has(value)):
        raise Unfit
    return value


def _is_finite(number: Any) -> bool:
    try:
        return math.isfinite(number)
    except (
        OverflowError
    ):  # a whole number beyond every float is finite, and too large for all that is wanted here
        return False


def _fit_list(value: Any, base: type, parts: tuple[Any, ...], within: Range | None) -> Any:
    if isinstance(value, str | bytes) or hasattr(value, "keys") or not isinstance(value, Iterable):
        raise Unfit
    items = list(value)
    item = parts[0] if parts else Any
    is_pair = base is tuple and len(parts) > 1 and parts[1] is not Ellipsis
    least, most = (len(parts),) * 2 if is_pair else (within.least, within.most) if within else (0, 10_000)
    if not least <= len(items) <= most:
        raise Unfit
    fitted = [fit(one, item, within) for one in items]
    same = all(new is old for new, old in zip(fitted, items, strict=True))
    return value if same else fitted


def words_for(annotation: Any, within: Range | None = None) -> str:
    """Say what an annotation and a range want: "a whole number from 1 to 8, or null"."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        plain = [part for part in parts if not _is_foreign(part)]
        return ", or ".join(dict.fromkeys(words_for(part, within) for part in plain))
    if origin is typing.Literal:
        return " or ".join(repr(part) for part in parts)
    base = origin or annotation
    reach = f" {within.words}" if within is not None else ""
    if base is int:
        return f"a whole number{reach}"
    if base is float:
        return f"a number{reach}"
    if base in (list, tuple, Sequence, Iterable, Collection):
        least = f" of at least {within.least}" if within is not None and within.least else ""
        most = f", at most {within.most}" if within is not None and within.most < 1000 else ""
        return f"a list{least} ({words_for(parts[0], within) if parts else 'anything'} each{most})"
    known = {
        bool: "true or false",
        str: "a text",
        types.NoneType: "null",
        dict: "a mapping",
        Mapping: "a mapping",
    }
    if base in known:
        return known[base]
    if inspect.isclass(base) and issubclass(base, os.PathLike):
        return "a path"
    return f"a {getattr(base, '__name__', base)}"


def _is_foreign(part: Any) -> bool:
    """Whether no YAML file can hold such a value."""
    root = getattr(part, "__module__", "").split(".")[0]
    return root in ("torch", "numpy", "pathlib")


_building = threading.local()


def may_be_giant(params: Mapping[str, Any]) -> bool:
    """Whether a configuration names widths and depths whose product is far beyond that of Stable Diffusion (1.2e8)."""
    most = dict.fromkeys(("width", "times", "levels", "blocks", "depth", "rows"), 1.0)

    def look(tree: Mapping[str, Any]) -> None:
        for name, value in tree.items():
            if isinstance(value, Mapping):
                look(value)
                continue
            numbers = _numbers(value)
            kind = {
                "channel_mult": "times",
                "ch_mult": "times",
                "num_res_blocks": "blocks",
                "transformer_depth": "depth",
            }
            if RANGES.get(name) is WIDTH and name != "context_dim":
                kind[name] = "width"
            elif name in ("n_e", "n_embed", "n_classes", "num_classes"):
                kind[name] = "rows"
            if name in kind:
                most[kind[name]] = max(most[kind[name]], *numbers, 1)
            if kind.get(name) == "times":
                most["levels"] = max(most["levels"], len(numbers))

    look(params)
    width = most["width"] * most["times"]
    convolutions = 9 * width**2 * most["levels"] * most["blocks"] * most["depth"]
    return max(convolutions, most["rows"] * width) > GIANT


def _numbers(value: Any) -> list[float]:
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, Sequence) else [value]
    numbers = []
    for part in parts:
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            numbers.append(float(part))
    return numbers


def expect_tensors(count: int) -> None:
    """Refuse a network whose depths alone say that it has too many tensors, before the first is made.

    Raises:
        UnsafeFileError: more than MAX_TENSORS.
    """
    if count > MAX_TENSORS:
        where = getattr(_building, "where", None) or "a network"
        raise UnsafeFileError(
            f"{where} asks for a model of more than {MAX_TENSORS} tensors or {MAX_PARAMETERS:.0e} parameters; lower "
            f"its widths and depths (its levels, blocks and transformer_depth make at least {count} tensors)"
        )


def is_counting() -> bool:
    """Whether a `bounded` block is open in this thread."""
    return getattr(_building, "where", None) is not None


@contextlib.contextmanager
def bounded(where: str) -> Iterator[None]:
    """Refuse to build more than MAX_PARAMETERS in MAX_TENSORS, as soon as the next one would go beyond.

    Calls inside of one another count together.

    Raises:
        UnsafeFileError: there were more.
    """
    if is_counting():
        outer = _building.where
        _building.where = where or outer
        try:
            yield
        finally:
            _building.where = outer
        return
    from torch.nn.modules.module import register_module_parameter_registration_hook

    thread, tensors, numbers = threading.get_ident(), 0, 0

    def count(module: Any, name: str, parameter: Any) -> None:
        nonlocal tensors, numbers
        if parameter is None or threading.get_ident() != thread:
            return
        tensors, numbers = tensors + 1, numbers + parameter.numel()
        if tensors > MAX_TENSORS or numbers > MAX_PARAMETERS:
            raise UnsafeFileError(
                f"{_building.where} asks for a model of more than {MAX_TENSORS} tensors or {MAX_PARAMETERS:.0e} "
                f"parameters; lower its widths and depths ({type(module).__name__}.{name} was one too many)"
            )

    handle = register_module_parameter_registration_hook(count)
    _building.where = where
    try:
        yield
    finally:
        _building.where = None
        handle.remove()
