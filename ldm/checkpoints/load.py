"""From a file or folder to a model in evaluation mode, with every tensor accounted for."""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoints import key_mapping
from ldm.checkpoints.build import collector_paused, follow_hub, match_file, open_file
from ldm.checkpoints.files import Weights
from ldm.checkpoints.folders import FolderWeights
from ldm.checkpoints.matching import LEFT_OUT, check_patterns, match_vae
from ldm.checkpoints.report import LoadReport
from ldm.checkpoints.tensors import assign_state, check_dtype, choose_dtypes, load_tensors
from ldm.devices import pick_device
from ldm.errors import (
    MismatchError,
    ResourceError,
    escaped,
    is_out_of_memory,
    refuse_elsewhere,
)
from ldm.helpers import count_params
from ldm.process.schedule import SCHEDULE_BUFFERS

logger = logging.getLogger(__name__)

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
        The model in evaluation mode, and the report of every tensor.

    Raises:
        AbsentError, FormatError, UnsafeFileError: the file cannot be had, read or trusted.
        MismatchError: another family, tensors that do not match the model's, or a wrong section `sampling:`.
        NumericError: weights that are not finite, or not any more in dtype.
        ResourceError: out of memory.
    """
    check_dtype(dtype)
    check_dtype(vae_dtype)
    vae_dtype = vae_dtype or dtype
    patterns = check_patterns(ignore)
    device = pick_device(device)
    refuse_elsewhere("weight file", path)
    refuse_elsewhere("VAE", vae)
    refuse_elsewhere("tokenizer", tokenizer)
    with memory_named(path), contextlib.ExitStack() as opened:
        model, report, source = match_file(
            Path(path),
            config,
            opened,
            use_ema=use_ema,
            tokenizer=tokenizer,
            vae=vae,
            ignore=patterns,
            source=source,
        )
        dtypes = choose_dtypes(model, dtype, vae_dtype)
        state: dict[str, Tensor] = {}
        with memory_named(path, model):
            if vae is not None:
                replacement = opened.enter_context(contextlib.closing(open_vae(vae)))
                inner = match_vae(model.first_stage_model, replacement)
                state |= load_tensors(model, inner, replacement, device, dtypes, prefix=key_mapping.VAE)
                report.notes.append(inner.summary())
            _check_tables(model, report, source)
            state |= load_tensors(model, report, source, device, dtypes)
            assign_state(model, state, report, device)
    if vae is not None:
        model.first_stage_model.weights_file = Path(vae)  # which pictures name
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
    with contextlib.closing(open_vae(path)) as source, memory_named(path, module):
        report = match_vae(module, source, patterns)
        dtypes = choose_dtypes(module, weight.dtype, weight.dtype)
        state = load_tensors(module, report, source, weight.device, dtypes)
        before = module.state_dict()
        module.load_state_dict({name: state.get(name, value) for name, value in before.items()})
    module.weights_file = Path(path)  # which pictures name
    logger.info("%s", report.summary())
    return report


def open_vae(path: str | Path) -> Weights:
    """Open a file or folder that holds a VAE, alone or among others."""
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


def _check_tables(model: nn.Module, report: LoadReport, source: Weights) -> None:
    """Compare the schedule and scale that a file states with those of the configuration.

    Raises:
        MismatchError: they differ by more than rounding explains.
    """
    tensors = model.state_dict()
    # A file that says to have no signal at its last level may hold the tables of before that was given to it.
    tables = () if getattr(model, "rescale_betas_zero_snr", False) else SCHEDULE_BUFFERS
    for name in [*tables, "scale_factor"]:
        if report.ignored.get(name, LEFT_OUT) == LEFT_OUT or name not in source.infos:
            continue
        ours = tensors[name] if name in tensors else getattr(model, name, None)
        theirs = source.read(name)
        if ours is None:
            continue
        if theirs.dtype.itemsize == 1:  # too few digits to compare schedules
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
