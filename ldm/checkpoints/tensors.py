"""From a report to tensors in a model: read, checked, cast, moved to their device and assigned."""

import logging
import re
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from ldm.checkpoints import key_mapping
from ldm.checkpoints.files import Weights, require_float
from ldm.checkpoints.report import LoadReport, first_few
from ldm.errors import MismatchError, NumericError, UsageError, escaped
from ldm.helpers import pinned

logger = logging.getLogger(__name__)

READERS = 2  # threads on a CPU: copying out of the system's cache is bound by one core's speed
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Smaller ones may be all zeros by chance or by design.
MANY_VALUES = 1024
# What CompVis's networks set to zero before training, and what is the zero half of a LoRA or ControlNet.
STARTS_AT_ZERO = re.compile(
    r"(^|[./])(out\.2|conv_out|zero_convs\.\d+\.0|middle_block_out\.0|input_hint_block\.14|controlnet_\w+\.\w+)\.weight$"
    r"|\.(proj_out|out_layers\.3|conv2)\.weight$|lora_?(up|B)\b|\.hada_|\.lokr_|^model_ema\."
)


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


def choose_dtypes(
    model: nn.Module, dtype: torch.dtype | None, vae_dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Say in which dtype each tensor of a model's state dict is loaded.

    Args:
        dtype: of parameters; None = float32. Buffers keep the dtype that they were built with.
        vae_dtype: the same for the parameters of a first stage.
    """
    parameters = {name for name, _ in model.named_parameters()}

    def choose(name: str, built: Tensor) -> torch.dtype:
        if name not in parameters:
            return built.dtype
        return (vae_dtype if name.startswith(key_mapping.VAE) else dtype) or torch.float32

    return {name: choose(name, value) for name, value in model.state_dict().items()}


def load_tensors(
    model: nn.Module,
    report: LoadReport,
    source: Weights,
    device: torch.device,
    dtypes: Mapping[str, torch.dtype],
    prefix: str = "",
) -> dict[str, Tensor]:
    """Read, check, cast and move every tensor that a report assigns; on a CPU several at once.

    Args:
        model: whose shapes they get.
        dtypes: of the model's tensors, from `choose_dtypes`.
        prefix: of the model's names, where the report has those of one of its parts.

    Returns:
        tensors by the model's names.

    Raises:
        MismatchError: a number with a fraction where a whole one belongs, or the other way round.
        NumericError: values that are not finite, or not any more in their dtype.
    """
    targets = {name: prefix + target for name, target in report.assigned.items()}
    wanted = {name: dtypes[target] for name, target in targets.items()}
    _check_kinds(source, wanted)
    scales = {
        name: report.scales[target] for name, target in report.assigned.items() if target in report.scales
    }
    reader = _Reader(source, device, wanted, scales)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    state: dict[str, Tensor] = {}
    with ThreadPoolExecutor(READERS if device.type == "cpu" else 1) as threads:
        try:
            for target, values in zip(targets.values(), threads.map(reader.read, targets), strict=True):
                state[target] = values.reshape(shapes[target])
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    if reader.empty:
        empty = sorted(reader.empty, key=list(wanted).index)
        report.notes.append(f"{all_zeros(empty, len(wanted))}; get the file again if it was trained")
        logger.warning("'%s': %s", report.path, report.notes[-1])
    return state


def _check_kinds(source: Weights, wanted: Mapping[str, torch.dtype]) -> None:
    """Refuse whole numbers where the model has floating-point ones, and the other way round."""
    for name, dtype in wanted.items():
        in_file = source.infos[name].dtype
        if dtype.is_floating_point:
            require_float(source.path, name, in_file)
        elif in_file.is_floating_point:
            raise MismatchError(
                f"'{escaped(source.path)}': '{escaped(name)}' should be a whole number, not {in_file}"
            )


class _Reader:
    """Reads a file's tensors one by one onto a device, for several threads at once.

    Args:
        wanted: dtype of each tensor, by its name in the file.
        scales: names in the file of weights in 8 bits -> of the factors that they are multiplied by.

    Attributes:
        empty: the tensors read that are all zeros and should not be.
    """

    def __init__(
        self,
        source: Weights,
        device: torch.device,
        wanted: Mapping[str, torch.dtype],
        scales: Mapping[str, str],
    ):
        self.source, self.device, self.wanted, self.scales = source, device, wanted, scales
        # What is copied once more anyway is read into the same memory over and over: fresh pages cost more than bytes.
        infos = source.infos
        self.copied = {n for n, dtype in wanted.items() if device.type != "cpu" or infos[n].dtype != dtype}
        self.buffers = _ThreadBuffers(max((infos[n].nbytes for n in self.copied), default=0), device)
        self.empty: list[str] = []

    def read(self, name: str) -> Tensor:
        """Read one tensor, check its values, and give it in its dtype."""
        path, dtype = self.source.path, self.wanted[name]
        memory = self.buffers.get() if name in self.copied else None
        values = self.source.read(name, memory).to(self.device)
        if dtype.is_floating_point:
            check_finite(path, name, values, dtype)
            if is_empty(name, values):
                self.empty.append(name)
        if scale := self.scales.get(name):
            values = scaled(values, self.source.read(scale).to(self.device), path, name)
            check_finite(path, name, values, dtype)
        # On the device before the cast: fewer bytes travel, and an accelerator casts faster.
        return values.to(dtype)


class _ThreadBuffers(threading.local):
    """One buffer for each thread, which its tensors are read into; pinned memory where they go on to a GPU."""

    def __init__(self, nbytes: int, device: torch.device):
        self._nbytes, self._device = nbytes, device
        self._memory: Tensor | None = None

    def get(self) -> Tensor:
        """Return this thread's buffer, (nbytes,) uint8."""
        if self._memory is None:
            self._memory = torch.empty(self._nbytes, dtype=torch.uint8)
            if self._device.type == "cuda" and self._nbytes > 0:
                self._memory = pinned(self._memory)
        return self._memory


def scaled(values: Tensor, scale: Tensor, path: str, name: str) -> Tensor:
    """Multiply a weight in 8 bits by its factor, one for all or one for each row."""
    if scale.numel() not in (1, values.shape[0] if values.dim() else 1):
        raise MismatchError(
            f"'{escaped(path)}': the scale of '{escaped(name)}' has the shape {list(scale.shape)}; wanted one value, "
            f"or one for each of {values.shape[0]} rows"
        )
    return values.float() * scale.float().reshape(-1, *(1 for _ in values.shape[1:]))


def assign_state(
    model: nn.Module, state: dict[str, Tensor], report: LoadReport, device: torch.device
) -> None:
    """Give a model built on the meta device its tensors, and put it into evaluation mode.

    Args:
        state: what was loaded, by the model's names; the computed tables and the seeded averages are added.
    """
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
