"""A row of training: forward, backward and AdamW's step, by libraries that take turns at one set of weights."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.speedlib import models, process
from bench.speedlib.contestants import Contestant, Room, switches
from bench.speedlib.models import Geometry
from bench.speedlib.rows import OURS, PLAIN, Row
from bench.speedlib.timing import clocked
from ldm.checkpoints.key_mapping import UNET, unet_to_diffusers

LEARNING_RATE = 1e-6  # so small that rounds do not differ
LOSS_SCALE = {"float16": 1024.0}  # AdamW's step does not depend on it


class TrainingRow:
    """Contestants that train one set of weights, in turn: weights, AdamW's averages and gradients lie there once.

    Only so do two libraries fit into the memory that one of them needs. Who keeps weights in another layout has
    weights and averages of its own. In half precision the weights stay float32 and the forward pass runs
    under autocast.
    """

    def __init__(self, shape: Geometry, row: Row, device: torch.device, stack: ExitStack):
        self.shape, self.row, self.device, self.stack = shape, row, device, stack
        self.room = Room(device)
        self.weights = models.make_weights(shape, torch.float32, device, (UNET,))
        self.masters = {
            name.removeprefix(UNET): nn.Parameter(weight) for name, weight in self.weights.items()
        }
        self.optimizer = torch.optim.AdamW(self.masters.values(), lr=LEARNING_RATE)
        self.inputs = models.make_inputs(shape, "train", row.batch, torch.float32, device)
        self.nbytes = sum(weight.nbytes for weight in self.weights.values())
        # Gradients and two averages, and what the forward pass keeps.
        self.room.take(3 * self.nbytes + models.count_saved(shape, row.batch), "training")

    def build(self, name: str) -> Contestant:
        x, t, context = (self.inputs[key] for key in ("x", "t", "context"))
        if name not in PLAIN:
            self.room.take(4 * self.nbytes, name)
        if name in OURS:
            model = models.build_ours(self.shape, self.weights, self.device)
            if name == "ldm-kernels":
                process.use_kernels(model, self.row.compiled, self.stack)
            own = dict(model.model.diffusion_model.named_parameters())

            def predict() -> Tensor:
                return model.apply_model(x, t, context)
        else:
            unet = models.build_their_unet(self.shape, self.weights, self.device)
            if name == "diffusers-best":
                unet.to(memory_format=torch.channels_last)
                if self.row.compiled:
                    unet.compile()
            theirs = dict(unet.named_parameters())
            own = {ours: theirs[there] for ours, there in unet_to_diffusers(self.masters).items()}

            def predict() -> Tensor:
                return unet(x, t, context, return_dict=False)[0]

        return self._contestant(name, own, predict)

    def _contestant(
        self, name: str, own: dict[str, nn.Parameter], predict: Callable[[], Tensor]
    ) -> Contestant:
        dtype, scale = getattr(torch, self.row.dtype), LOSS_SCALE.get(self.row.dtype, 1.0)
        shared = all(own[key].data_ptr() == master.data_ptr() for key, master in self.masters.items())
        optimizer = self.optimizer if shared else torch.optim.AdamW(own.values(), lr=LEARNING_RATE)

        def backward() -> None:
            with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
                error = F.mse_loss(predict().float(), self.inputs["target"])
            (scale * error).backward()

        def step() -> None:
            backward()
            if shared:
                for key, master in self.masters.items():
                    master.grad, own[key].grad = own[key].grad, None
            optimizer.step()
            optimizer.zero_grad()

        def answer() -> Tensor:
            backward()
            first = own["input_blocks.0.0.weight"].grad  # the whole network lies behind it
            found = (first / scale).float().cpu().contiguous().clone()
            for parameter in own.values():
                parameter.grad = None
            return found

        def switched(what: Callable[[], Any]) -> Callable[[], Any]:
            def run() -> Any:
                with switches(name, self.row, self.device):
                    return what()

            return run

        return Contestant(switched(answer), switched(lambda: clocked(step, self.device)), switched(step))
