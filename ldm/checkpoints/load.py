"""From a file or folder to a model in evaluation mode, with every tensor accounted for."""

import contextlib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldm.checkpoints import names
from ldm.checkpoints.account import LoadReport, shown
from ldm.checkpoints.build import build_empty, collector_paused, open_model
from ldm.checkpoints.files import Weights, open_weights, require_float
from ldm.checkpoints.folders import FolderWeights
from ldm.checkpoints.pair import account_model, account_vae
from ldm.checkpoints.sampling import read_sampling
from ldm.errors import LdmError, MismatchError, NumericError, ResourceError, UsageError
from ldm.process.schedule import SCHEDULE_BUFFERS

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Relative difference that storing the schedule in these dtypes explains.
ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@collector_paused()
def load_latent_diffusion(
    path: str | Path,
    *,
    config: str | Path | Mapping[str, Any] | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    use_ema: bool | None = None,
    tokenizer: str | Path | None = None,
    vae: str | Path | None = None,
    vae_dtype: torch.dtype | None = None,
    disable_mmap: bool = False,
) -> tuple["LatentDiffusion", LoadReport]:
    """Load a latent diffusion model of the v1 family from a single file or a diffusers folder.

    The model is built without memory and given the file's tensors one by one, so that the peak is the model
    (and, for a pickle, the file).

    Args:
        path: .safetensors, .ckpt, or a diffusers folder.
        config: a YAML file, mapping or OmegaConf with CompVis's keys. None chooses Stable Diffusion v1 or its
            inpainting model from the shapes in the file; a folder brings its own. A section `sampling:` beside
            `model:` may advise how to paint with the model (ldm.checkpoints.sampling); the report holds it.
        device: where the model goes.
        dtype: of the parameters; None = float32, as CompVis's loader. Buffers keep their own.
        use_ema: the file's weights that the UNet gets. True: the moving average. False: the plain ones.
            None: the plain ones, and if the configuration keeps a moving average, that too, as CompVis does.
            A model that keeps an average and is not given one has it seeded from the loaded weights.
        tokenizer: folder or file of the tokenizer, if not the one that the text encoder finds.
        vae: a file or folder whose VAE replaces this file's.
        vae_dtype: of the first stage's parameters; None = dtype.
        disable_mmap: copy every weight. Otherwise weights that stay on the CPU in the file's own dtype stay in the
            system's cache of a safetensors file, where that is safe whatever becomes of the file (mapping.py).

    Returns:
        The model in evaluation mode, and the account of every tensor.

    Raises:
        AbsentError, FormatError, UnsafeFileError: the file cannot be had, read or trusted.
        MismatchError: another family, tensors that do not pair with the model's, or a wrong section `sampling:`.
        NumericError: weights that are not finite, or not any more in dtype.
        ResourceError: out of memory.
    """
    check_dtype(dtype)
    check_dtype(vae_dtype)
    vae_dtype = vae_dtype or dtype
    device = usable(device)
    with contextlib.ExitStack() as opened:
        source, family, settings = open_model(Path(path), config, opened)
        sampling = read_sampling(settings.get("sampling"))
        model = build_empty(settings, tokenizer)
        report = account_model(model, source, family, use_ema, given_vae=vae)
        report.sampling = sampling
        state = {}
        with memory_named(path, model):
            if vae is not None:
                replacement = opened.enter_context(contextlib.closing(_open_vae(vae)))
                inner = account_vae(model.first_stage_model, replacement)
                fill(
                    state, model, inner, replacement, device, dtype, vae_dtype, disable_mmap, prefix=names.VAE
                )
                report.notes.append(inner.summary())
            _check_tables(model, report, source)
            fill(state, model, report, source, device, dtype, vae_dtype, disable_mmap)
            finish(model, state, report, device)
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
    with contextlib.closing(_open_vae(path)) as source, memory_named(path, module):
        report = account_vae(module, source, tuple(ignore_keys))
        state: dict[str, Tensor] = {}
        fill(state, module, report, source, weight.device, weight.dtype, weight.dtype)
        own = module.state_dict()
        module.load_state_dict({name: state.get(name, value) for name, value in own.items()})
    logger.info("%s", report.summary())
    return report


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


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise UsageError unless weights can be loaded as this, or None."""
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype should be one of {', '.join(map(str, DTYPES))}, got {dtype}")


def check_finite(path: str, name: str, values: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise NumericError if a weight is not finite, or would not be in dtype.

    A finite sum, which costs half as much, has finite terms; where it is not, or casting may overflow, the extremes
    decide: NaN passes through them, and casting keeps their order.
    """
    narrower = dtype is not None and torch.finfo(dtype).max < torch.finfo(values.dtype).max
    if not values.numel() or (not narrower and torch.isfinite(values.detach().sum())):
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


def fill(
    state: dict[str, Tensor],
    model: nn.Module,
    report: LoadReport,
    source: Weights,
    device: torch.device,
    dtype: torch.dtype | None,
    vae_dtype: torch.dtype | None,
    disable_mmap: bool = False,
    prefix: str = "",
) -> None:
    """Check, cast and move every assigned tensor: those that the file lends, and the others, read one at a time."""
    own = model.state_dict()
    parameters = {name for name, _ in model.named_parameters()}

    def kind(target: str) -> torch.dtype:
        if target not in parameters:
            return own[target].dtype
        return (vae_dtype if target.startswith(names.VAE) else dtype) or torch.float32

    wanted = {name: kind(prefix + target) for name, target in report.assigned.items()}
    for name in wanted:
        held = source.infos[name].dtype
        if wanted[name].is_floating_point:
            require_float(source.path, name, held)
        elif held.is_floating_point:
            raise MismatchError(
                f"'{shown(source.path)}': '{shown(name)}' should be a whole number, not {held}"
            )
    lent: dict[str, Tensor] = {}
    if device.type == "cpu" and not disable_mmap:
        lent = {name: values for name in wanted if (values := source.lend(name)) is not None}
    # One after the other, for between two checks that are apart the threads go to sleep.
    for name, values in lent.items():
        if wanted[name].is_floating_point:
            check_finite(source.path, name, values, wanted[name])
    # What is copied once more anyway is read into the same memory over and over: fresh pages cost more than bytes.
    passing = {
        name
        for name in wanted.keys() - lent.keys()
        if device.type != "cpu" or source.infos[name].dtype != wanted[name]
    }
    size = max((source.infos[name].nbytes for name in passing), default=0)
    scratch = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda" and size > 0)
    for name, target in report.assigned.items():
        if name in lent:
            values = lent.pop(name)
        else:
            values = source.read(name, scratch if name in passing else None).to(device)
            if wanted[name].is_floating_point:
                check_finite(source.path, name, values, wanted[name])
        # On the device before the cast: fewer bytes travel, and an accelerator casts faster.
        state[prefix + target] = values.to(wanted[name]).reshape(own[prefix + target].shape)


def _check_tables(model: nn.Module, report: LoadReport, source: Weights) -> None:
    """Hold the schedule and scale that a file states against those that the configuration gives."""
    own = model.state_dict()
    for name in [*SCHEDULE_BUFFERS, "scale_factor"]:
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


def finish(model: nn.Module, state: dict[str, Tensor], report: LoadReport, device: torch.device) -> None:
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
    if device.type != "cpu":  # where it was built
        model.to(device)
    model.eval()


def usable(device: str | torch.device) -> torch.device:
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
def memory_named(path: str | Path, model: nn.Module) -> Iterator[None]:
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
