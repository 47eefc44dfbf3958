"""The samplers: one short class an algorithm, in a file a family; the table of their names; and `sample_steps`.

A run is a plan (levels.py: the levels to go through), a denoiser (denoiser.py: the model with its conditions and
guidance) and a sampler (base.py: how to step from one level to another). `sample_steps` joins them and yields every
step, so progress, preview and interruption need nothing from here. CompVis's DDIMSampler, PLMSSampler and
DPMSolverSampler call the same classes.
"""

from ldm.models.diffusion.denoiser import WHOLE_INTERVAL, Denoiser, check_interval, predict_both
from ldm.models.diffusion.levels import (
    Level,
    LevelTable,
    Noise,
    Step,
    alpha_bar_table,
    check_levels,
    choose_levels,
    make_plan,
    resolve_spacing,
    run_levels,
    unit_noise,
    visited_levels,
)
from ldm.models.diffusion.samplers.as_diffusers import (
    check_rules,
    check_schedule,
    last_calls,
    steps_as_diffusers,
)
from ldm.models.diffusion.samplers.base import NoisySampler, Sampler, SigmaSampler, check_eta
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
from ldm.models.diffusion.samplers.names import SAMPLERS, resolve_sampler, split_sampler
from ldm.models.diffusion.samplers.restart import Restart
from ldm.models.diffusion.samplers.run import (
    check_mask,
    sample_steps,
    sampler_options,
    split_options,
    start_level,
    warn_of_batch,
)
from ldm.models.diffusion.samplers.sde import (
    DPMSolverPP2MSDE,
    DPMSolverPP2MSDEHeun,
    DPMSolverPP3MSDE,
    DPMSolverPPSDE,
    SDESampler,
)
from ldm.models.diffusion.samplers.singlestep import DPMAdaptive, DPMFast
from ldm.models.diffusion.samplers.stochastic import ERSDE, SASolver
from ldm.sampler_names import NAMES, Names

__all__ = [
    "DDIM",
    "DDIMCFGPP",
    "DDPM",
    "DEIS",
    "DPM2",
    "DPM2Ancestral",
    "DPMAdaptive",
    "DPMFast",
    "DPMSolver",
    "DPMSolverPP2M",
    "DPMSolverPP2MSDE",
    "DPMSolverPP2MSDEHeun",
    "DPMSolverPP2Mv2",
    "DPMSolverPP2SAncestral",
    "DPMSolverPP3MSDE",
    "DPMSolverPPSDE",
    "DPMSolverSinglestep",
    "Denoiser",
    "ERSDE",
    "Euler",
    "EulerAncestral",
    "EulerAncestralCFGPP",
    "EulerCFGPP",
    "GradientEstimation",
    "Heun",
    "HeunPP2",
    "IPNDM",
    "IPNDMV",
    "LCM",
    "LMS",
    "Level",
    "LevelTable",
    "NAMES",
    "Names",
    "Noise",
    "NoisySampler",
    "PLMS",
    "RES2S",
    "RESMultistep",
    "RESMultistepAncestral",
    "Restart",
    "SAMPLERS",
    "SASolver",
    "SDESampler",
    "Sampler",
    "SigmaSampler",
    "Step",
    "TCD",
    "UniPC",
    "WHOLE_INTERVAL",
    "alpha_bar_table",
    "check_eta",
    "check_interval",
    "check_levels",
    "check_mask",
    "check_rules",
    "check_schedule",
    "choose_levels",
    "last_calls",
    "make_plan",
    "predict_both",
    "resolve_sampler",
    "resolve_spacing",
    "run_levels",
    "sample_steps",
    "sampler_options",
    "split_options",
    "split_sampler",
    "start_level",
    "steps_as_diffusers",
    "unit_noise",
    "visited_levels",
    "warn_of_batch",
]
