"""A moving average of a model's weights, with CompVis's names for the buffers."""

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import MismatchError, UsageError
from ldm.modules.seams import Change, Rank, StepInfo, attached, states_of


class LitEma(nn.Module):
    """Keep an exponential moving average of every trainable parameter of a model.

    The average is kept in float32 (or the parameter's own dtype, if that is wider): a half-precision average
    would swallow updates of a ten-thousandth. Its buffers are named like the parameters with all dots removed, as
    checkpoints have them (`model_ema.diffusion_modelinput_blocks00weight`).

    Args:
        model: whose parameters are averaged.
        decay: share of the average that one update keeps, in [0, 1].
        use_num_upates: CompVis's spelling; warm up with min(decay, (1 + n) / (10 + n)) at update n.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, use_num_upates: bool = True):
        super().__init__()
        if not 0.0 <= decay <= 1.0:
            raise UsageError(f"decay should lie in [0, 1], got {decay}")
        self.m_name2s_name: dict[str, str] = {}
        self._changes: dict[str, Change] = {}
        self._shadows: tuple[list[Tensor], Any] = (
            [],
            None,
        )  # that the changes were made of, and their states
        self.register_buffer("decay", torch.tensor(decay, dtype=torch.float32))
        self.register_buffer("num_updates", torch.tensor(0 if use_num_upates else -1, dtype=torch.int))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                shadow_name = name.replace(".", "")
                if shadow_name in self.m_name2s_name.values():
                    raise MismatchError(
                        f"two parameters become '{shadow_name}' without dots, one of them '{name}'"
                    )
                self.m_name2s_name[name] = shadow_name
                wide = torch.promote_types(parameter.dtype, torch.float32)
                self.register_buffer(shadow_name, parameter.detach().to(wide, copy=True))
        self.collected_params: list[Tensor] = []

    def reset_num_updates(self) -> None:
        """Start the warm-up of the decay again."""
        self.num_updates.zero_()

    def _apply(self, fn, recurse: bool = True):
        """Follow the model to another device, but keep float32 when the model goes to half precision."""

        def keep_wide(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrowed = moved.is_floating_point() and moved.dtype.itemsize < tensor.dtype.itemsize
            return tensor.to(moved.device) if narrowed else moved

        return super()._apply(keep_wide, recurse)

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """Take the model's present weights into the average."""
        decay = self.decay
        if self.num_updates >= 0:
            self.num_updates += 1
            decay = torch.minimum(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for name, parameter in model.named_parameters():
            if name in self.m_name2s_name:
                shadow = getattr(self, self.m_name2s_name[name])
                shadow.sub_((1.0 - decay) * (shadow - parameter.to(shadow.dtype)))

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the model's weights with the average."""
        for name, parameter in model.named_parameters():
            if name in self.m_name2s_name:
                parameter.copy_(getattr(self, self.m_name2s_name[name]))

    @torch.no_grad()
    def copy_from(self, model: nn.Module) -> None:
        """Overwrite the average with the model's weights, as after loading a file without an average."""
        for name, parameter in model.named_parameters():
            if name in self.m_name2s_name:
                getattr(self, self.m_name2s_name[name]).copy_(parameter)

    # --- as an attachment, of rank WEIGHTS ---

    rank = Rank.WEIGHTS

    def changes(self, network: nn.Module) -> dict[str, Change]:
        """Put the average in the place of each weight: itself where the dtype is its own, else a copy.

        Returns:
            the change of each parameter that is averaged, the same object until the average moves.
        """
        shadows = list(map(self._buffers.__getitem__, self.m_name2s_name.values()))
        states = states_of(shadows)
        known, of = self._shadows
        if of != states or not all(map(operator.is_, known, shadows)):
            self._changes = {}
            for name, shadow in zip(self.m_name2s_name, shadows, strict=True):
                whole = nn.Parameter(shadow, requires_grad=False)
                self._changes[name] = Change(whole.detach().to, whole)
            self._shadows = (shadows, states)
        return self._changes

    def at(self, step: StepInfo) -> None:
        """Do nothing: the average is the same at every step."""

    @contextmanager
    def scope(self, network: nn.Module) -> Iterator[None]:
        """Let a network compute with the averaged weights until the end of the block; its own objects come back."""
        with attached(network, self):
            yield

    def __getstate__(self) -> dict[str, Any]:  # a copy makes changes of its own average
        return {**vars(self), "_changes": {}, "_shadows": ([], None)}

    # --- by copying, as CompVis's callers do it ---

    def store(self, parameters) -> None:
        """Remember these parameters until restore()."""
        self.collected_params = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def restore(self, parameters) -> None:
        """Give the remembered values back to these parameters."""
        for kept, parameter in zip(self.collected_params, parameters, strict=True):
            parameter.copy_(kept)
        self.collected_params = []


def average_key(rate: float) -> str:
    """Name a rate as a key of a ModuleDict, which has no dots: 0_9999."""
    return repr(float(rate)).replace(".", "_")
