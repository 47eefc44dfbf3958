"""From a file to a model on the meta device, without memory yet, in which each of its tensors has a place."""

import contextlib
import copy
import gc
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ldm.checkpoints import families
from ldm.checkpoints.configs import Candidate, candidates, find_config, with_origin
from ldm.checkpoints.files import PICKLE_SUFFIXES, Weights, open_weights
from ldm.checkpoints.folders import FolderWeights, folder_settings, is_diffusers_folder
from ldm.checkpoints.matching import match_model, without
from ldm.checkpoints.report import LoadReport, first_few
from ldm.checkpoints.sampling import read_sampling
from ldm.config import instantiate_from_config
from ldm.errors import AbsentError, FormatError, LdmError, MismatchError, UsageError, escaped

logger = logging.getLogger(__name__)


def follow_hub(path: Path) -> Path:
    """Follow a model's folder in the hub's cache to its snapshot; other paths stay as they are.

    Raises:
        AbsentError: there are several snapshots, none of them the one that "main" names, or none at all.
    """
    snapshots = path if path.name == "snapshots" else path / "snapshots"
    if not snapshots.is_dir() or is_diffusers_folder(path):
        return path
    found = sorted(folder for folder in snapshots.iterdir() if folder.is_dir())
    main = snapshots.parent / "refs" / "main"
    if len(found) > 1 and main.is_file() and main.stat().st_size <= 100:
        named = main.read_text(encoding="utf-8", errors="replace").strip()
        found = [folder for folder in found if folder.name == named] or found
    if len(found) != 1:
        advice = f"name one, such as '{escaped(found[0])}'" if found else "download the model again"
        raise AbsentError(f"'{escaped(path)}' in the hub's cache has {len(found)} snapshots; {advice}")
    return found[0]


def open_file(path: Path) -> Weights:
    """Open a weight file as open_weights does; of a folder, say what in it could be meant.

    Raises:
        FormatError: a folder.
    """
    if path.is_dir():
        inside = sorted(entry.name for entry in path.iterdir())
        if repositories := [name for name in inside if name.startswith("models--")]:
            raise FormatError(
                f"'{escaped(path)}' is a cache of the hub; name a model in it: {first_few(repositories)}"
            )
        if files := [name for name in inside if name.endswith((".safetensors", *PICKLE_SUFFIXES))]:
            raise FormatError(
                f"'{escaped(path)}' is a folder and no diffusers model; name a file in it: {first_few(files)}"
            )
    return open_weights(path)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the garbage collector: building makes many objects that stay, and each few thousand set it off again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _Empty(TorchFunctionMode):
    """Inside torch.device("meta"): keep tensors that are made from values real, and draw no first weights.

    What has no memory cannot be filled; computing what it would be filled with is most of the time of building.
    """

    MAKERS = frozenset({torch.tensor, torch.as_tensor, torch.arange, torch.linspace, torch.full})
    # By name: transformers puts functions of its own in the place of torch's.
    FILLS = frozenset(name for name in dir(nn.init) if re.fullmatch("[a-z]+(_[a-z]+)*_", name)) | {
        "fill_",
        "zero_",
    }

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self.FILLS:
            filled = args[0] if args else kwargs["tensor"]
            if filled.is_meta:
                return filled
        if func in self.MAKERS and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


def build_empty(settings: Mapping[str, Any], tokenizer: str | Path | None = None) -> nn.Module:
    """Build a configured model whose weights take no memory (meta device) and whose computed tables are real."""
    model_config = copy.deepcopy(dict(settings["model"]))
    if tokenizer is not None:
        stage = model_config["params"].get("cond_stage_config")
        if not isinstance(stage, dict):
            raise UsageError("tokenizer= needs a model with a text encoder; this configuration has none")
        stage.setdefault("params", {})["tokenizer"] = str(tokenizer)
    with torch.device("meta"), _Empty():
        return instantiate_from_config(model_config, where="model").eval()


def build_fitting(
    tried: Sequence[Candidate], match: Callable[[nn.Module], LoadReport], tokenizer: str | Path | None = None
) -> tuple[nn.Module, LoadReport]:
    """Build the first candidate that a file fits.

    Args:
        match: reports on the file's tensors in an empty model, or raises.

    Raises:
        As match, for the first candidate, if none fits.
    """
    failure: LdmError | None = None
    for candidate in tried:
        try:
            sampling = read_sampling(candidate.settings.get("sampling"))
            model = build_empty(candidate.settings, tokenizer)
            report = match(model)
        except LdmError as error:
            if failure is None:
                failure = error if candidate.origin is None else with_origin(error, candidate.origin)
            continue
        if failure is not None:
            origin = tried[0].origin
            report.notes.append(
                f"'{escaped(origin)}' beside the file is another model's; Stable Diffusion v1's was used"
            )
            logger.warning("'%s': %s", report.path, report.notes[-1])
        report.notes += candidate.notes
        report.sampling = sampling
        return model, report
    assert failure is not None, "there is no candidate"
    raise failure


def match_file(
    path: Path,
    config: str | Path | Mapping[str, Any] | None,
    opened: contextlib.ExitStack,
    *,
    use_ema: bool | None = None,
    tokenizer: str | Path | None = None,
    vae: str | Path | None = None,
    ignore: tuple[str, ...] = (),
    source: Weights | None = None,
) -> tuple[nn.Module, LoadReport, Weights]:
    """Open a full model's file, build the model that fits it and match every tensor; options of load_latent_diffusion.

    Raises:
        As load_latent_diffusion, before any value is read.
    """
    path = follow_hub(path)
    if isinstance(config, str | Path):
        config = find_config(config)
    if is_diffusers_folder(path):
        family, own = folder_settings(path)  # names another family before anything is missed
        if source is None:
            source = opened.enter_context(contextlib.closing(FolderWeights(path)))
        tried = candidates(path, source, family, own if config is None else config)
    else:
        if source is None:
            source = opened.enter_context(contextlib.closing(open_file(path)))
        family = families.family_of(without(source.infos, ignore))
        if family in families.REFUSED:
            raise MismatchError(f"'{escaped(path)}' is {families.REFUSED[family]}; {families.ADVICE[family]}")
        tried = candidates(path, source, family, config)

    def match(model: nn.Module) -> LoadReport:
        return match_model(model, source, family, use_ema, given_vae=vae, ignore=ignore)

    return *build_fitting(tried, match, tokenizer), source
