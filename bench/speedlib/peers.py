"""Peers beside diffusers, on the same weights: OpenVINO, and diffusers by torch.compile with frozen weights.

Both are asked for by --peers. OpenVINO is an extra of the bench alone (`pip install openvino`); nothing else needs it.
"""

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import AbsentError

HINTS = {"float32": "f32", "bfloat16": "bf16"}  # INFERENCE_PRECISION_HINT, by a row's dtype


class _Positional(nn.Module):
    """A network's call with its inputs by position, as a converter traces it."""

    def __init__(
        self, network: nn.Module, call: Callable[[Any, dict[str, Tensor]], Tensor], names: list[str]
    ):
        super().__init__()
        self.network, self.call, self.names = network, call, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(self.network, dict(zip(self.names, inputs, strict=True)))


def need_openvino() -> Any:
    """Import OpenVINO.

    Raises:
        AbsentError: it is not installed.
    """
    if importlib.util.find_spec("openvino") is None:
        raise AbsentError("OpenVINO is not installed; pip install openvino, or leave it out of --peers")
    import openvino

    return openvino


def openvino_call(
    network: nn.Module,
    call: Callable[[Any, dict[str, Tensor]], Tensor],
    inputs: dict[str, Tensor],
    dtype: str,
) -> tuple[Callable[[], Tensor], str]:
    """Convert a float32 network for inputs of these very sizes, and compile it for this processor.

    Args:
        call: gives the network's answer to inputs by name.
        dtype: what it shall compute in. OpenVINO takes it for a hint; weights and inputs stay float32 to the caller.

    Returns:
        what computes the answer, and OpenVINO's version.
    """
    openvino = need_openvino()
    names, values = list(inputs), [value.contiguous() for value in inputs.values()]
    traced = _Positional(network, call, names).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what tracing says of the networks' own checks of shapes
        model = openvino.convert_model(
            traced,
            example_input=tuple(values),
            input=[openvino.PartialShape(list(value.shape)) for value in values],
        )
    options = {
        "INFERENCE_PRECISION_HINT": HINTS[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
    }
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    arrays = [value.numpy() for value in values]

    def infer() -> Tensor:
        # The result lies in the request's own memory until the next call.
        return torch.from_numpy(request.infer(arrays, share_inputs=True, share_outputs=True)[0])

    return infer, openvino.__version__
