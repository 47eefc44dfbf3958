"""What every inversion is: how to begin at a clean sample, step up to noise, and step down again.

A method is one short class: `up` goes to the next noisier level, `down` back, by what `up` remembered. The walk, what
is kept of it and how well it did are here and the same for all. To add one: a dataclass of `Method` with a name, whose
fields are its options; then a word in the table METHODS of ldm.models.diffusion.inversion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ldm.errors import NumericError, UsageError, shown
from ldm.limits import is_real, whole
from ldm.models.diffusion.denoiser import Denoiser
from ldm.models.diffusion.levels import Level, alpha_bar_table, run_levels
from ldm.models.diffusion.samplers import SAMPLERS
from ldm.process.guidance import first_tensor
from ldm.process.schedule import LEAST_SIGNAL
from ldm.process.spacing import check_steps
from ldm.process.steps import ddim_inverse_step, ddim_step


@dataclass(frozen=True)
class Context:
    """What a network is asked under.

    Attributes:
        conditioning, unconditional: as apply_model takes them; unconditional None = nothing is guided.
        guidance_scale: weight of the condition; at 1 the unconditional pass is skipped.
    """

    conditioning: Any
    unconditional: Any = None
    guidance_scale: float = 1.0

    def only(self, condition: Any) -> Context:
        """Give the context of one unguided pass; the unconditional one is known to adapters by being that."""
        return replace(self, conditioning=condition, guidance_scale=1.0)


class Network:
    """A model as inversions see it: called with a sample (b, ...), its level and a context, it predicts the noise.

    Any function of these three does for most methods; a model is needed where samplers are run.

    Args:
        model: see ldm.models.diffusion.denoiser.
        options: of Denoiser, as guidance_rescale.

    Attributes:
        calls: how often the network was asked for each picture; a guided prediction asks twice.
    """

    def __init__(self, model: Any, **options: Any):
        self.model, self.options, self.calls = model, options, 0

    def at(self, level: Level, context: Context, images: int) -> None:
        """Tell a model that has `at_level` where the run is, before it predicts: what is attached to it may ask."""
        tell = getattr(self.model, "at_level", None)
        if tell is not None:
            tell(level, context, images)

    def denoiser(self, context: Context) -> Denoiser:
        """Give the model under a context, as samplers want it."""
        guided = {
            "unconditional_conditioning": context.unconditional,
            "guidance_scale": context.guidance_scale,
        }
        return _Counted(self, context.conditioning, **guided, **self.options)

    def __call__(self, x: Tensor, level: Level, context: Context) -> Tensor:
        """Predict the noise, after guidance, shaped like x."""
        self.at(level, context, len(x))
        return self.denoiser(context)(x, level.t, level.alpha_bar)[0]


class _Counted(Denoiser):
    """A denoiser whose network counts what it is asked."""

    def __init__(self, network: Network, conditioning: Any, **options: Any):
        super().__init__(network.model, conditioning, **options)
        self._network = network

    def _answer(
        self, x: Tensor, t: float | Tensor, alpha_bar: Tensor, both: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        self._network.calls += 1 if self.is_guided(t, at_scale_1=both) is False else 2
        return super()._answer(x, t, alpha_bar, both)


Predict = Callable[[Tensor, Level, Context], Tensor]


@dataclass(frozen=True)
class Run:
    """A walk up or down: the network, what it is asked under, and the levels.

    Attributes:
        levels: noisiest first; the last is the clean end, where left is 0.
        dtype: what the network is asked in; states may be kept in a finer one.
    """

    network: Predict
    context: Context
    levels: Sequence[Level]
    dtype: torch.dtype

    def eps(self, x: Tensor, level: Level, context: Context | None = None) -> Tensor:
        """Predict the noise of x (b, ...) at a level, under the run's context or another."""
        return self.network(x.to(self.dtype), level, self.context if context is None else context)

    def level(self, left: int) -> Level:
        """Give the level from which so many steps are left."""
        return self.levels[len(self.levels) - 1 - left]


@dataclass
class Method:
    """One way to invert.

    A state is what a step starts from: the sample (b, ...), or a tuple that begins with it.

    Options of every method:
        eta: fresh noise in each step, 0 to 1, where `accepts_eta` takes it; None = the method's own.

    Attributes:
        exact: a walk up and down comes back up to rounding, whatever the network.
        from_latents: a walk down may begin at latents that no walk up has left.
        guided_up: an edit's guidance belongs to its way up as well: noise stays noise under it, or is not made by it.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = False
    from_latents: ClassVar[bool] = False
    guided_up: ClassVar[bool] = False
    own_eta: ClassVar[float] = 0.0

    _: KW_ONLY
    eta: float | None = None

    def __post_init__(self) -> None:
        self.eta = self.own_eta if self.eta is None else self.eta
        if not is_real(self.eta, 0, 1) or not self.accepts_eta(self.eta):
            raise UsageError(f"eta of the inversion {self.name} {self.etas()}; got {shown(self.eta)}")

    def accepts_eta(self, eta: float) -> bool:
        """Tell whether so much fresh noise means something here."""
        return eta == 0

    def etas(self) -> str:
        """Say which eta is wanted, as an error does."""
        return (
            "must be 0: it follows a path without fresh noise ('edit_friendly' keeps the noise of each step)"
        )

    def plan(self, alpha_bar: np.ndarray, steps: int, spacing: str | Sequence[float] | None) -> list[Level]:
        """List the levels of a walk down, noisiest first: those of DDIM, the end the model's level 0."""
        floor = np.maximum(alpha_bar, LEAST_SIGNAL)  # a level without signal can be left by no step up
        own = SAMPLERS["ddim"].own_spacing(alpha_bar)
        return SAMPLERS["ddim"].plan(floor, steps, spacing=own if spacing is None else spacing)

    def begin(self, run: Run, x0: Tensor) -> Any:
        """Give the state of a clean sample."""
        return x0

    def up(self, run: Run, state: Any, here: Level, to: Level) -> tuple[Any, Any]:
        """Step to the next noisier level: (state there, what the step down needs to remember)."""
        raise NotImplementedError

    def finish(self, run: Run, inversion: Inversion) -> None:
        """Work the walk over once it has arrived, from its noisiest level down."""

    def resume(self, run: Run, state: Any, above: Any = None) -> Any:
        """Give the state that a walk down begins with, of those of the way up here and at the noisier level, if any."""
        return state

    def changed(self, state: Any, change: Callable[[Tensor], Tensor]) -> Any:
        """Change the sample of a state, on the way down."""
        return on_tensors(change, state)

    def down(self, run: Run, state: Any, here: Level, to: Level, kept: Any) -> Any:
        """Step to the next cleaner level, by what the step up remembered."""
        raise NotImplementedError


@dataclass
class DDIM(Method):
    """DDIM inversion, plain: Eq. 13 of arXiv:2010.02502 read backwards, with the noise predicted at the cleaner end.

    As in prompt-to-prompt the network is called with the level of the noisier end. Each step errs by what the noise
    changes along it, and guidance multiplies that: with it a picture does not come back.
    """

    name = "ddim"
    from_latents = True

    def up(self, run: Run, state: Tensor, here: Level, to: Level) -> tuple[Tensor, Any]:
        return rise(state, run.eps(state, to), here, to), None

    def down(self, run: Run, state: Tensor, here: Level, to: Level, kept: Any) -> Tensor:
        return fall(state, run.eps(state, here), here, to)


def rise(x: Tensor, eps: Tensor, here: Level, to: Level) -> Tensor:
    """Step to a noisier level by a noise (b, ...): DDIM's transfer."""
    return ddim_inverse_step(x, eps, alpha_bar_t=here.alpha_bar, alpha_bar_next=to.alpha_bar)


def fall(x: Tensor, eps: Tensor, here: Level, to: Level) -> Tensor:
    """Step to a cleaner level by a noise (b, ...): DDIM's transfer."""
    return ddim_step(x, eps, alpha_bar_t=here.alpha_bar, alpha_bar_prev=to.alpha_bar)[0]


@dataclass(eq=False)
class Inversion:
    """A clean sample walked up to noise, with all that is needed to walk down again; `inversion[-(s + 1)]` is the
    latents from which a run that leaves the first s steps out begins.

    Attributes:
        method: the object that made it.
        levels: noisiest first, the clean end last: those of the way up and of every way down.
        states: of the method, one for each level, the clean sample's first.
        memory: what each step up remembered, the first step's first.
        dtype: of the samples.
        context: what the network was asked under.
        calls: how often the network was asked on the way up, for each picture; the measuring not counted.
        reconstruction: (b, ...) the walk down under the same context; None until `measure`.
    """

    method: Method
    network: Predict = field(repr=False)
    context: Context = field(repr=False)
    levels: Sequence[Level] = field(repr=False)
    states: list[Any] = field(repr=False)
    memory: list[Any] = field(repr=False)
    dtype: torch.dtype = field(repr=False)
    calls: int = 0
    reconstruction: Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.states) - 1

    @property
    def shape(self) -> torch.Size:
        """That of `latents`: (steps, b, ...)."""
        return torch.Size((len(self), *self.x0.shape))

    def __getitem__(self, index: int) -> Tensor:
        return self.latents[index]

    @property
    def x0(self) -> Tensor:
        """The clean sample (b, ...)."""
        return sample_of(self.states[0]).to(self.dtype)

    @property
    def latents(self) -> Tensor:
        """(steps, b, ...) of every level above the clean end, the noisiest last."""
        return torch.stack([sample_of(state).to(self.dtype) for state in self.states[1:]])

    @property
    def error(self) -> Tensor | None:
        """(b,) root mean square of what the reconstruction is off by; None until `measure`."""
        if self.reconstruction is None:
            return None
        return (self.reconstruction - self.x0).double().flatten(1).square().mean(1).sqrt()

    def measure(self) -> Tensor:
        """Walk down under the same context, and give the error (b,)."""
        if self.reconstruction is None:
            self.reconstruction = self.sample()
        return self.error

    @torch.no_grad()
    def sample(
        self,
        context: Context | None = None,
        start_step: int = 0,
        *,
        network: Predict | None = None,
        after: Callable[[Tensor, Level], Tensor] | None = None,
    ) -> Tensor:
        """Walk down, under another context or the same: (b, ...) clean samples.

        Args:
            context: for as many rows as the inversion has, or for more where it has one: several edits of a picture.
            start_step: steps to leave out: 0 begins at the noisiest level, with more of them less is changed.
            network: the same model with something else attached; None = the inversion's.
            after: changes the sample after each step: is called with it and its level.

        Raises:
            UsageError: start_step outside 0 .. steps - 1, or a context for another number of rows.
            NumericError: the result is not finite.
        """
        steps = len(self)
        whole("start_step", start_step, 0, steps - 1)
        context = self.context if context is None else context
        run = Run(self.network if network is None else network, context, self.levels, self.dtype)
        rows = len(self.x0)
        given = first_tensor(context.conditioning)
        wanted = rows if given is None or given.dim() == 0 else len(given)
        if rows != wanted and rows != 1:
            raise UsageError(
                f"the context is for {wanted} pictures, but {rows} were inverted; give one for each"
            )

        def spread(thing: Any) -> Any:
            return thing if rows == wanted else on_tensors(lambda t: t.expand(wanted, *t.shape[1:]), thing)

        left = steps - start_step
        above = spread(self.states[left + 1]) if start_step else None
        state = self.method.resume(run, spread(self.states[left]), above)
        return walk_down(run, self.method, state, start_step, [spread(one) for one in self.memory], after)


@torch.no_grad()
def walk_up(
    network: Predict,
    method: Method,
    x0: Tensor,
    context: Context,
    levels: Sequence[Level],
    *,
    measure: bool = True,
) -> Inversion:
    """Invert x0 (b, ...) over levels, noisiest first, by a method; see `Inversion`.

    Args:
        measure: walk down again as well, and so tell the error.

    Raises:
        NumericError: the latents are not finite.
    """
    run = Run(network, context, levels, x0.dtype)
    before = getattr(network, "calls", 0)
    state = method.begin(run, x0)
    states, memory = [state], []

    def step(state: Any, here: Level, to: Level) -> tuple[Any, Tensor]:
        state, kept = method.up(run, state, here, to)
        memory.append(kept)
        return state, sample_of(state)

    for done in run_levels(levels[::-1], state, step):
        states.append(done.x_t)
    finite(sample_of(states[-1]), f"the inversion by {method.name}")
    inversion = Inversion(method, network, context, levels, states, memory, x0.dtype)
    method.finish(run, inversion)
    inversion.calls = getattr(network, "calls", 0) - before
    if measure:
        inversion.measure()
    return inversion


@torch.no_grad()
def walk_down(
    run: Run,
    method: Method,
    state: Any,
    start_step: int = 0,
    memory: Sequence[Any] | None = None,
    after: Callable[[Tensor, Level], Tensor] | None = None,
) -> Tensor:
    """Walk a state down the levels of a run from a step on: the clean sample (b, ...); see `Inversion.sample`.

    Args:
        state: of `Method.resume`.
        memory: what each step up remembered, the first step's first; None where nothing walked up.
    """

    def step(state: Any, here: Level, to: Level) -> tuple[Any, Tensor]:
        state = method.down(run, state, here, to, None if memory is None else memory[to.left])
        if after is not None:
            state = method.changed(state, lambda x: after(x, to))
        return state, sample_of(state)

    for done in run_levels(run.levels[start_step:], state, step):
        state = done.x_t
    return finite(sample_of(state).to(run.dtype), f"sampling by {method.name}")


def plan_of(
    method: Method, model: Any, steps: int, spacing: str | Sequence[float] | None = None
) -> list[Level]:
    """List the levels of a method's walk over a model's table; see `Method.plan`."""
    steps = check_steps(steps, model.num_timesteps, name="steps")
    return method.plan(alpha_bar_table(model), steps, spacing)


def sample_of(state: Any) -> Tensor:
    """Give the sample of a state."""
    return state if isinstance(state, Tensor) else state[0]


def on_tensors(change: Callable[[Tensor], Tensor], thing: Any) -> Any:
    """Change every tensor of a state or memory, and leave the rest."""
    if isinstance(thing, Tensor):
        return change(thing)
    return tuple(on_tensors(change, one) for one in thing) if isinstance(thing, tuple) else thing


def fine(x: Tensor) -> Tensor:
    """Bring a sample into float64, where its device has that, so that steps undo each other."""
    return x if x.device.type == "mps" else x.double()


def finite(x: Tensor, what: str) -> Tensor:
    """Return x, or raise NumericError if it is not finite."""
    if not torch.isfinite(x).all():
        raise NumericError(
            f"{what} gave values that are not finite; take a lower guidance_scale or another method"
        )
    return x
