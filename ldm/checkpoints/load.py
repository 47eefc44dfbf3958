"""From a file or folder to a model in evaluation mode, with every tensor accounted for."""

import contextlib
import copy
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.checkpoints import names
from ldm.checkpoints.account import LoadReport, match, shown
from ldm.checkpoints.files import Weights, open_weights, require_float
from ldm.checkpoints.folders import FolderWeights, folder_settings, is_diffusers_folder, modern_name
from ldm.errors import LdmError, MismatchError, NumericError, ResourceError, UsageError
from ldm.paths import shipped
from ldm.util import instantiate_from_config, load_config

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

logger = logging.getLogger(__name__)

CONFIGS = {"v1": "configs/v1-inference.yaml", "v1-inpainting": "configs/v1-inpainting.yaml"}
V1_WIDTH = 320  # channels of Stable Diffusion v1's UNet; other sizes need their own configuration
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
COMPUTED = "computed from the configuration"
# Left over from a training that is not resumed, or from another reader; none of them is used in sampling.
UNUSED = {
    "cond_stage_model.logit_scale": "not used by the text encoder of v1",
    "cond_stage_model.text_projection": "not used by the text encoder of v1",
    "cond_stage_model.transformer.logit_scale": "not used by the text encoder of v1",
    "cond_stage_model.transformer.text_projection.weight": "not used by the text encoder of v1",
    "lvlb_weights": COMPUTED,
    "model_ema.decay": "bookkeeping of a moving average that this model does not keep",
    "model_ema.num_updates": "bookkeeping of a moving average that this model does not keep",
}
# Relative difference that storing the schedule in these dtypes explains.
ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def load_latent_diffusion(
    path: str | Path,
    *,
    config: str | Path | Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    use_ema: bool | None = None,
    tokenizer: str | Path | None = None,
    vae: str | Path | None = None,
) -> tuple["LatentDiffusion", LoadReport]:
    """Load a latent diffusion model of the v1 family from a single file or a diffusers folder.

    The model is built without memory and given the file's tensors one by one, so that the peak is the model
    (and, for a pickle, the file).

    Args:
        path: .safetensors, .ckpt, or a diffusers folder.
        config: a YAML file, mapping or OmegaConf with CompVis's keys. None chooses Stable Diffusion v1 or its
            inpainting model from the shapes in the file; a folder brings its own.
        device: where the model goes.
        dtype: of the parameters; None = float32, as CompVis's loader. Buffers keep their own.
        use_ema: the file's weights that the UNet gets. True: the moving average. False: the plain ones.
            None: the plain ones, and if the configuration keeps a moving average, that too, as CompVis does.
            A model that keeps an average and is not given one has it seeded from the loaded weights.
        tokenizer: folder or file of the tokenizer, if not the one that the text encoder finds.
        vae: a file or folder whose VAE replaces this file's.

    Returns:
        The model in evaluation mode, and the account of every tensor.

    Raises:
        AbsentError, FormatError, UnsafeFileError: the file cannot be had, read or trusted.
        MismatchError: another family, or tensors that do not pair with the model's.
        NumericError: weights that are not finite, or not any more in dtype.
        ResourceError: out of memory.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype should be one of {', '.join(map(str, DTYPES))}, got {dtype}")
    device = _usable(device)
    with contextlib.ExitStack() as opened:
        source, family, settings = open_model(Path(path), config, opened)
        model = build_empty(settings, tokenizer)
        report = account_model(model, source, family, use_ema, given_vae=vae)
        state = {}
        with _memory_named(path, model):
            if vae is not None:
                replacement = opened.enter_context(contextlib.closing(_open_vae(vae)))
                inner = account_vae(model.first_stage_model, replacement)
                _fill(state, model, inner, replacement, device, dtype, prefix=names.VAE)
                report.notes.append(inner.summary())
            _check_tables(model, report, source)
            _fill(state, model, report, source, device, dtype)
            _finish(model, state, report, device)
    logger.info("%s", report.summary())
    return model, report


def load_vae(model: nn.Module, path: str | Path, *, ignore_keys: Iterable[str] = ()) -> LoadReport:
    """Load a VAE into an autoencoder, or into the first stage of a latent diffusion model, in place.

    Args:
        model: AutoencoderKL (or VQModel), or a model with `first_stage_model`; device and dtype stay.
        path: a VAE file (CompVis's names, with or without "first_stage_model.", or diffusers'), a full model
            (the rest of it is ignored), or a diffusers folder.
        ignore_keys: beginnings of names in the file to leave out.

    Raises:
        MismatchError: a tensor is missing, unexpected or misshapen; nothing has been changed then.
        As load_latent_diffusion otherwise.
    """
    module = getattr(model, "first_stage_model", model)
    weight = next(module.parameters())
    with contextlib.closing(_open_vae(path)) as source, _memory_named(path, module):
        report = account_vae(module, source, tuple(ignore_keys))
        state: dict[str, Tensor] = {}
        _fill(state, module, report, source, weight.device, weight.dtype)
        own = module.state_dict()
        module.load_state_dict({name: state.get(name, value) for name, value in own.items()})
    logger.info("%s", report.summary())
    return report


# --- which file, which model -------------------------------------------------------------------------------------


def open_model(
    path: Path, config: str | Path | Mapping[str, Any] | None, opened: contextlib.ExitStack
) -> tuple[Weights, str, dict[str, Any]]:
    """Open a full model; name its family and find its configuration.

    Raises:
        MismatchError: another family, or a configuration that contradicts the file.
    """
    if is_diffusers_folder(path):
        family, settings = folder_settings(path)
        source: Weights = opened.enter_context(contextlib.closing(FolderWeights(path)))
        return source, family, settings if config is None else read_settings(config)
    source = opened.enter_context(contextlib.closing(open_weights(path)))
    family = names.family_of(source.infos)
    if family in names.REFUSED:
        advice = names.ADVICE.get(family, "a full Stable Diffusion v1 model is needed here")
        raise MismatchError(f"'{shown(path)}' is {names.REFUSED[family]}; {advice}")
    first = source.infos.get(f"{names.UNET}input_blocks.0.0.weight")
    shape = first.shape if first is not None else ()
    if config is None:
        if shape[:1] != (V1_WIDTH,):
            raise MismatchError(
                f"'{shown(path)}' has a UNet of width {shape[0] if shape else 'unknown'}, Stable Diffusion v1's is "
                f"{V1_WIDTH}; give the configuration that belongs to it"
            )
        return source, family, read_settings(shipped(CONFIGS[family]))
    settings = read_settings(config)
    unet = settings["model"].get("params", {}).get("unet_config", {})
    wanted = unet.get("params", {}).get("in_channels") if isinstance(unet, Mapping) else None
    if len(shape) > 1 and wanted is not None and wanted != shape[1]:
        kind = {4: "text-to-image", 9: "inpainting"}.get(shape[1], "other")
        raise MismatchError(
            f"'{shown(path)}' is a {shape[1]}-channel ({kind}) checkpoint, but the configuration asks for {wanted} "
            f"channels; use {CONFIGS[family]} or none"
        )
    return source, family, settings


def read_settings(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Read a model configuration into plain dicts, without paths of weights to load on the way."""
    from omegaconf import OmegaConf

    if isinstance(config, str | Path):
        config = load_config(config)
    settings = (
        OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else copy.deepcopy(config)
    )
    model = settings.get("model") if isinstance(settings, Mapping) else None
    if not isinstance(model, dict) or "target" not in model:
        raise MismatchError(
            "a model configuration needs 'model:' with 'target' and 'params'; this one has none"
        )
    params = model.setdefault("params", {})
    if params.pop("ckpt_path", None) is not None and "finetune_keys" in params:
        params["finetune_keys"] = None  # only for training from another model's file
    first_stage = params.get("first_stage_config")
    if isinstance(first_stage, dict) and isinstance(first_stage.get("params"), dict):
        first_stage["params"].pop("ckpt_path", None)
    return settings


class _ValuesStay(TorchFunctionMode):
    """Keep tensors that are made from values real, inside torch.device("meta")."""

    MAKERS = (torch.tensor, torch.as_tensor, torch.arange, torch.linspace, torch.full)

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.MAKERS and kwargs.get("device") is None:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def build_empty(settings: Mapping[str, Any], tokenizer: str | Path | None = None) -> nn.Module:
    """Build a configured model whose weights take no memory (meta device) and whose computed tables are real."""
    model_config = copy.deepcopy(dict(settings["model"]))
    if tokenizer is not None:
        stage = model_config["params"].get("cond_stage_config")
        if not isinstance(stage, dict):
            raise UsageError("tokenizer= needs a model with a text encoder; this configuration has none")
        stage.setdefault("params", {})["tokenizer"] = str(tokenizer)
    with torch.device("meta"), _ValuesStay():
        return instantiate_from_config(model_config).eval()


def _open_vae(path: str | Path) -> Weights:
    path = Path(path)
    if (path / "vae").is_dir():
        return FolderWeights(path, ("vae",))
    if (path / "config.json").is_file():
        return FolderWeights(path.parent, (path.name,)) if path.name == "vae" else _VaeFolder(path)
    return open_weights(path)


class _VaeFolder(FolderWeights):
    """A diffusers VAE folder under a name of its own."""

    def __init__(self, path: Path):
        super().__init__(path, ())
        self._add("vae/", path, "diffusion_pytorch_model")


# --- the account, before any value is read --------------------------------------------------------------------------


def account_model(
    model: nn.Module,
    source: Weights,
    family: str,
    use_ema: bool | None = None,
    given_vae: str | Path | None = None,
) -> LoadReport:
    """Pair a full model with its file.

    Raises:
        MismatchError: tensors that do not pair, or an average that is asked for and not there.
    """
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    report = LoadReport(path=shown(source.path), family=family, notes=list(source.notes))
    folder = source.kind == "diffusers folder"
    rename = _folder_names(wanted, source) if folder else _file_names(source)
    for name in source.infos:
        reason = _reason_to_ignore(rename.get(name, name), wanted)
        if reason:
            report.ignored[name] = reason
    for name in dict(model.named_buffers()):
        absent = name not in source.infos or name in report.ignored
        if name in wanted and absent and not name.startswith(tuple(names.PARTS.values())):
            report.initialised[name] = COMPUTED
    _account_ema(wanted, source, rename, report, use_ema)
    if given_vae is not None:
        reason = f"replaced by the VAE of '{shown(given_vae)}'"
        report.ignored.update({n: reason for n in source.infos if rename.get(n, n).startswith(names.VAE)})
        report.initialised.update(
            {n: f"VAE of '{shown(given_vae)}'" for n in wanted if n.startswith(names.VAE)}
        )
    report.assigned = match(
        source.path,
        held=source.infos,
        wanted=wanted,
        rename=rename,
        ignored=report.ignored,
        initialised=report.initialised,
        linear_is_conv=folder,
    )
    return report


def _file_names(source: Weights) -> dict[str, str]:
    """Where a single file's names differ from the model's: text keys without "text_model."."""
    head = names.TEXT + "transformer."
    return {n: head + names.text_name(n.removeprefix(head)) for n in source.infos if n.startswith(head)}


def _folder_names(wanted: Mapping[str, Any], source: Weights) -> dict[str, str]:
    """Translate a folder's names by translating the model's own and turning the table round."""

    def inside(prefix: str) -> list[str]:
        return [name.removeprefix(prefix) for name in wanted if name.startswith(prefix)]

    table = {
        f"unet/{theirs}": names.UNET + ours
        for ours, theirs in names.unet_to_diffusers(inside(names.UNET)).items()
    }
    table |= {
        f"vae/{theirs}": names.VAE + ours
        for ours, theirs in names.vae_to_diffusers(inside(names.VAE)).items()
    }
    rename = {}
    for name in source.infos:
        modern = modern_name(name)
        if modern.startswith("text_encoder/"):
            rename[name] = f"{names.TEXT}transformer.{modern.removeprefix('text_encoder/')}"
        else:
            rename[name] = table.get(modern, name)
    return rename


def _reason_to_ignore(name: str, wanted: Mapping[str, Any]) -> str | None:
    """Say why a tensor of the file, under its name in the model, is left out; None if it is not."""
    if name.endswith(names.POSITION_IDS):
        return "a constant, made anew"
    if name in names.SCHEDULE and name in wanted:
        return f"{COMPUTED}, and equal"
    if name in wanted:
        return None
    if name in UNUSED:
        return UNUSED[name]
    if name.startswith((f"{names.VAE}loss.", "loss.")):
        return "the VAE's training loss"
    if name.startswith(f"{names.VAE}model_ema."):
        return "a moving average of the VAE"
    if name in ("logvar", "scale_factor"):
        return "fixed by the configuration"
    return None


def _account_ema(
    wanted: Mapping[str, Any],
    source: Weights,
    rename: dict[str, str],
    report: LoadReport,
    use_ema: bool | None,
) -> None:
    """Decide where the UNet's weights and its moving average come from; changes rename and report."""
    shadows = {names.ema_name(name): name for name in wanted if name.startswith("model.")}
    held = [shadow for shadow in shadows if shadow in source.infos]
    keeps = any(name.startswith(names.EMA) for name in wanted)
    if use_ema and not held:
        raise MismatchError(
            f"'{shown(source.path)}' has no EMA weights (model_ema.*); load it with use_ema=False"
        )
    if use_ema is None and held and keeps:
        report.notes.append("plain weights in the UNet, the file's EMA weights in its moving average")
        return
    if use_ema:
        for shadow in held:
            rename[shadow] = shadows[shadow]
            if shadows[shadow] in source.infos:
                report.ignored[shadows[shadow]] = "the EMA weights were chosen"
    else:
        report.ignored.update({shadow: "EMA weights, the plain ones were chosen" for shadow in held})
    if keeps:
        report.notes.append("the model's moving average was seeded from the loaded weights")
        for name in wanted:
            if name.startswith(names.EMA) and name in shadows:
                report.initialised[name] = "seeded from the loaded weights"
            elif name.startswith(names.EMA) and (use_ema is False or name not in source.infos):
                report.initialised[name] = COMPUTED
                if name in source.infos:
                    report.ignored[name] = UNUSED[name]


def account_vae(module: nn.Module, source: Weights, ignore_keys: tuple[str, ...] = ()) -> LoadReport:
    """Pair an autoencoder with a file that holds one, alone or among others.

    Raises:
        MismatchError: no VAE in the file, or tensors that do not pair.
    """
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    report = LoadReport(path=shown(source.path), family="VAE", notes=list(source.notes))
    diffusers = source.kind == "diffusers folder" or names.family_of(source.infos) == "VAE (diffusers)"
    rename: dict[str, str] = {}
    if diffusers:
        table = {theirs: ours for ours, theirs in names.vae_to_diffusers(wanted).items()}
        for name in source.infos:
            modern = names.modern_vae_name(name.removeprefix("vae/"))
            rename[name] = table.get(modern, name)
    elif any(name.startswith(names.VAE) for name in source.infos):
        rename = {n: n.removeprefix(names.VAE) for n in source.infos if n.startswith(names.VAE)}
        report.ignored = {n: "not part of the VAE" for n in source.infos if n not in rename}
    for name in source.infos:
        target = rename.get(name, name)
        if ignore_keys and target.startswith(ignore_keys):
            report.ignored[name] = "left out by ignore_keys"
        elif target not in wanted and target.startswith(("loss.", "model_ema.")):
            report.ignored[name] = "training state of the VAE"
    given = {rename.get(name, name) for name in source.infos if name not in report.ignored}
    if not given & wanted.keys():
        kind = names.REFUSED.get(names.family_of(source.infos), "a model without one")
        raise MismatchError(f"'{shown(source.path)}' holds no VAE that fits: it is {kind}")
    for name in wanted:
        if name in given:
            continue
        if name.startswith(("loss.", "model_ema.")) or (ignore_keys and name.startswith(ignore_keys)):
            report.initialised[name] = "keeps its own value"
    report.assigned = match(
        source.path,
        held=source.infos,
        wanted=wanted,
        rename=rename,
        ignored=report.ignored,
        initialised=report.initialised,
        linear_is_conv=diffusers,
    )
    return report


# --- values -------------------------------------------------------------------------------------------------------


def check_finite(path: str, name: str, values: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise NumericError if a weight is not finite, or would not be in dtype.

    The extremes decide: NaN passes through them, and casting keeps their order.
    """
    if not values.numel():
        return
    extremes = torch.stack(torch.aminmax(values.detach()))
    if not torch.isfinite(extremes).all():
        raise NumericError(
            f"'{shown(path)}' is damaged: '{shown(name)}' holds values that are not finite (NaN, infinity)"
        )
    if dtype is not None and not torch.isfinite(extremes.to(dtype)).all():
        raise NumericError(
            f"'{shown(path)}': '{shown(name)}' reaches {extremes.abs().max().item():.3g}, too large for "
            f"{str(dtype).removeprefix('torch.')}; load it as float32 or bfloat16"
        )


def _fill(
    state: dict[str, Tensor],
    model: nn.Module,
    report: LoadReport,
    source: Weights,
    device: torch.device,
    dtype: torch.dtype | None,
    prefix: str = "",
) -> None:
    """Read, check, cast and move every assigned tensor, one at a time."""
    own = model.state_dict()
    parameters = {name for name, _ in model.named_parameters()}
    wanted = {
        name: (dtype or torch.float32) if prefix + target in parameters else own[prefix + target].dtype
        for name, target in report.assigned.items()
    }
    # What is copied once more anyway is read into the same memory over and over: fresh pages cost more than bytes.
    passing = [n for n in wanted if device.type != "cpu" or source.infos[n].dtype != wanted[n]]
    size = max((source.infos[name].nbytes for name in passing), default=0)
    scratch = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda" and size > 0)
    reused = set(passing)
    for name, target in report.assigned.items():
        like = own[prefix + target]
        values = source.read(name, scratch if name in reused else None).to(device)
        if like.dtype.is_floating_point:
            require_float(source.path, name, values.dtype)
            check_finite(source.path, name, values, wanted[name])
        elif values.dtype.is_floating_point:
            raise MismatchError(
                f"'{shown(source.path)}': '{shown(name)}' should be a whole number, not {values.dtype}"
            )
        # On the device before the cast: fewer bytes travel, and an accelerator casts faster.
        state[prefix + target] = values.to(wanted[name]).reshape(like.shape)


def _check_tables(model: nn.Module, report: LoadReport, source: Weights) -> None:
    """Hold the schedule and scale that a file states against those that the configuration gives."""
    own = model.state_dict()
    for name in [*names.SCHEDULE, "scale_factor"]:
        if name not in report.ignored or name not in source.infos:
            continue
        ours = own[name] if name in own else getattr(model, name, None)
        theirs = source.read(name)
        if ours is None:
            continue
        ours = torch.as_tensor(ours, dtype=torch.float64)
        if ours.numel() != theirs.numel():
            raise MismatchError(
                f"'{shown(source.path)}': its {name} has {theirs.numel()} values, the configuration's {ours.numel()}"
            )
        allowed = ROUNDING.get(theirs.dtype, 0.0) * (ours.abs() + 1e-3)
        far = (theirs.double().reshape(ours.shape) - ours).abs() > allowed
        if far.any():
            raise MismatchError(
                f"'{shown(source.path)}' was trained with another noise schedule or scale: its {name} differs from the "
                "configuration's; use the configuration that belongs to it"
            )


def _finish(model: nn.Module, state: dict[str, Tensor], report: LoadReport, device: torch.device) -> None:
    """Assign the gathered tensors, strictly; what the report calls initialised is computed or seeded here."""
    for name, value in model.state_dict().items():
        if name in state:
            continue
        if report.initialised.get(name, "").startswith("seeded"):
            continue
        assert not value.is_meta, f"{name} has no value"
        state[name] = value.to(device)
    shadows = {names.ema_name(name): name for name in state if name.startswith("model.")}
    for name, reason in report.initialised.items():
        if reason.startswith("seeded"):
            state[name] = state[shadows[name]].to(torch.float32, copy=True)
    model.load_state_dict(state, strict=True, assign=True)
    left = [name for name, value in [*model.named_parameters(), *model.named_buffers()] if value.is_meta]
    assert not left, f"{left[:3]} have no value"
    model.to(device)
    model.eval()


def _usable(device: str | torch.device) -> torch.device:
    """Check that a device is there before anything is read.

    Raises:
        UsageError: it is not; the message lists those that are.
    """
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
        return device
    except (RuntimeError, AssertionError) as error:
        there = ["cpu"]
        if torch.cuda.is_available():
            there += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        if torch.backends.mps.is_available():
            there.append("mps")
        raise UsageError(f"device '{shown(device)}' is not available; have: {', '.join(there)}") from error


@contextlib.contextmanager
def _memory_named(path: str | Path, model: nn.Module) -> Iterator[None]:
    """Turn an allocation that failed into a ResourceError with sizes."""
    try:
        yield
    except LdmError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search(
            "out of memory|can't allocate memory", str(error)
        ):
            raise
        need = sum(p.numel() * 4 for p in model.parameters()) / 2**30
        raise ResourceError(
            f"not enough memory to load '{shown(path)}': the model takes {need:.2f} GiB in float32; "
            "load it as float16 or bfloat16, or free some"
        ) from error
