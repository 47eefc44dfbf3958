"""A file whose keys are those of a model that is there already, as a training leaves it: CompVis's init_from_ckpt."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ldm.checkpoints.key_mapping import EMA
from ldm.checkpoints.matching import match
from ldm.checkpoints.report import LoadReport, TensorInfo
from ldm.process.schedule import SCHEDULE_BUFFERS

NETWORK = "model."
LEFT = "begins with one of ignore_keys"
NETWORK_ONLY = "only the network is loaded"


def match_states(
    path: str,
    tensors: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    *,
    family: str,
    keeps_average: bool,
    ignore_keys: Iterable[str] = (),
    only_model: bool = False,
) -> LoadReport:
    """Match a file's tensors with a diffusion model's of the same names, and report on every one of both.

    The schedule and the constant logvar may be absent, for they are computed; so may the averaged weights, which the
    caller seeds from the loaded ones.

    Args:
        wanted: the model's state dict.
        family: what the report calls the model.
        keeps_average: the model has a moving average.
        ignore_keys: beginnings of keys to leave out; what they would have set stays as it is.
        only_model: take the network alone and leave everything else of the file and of the model.

    Raises:
        MismatchError: a tensor of the file or of the model is left over, or has another shape.
    """
    skipped = tuple(ignore_keys)
    report = LoadReport(path=str(path), family=family)
    for name in tensors:
        if skipped and name.startswith(skipped):
            report.ignored[name] = LEFT
        elif only_model and not name.startswith(NETWORK):
            report.ignored[name] = NETWORK_ONLY
        elif name.endswith(".position_ids") and name not in wanted:
            report.ignored[name] = "constant"
        elif name.startswith(EMA) and not keeps_average:
            report.ignored[name] = "averaged weights; this model keeps none (use_ema is off)"
    given = {name for name in tensors if name not in report.ignored}
    has_average = any(name.startswith(EMA) for name in given)
    for name in (name for name in wanted if name not in given):
        table = name.removeprefix("low_scale_model.")  # an upscaler's has a schedule of its own
        if table in SCHEDULE_BUFFERS or name in ("logvar", "scale_factor"):
            report.initialised[name] = "computed from the configuration"
        elif name.startswith(EMA) and not has_average:
            report.initialised[name] = "seeded from the loaded network"
        elif only_model and not name.startswith(NETWORK):
            report.initialised[name] = NETWORK_ONLY
        elif skipped and name.startswith(skipped):
            report.initialised[name] = LEFT
    report.assigned = match(
        report.path,
        infos={name: TensorInfo(tuple(value.shape), value.dtype) for name, value in tensors.items()},
        wanted={name: tuple(value.shape) for name, value in wanted.items()},
        rename={},
        ignored=report.ignored,
        initialised=report.initialised,
    )
    return report


@torch.no_grad()
def assign(model: nn.Module, tensors: Mapping[str, Tensor], report: LoadReport) -> None:
    """Copy the tensors that a report assigns into the model's own, in place."""
    state = model.state_dict()
    for name, target in report.assigned.items():
        state[target].copy_(tensors[name].reshape(state[target].shape))
