"""The one table of the samplers' names: ours and other programs'. Lookups, help, metadata and docs are made from it.

Knows no torch, as the scripts answer --help before that is imported. The classes are in ldm.models.diffusion.samplers.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Names:
    """A sampler in other programs' words, each understood in any spelling.

    Attributes:
        name: ours, and its class's.
        a1111: what A1111's text says for it, and the text of our pictures; where A1111 has none, a word in its manner.
        comfyui: KSampler's name, None where ComfyUI has none.
        diffusers: the class of diffusers, less "Scheduler".
        also: more spellings: CompVis's flag, InvokeAI's, stable-diffusion.cpp's.
        calls: of the network in a run of S steps.
        own_eta: eta where none is asked for, as the class has it.
    """

    name: str
    a1111: str
    comfyui: str | None = None
    diffusers: str | None = None
    also: tuple[str, ...] = ()
    calls: str = "S"
    own_eta: float = 0.0

    @property
    def others(self) -> tuple[str, ...]:
        """Other programs' words, each once."""
        return tuple(dict.fromkeys(w for w in (self.a1111, self.comfyui, self.diffusers, *self.also) if w))


NAMES: tuple[Names, ...] = (
    Names("ddim", "DDIM", "ddim", "DDIM"),
    Names("plms", "PLMS", None, "PNDM", ("--plms",), "S + 1"),
    Names("ddpm", "DDPM", "ddpm", "DDPM"),
    Names("dpm_solver", "DPM-Solver", also=("--dpm_solver",)),
    Names("dpmpp_2m", "DPM++ 2M", "dpmpp_2m", "DPMSolverMultistep", ("DPM-Solver++", "DPM++")),
    Names("euler", "Euler", "euler", "EulerDiscrete"),
    Names("euler_a", "Euler a", "euler_ancestral", "EulerAncestralDiscrete", own_eta=1.0),
    Names("heun", "Heun", "heun", "HeunDiscrete", calls="2 S - 1"),
    Names("dpm2", "DPM2", "dpm_2", "KDPM2Discrete", calls="2 S - 1"),
    Names("dpm2_a", "DPM2 a", "dpm_2_ancestral", "KDPM2AncestralDiscrete", calls="2 S - 1", own_eta=1.0),
    Names("lms", "LMS", "lms", "LMSDiscrete"),
    Names("dpmpp_2s_a", "DPM++ 2S a", "dpmpp_2s_ancestral", calls="2 S - 1", own_eta=1.0),
    Names("dpmpp_sde", "DPM++ SDE", "dpmpp_sde", "DPMSolverSDE", ("dpmpp_sde_gpu",), "2 S - 1", own_eta=1.0),
    Names("dpmpp_2m_sde", "DPM++ 2M SDE", "dpmpp_2m_sde", also=("dpmpp_2m_sde_gpu",), own_eta=1.0),
    Names(
        "dpmpp_2m_sde_heun",
        "DPM++ 2M SDE Heun",
        "dpmpp_2m_sde_heun",
        also=("dpmpp_2m_sde_heun_gpu",),
        own_eta=1.0,
    ),
    Names("dpmpp_3m_sde", "DPM++ 3M SDE", "dpmpp_3m_sde", also=("dpmpp_3m_sde_gpu",), own_eta=1.0),
    Names("dpm_fast", "DPM fast", "dpm_fast"),
    Names("dpm_adaptive", "DPM adaptive", "dpm_adaptive", calls="by tolerance"),
    Names("restart", "Restart", calls="2 S - 1"),
    Names("euler_cfg_pp", "Euler CFG++", "euler_cfg_pp"),
    Names("euler_a_cfg_pp", "Euler a CFG++", "euler_ancestral_cfg_pp", own_eta=1.0),
    Names("ddim_cfg_pp", "DDIM CFG++"),
    Names("dpm_solver_singlestep", "DPM-Solver single step", None, "DPMSolverSinglestep", ("DPM++ 2S",)),
    Names("dpmpp_2m_v2", "DPM++ 2M v2", also=("dpm++2mv2", "DPM++ 2M test")),
    Names("unipc", "UniPC", "uni_pc", "UniPCMultistep", ("uni_pc_bh2",)),
    Names("deis", "DEIS", "deis", "DEISMultistep"),
    Names("ipndm", "IPNDM", "ipndm", "IPNDM"),
    Names("ipndm_v", "IPNDM_V", "ipndm_v"),
    Names("sa_solver", "SA-Solver", "sa_solver", "SASolver", own_eta=1.0),
    Names("er_sde", "ER SDE", "er_sde", own_eta=1.0),
    Names("res_multistep", "RES multistep", "res_multistep"),
    Names("res_multistep_a", "RES multistep a", "res_multistep_ancestral", own_eta=1.0),
    Names("res_2s", "RES 2S", calls="2 S - 1"),
    Names("heunpp2", "HeunPP2", "heunpp2", also=("Heun++ 2",), calls="max(3 S - 3, 1)"),
    Names("gradient_estimation", "Gradient estimation", "gradient_estimation"),
    Names("lcm", "LCM", "lcm", "LCM"),
    Names("tcd", "TCD", None, "TCD"),
)
