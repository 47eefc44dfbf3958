"""Ways to edit an inverted picture: what happens on the way down from its noise, beside another prompt.

    sd.edit("cat.png", "a cat", "a dog")                                                # another prompt, no more
    sd.edit("cat.png", "a cat", "a dog", editor="prompt_to_prompt")                     # where the cat was looked for
    sd.edit("cat.png", "a cat", "a dog", editor=PromptToPrompt(self_replace_steps=0.8))
    sd.edit("cat.png", "a cat", "a dog", editor="diffedit")                             # within a mask found by itself
    sd.edit("cat.png", "a cat", "a dog", mask="mask.png", feather=8)                    # within a mask of yours

To add a way: a function of a Scene that gives latents, or a class of such, and a word in the table EDITORS.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.adapters import MutualSelfAttention, PlugAndPlay, PromptToPrompt
from ldm.adapters.attention_control import AttentionControl
from ldm.adapters.guidance import gaussian_blur
from ldm.adapters.use import told_of
from ldm.errors import UsageError, nearest, shown
from ldm.limits import SEED, real, whole
from ldm.models.diffusion.inversion import Context, Inversion, Network, Run, spelt
from ldm.models.diffusion.inversion_base import DDIM, sample_of, walk_down
from ldm.models.diffusion.levels import Level
from ldm.process.gaussian import q_sample

if TYPE_CHECKING:
    from ldm.models.diffusion.ddpm import LatentDiffusion

MOST_FEATHER = 256  # pixels
OUTLIERS = (
    3.0  # times its mean: what a difference of DiffEdit's is cut at before it is measured by its largest
)


@dataclass(frozen=True)
class Scene:
    """An inverted picture, and what is to become of it.

    Attributes:
        model: the LatentDiffusion.
        inversion: of one picture.
        source: the prompt of what it shows; edits: those of what it is to show.
        start_step: steps that are left out, 0 .. steps - 1.
        context: encodes prompts, a row for each, with the edit's guidance.
        network: makes the network of one way down, with these adapters besides `adapters`.
        adapters: of the edit.
        region: (1, 1, h, w) of latents, from 0, where the source's path is kept, to 1; None = everywhere 1.
    """

    model: LatentDiffusion
    inversion: Inversion
    source: str
    edits: Sequence[str]
    start_step: int
    context: Callable[[Sequence[str]], Context]
    network: Callable[..., Network]
    adapters: Sequence[Any] = ()
    region: Tensor | None = None

    def source_at(self, level: Level) -> Tensor:
        """Give the source's latents (1, c, h, w) at a level."""
        return sample_of(self.inversion.states[level.left])

    def keep(self, x: Tensor, level: Level) -> Tensor:
        """Give samples (b, c, h, w) at a level, with the source's outside the region."""
        if self.region is None:
            return x
        source = self.source_at(level).to(x.dtype)
        return source + self.region.to(x) * (x - source)


# --- ways -------------------------------------------------------------------------------------------


def swap(scene: Scene) -> Tensor:
    """Sample under the edits' prompts, and nothing else: (edits, c, h, w)."""
    return scene.inversion.sample(
        scene.context(scene.edits), scene.start_step, network=scene.network(), after=scene.keep
    )


@dataclass(frozen=True)
class Controlled:
    """Sample beside the source, which a control of attention looks at.

    The source's row goes the way that the inversion came (arXiv:2310.01506, direct inversion), so that what the control
    takes from it is of the picture itself, at any guidance.
    """

    control: AttentionControl

    def __call__(self, scene: Scene) -> Tensor:
        prompts = [scene.source, *scene.edits]
        told = told_of(scene.model, [*scene.adapters, self.control], prompts, [0] * len(prompts))
        network = scene.network(told[-1])

        def after(x: Tensor, level: Level) -> Tensor:
            x = torch.cat([scene.source_at(level).to(x.dtype), x[1:]])
            return scene.keep(network.model.change_samples(x), level)

        context = scene.context(prompts)
        return scene.inversion.sample(context, scene.start_step, network=network, after=after)[1:]


@dataclass(frozen=True)
class DiffEdit:
    """Sample within a mask that is found where the two prompts disagree (arXiv:2210.11427).

    Args:
        strength: how far the picture is noised to ask both, a share of the steps.
        draws: of noise, whose differences are averaged.
        threshold: from where on a cell is to be changed, as a share of the largest difference.
        seed: of the noise, drawn on the CPU.

    Raises:
        UsageError: a number out of range.
    """

    strength: float = 0.5
    draws: int = 10
    threshold: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        real("strength", self.strength, 0.01, 1)
        whole("draws", self.draws, 1, 1000)
        real("threshold", self.threshold, 0, 1)
        whole("seed", self.seed, *SEED)

    @torch.no_grad()
    def region(self, scene: Scene, edit: str) -> Tensor:
        """Find where a picture is to be changed for an edit: (1, 1, h, w) of 0 and 1."""
        inversion = scene.inversion
        steps = len(inversion)
        level = inversion.levels[steps - max(1, round(self.strength * steps))]
        drawing = torch.Generator().manual_seed(self.seed)
        noise = torch.randn(self.draws, *scene.inversion.x0.shape[1:], generator=drawing)
        x = q_sample(scene.inversion.x0, noise.to(scene.inversion.x0), alpha_bar=level.alpha_bar)
        network = scene.network()
        answers = [network(x, level, scene.context([prompt] * self.draws)) for prompt in (edit, scene.source)]
        difference = (answers[0] - answers[1]).abs().mean(dim=(0, 1))  # (h, w)
        difference = difference.clamp(max=OUTLIERS * difference.mean())
        return (difference > self.threshold * difference.max()).float()[None, None]

    def __call__(self, scene: Scene) -> Tensor:
        rows = []
        for edit in scene.edits:
            found = self.region(scene, edit).to(scene.inversion.x0)
            region = found if scene.region is None else found * scene.region.to(found)
            rows.append(swap(replace(scene, edits=[edit], region=region)))
        return torch.cat(rows)


@dataclass(frozen=True)
class AddNoise:
    """Add fresh noise to the picture and sample: img2img, or SDEdit (arXiv:2108.01073) where it is a sketch of strokes.

    Nothing of the inversion is used; it stands here to be compared.

    Args:
        seed: of the noise, drawn on the CPU.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        whole("seed", self.seed, *SEED)

    @torch.no_grad()
    def __call__(self, scene: Scene) -> Tensor:
        inversion = scene.inversion
        noise = torch.randn(scene.inversion.x0.shape, generator=torch.Generator().manual_seed(self.seed))
        x = q_sample(
            scene.inversion.x0,
            noise.to(scene.inversion.x0),
            alpha_bar=inversion.levels[scene.start_step].alpha_bar,
        )
        x = x.expand(len(scene.edits), *x.shape[1:])
        run = Run(scene.network(), scene.context(scene.edits), inversion.levels, x.dtype)
        return walk_down(run, DDIM(), x, scene.start_step, after=scene.keep)


@dataclass(frozen=True)
class DDS:
    """Delta denoising score (arXiv:2304.07090): move the latents by what the two prompts' predictions differ in.

    No noise is inverted; start_step has no say.

    Args:
        iterations: how many moves, each at a level drawn at random.
        rate: of a move; the authors' program has 0.1 * 2000 / (64 * 64) for latents of 64 x 64.
        seed: of levels and noise, drawn on the CPU.
    """

    iterations: int = 200
    rate: float = 0.1 * 2000 / (64 * 64)
    seed: int = 0

    LEVELS = (0.05, 0.95)  # of a model's, between which they are drawn

    def __post_init__(self) -> None:
        whole("iterations", self.iterations, 1, 100_000)
        real("rate", self.rate, 0, 10)
        whole("seed", self.seed, *SEED)

    @torch.no_grad()
    def __call__(self, scene: Scene) -> Tensor:
        x0 = scene.inversion.x0.expand(len(scene.edits), *scene.inversion.x0.shape[1:])
        wanted, shown_now = scene.context(scene.edits), scene.context([scene.source] * len(scene.edits))
        network, drawing = scene.network(), torch.Generator().manual_seed(self.seed)
        table = scene.model.alphas_cumprod.double().cpu()
        low, high = (int(share * len(table)) for share in self.LEVELS)
        z = x0
        for i in range(self.iterations):
            t = int(torch.randint(low, high, (), generator=drawing))
            level = Level(t, table[t], self.iterations - i, self.iterations)
            noise = torch.randn(x0.shape, generator=drawing).to(x0)
            noised = [q_sample(one, noise, alpha_bar=level.alpha_bar) for one in (z, x0)]
            z = z - self.rate * (network(noised[0], level, wanted) - network(noised[1], level, shown_now))
        return scene.keep(z, scene.inversion.levels[-1])


Editor = Callable[[Scene], Tensor]
EDITORS: dict[str, Editor | type] = {
    "swap": swap,
    "prompt_to_prompt": PromptToPrompt,
    "mutual_self_attention": MutualSelfAttention,
    "plug_and_play": PlugAndPlay,
    "diffedit": DiffEdit,
    "dds": DDS,
    "add_noise": AddNoise,
}
OTHER_NAMES = {
    "p2p": "prompt_to_prompt",
    "masactrl": "mutual_self_attention",
    "pnp": "plug_and_play",
    "delta_denoising_score": "dds",
    "img2img": "add_noise",
    "sdedit": "add_noise",
}


def resolve_editor(given: str | AttentionControl | Editor, **options: Any) -> Editor:
    """Give a way to edit by its name, with its options; a control of attention, or what is one already.

    Raises:
        UsageError: an unknown name or option, a value out of range, or nothing of the kind.
    """
    is_control = isinstance(given, AttentionControl)
    if is_control or (callable(given) and not isinstance(given, type)):
        if options:
            raise UsageError(
                f"an editor that is made takes no further options, got {', '.join(sorted(options))}"
            )
        return Controlled(given) if is_control else given
    name = spelt(given)
    name = OTHER_NAMES.get(name, name)
    if name not in EDITORS:
        near = nearest(name, [*EDITORS, *OTHER_NAMES])
        hint = f" (did you mean {near}?)" if near else ""
        raise UsageError(
            f"editor must be one of {', '.join(EDITORS)}, or such as PromptToPrompt(...); got {shown(given)}{hint}"
        )
    kind = EDITORS[name]
    known = list(inspect.signature(kind).parameters) if isinstance(kind, type) else []
    if unknown := sorted(options.keys() - set(known)):
        near = nearest(unknown[0], known)
        hint = f" (did you mean {near}?)" if near else ""
        raise UsageError(
            f"the editor {name} has no option {', '.join(unknown)[:100]}{hint}; it has {', '.join(known) or 'none'}"
        )
    made = kind(**options) if isinstance(kind, type) else kind
    return Controlled(made) if isinstance(made, AttentionControl) else made


# --- a mask in pixels -------------------------------------------------------------------------------


def feathered(mask: Tensor, feather: float) -> Tensor:
    """Soften the edge of a mask (1, 1, height, width) of 0 and 1 over so many pixels to each side.

    Raises:
        UsageError: feather is no number from 0 to 256.
    """
    feather = real("feather", feather, 0, MOST_FEATHER)
    return mask if feather == 0 else gaussian_blur(mask, feather / 2)


def region_of(mask: Tensor, f: int) -> Tensor:
    """Bring a mask (1, 1, height, width) to latent cells, f pixels a side: the share of each that is marked."""
    return F.avg_pool2d(mask, f)
