"""The list of samplers, and how they are found by the names that people have for them."""

import inspect
import re
from collections.abc import Sequence

from ldm.errors import UsageError, nearest, shown
from ldm.models.diffusion.levels import resolve_spacing
from ldm.models.diffusion.samplers.base import Sampler
from ldm.models.diffusion.samplers.cfg_pp import DDIMCFGPP, EulerAncestralCFGPP, EulerCFGPP
from ldm.models.diffusion.samplers.compvis import DDIM, DDPM, PLMS
from ldm.models.diffusion.samplers.distilled import LCM, TCD
from ldm.models.diffusion.samplers.dpm_solver import DPMSolver, DPMSolverPP2M
from ldm.models.diffusion.samplers.dpm_solver_singlestep import DPMSolverSinglestep
from ldm.models.diffusion.samplers.kdiffusion import (
    DPM2,
    LMS,
    DPM2Ancestral,
    DPMSolverPP2SAncestral,
    Euler,
    EulerAncestral,
    Heun,
)
from ldm.models.diffusion.samplers.multistep import (
    DEIS,
    IPNDM,
    IPNDMV,
    RES2S,
    DPMSolverPP2Mv2,
    GradientEstimation,
    HeunPP2,
    RESMultistep,
    RESMultistepAncestral,
    UniPC,
)
from ldm.models.diffusion.samplers.restart import Restart
from ldm.models.diffusion.samplers.sde import (
    DPMSolverPP2MSDE,
    DPMSolverPP2MSDEHeun,
    DPMSolverPP3MSDE,
    DPMSolverPPSDE,
)
from ldm.models.diffusion.samplers.singlestep import DPMAdaptive, DPMFast
from ldm.models.diffusion.samplers.stochastic import ERSDE, SASolver
from ldm.process.sigmas import SIGMA_TABLES, resolve_sigma_table
from ldm.sampler_names import NAMES

# The one list of samplers by name: what is put into it works wherever a sampler is named (docs/own-sampler.md). What
# other programs call them is in ldm.sampler_names.
SAMPLERS: dict[str, type[Sampler]] = {
    cls.name: cls
    for cls in (
        DDIM,
        PLMS,
        DDPM,
        DPMSolver,
        DPMSolverPP2M,
        Euler,
        EulerAncestral,
        Heun,
        DPM2,
        DPM2Ancestral,
        LMS,
        DPMSolverPP2SAncestral,
        DPMSolverPPSDE,
        DPMSolverPP2MSDE,
        DPMSolverPP2MSDEHeun,
        DPMSolverPP3MSDE,
        DPMFast,
        DPMAdaptive,
        Restart,
        EulerCFGPP,
        EulerAncestralCFGPP,
        DDIMCFGPP,
        DPMSolverSinglestep,
        DPMSolverPP2Mv2,
        UniPC,
        DEIS,
        IPNDM,
        IPNDMV,
        SASolver,
        ERSDE,
        RESMultistep,
        RESMultistepAncestral,
        RES2S,
        HeunPP2,
        GradientEstimation,
        LCM,
        TCD,
    )
}


def _reduce(name: str) -> str:
    """Reduce a spelling to small letters and digits, "+" as "p", less "scheduler"."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "p")).removesuffix("scheduler")


_ALIASES = {_reduce(word): names.name for names in NAMES for word in names.others}


def resolve_sampler(name: str) -> str:
    """Find a sampler by any common spelling: CompVis's, A1111's, ComfyUI's or diffusers' class name.

    Raises:
        UsageError: no such sampler; the message lists some, and those of one's own. Or what SAMPLERS has there is none.
    """
    by_spelling = _ALIASES | {_reduce(key): key for key in SAMPLERS}
    spelling = _reduce(name) if isinstance(name, str) else None
    if spelling not in by_spelling and (spelling or "").startswith("k"):
        spelling = spelling[1:]  # "k_euler_a", as scripts of 2022 say
    found = name if isinstance(name, str) and name in SAMPLERS else by_spelling.get(spelling)
    if found not in SAMPLERS:
        near = nearest(spelling or "", by_spelling, 0.7)
        hint = f" (did you mean {by_spelling[near]}?)" if near else ""
        own = SAMPLERS.keys() - {names.name for names in NAMES}
        some = [key for key in SAMPLERS if key not in own][:12]
        listed = ", ".join([*some, "others of docs/samplers.md", *sorted(map(str, own))[:12]])
        raise UsageError(f"the sampler must be one of {listed}; got {shown(name)}{hint}")
    cls = SAMPLERS[found]
    if not (isinstance(cls, type) and issubclass(cls, Sampler)):
        raise UsageError(
            f"SAMPLERS[{shown(found)}] must be a subclass of ldm.models.diffusion.samplers.Sampler, got {shown(cls)}"
        )
    for hook in ("step", "step_sigma"):
        method = getattr(cls, hook, None)
        if method is not None and list(inspect.signature(method).parameters) == ["self", "x", "level"]:
            raise UsageError(
                f"{hook} of SAMPLERS[{shown(found)}] takes (x, level), but a step is now {hook}(x, here, to): "
                "level.t, alpha_bar and sigma are here's, level.t_next, alpha_bar_prev and sigma_prev are to.t, "
                "to.alpha_bar and to.sigma; see docs/own-sampler.md"
            )
    return found


def split_sampler(
    name: str, spacing: str | Sequence[float] | None = None
) -> tuple[str, str | Sequence[float] | None]:
    """Read a sampler's name, in any spelling, with or without that of a table of sigmas.

    "DPM++ 2M Karras", as A1111 said it, or "dpmpp_2m_k", as InvokeAI.

    Args:
        spacing: what was named for it apart.

    Returns:
        (sampler, spacing), a name of SIGMA_TABLES in its own spelling.

    Raises:
        UsageError: no such sampler or spacing, or two spacings.
    """
    if isinstance(spacing, str):
        spacing = resolve_spacing(spacing)
    words = re.split(r"[\s_-]+", name.strip()) if isinstance(name, str) else []
    for count in range(1, min(len(words), 4)):  # "Align Your Steps" are three
        table = "karras" if words[-count:] == ["k"] else resolve_sigma_table(" ".join(words[-count:]))
        try:
            sampler = resolve_sampler(" ".join(words[:-count])) if table else None
        except UsageError:
            continue
        if sampler is None or name in SAMPLERS:
            continue
        if spacing is not None and not (isinstance(spacing, str) and spacing == table):
            raise UsageError(
                f"the sampler {shown(name)} and spacing={shown(spacing)} name two spacings; give one"
            )
        return sampler, table
    try:
        return resolve_sampler(name), spacing
    except UsageError:
        near = _meant(words)
        if near is None:
            raise
        raise UsageError(
            f"the sampler {shown(name)} names a spacing that there is none of; did you mean {near!r}?"
        ) from None


def _meant(words: Sequence[str]) -> str | None:
    """Give the words of a sampler and a misspelt table of sigmas as they were meant; None where they are no such."""
    sampler, table = " ".join(words[:-1]), nearest(words[-1].lower(), SIGMA_TABLES, 0.7) if words else None
    try:
        return f"{resolve_sampler(sampler)} {table}" if table else None
    except UsageError:
        return None
