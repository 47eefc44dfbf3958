"""T2I-Adapter's style adapter (arXiv:2302.08453): what a picture looks like, as tokens behind those of the prompt.

style = StyleAdapter("t2iadapter_style_sd14v1.pth", image="look.png", image_encoder="clip-vit-large-patch14")
sd.txt2img("a cat", adapters=[style])
"""

import copy
import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ldm.adapters.controls import CONTEXTS, ControlFile, check_span, filled, is_within, span_of
from ldm.adapters.ip_adapter_images import encode_images
from ldm.checkpoints import TensorInfo
from ldm.errors import MismatchError, UsageError, escaped, shown
from ldm.modules.attention import SpatialTransformer
from ldm.modules.encoders.style_tokens import StyleTokens
from ldm.modules.seams import Rank, StepInfo, Undo, wrap
from ldm.values import check_value

HEADS = 8  # of the published file, which no tensor says
MARK = "style_embedding"


class StyleAdapterFile(ControlFile):
    """A style adapter's file, as TencentARC names its tensors.

    Attributes:
        network: what turns CLIP's hidden states into tokens.
    """

    family = "T2I-Adapter"
    wanted = "a T2I-Adapter of style"

    def __init__(self, path: str | os.PathLike):
        super().__init__(path)
        try:
            self.network = assemble(self.tensors)
        except ValueError as error:
            raise self.misfit(f"one that is damaged, or of another kind: {error}") from None

    def own(self, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
        """As ControlFile.own; those that read a hint are refused."""
        found = super().own(infos)
        if MARK not in found:
            raise self.misfit("one that reads a hint; use it as T2IAdapter(file, hint)")
        return found


def assemble(tensors: Mapping[str, Tensor], heads: int = HEADS) -> StyleTokens:
    """Build the network that holds these tensors.

    Raises:
        ValueError: they do not go together; says why.
    """
    layers = {name.split(".")[1] for name in tensors if name.startswith("transformer_layes.")}
    try:
        _, num_tokens, width = tensors[MARK].shape
        context_dim = tensors["proj"].shape[1]
    except (KeyError, ValueError, IndexError):
        raise ValueError("there is no style_embedding of three dimensions with a proj of two") from None
    if width % heads:
        raise ValueError(f"its width of {width} is no multiple of {heads} heads")

    def build() -> StyleTokens:
        return StyleTokens(width, context_dim, heads, len(layers), num_tokens)

    with torch.device("meta"):
        wanted = {name: tuple(one.shape) for name, one in build().state_dict().items()}
    given = {name: tuple(one.shape) for name, one in tensors.items()}
    if odd := sorted({name for name, _ in wanted.items() ^ given.items()}):
        raise ValueError(f"{len(odd)} of its tensors differ, {shown(odd[0])}")
    return filled(build, tensors)


@dataclass(frozen=True, eq=False)
class StyleAdapter:
    """A style adapter with its picture, for some of the steps. Several stand side by side, also beside other adapters.

    Rows without the prompt's condition get their own last tokens once more, as TencentARC's samplers do, so that both
    halves of a guided batch have as many. A ControlNet sees the text's tokens alone.

    Args:
        file: path or StyleAdapterFile; a StyleAdapterFile from then on, which serves any number of them.
        states: of the picture: what CLIP's vision model has after its last layer, (1, tokens, width); for the published
            file ViT-L/14's (1, 257, 1024), transformers' last_hidden_state. In place of image.
        scale: of the tokens; 0 = none are added.
        start, end: share of the sampler's way, from noise (0) to picture (1): a step has it that lies wholly within.
        image: the picture, or its path, with image_encoder, from which the states are made.
        image_encoder: CLIP's vision model: its folder, one file, or the model; ViT-L/14 for the published file.

    Attributes:
        tokens: (1, num_tokens, context_dim), float32.

    Raises:
        UsageError: neither states nor image, or both; no image_encoder; a number that is not finite or out of range.
        MismatchError: states of another shape, as those of another vision model.
        Others: as StyleAdapterFile, load_encoder and images.open_image.
    """

    file: StyleAdapterFile | str | os.PathLike
    states: Tensor | None = None
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    _: KW_ONLY
    image: Any = None
    image_encoder: Any = None
    rank: ClassVar[Rank] = Rank.TOKENS

    def __post_init__(self) -> None:
        start, end = check_span(self.start, self.end)
        scale = float(check_value(self.scale, float, "scale"))
        file = self.file if isinstance(self.file, StyleAdapterFile) else StyleAdapterFile(self.file)
        states = _checked(file, self.states if self.image is None else self._encoded())
        with torch.no_grad():
            tokens = file.network.float()(states)
        digest = hashlib.sha256(states.contiguous().numpy().tobytes()).hexdigest()[:12]
        checked = {"file": file, "states": states, "scale": scale, "start": start, "end": end}
        checked |= {"image": None, "image_encoder": None}  # which have been read
        for name, value in (checked | {"tokens": tokens, "_hash": digest, "_step": None}).items():
            object.__setattr__(self, name, value)

    def _encoded(self) -> Tensor:
        if self.states is not None:
            raise UsageError("a StyleAdapter wants states= or image=, got both; leave one out")
        if self.image_encoder is None:
            raise UsageError(
                "a StyleAdapter with image= wants image_encoder=, CLIP's vision model (its folder or file; ViT-L/14 "
                "for the published style file); or give states="
            )
        return encode_images(self.image_encoder, [self.image], "last")[0]

    def describe(self) -> dict[str, Any]:
        """Say what goes into a picture's metadata: name, scale, image (a hash of its states), hash, sha256, ..."""
        found: dict[str, Any] = {"name": self.file.name, "scale": self.scale, "image": self._hash}
        whole = self.file.hashes[0]
        return {**found, **span_of(self), "hash": whole[:10], "sha256": whole}

    def begin(self) -> "StyleAdapter":
        """Return one for one run of a sampler, which stands at a step of its own."""
        return copy.copy(self)

    def check(self, unet: nn.Module) -> None:
        """Raise UsageError or MismatchError if it cannot be attached to a network."""
        transformers = [part for part in unet.modules() if isinstance(part, SpatialTransformer)]
        if not transformers:
            raise UsageError("a StyleAdapter needs a UNet with spatial transformers, and this one has none")
        width, mine = (
            transformers[0].transformer_blocks[0].attn2.to_k.in_features,
            self.file.network.context_dim,
        )
        if mine != width:
            whose = f" of {CONTEXTS[mine]}" if mine in CONTEXTS else ""
            raise self.file.misfit(f"one for a context{whose} {mine} wide; the model's is {width} wide")

    def at(self, step: StepInfo) -> None:
        """Learn where the sampler is."""
        object.__setattr__(self, "_step", step)

    def attach(self, network: nn.Module) -> Undo:
        """Put the tokens behind the text's; outside of its part of the steps, and at scale 0, nothing is attached."""
        self.check(network)
        if self.scale == 0 or not is_within(self._step, self.start, self.end):
            return lambda: None
        return wrap(network, _Styled(self))

    def join(self, context: Tensor) -> Tensor:
        """Put tokens behind a context (b, n, d), and its own last ones in the rows without the condition."""
        without = 0 if self._step is None else self._step.unconditional
        count = self.tokens.shape[1]
        # Of a shorter context the last token stands as often as is needed.
        last = torch.arange(context.shape[1] - count, context.shape[1]).clamp(min=0).to(context.device)
        mine = (self.scale * self.tokens).to(context).expand(len(context) - without, -1, -1)
        return torch.cat([context, torch.cat([context[:without, last], mine])], dim=1)


def _checked(file: StyleAdapterFile, states: Any) -> Tensor:
    """Return states as float32 on the CPU, or say what was wanted."""
    width = file.network.width
    if not isinstance(states, Tensor):
        raise UsageError(
            f"a StyleAdapter wants image= with image_encoder=, or states=, a tensor (1, tokens, {width}), CLIP's "
            f"last_hidden_state of the picture; got {'neither' if states is None else 'states=' + shown(states)}"
        )
    states = states.detach().float().cpu()
    if states.dim() != 3 or len(states) != 1 or states.shape[-1] != width or states.shape[1] == 0:
        raise MismatchError(
            f"states for '{escaped(file.path)}' should be of shape (1, tokens, {width}), got {tuple(states.shape)}; "
            "the published file reads CLIP ViT-L/14's"
        )
    if not torch.isfinite(states).all():
        raise UsageError("states should be finite, got NaN or infinity")
    return states


class _Styled:
    """A UNet's call with a picture's tokens in its context."""

    def __init__(self, adapter: StyleAdapter):
        self._adapter = adapter

    def __call__(
        self,
        proceed: Callable[..., Any],
        x: Tensor,
        timesteps: Any = None,
        context: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        return proceed(x, timesteps, self._adapter.join(context), *args, **kwargs)

    def state(self) -> tuple[str]:
        """Say what a captured graph depends on beside the context, which is an argument: nothing."""
        return ("StyleAdapter",)
