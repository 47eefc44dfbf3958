"""Merging of checkpoints, by AUTOMATIC1111's formulas, with LoRAs and another VAE baked in.

    merge("both.safetensors", "a.safetensors", "b.safetensors", alpha=0.3)                     # (1 - alpha) A + alpha B
    merge("new.safetensors", "a.safetensors", "tuned.safetensors", "base.safetensors", alpha=1)  # A + alpha (B - C)
    merge("small.safetensors", "a.ckpt", dtype=torch.float16)                                  # A alone, pruned

All is computed in float64, tensor by tensor, and rounded to the result's dtype at the end; no model is built.
"""

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ldm
from ldm.adapters.lora import BLOCKS, LoRA, block_of
from ldm.checkpoints.build import build_empty, collector_paused, follow_hub, match_file
from ldm.checkpoints.compvis import (
    PLAIN,
    STEM,
    CompVisWeights,
    check_fit,
    check_output,
    network_of,
    refuse_existing,
    sha256_of,
)
from ldm.checkpoints.configs import CONFIGS, V1_WIDTH, config_beside, read_settings
from ldm.checkpoints.families import first_shape, why_unused
from ldm.checkpoints.folders import is_diffusers_folder
from ldm.checkpoints.key_mapping import POSITION_IDS, UNET
from ldm.checkpoints.matching import without_trailing_ones
from ldm.checkpoints.report import LoadReport, TensorInfo, first_few
from ldm.checkpoints.tensors import is_finite
from ldm.checkpoints.write import replacing, stream_safetensors
from ldm.errors import LdmError, MismatchError, NumericError, UsageError, escaped, shown
from ldm.paths import shipped
from ldm.process.schedule import SCHEDULE_BUFFERS
from ldm.saving import as_yaml, settings_beside
from ldm.values import check_value

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
EMAS = ("drop", "use")
PIECE = 1 << 20  # values that are computed at a time
BASE = "BASE"
# Markers are no weights, but without them a reader takes the model for another kind.
MARKERS = ("v_pred", "ztsnr")


@torch.no_grad()
def weighted_sum(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) A + alpha B: A1111's "Weighted sum"."""
    return a * (1 - alpha) + b * alpha


@torch.no_grad()
def add_difference(a: Tensor, b: Tensor, c: Tensor, alpha: float) -> Tensor:
    """A + alpha (B - C): A1111's "Add difference"."""
    return a + alpha * (b - c)


def alphas_of_blocks(blocks: Mapping[str, float] | Sequence[float] | None, alpha: float) -> dict[str, float]:
    """Give each block of the UNet, and BASE for all that is not the UNet, its alpha.

    Args:
        blocks: 25 numbers for IN00 to IN11, M00 and OUT00 to OUT11, while BASE has alpha; 26 with BASE before them; or
            a dict of some of these names, while the others have alpha.

    Raises:
        UsageError: another number of them, an unknown name, or no finite number.
    """
    if blocks is None:
        given: dict[str, Any] = {}
    elif isinstance(blocks, Mapping):
        given = {str(name).upper(): one for name, one in blocks.items()}
        if len(given) < len(blocks):
            raise UsageError(
                f"blocks should name each block once, whatever its case, got {shown(list(blocks))}"
            )
        if unknown := [name for name in given if name not in BLOCKS]:
            raise UsageError(
                f"blocks should be of BASE, IN00 to IN11, M00 and OUT00 to OUT11, got {shown(unknown[0])}"
            )
    else:
        numbers = list(check_value(blocks, Sequence[float], "blocks"))
        names = {len(BLOCKS): BLOCKS, len(BLOCKS) - 1: BLOCKS[1:]}.get(len(numbers))
        if names is None:
            raise UsageError(
                f"blocks should be 25 numbers (IN00 to IN11, M00, OUT00 to OUT11) or 26 with BASE before them, "
                f"got {len(numbers)}"
            )
        given = dict(zip(names, numbers, strict=True))
    checked = {name: float(check_value(one, float, f"blocks {name}")) for name, one in given.items()}
    return {**dict.fromkeys(BLOCKS, alpha), **checked}


def block_of_tensor(name: str) -> str:
    """The block whose alpha a tensor has, as the web UI's extension for merging by blocks counts them.

    What lies before the input blocks counts to IN00, what lies behind the output blocks to OUT11; VAE and text encoder
    to BASE.
    """
    if not name.startswith(UNET):
        return BASE
    bare = name.removeprefix(UNET)
    return block_of(name) or ("OUT11" if bare.startswith("out.") else "IN00")


@dataclass(frozen=True)
class _Entry:
    """How a tensor of the result is had: from a source, merged with the same tensor of others, then changed."""

    source: CompVisWeights
    info: TensorInfo
    others: tuple[CompVisWeights, ...] = ()
    alpha: float = 0.0
    changes: tuple[Callable[[Tensor], Tensor], ...] = ()


@dataclass(frozen=True)
class _Named:
    """The names and shapes of a result, as LoRA reads them off a model."""

    entries: Mapping[str, _Entry]

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, entry in self.entries.items():
            if network_of(name):
                yield name, torch.empty(entry.info.shape, device="meta")


def merge(
    output: str | os.PathLike,
    a: str | os.PathLike,
    b: str | os.PathLike | None = None,
    c: str | os.PathLike | None = None,
    *,
    alpha: float | None = None,
    blocks: Mapping[str, float] | Sequence[float] | None = None,
    vae: str | os.PathLike | None = None,
    loras: Iterable[LoRA] = (),
    ema: str = "drop",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> list[LoadReport]:
    """Merge Stable Diffusion v1 models of the same layout into one safetensors file with CompVis's keys.

    One file is pruned and cast, two give the weighted sum, three add the difference of B and C to A. Tables, markers
    and the text encoder's position_ids are A's. What a file has no tensor of (a VAE, a text encoder) is left as A has
    it, or taken from B where A has none. A may be an inpainting model (9 input channels) where the others are not:
    the first 4 are merged then. It is written beside its name first; A's configuration, where it needs one, beside it.

    Args:
        output: name.safetensors.
        a, b, c: files or diffusers folders.
        alpha: share of B, or of the difference; wanted with b.
        blocks: alphas of the UNet's blocks, see alphas_of_blocks.
        vae: a file or folder whose VAE is put in the place of A's.
        loras: baked in, in this order, after merging.
        ema: of files that hold a moving average (model_ema.*): "drop" it, or "use" it as the UNet's weights.
        dtype: of the weights, float32, float16 or bfloat16; None = as A's.
        overwrite: whether a file that has the output's name may be replaced.

    Returns:
        a report for each file read, of every tensor in it.

    Raises:
        UsageError: an option out of range, or an output that is one of the inputs.
        AbsentError, FormatError, UnsafeFileError: a file cannot be read.
        MismatchError: files of other families, layouts or channels, or with tensors missing.
        NumericError: the result is not finite in its dtype.
        OutputError: it cannot be written.
    """
    output = check_output(output, [one for one in (a, b, c, vae) if one is not None], overwrite)
    alpha = _checked_alpha(b, c, alpha, blocks)
    if ema not in EMAS:
        raise UsageError(f"ema should be one of {', '.join(EMAS)}, got {shown(ema)}")
    if dtype is not None and dtype not in DTYPES.values():
        raise UsageError(f"dtype should be one of {', '.join(DTYPES)}, got {shown(dtype)}")
    loras = _checked_loras(loras)
    if any((one.start, one.end) != (0.0, 1.0) for one in loras):
        raise UsageError("a LoRA that is baked in is there at all steps; leave its start and end out")
    with contextlib.ExitStack() as opened:
        models = [
            opened.enter_context(CompVisWeights(one, use_ema=ema == "use"))
            for one in (a, b, c)
            if one is not None
        ]
        if ema == "use" and not any(one.is_averaged for one in models):
            raise MismatchError(
                f"'{escaped(a)}' has no EMA weights (model_ema.*) to use; leave ema='use' (--ema use) out"
            )
        _check_whole(Path(a), models[0])
        replacement = None if vae is None else opened.enter_context(CompVisWeights(vae, only_vae=True))
        entries, reports = _plan(models, alphas_of_blocks(blocks, alpha), alpha)
        if replacement is not None:
            reports.append(_replace_vae(entries, reports, replacement))
        _bake(entries, loras, reports)
        infos = {name: _info_of(name, entry.info, dtype) for name, entry in entries.items()}
        settings = _settings_of(Path(a), models[0])
        if settings is not None:
            refuse_existing(output.with_suffix(".yaml"), overwrite)
        recipe = _recipe(models, replacement, loras, alpha, blocks, ema, dtype)
        with contextlib.ExitStack() as written:
            if settings is not None:  # takes its name after the weights have theirs
                written.enter_context(replacing(output.with_suffix(".yaml"))).write(settings.encode("utf-8"))
            stream_safetensors(
                output,
                infos,
                lambda name: _values(name, entries[name], infos[name].dtype),
                {**models[0].metadata, "format": "pt", **recipe},
                opened.close,  # says if a file changed meanwhile
            )
    return reports


# --- what is asked for ----------------------------------------------------------------------------------------------


def _checked_loras(loras: Any) -> list[LoRA]:
    if not isinstance(loras, Iterable) or isinstance(loras, str):
        raise UsageError(f"loras should be a list of ldm.adapters.LoRA, got {shown(loras)}")
    found = list(loras)
    if odd := [one for one in found if not isinstance(one, LoRA)]:
        raise UsageError(f"loras should be a list of ldm.adapters.LoRA, got {shown(odd[0])} in it")
    return found


def _checked_alpha(b: Any, c: Any, alpha: float | None, blocks: Any) -> float:
    if b is None:
        if c is not None or alpha is not None or blocks is not None:
            raise UsageError("alpha, blocks and a third model need a second one to merge with")
        return 0.0
    if alpha is None:
        raise UsageError("alpha is wanted, the share of the second model (0 = none of it, 1 = all)")
    alpha = float(check_value(alpha, float, "alpha"))
    if not math.isfinite(alpha):
        raise UsageError(f"alpha should be a finite number, got {alpha}")
    return alpha


# --- which tensor comes from where ----------------------------------------------------------------------------------


def _plan(
    models: list[CompVisWeights], alphas: Mapping[str, float], alpha: float
) -> tuple[dict[str, _Entry], list[LoadReport]]:
    """Say how each tensor of the result is had, and what becomes of every tensor of each file."""
    first, *others = models
    entries: dict[str, _Entry] = {}
    reports = [LoadReport(one.path, one.family, ignored=dict(one.ignored)) for one in models]
    for name, theirs in first.names.items():
        reason = None if name in MARKERS else why_unused(name)
        if reason:
            reports[0].ignored[theirs] = reason
            continue
        entries[name] = _Entry(first, first.infos[name])
        reports[0].assigned[theirs] = name
    known = (*SCHEDULE_BUFFERS, *MARKERS, "logvar", "scale_factor")
    odd = [n for n in entries if not network_of(n) and n not in known and not n.endswith(POSITION_IDS)]
    if odd:
        reports[0].notes.append(
            f"{len(odd)} tensors that belong to no network were kept ({first_few(odd, 2)})"
        )
    for one in others:
        check_fit(one, first)
        for marker in MARKERS:
            if (marker in first.names) != (marker in one.names):
                having, lacking = (first, one) if marker in first.names else (one, first)
                reports[0].notes.append(
                    f"'{escaped(having.path)}' says {marker}, '{escaped(lacking.path)}' does not; they may not fit"
                )
                logger.warning("%s", reports[0].notes[-1])
    for one, report in zip(others, reports[1:], strict=True):
        for name, theirs in one.names.items():
            network = network_of(name)
            if network is None:
                report.ignored[theirs] = why_unused(name) or "the first model's is kept"
            elif first.has(network):
                report.assigned[theirs] = name
            elif one is others[0]:
                entries[name] = _Entry(one, one.infos[name])
                report.assigned[theirs] = name
            else:
                report.ignored[theirs] = f"the first model has no {network}"
    for network in ("UNet", "VAE", "text encoder"):
        having = [one for one in others if one.has(network)]
        if not first.has(network) and others and others[0].has(network):
            reports[1].notes.append(f"its {network} was taken, the first model has none")
        elif len(having) < len(others) and first.has(network):
            lacking = next(one for one in others if one not in having)
            reports[0].notes.append(f"the {network} is as it was: '{escaped(lacking.path)}' has none")
            for one, report in zip(others, reports[1:], strict=True):
                for name in [n for n in report.assigned.values() if network_of(n) == network]:
                    report.ignored[one.names[name]] = "there is nothing to merge it with"
                    del report.assigned[one.names[name]]
        elif others:
            for name in [n for n, entry in entries.items() if network_of(n) == network]:
                entry = entries[name]
                entries[name] = _Entry(
                    first, entry.info, tuple(others), alphas.get(block_of_tensor(name), alpha)
                )
    return entries, reports


def _check_whole(path: Path, first: CompVisWeights) -> None:
    """Raise MismatchError if tensors of its networks are missing in the first model, where a configuration says which.

    The others are compared with it.
    """
    place = follow_hub(path)
    if is_diffusers_folder(place):
        return  # is matched with its configuration in any case
    beside, is_v1 = config_beside(place), first_shape(first.infos)[:1] == (V1_WIDTH,)
    if beside is not None and (beside.stem == place.stem or not is_v1):
        settings = read_settings(beside)
    elif is_v1:
        settings = read_settings(shipped(CONFIGS["v1"]))  # the inpainting model has the same names
    else:
        return
    with collector_paused():
        wanted = build_empty(settings).state_dict()
    missing = [name for name in wanted if name not in first.infos and first.has(network_of(name) or "")]
    if missing:
        raise MismatchError(
            f"'{escaped(path)}' is not whole: {len(missing)} of its tensors are missing ({first_few(missing, 2)}); get "
            "the file again"
        )


def _replace_vae(entries: dict[str, _Entry], reports: list[LoadReport], vae: CompVisWeights) -> LoadReport:
    """Put another VAE in the place of that of the entries."""
    replaced = {name: entry for name, entry in entries.items() if network_of(name) == "VAE"}
    missing = [name for name in replaced if name not in vae.infos]
    odd = [name for name in vae.infos if replaced and name not in replaced]
    odd += [
        name
        for name in replaced.keys() & vae.infos.keys()
        if without_trailing_ones(replaced[name].info.shape) != without_trailing_ones(vae.infos[name].shape)
    ]
    if missing or odd:
        raise MismatchError(
            f"'{escaped(vae.path)}' does not fit: its VAE lacks {len(missing)} tensors and has {len(odd)} others or of "
            f"another shape ({first_few(missing or odd, 2)})"
        )
    reason = f"replaced by the VAE of '{escaped(vae.path)}'"
    for report in reports:
        for theirs in [theirs for theirs, name in report.assigned.items() if network_of(name) == "VAE"]:
            del report.assigned[theirs]
            report.ignored[theirs] = reason
    report = LoadReport(vae.path, "VAE", ignored=dict(vae.ignored))
    for name, theirs in vae.names.items():
        entries[name] = _Entry(vae, vae.infos[name])
        report.assigned[theirs] = name
    return report


def _bake(entries: dict[str, _Entry], loras: list[LoRA], reports: list[LoadReport]) -> None:
    """Let LoRAs change the entries, the first one first."""
    named = _Named(dict(entries))
    for lora in loras:
        for name, change in lora.deltas(named).items():
            entry = entries[name]
            entries[name] = _Entry(
                entry.source, entry.info, entry.others, entry.alpha, (*entry.changes, change)
            )
        reports.append(lora.report(named))


# --- values ---------------------------------------------------------------------------------------------------------


def _info_of(name: str, info: TensorInfo, dtype: torch.dtype | None) -> TensorInfo:
    return TensorInfo(info.shape, dtype) if dtype is not None and network_of(name) else info


def _values(name: str, entry: _Entry, dtype: torch.dtype) -> Tensor:
    """Compute a tensor of the result."""
    own = entry.source.read(name).reshape(entry.info.shape)
    if not network_of(name):
        return own
    # What a LoRA changes is rounded after it, and not before.
    last = torch.float64 if entry.changes else dtype
    if not entry.others:
        merged = own.to(last)
    elif own.shape[1:2] != entry.others[0].infos[name].shape[1:2] and name == STEM:
        merged = own.to(last, copy=True)
        merged[:, :PLAIN] = blend(own[:, :PLAIN], [one.read(name) for one in entry.others], entry.alpha, last)
    else:
        merged = blend(own, [one.read(name) for one in entry.others], entry.alpha, last)
    for change in entry.changes:
        merged = change(merged)
    merged = merged.to(dtype)
    if not is_finite(merged):
        raise NumericError(
            f"'{escaped(name)}' of the result is not finite in {str(dtype).removeprefix('torch.')}: a file holds "
            "values that are not, or they are too large; use dtype=float32 or bfloat16 (--dtype)"
        )
    return merged


@torch.no_grad()
def blend(a: Tensor, others: Sequence[Tensor], alpha: float, dtype: torch.dtype) -> Tensor:
    """Merge a tensor with one (weighted_sum) or two others (add_difference) in float64, piece by piece, into dtype."""
    result = torch.empty(a.shape, dtype=dtype)
    flat, tensors = result.reshape(-1), [one.reshape(-1) for one in (a, *others)]
    formula = weighted_sum if len(others) == 1 else add_difference
    for start in range(0, len(flat), PIECE):
        pieces = [one[start : start + PIECE].double() for one in tensors]
        flat[start : start + PIECE] = formula(*pieces, alpha)
    return result


# --- what the result says of itself ---------------------------------------------------------------------------------


def _recipe(
    models: list[CompVisWeights],
    vae: CompVisWeights | None,
    loras: list[LoRA],
    alpha: float,
    blocks: Any,
    ema: str,
    dtype: torch.dtype | None,
) -> dict[str, str]:
    """Say from what the result was made and how, under the names of A1111's merger and in its form."""
    hashes = [[sha256_of(file) for file in one.files] for one in models]
    method = ("No interpolation", "Weighted sum", "Add difference")[len(models) - 1]
    recipe: dict[str, Any] = {"type": "ldm", "version": ldm.__version__, "interp_method": method}
    for place, found in zip(("primary", "secondary", "tertiary"), hashes, strict=False):
        recipe[f"{place}_model_hash"] = found[0] if len(found) == 1 else found
    if len(models) > 1:
        recipe["multiplier"] = alpha
    if blocks is not None:
        recipe["block_weights"] = alphas_of_blocks(blocks, alpha)
    recipe |= {"ema": ema, "dtype": "as the first" if dtype is None else str(dtype).removeprefix("torch.")}
    sources = {
        digest: {"name": Path(file).name, **_earlier(one)}
        for one, digests in zip(models, hashes, strict=True)
        for file, digest in zip(one.files, digests, strict=True)
    }
    if vae is not None:
        digests = [sha256_of(file) for file in vae.files]
        recipe |= {"bake_in_vae": Path(vae.path).name, "vae_hash": digests[0]}
        sources |= {
            digest: {"name": Path(file).name} for digest, file in zip(digests, vae.files, strict=True)
        }
    if loras:
        recipe["loras"] = [lora.describe() for lora in loras]
    return {"sd_merge_recipe": json.dumps(recipe), "sd_merge_models": json.dumps(sources)}


def _earlier(model: CompVisWeights) -> dict[str, str]:
    """What a model that was merged itself says of that."""
    return {key: value for key, value in model.metadata.items() if key == "sd_merge_recipe"}


def _settings_of(path: Path, first: CompVisWeights) -> str | None:
    """Write down the configuration of the first model, as YAML, or None where a reader needs none."""
    place = follow_hub(path).resolve()  # the text encoder's folder is found from everywhere
    if is_diffusers_folder(place):
        with contextlib.ExitStack() as opened:
            model, report, _ = match_file(place, None, opened)
        return settings_beside(model, report.sampling)
    beside = config_beside(place)
    if beside is None:
        return None
    if beside.stem == place.stem or first_shape(first.infos)[:1] != (V1_WIDTH,):
        return as_yaml(read_settings(beside))
    # A folder's config.yaml may be another model's, or another program's.
    with contextlib.ExitStack() as opened, contextlib.suppress(LdmError):
        model, report, _ = match_file(place, None, opened)
        return settings_beside(model, report.sampling)
    return None
