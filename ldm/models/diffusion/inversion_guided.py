"""Inversions for sampling with guidance: the way up is taken without it, or keeps the noise of each step."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ldm.errors import UsageError, shown
from ldm.limits import MAX_SEED, choice, real, whole
from ldm.models.diffusion.inversion_base import (
    DDIM,
    Context,
    Inversion,
    Method,
    Run,
    fall,
    fine,
    rise,
    sample_of,
)
from ldm.models.diffusion.levels import Level
from ldm.process.gaussian import q_sample
from ldm.process.guidance import guide
from ldm.process.steps import ddim_std, ddim_step

# Of Denoiser: what a guided answer depends on beside its scale.
OF_GUIDANCE = ("guidance_rescale", "guidance_interval", "score_corrector", "known")


def check_plain_guidance(method: Method, run: Run) -> None:
    """Raise UsageError where a network guides by more than a scale, for a method that mixes its two answers itself."""
    network = run.network
    terms = getattr(getattr(network, "model", None), "guidance_terms", tuple)()
    given = [
        *(getattr(network, "options", {}).keys() & set(OF_GUIDANCE)),
        *(type(one).__name__ for one in terms),
    ]
    if given and run.context.guidance_scale != 1:
        raise UsageError(
            f"{method.name} guides by itself, by its scale alone; leave {', '.join(sorted(given)):.100} out, or take "
            "the inversion negative_prompt"
        )


@dataclass
class EditFriendly(Method):
    """Edit-friendly DDPM inversion (arXiv:2304.06140): every level is noised afresh, and each step's noise map kept.

    Eq. 6 and 7. What is kept is sigma_t z_t and not z_t, so that a last step without noise comes back exactly as well.
    Noise maps hold the picture's layout: start_step and a higher guidance_scale of the edit say how much of it stays.
    Samples are kept in float64, so that a network that computes in bfloat16 is asked the same on both ways.

    Options:
        eta: above 0 to 1: the variance of the steps, 1 as DDPM's.
        seed: of the noise, the same for every picture of a batch.
    """

    name = "edit_friendly"
    exact = True
    guided_up = True
    own_eta = 1.0

    _: KW_ONLY
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(f"seed of {self.name}", self.seed, 0, MAX_SEED)

    def accepts_eta(self, eta: float) -> bool:
        return 0 < eta <= 1

    def etas(self) -> str:
        return "must be above 0 and at most 1: it keeps the noise of each step"

    def begin(self, run: Run, x0: Tensor) -> tuple[Tensor, Tensor, torch.Generator]:
        return fine(x0), fine(x0), torch.Generator().manual_seed(self.seed)

    def up(self, run: Run, state: Any, here: Level, to: Level) -> tuple[Any, Tensor]:
        x, x0, generator = state
        noise = torch.randn(x0.shape[1:], generator=generator, dtype=run.dtype).to(x0).expand_as(x0)
        x_to = q_sample(x0, noise, alpha_bar=to.alpha_bar)
        return (x_to, x0, generator), x - self.mean(run, x_to, to, here)

    def resume(self, run: Run, state: Any, above: Any = None) -> Tensor:
        return sample_of(state)

    def down(self, run: Run, state: Tensor, here: Level, to: Level, kept: Tensor) -> Tensor:
        return self.mean(run, state, here, to) + kept

    def mean(self, run: Run, x: Tensor, here: Level, to: Level) -> Tensor:
        """Step down without the fresh noise."""
        std = ddim_std(here.alpha_bar, to.alpha_bar, self.eta)
        levels = {"alpha_bar_t": here.alpha_bar, "alpha_bar_prev": to.alpha_bar}
        return ddim_step(x, run.eps(x, here), std=std, noise=torch.zeros_like(x), **levels)[0]


@dataclass
class Unguided(DDIM):
    """DDIM inversion by the condition alone, whatever the guidance of the way down."""

    def up(self, run: Run, state: Tensor, here: Level, to: Level) -> tuple[Tensor, Any]:
        eps = run.eps(state, to, run.context.only(run.context.conditioning))
        return rise(state, eps, here, to), self.kept(run.context)

    def kept(self, context: Context) -> Any:
        """Give what a step remembers: what stands in for the unconditional condition."""
        return None

    def down(self, run: Run, state: Tensor, here: Level, to: Level, kept: Any) -> Tensor:
        context = run.context if kept is None else replace(run.context, unconditional=kept)
        return fall(state, run.eps(state, here, context), here, to)


@dataclass
class NegativePrompt(Unguided):
    """Negative-prompt inversion (arXiv:2305.16807): the source's own prompt takes the place of the empty one.

    What null-text inversion looks for, taken to be the condition itself, without optimising anything. Under its own
    prompt the guidance then cancels, and a picture comes back as by plain DDIM without guidance.
    """

    name = "negative_prompt"
    from_latents = False
    guided_up = True

    def kept(self, context: Context) -> Any:
        return context.conditioning


@dataclass
class Proximal(NegativePrompt):
    """Proximal negative-prompt inversion (ProxEdit, arXiv:2306.05414): what guidance changes little, it leaves.

    Options:
        quantile: 0 to 1, the share of a picture's values whose difference is dropped.
        prox: "l0" leaves the others as they are, "l1" shortens them by the threshold.
    """

    name = "proximal"

    _: KW_ONLY
    quantile: float = 0.7
    prox: str = "l0"

    def __post_init__(self) -> None:
        super().__post_init__()
        real("quantile of proximal", self.quantile, 0, 1)
        choice("prox of proximal", self.prox, ("l0", "l1"))

    def begin(self, run: Run, x0: Tensor) -> Tensor:
        check_plain_guidance(self, run)
        return x0

    def down(self, run: Run, state: Tensor, here: Level, to: Level, kept: Any) -> Tensor:
        context = run.context
        eps = run.eps(state, here, replace(context, unconditional=kept).only(context.conditioning))
        check_plain_guidance(self, run)  # of this step, and of another network than that of the way up
        if context.guidance_scale != 1:
            base = run.eps(state, here, replace(context, unconditional=kept).only(kept))
            eps = base + context.guidance_scale * self.shrink(eps - base)
        return fall(state, eps, here, to)

    def shrink(self, change: Tensor) -> Tensor:
        """Drop the small values of (b, ...): the proximal step of the penalty."""
        size = change.abs()
        size = size.to(torch.promote_types(size.dtype, torch.float32))  # quantile knows no half precision
        least = size.flatten(1).quantile(self.quantile, dim=1)
        least = least.reshape(-1, *(1 for _ in change.shape[1:]))
        kept = change if self.prox == "l0" else change.sign() * (size - least)
        return torch.where(size > least, kept, 0.0).to(change.dtype)


@dataclass
class NullText(Unguided):
    """Null-text inversion (arXiv:2211.09794): the unconditional features of each step are optimised to lead back.

    The way up is taken by the condition alone. Then, from the noisiest level down, Adam changes the unconditional
    features (b, n, d) until the guided step arrives where the way up was, Eq. 4; each step begins with those of the
    step before. Numbers as in the published code: learning rate 1e-2 (1 - i / 100) at step i, at most 10 iterations,
    until a picture's mean squared error is below 1e-5 + i 2e-5. Half precision is too coarse for it. `calls` counts
    forward passes; each iteration has a backward pass as well.

    Options:
        iterations: at most so many a step.
        learning_rate, early_stop: at the first step, as above.
    """

    name = "null_text"
    from_latents = False
    guided_up = True

    _: KW_ONLY
    iterations: int = 10
    learning_rate: float = 1e-2
    early_stop: float = 1e-5

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("iterations of null_text", self.iterations, 1, 1000)
        real("learning_rate of null_text", self.learning_rate, 0, 1)
        real("early_stop of null_text", self.early_stop, 0, 1)

    def begin(self, run: Run, x0: Tensor) -> Tensor:
        check_plain_guidance(self, run)
        return x0

    def finish(self, run: Run, inversion: Inversion) -> None:
        context = run.context
        if context.unconditional is None or context.guidance_scale == 1:
            return
        if not isinstance(context.unconditional, Tensor):
            raise UsageError(
                f"null_text optimises features (b, n, d), got {shown(type(context.unconditional).__name__)}; give a "
                "tensor as unconditional condition"
            )
        x, features = inversion.states[-1], context.unconditional
        for i, (here, to) in enumerate(pairwise(run.levels)):
            features = self.optimise(run, x, features, here, to, inversion.states[to.left], i)
            inversion.memory[to.left] = features
            x = self.down(run, x, here, to, features)

    def optimise(
        self, run: Run, x: Tensor, features: Tensor, here: Level, to: Level, target: Tensor, i: int
    ) -> Tensor:
        """Change the unconditional features of a step until it arrives at `target`."""
        context, scale = run.context, run.context.guidance_scale
        cond = run.eps(x, here, context.only(context.conditioning))
        check_plain_guidance(self, run)  # of this step
        features = features.detach().clone().requires_grad_()
        adam = torch.optim.Adam([features], lr=self.learning_rate * max(0.0, 1 - i / 100))
        done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for _ in range(self.iterations):
            before = features.detach().clone()
            with torch.enable_grad():
                uncond = run.eps(x, here, replace(context, unconditional=features).only(features))
                off = fall(x, guide(uncond, cond, scale), here, to) - target
                loss = off.square().flatten(1).mean(1)  # (b,)
                (features.grad,) = torch.autograd.grad(loss.sum(), [features])
            adam.step()
            with torch.no_grad():  # a picture that has arrived waits for the others
                features[done] = before[done]
            done = done | (loss.detach() < self.early_stop * (1 + 2 * i))
            if done.all():
                break
        return features.detach()
