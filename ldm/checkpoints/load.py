"""From a file or folder to a model in evaluation mode, with every tensor accounted for."""

import contextlib
import logging
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints import key_mapping
from ldm.checkpoints.build import collector_paused, follow_hub, open_file, pair_file
from ldm.checkpoints.files import Weights, require_float
from ldm.checkpoints.folders import FolderWeights
from ldm.checkpoints.matching import LEFT_OUT, account_vae, check_patterns
from ldm.checkpoints.report import LoadReport, first_few
from ldm.errors import (
    MismatchError,
    NumericError,
    ResourceError,
    UsageError,
    escaped,
    is_out_of_memory,
    refuse_elsewhere,
)
from ldm.helpers import count_params, pinned
from ldm.process.schedule import SCHEDULE_BUFFERS

logger = logging.getLogger(__name__)

READERS = 2  # threads on a CPU: copying out of the system's cache is bound by one core's speed
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Relative difference that storing the schedule in these dtypes explains.
ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}

# Smaller ones may be all zeros by chance or by design.
MANY_VALUES = 1024
# What CompVis's networks set to zero before training, and what is the zero half of a LoRA or ControlNet.
STARTS_AT_ZERO = re.compile(
    r"(^|[./])(out\.2|conv_out|zero_convs\.\d+\.0|middle_block_out\.0|input_hint_block\.14|controlnet_\w+\.\w+)\.weight$"
    r"|\.(proj_out|out_layers\.3|conv2)\.weight$|lora_?(up|B)\b|\.hada_|\.lokr_|^model_ema\."
)


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
    ignore: str | Iterable[str] = (),
    source: Weights | None = None,
) -> tuple[nn.Module, LoadReport]:
    """Load a latent diffusion model of the v1 family from a single file or a diffusers folder.

    The model is built without memory and given the file's tensors one by one, so that the peak is the model.

    Args:
        path: .safetensors, .ckpt, a diffusers folder, or a model's folder in the hub's cache.
        config: a YAML file, mapping or OmegaConf with CompVis's keys. None takes the YAML file beside the weights,
            of the same name or called config.yaml; without one, Stable Diffusion v1 or its inpainting model by the
            shapes in the file. A folder brings its own. A section `sampling:` beside `model:` may advise how to
            paint with the model (ldm.checkpoints.sampling); the report holds it.
        device: where the model goes.
        dtype: of the parameters; None = float32, as CompVis's loader. Buffers keep their own.
        use_ema: the file's weights that the UNet gets. True: the moving average. False: the plain ones.
            None: the plain ones, and if the configuration keeps a moving average, that too, as CompVis does; of a
            file that holds its UNet as an average only, the average.
            A model that keeps an average and is not given one has it seeded from the loaded weights.
        tokenizer: folder or file of the tokenizer, if not the one that the text encoder finds.
        vae: a file or folder whose VAE replaces this file's.
        vae_dtype: of the first stage's parameters; None = dtype.
        ignore: names, beginnings of names or shell patterns ("loss.*") of tensors in the file to leave out.
        source: the file `path`, opened by open_weights; whoever opened it closes it. None opens it here.

    What the file says of itself (a `v_pred` or `ztsnr` marker, or the trainers' metadata for them) is heeded where
    the configuration is silent.

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
    patterns = check_patterns(ignore)
    device = usable(device)
    refuse_elsewhere("weight file", path)
    refuse_elsewhere("VAE", vae)
    refuse_elsewhere("tokenizer", tokenizer)
    with memory_named(path), contextlib.ExitStack() as opened:
        model, report, source = pair_file(
            Path(path),
            config,
            opened,
            use_ema=use_ema,
            tokenizer=tokenizer,
            vae=vae,
            ignore=patterns,
            source=source,
        )
        state: dict[str, Tensor] = {}
        with memory_named(path, model):
            if vae is not None:
                replacement = opened.enter_context(contextlib.closing(_open_vae(vae)))
                inner = account_vae(model.first_stage_model, replacement)
                fill(state, model, inner, replacement, device, dtype, vae_dtype, prefix=key_mapping.VAE)
                report.notes.append(inner.summary())
            _check_tables(model, report, source)
            fill(state, model, report, source, device, dtype, vae_dtype)
            finish(model, state, report, device)
    logger.info("%s", report.summary())
    return model, report


def load_vae(
    model: nn.Module,
    path: str | Path,
    *,
    ignore: str | Iterable[str] = (),
    ignore_keys: str | Iterable[str] = (),
) -> LoadReport:
    """Load a VAE into an autoencoder, or into the first stage of a latent diffusion model, in place.

    Args:
        model: AutoencoderKL (or VQModel), or a model with `first_stage_model`; device and dtype stay.
        path: a VAE file (CompVis's names, with or without "first_stage_model.", or diffusers'), a full model
            (the rest of it is ignored), or a diffusers folder.
        ignore: as for load_latent_diffusion; what they would have set stays as it is.
        ignore_keys: CompVis's word for ignore; both are heeded.

    Raises:
        MismatchError: a tensor is missing, unexpected or misshapen; nothing has been changed then.
        As load_latent_diffusion otherwise.
    """
    patterns = check_patterns(ignore) + check_patterns(ignore_keys)
    module = getattr(model, "first_stage_model", model)
    weight = next(module.parameters())
    refuse_elsewhere("VAE", path)
    with contextlib.closing(_open_vae(path)) as source, memory_named(path, module):
        report = account_vae(module, source, patterns)
        state: dict[str, Tensor] = {}
        fill(state, module, report, source, weight.device, weight.dtype, weight.dtype)
        own = module.state_dict()
        module.load_state_dict({name: state.get(name, value) for name, value in own.items()})
    logger.info("%s", report.summary())
    return report


def _open_vae(path: str | Path) -> Weights:
    path = follow_hub(Path(path))
    if (path / "vae").is_dir():
        return FolderWeights(path, ("vae",))
    if (path / "config.json").is_file():
        return FolderWeights(path.parent, (path.name,)) if path.name == "vae" else _VaeFolder(path)
    return open_file(path)


class _VaeFolder(FolderWeights):
    """A diffusers VAE folder under a name of its own."""

    def __init__(self, path: Path):
        super().__init__(path, ())
        self._add("vae/", path, "diffusion_pytorch_model")


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raise UsageError unless weights can be loaded as this, or None."""
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype should be one of {', '.join(map(str, DTYPES))}, got {dtype}")


def is_finite(values: Tensor) -> bool:
    """Tell whether all values are finite. A finite sum, which costs half as much, has finite terms."""
    values = _computable(values.detach())
    if not values.numel() or torch.isfinite(values.sum()):
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(values))).all())


def is_empty(name: str, values: Tensor) -> bool:
    """Tell whether a weight is all zeros where a trained network has none, as a download that stopped leaves it."""
    if values.dim() < 2 or values.numel() < MANY_VALUES or STARTS_AT_ZERO.search(name):
        return False
    values = values.detach().contiguous().view(torch.uint8).reshape(-1)
    return not values[:MANY_VALUES].any() and not values.any()  # few are looked at more than briefly


def all_zeros(empty: list[str], count: int) -> str:
    """Say which weights are empty, of how many."""
    return f"{len(empty)} of {count} tensors are all zeros ({first_few(empty)}), as after a download that stopped"


def _computable(values: Tensor) -> Tensor:
    """Widen values in 8 bits, for which torch has no arithmetic."""
    return values.float() if values.dtype.itemsize == 1 else values


def check_finite(path: str, name: str, values: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raise NumericError if a weight is not finite, or would not be in dtype.

    Where casting may overflow, the extremes decide: casting keeps their order.
    """
    if not is_finite(values):
        raise NumericError(
            f"'{escaped(path)}' is damaged: '{escaped(name)}' holds values that are not finite (NaN, infinity)"
        )
    if dtype is None or not values.numel() or torch.finfo(dtype).max >= torch.finfo(values.dtype).max:
        return
    extremes = torch.stack(torch.aminmax(values.detach()))
    if not torch.isfinite(extremes.to(dtype)).all():
        raise NumericError(
            f"'{escaped(path)}': '{escaped(name)}' reaches {extremes.abs().max().item():.3g}, too large for "
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
    prefix: str = "",
) -> None:
    """Read, check, cast and move every assigned tensor; on a CPU several at once."""
    own = model.state_dict()
    parameters = {name for name, _ in model.named_parameters()}

    def kind(target: str) -> torch.dtype:
        if target not in parameters:
            return own[target].dtype
        return (vae_dtype if target.startswith(key_mapping.VAE) else dtype) or torch.float32

    wanted = {name: kind(prefix + target) for name, target in report.assigned.items()}
    for name in wanted:
        held = source.infos[name].dtype
        if wanted[name].is_floating_point:
            require_float(source.path, name, held)
        elif held.is_floating_point:
            raise MismatchError(
                f"'{escaped(source.path)}': '{escaped(name)}' should be a whole number, not {held}"
            )
    # What is copied once more anyway is read into the same memory over and over: fresh pages cost more than bytes.
    passing = {name for name in wanted if device.type != "cpu" or source.infos[name].dtype != wanted[name]}
    scratches = _Scratches(max((source.infos[name].nbytes for name in passing), default=0), device)
    empty: list[str] = []

    def take(name: str) -> Tensor:
        values = source.read(name, scratches.own() if name in passing else None).to(device)
        if wanted[name].is_floating_point:
            check_finite(source.path, name, values, wanted[name])
            if is_empty(name, values):
                empty.append(name)
        if scale := report.scales.get(report.assigned[name]):
            values = _scaled(values, source.read(scale).to(device), source.path, name)
            check_finite(source.path, name, values, wanted[name])
        # On the device before the cast: fewer bytes travel, and an accelerator casts faster.
        return values.to(wanted[name])

    with ThreadPoolExecutor(READERS if device.type == "cpu" else 1) as readers:
        try:
            for target, values in zip(
                report.assigned.values(), readers.map(take, report.assigned), strict=True
            ):
                state[prefix + target] = values.reshape(own[prefix + target].shape)
        except BaseException:
            readers.shutdown(wait=False, cancel_futures=True)
            raise
    if empty:
        empty.sort(key=list(wanted).index)
        report.notes.append(f"{all_zeros(empty, len(wanted))}; get the file again if it was trained")
        logger.warning("'%s': %s", report.path, report.notes[-1])


class _Scratches(threading.local):
    """Memory for each thread that its tensors pass through, page-locked on the way to a GPU."""

    def __init__(self, nbytes: int, device: torch.device):
        self._nbytes, self._device = nbytes, device
        self._memory: Tensor | None = None

    def own(self) -> Tensor:
        """Give this thread's memory (nbytes,)."""
        if self._memory is None:
            self._memory = torch.empty(self._nbytes, dtype=torch.uint8)
            if self._device.type == "cuda" and self._nbytes > 0:
                self._memory = pinned(self._memory)
        return self._memory


def _scaled(values: Tensor, scale: Tensor, path: str, name: str) -> Tensor:
    """Multiply a weight in 8 bits by its factor, one for all or one for each row."""
    if scale.numel() not in (1, values.shape[0] if values.dim() else 1):
        raise MismatchError(
            f"'{escaped(path)}': the scale of '{escaped(name)}' has the shape {list(scale.shape)}; wanted one value, "
            f"or one for each of {values.shape[0]} rows"
        )
    return values.float() * scale.float().reshape(-1, *(1 for _ in values.shape[1:]))


def _check_tables(model: nn.Module, report: LoadReport, source: Weights) -> None:
    """Hold the schedule and scale that a file states against those that the configuration gives."""
    own = model.state_dict()
    # A file that says to have no signal at its last level may hold the tables of before that was given to it.
    tables = () if getattr(model, "rescale_betas_zero_snr", False) else SCHEDULE_BUFFERS
    for name in [*tables, "scale_factor"]:
        if report.ignored.get(name, LEFT_OUT) == LEFT_OUT or name not in source.infos:
            continue
        ours = own[name] if name in own else getattr(model, name, None)
        theirs = source.read(name)
        if ours is None:
            continue
        if theirs.dtype.itemsize == 1:  # 8 bits say too little of a schedule to hold it against another
            continue
        ours = torch.as_tensor(ours, dtype=torch.float64)
        if ours.numel() != theirs.numel():
            raise MismatchError(
                f"'{escaped(source.path)}': its {name} has {theirs.numel()} values, the configuration's {ours.numel()}"
            )
        allowed = ROUNDING.get(theirs.dtype, 0.0) * (ours.abs() + 1e-3)
        far = (theirs.double().reshape(ours.shape) - ours).abs() > allowed
        if far.any():
            raise MismatchError(
                f"'{escaped(source.path)}' was trained with another noise schedule or scale: its {name} "
                "differs from the "
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
    shadows = {key_mapping.ema_name(name): name for name in state if name.startswith("model.")}
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
        raise UsageError(f"device '{escaped(device)}' is not available; have: {', '.join(there)}") from error


@contextlib.contextmanager
def memory_named(path: str | Path, model: nn.Module | None = None) -> Iterator[None]:
    """Turn an allocation that failed into a ResourceError, with the size of the model where it is known."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        need = (
            "" if model is None else f": the model takes {count_params(model) * 4 / 2**30:.2f} GiB in float32"
        )
        raise ResourceError(
            f"not enough memory to load '{escaped(path)}'{need}; load it as float16 or bfloat16, or free some"
        ) from error
