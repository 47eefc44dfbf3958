"""Presets: what other programs do where a picture depends on it, as data.

    sd.txt2img("a red circle", preset="diffusers", seed=5)

A preset sets options of ldm.options, and only those that the caller left open: whatever is given goes before it, also
where it contradicts the preset. A picture's metadata say the values, so that they are repeated without the preset's
name. docs/presets.md prints the table. Knows no torch, as ldm.options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

PRESETS = {
    "compvis": "CompVis's scripts/txt2img.py and img2img.py",
    "bubbliiiing": "bubbliiiing's predict.py",
    "cldm": "ControlNet's gradio_*.py",
    "diffusers": "diffusers' StableDiffusionPipeline, its Img2Img and its Inpaint, with a generator on the CPU",
    "a1111": "AUTOMATIC1111's web UI 1.10 on an NVIDIA GPU, as it is installed",
    "comfyui": "ComfyUI's KSampler on an NVIDIA GPU",
}  # fmt: skip


@dataclass(frozen=True)
class ByMode:
    """A value that depends on what is done; None leaves the option as it is without a preset."""

    txt2img: Any = None
    img2img: Any = None
    inpaint: Any = None

    def of(self, mode: str, sampler: str, said: Mapping[str, Any]) -> Any:
        return getattr(self, mode)

    def __str__(self) -> str:
        said = {name: value for name, value in vars(self).items() if value is not None}
        return ", ".join(f"{name} {value}" for name, value in said.items())


@dataclass(frozen=True)
class BySampler:
    """A value that depends on the sampler, None as in ByMode; that of samplers which are not named is `others`."""

    values: Mapping[str, Any]
    others: Any = None

    def of(self, mode: str, sampler: str, said: Mapping[str, Any]) -> Any:
        return self.values.get(sampler, self.others)

    def __str__(self) -> str:
        names: dict[Any, list[str]] = {}
        for sampler, value in self.values.items():
            names.setdefault(value, []).append(sampler)
        without = names.pop(None, [])
        said = [f"{value} ({', '.join(samplers)})" for value, samplers in names.items()]
        others = f"all but {', '.join(without)}" if without else "others"
        return "; ".join(said if self.others is None else [*said, f"{self.others} ({others})"])


@dataclass(frozen=True)
class Where:
    """A value with some samplers, as far as nothing was given that it does not go with.

    Attributes:
        allowed: option -> values of it that may be given beside; of those in `without` none may.
    """

    value: Any
    samplers: tuple[str, ...] | None  # None is all
    allowed: Mapping[str, tuple[Any, ...]]
    without: tuple[str, ...] = ()

    def of(self, mode: str, sampler: str, said: Mapping[str, Any]) -> Any:
        used = {sampler, said.get("hires_sampler", sampler)}
        # A list of sigmas, which numpy may have, is none of the values.
        fits = all(
            isinstance(said[name], str) and said[name] in values
            for name, values in self.allowed.items()
            if name in said
        )
        fits = fits and not said.keys() & set(self.without)
        return self.value if fits and (self.samplers is None or used <= set(self.samplers)) else None

    def __str__(self) -> str:
        return f"{self.value} ({', '.join(self.samplers)})" if self.samplers else str(self.value)


@dataclass(frozen=True)
class Row:
    """What of a picture one option decides.

    Attributes:
        option: its name in ldm.options.
        values: of the presets that set it; the others leave it as it is.
        sources: preset -> file and function of the original.
        modes: in which it decides anything.
        is_start: what a program begins with, and a picture says of itself: --like keeps the picture's.
    """

    option: str
    values: Mapping[str, Any]
    sources: Mapping[str, str]
    modes: tuple[str, ...] = ("txt2img", "img2img", "inpaint")
    is_start: bool = False


_TXT2IMG, _IMG2IMG, _DDIM = (
    "scripts/txt2img.py main",
    "scripts/img2img.py main",
    "ldm/models/diffusion/ddim.py",
)
_PREDICT, _GRADIO, _HACKED = "predict.py", "gradio_canny2image.py process", "cldm/ddim_hacked.py"
_PIPE = "pipeline_stable_diffusion{}.py"
_TIMESTEPS = ("ddim", "ddim_cfg_pp", "plms", "unipc")  # which A1111 runs over time steps, and not over sigmas
_WEB, _NODES, _COMFY = "modules/processing.py", "nodes.py", "comfy/samplers.py"

TABLE: tuple[Row, ...] = (
    Row(
        "rng",
        {
            "compvis": "compvis", "bubbliiiing": "compvis", "cldm": "compvis", "diffusers": "diffusers",
            "a1111": "nv", "comfyui": "comfyui",
        },
        {
            "compvis": f"{_TXT2IMG}, seed_everything", "bubbliiiing": f"{_PREDICT}, seed_everything",
            "cldm": f"{_GRADIO}, seed_everything", "diffusers": "utils/torch_utils.py randn_tensor",
            "a1111": "modules/rng.py ImageRNG", "comfyui": "comfy/sample.py prepare_noise; "
            "comfy/k_diffusion/sampling.py default_noise_sampler",
        },
    ),
    Row(
        "sampler",
        {
            "compvis": "ddim", "bubbliiiing": "ddim", "cldm": "ddim", "diffusers": "plms", "a1111": "dpmpp_2m",
            "comfyui": "euler",
        },
        {
            "compvis": _TXT2IMG, "bubbliiiing": _PREDICT, "cldm": _GRADIO,
            "diffusers": "stable-diffusion-v1-5's scheduler/scheduler_config.json",
            "a1111": "modules/sd_samplers_kdiffusion.py, the first of its list", "comfyui": f"{_NODES} KSampler",
        },
        is_start=True,
    ),
    Row(
        "spacing",
        {
            "compvis": BySampler({"ddim": "compvis", "plms": "compvis"}),
            "bubbliiiing": BySampler({"ddim": "compvis"}),
            "cldm": BySampler({"ddim": "compvis"}),
            "diffusers": BySampler(
                {
                    **dict.fromkeys(("ddim", "plms"), "leading"),
                    **dict.fromkeys(("euler", "euler_a", "dpmpp_2m", "unipc", "deis"), "linspace"),
                }
            ),
            "a1111": BySampler(
                {
                    **dict.fromkeys(
                        ("dpmpp_2m", "dpmpp_sde", "dpmpp_2s_a", "dpm2", "dpm2_a", "restart"), "karras"
                    ),
                    **dict.fromkeys(("dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde"), "exponential"),
                    **dict.fromkeys(("ddim", "ddim_cfg_pp", "plms"), "compvis"),
                    "unipc": "time_uniform",
                },
                "normal",
            ),
            "comfyui": "normal",
        },
        {
            "compvis": f"{_DDIM} make_schedule", "bubbliiiing": f"{_DDIM} make_schedule",
            "cldm": f"{_HACKED} make_schedule",
            "diffusers": "schedulers/scheduling_*.py set_timesteps, by each one's own timestep_spacing",
            "a1111": "modules/sd_samplers_kdiffusion.py get_sigmas; modules/sd_samplers_timesteps.py get_timesteps",
            "comfyui": f"{_NODES} KSampler; {_COMFY} calculate_sigmas",
        },
    ),
    Row(
        "arithmetic",
        {
            "diffusers": Where(
                "diffusers",
                ("ddim", "plms", "euler", "euler_a", "dpmpp_2m"),
                {
                    **dict.fromkeys(("spacing", "hires_spacing"), ("leading", "trailing", "linspace")),
                    "mask_rule": ("compvis", "diffusers"),
                    "strength_rule": ("compvis",),
                },
                (
                    "rho", "beta_dist_alpha", "beta_dist_beta",
                    "sigma_min", "sigma_max", "discard_next_to_last", "s_churn", "s_tmin", "s_tmax", "s_noise",
                    "order", "solver_type", "gamma", "brownian", "first_noise", "final_alpha",
                ),
            )
        },
        {"diffusers": "schedulers/scheduling_*.py step, add_noise, init_noise_sigma; models/attention_processor.py"},
    ),
    Row(
        "first_noise",
        {
            "a1111": BySampler(dict.fromkeys(_TIMESTEPS), "sigma"),
            "comfyui": Where(
                "unit", None,
                {
                    "spacing": (
                        "normal", "karras", "exponential", "sgm_uniform", "simple", "beta", "beta_sigma", "kl_optimal",
                        "kl_optimal_open",
                    )
                },
            ),
        },
        {
            "a1111": "modules/sd_samplers_kdiffusion.py sample, sgm_noise_multiplier off",
            "comfyui": "comfy/model_sampling.py noise_scaling, where the run begins at sigma_max",
        },
    ),
    Row(
        "final_alpha",
        {
            **dict.fromkeys(("compvis", "bubbliiiing", "cldm"), BySampler({"ddim": "lowest", "plms": "lowest"})),
            "a1111": BySampler(dict.fromkeys(("ddim", "ddim_cfg_pp", "plms"), "lowest")),
            "comfyui": "one",
        },
        {
            "compvis": "ldm/modules/diffusionmodules/util.py make_ddim_sampling_parameters", "bubbliiiing": "the same",
            "cldm": "the same", "a1111": "modules/sd_samplers_timesteps_impl.py", "comfyui": f"{_COMFY} *_scheduler",
        },
    ),
    Row(
        "steps",
        {
            "compvis": 50, "bubbliiiing": 20, "cldm": 20, "diffusers": 50, "a1111": 20, "comfyui": 20,
        },
        {
            "compvis": _TXT2IMG, "bubbliiiing": _PREDICT, "cldm": _GRADIO, "diffusers": f"{_PIPE.format('')} __call__",
            "a1111": "modules/ui.py create_ui", "comfyui": f"{_NODES} KSampler",
        },
        is_start=True,
    ),
    Row(
        "guidance_scale",
        {
            "compvis": ByMode(7.5, 5.0, 7.5), "bubbliiiing": 9.0, "cldm": 9.0, "diffusers": 7.5, "a1111": 7.0,
            "comfyui": 8.0,
        },
        {
            "compvis": f"{_TXT2IMG}; {_IMG2IMG}", "bubbliiiing": _PREDICT, "cldm": _GRADIO,
            "diffusers": f"{_PIPE.format('')} __call__", "a1111": "modules/ui.py create_ui",
            "comfyui": f"{_NODES} KSampler",
        },
        is_start=True,
    ),
    Row(
        "strength",
        {
            "compvis": ByMode(img2img=0.75), "bubbliiiing": ByMode(img2img=1.0),
            "diffusers": ByMode(img2img=0.8, inpaint=1.0), "a1111": ByMode(img2img=0.75, inpaint=0.75),
            "comfyui": ByMode(img2img=1.0, inpaint=1.0),
        },
        {
            "compvis": _IMG2IMG, "bubbliiiing": _PREDICT, "diffusers": f"{_PIPE.format('_img2img')} and "
            f"{_PIPE.format('_inpaint')} __call__", "a1111": "modules/ui.py create_ui", "comfyui": f"{_NODES} KSampler",
        },
        is_start=True,
    ),
    Row(
        "strength_rule",
        {
            "compvis": "compvis", "bubbliiiing": "bubbliiiing", "diffusers": "compvis",
            "a1111": BySampler(dict.fromkeys(_TIMESTEPS, "bubbliiiing"), "a1111"),
            "comfyui": "comfyui",
        },
        {
            "compvis": _IMG2IMG, "bubbliiiing": _PREDICT, "diffusers": f"{_PIPE.format('_img2img')} get_timesteps",
            "a1111": "modules/sd_samplers_common.py setup_img2img_steps, and sample_img2img of each kind",
            "comfyui": f"{_COMFY} KSampler.set_steps",
        },
        modes=("img2img", "inpaint"),
    ),
    Row(
        "mask_rule",
        {
            "compvis": "compvis", "bubbliiiing": "compvis", "diffusers": "diffusers", "a1111": "a1111",
            "comfyui": "comfyui",
        },
        {
            "compvis": f"{_DDIM} ddim_sampling", "bubbliiiing": f"{_DDIM} decode",
            "diffusers": f"{_PIPE.format('_inpaint')} __call__", "a1111": "modules/sd_samplers_cfg_denoiser.py forward",
            "comfyui": f"{_COMFY} KSamplerX0Inpaint",
        },
        modes=("inpaint",),
    ),
    Row(
        "mask_cells",
        {"compvis": "nearest", "diffusers": "nearest", "a1111": "bicubic", "comfyui": "bilinear"},
        {
            "compvis": "scripts/inpaint.py make_batch", "diffusers": f"{_PIPE.format('_inpaint')} prepare_mask_latents",
            "a1111": f"{_WEB} StableDiffusionProcessingImg2Img.init",
            "comfyui": "comfy/sampler_helpers.py prepare_mask",
        },
        modes=("inpaint",),
    ),
    Row(
        "mask_blur",
        {"a1111": ByMode(inpaint=4)},
        {"a1111": "modules/ui.py create_ui"},
        is_start=True,
    ),
    Row(
        "kept",
        {"compvis": "pixels", "diffusers": "latents", "a1111": "pixels", "comfyui": "latents"},
        {
            "compvis": "scripts/inpaint.py main", "diffusers": f"{_PIPE.format('_inpaint')} __call__",
            "a1111": f"{_WEB} apply_overlay", "comfyui": f"{_NODES} VAEDecode",
        },
        modes=("inpaint",),
    ),
    Row(
        "separate_passes",
        {"cldm": True},
        {"cldm": f"{_HACKED} p_sample_ddim"},
    ),
    Row(
        "prompt_syntax",
        {
            "compvis": "plain", "bubbliiiing": "plain", "cldm": "plain", "diffusers": "plain", "a1111": "a1111",
            "comfyui": "comfyui",
        },
        {
            "compvis": "ldm/modules/encoders/modules.py FrozenCLIPEmbedder", "bubbliiiing": "the same",
            "cldm": "the same", "diffusers": f"{_PIPE.format('')} encode_prompt",
            "a1111": "modules/prompt_parser.py; modules/sd_emphasis.py", "comfyui": "comfy/sd1_clip.py",
        },
    ),
    Row(
        "clip_skip_of",
        {"diffusers": "prompt", "a1111": "both", "comfyui": "both"},
        {
            "diffusers": f"{_PIPE.format('')} encode_prompt", "a1111": "modules/sd_hijack_clip.py",
            "comfyui": f"{_NODES} CLIPSetLastLayer",
        },
    ),
    Row(
        "rounding",
        {
            "compvis": "truncate", "bubbliiiing": "truncate_127.5", "cldm": "truncate_127.5", "diffusers": "round",
            "a1111": "truncate", "comfyui": "truncate",
        },
        {
            "compvis": _TXT2IMG, "bubbliiiing": _PREDICT, "cldm": _GRADIO,
            "diffusers": "image_processor.py numpy_to_pil", "a1111": f"{_WEB} process_images_inner",
            "comfyui": f"{_NODES} SaveImage",
        },
    ),
)  # fmt: skip


def values(
    preset: str, mode: str, sampler: str, said: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """Give the options that a preset sets: name -> value.

    Args:
        mode: "txt2img", "img2img" or "inpaint".
        sampler: the one that paints, by our name.
        said: what was given beside the preset.
    """
    found = {}
    for row in TABLE:
        value = row.values.get(preset) if mode in row.modes else None
        value = value.of(mode, sampler, said) if isinstance(value, ByMode | BySampler | Where) else value
        if value is not None:
            found[row.option] = value
    return found


def filled(
    preset: str,
    given: Mapping[str, Any],
    mode: str,
    split: Callable[[Any, Any], tuple[str, Any]],
) -> dict[str, Any]:
    """Give the options that a caller gave, filled up with those of a preset.

    Args:
        given: by name; None is not given.
        mode: "txt2img", "img2img" or "inpaint".
        split: from a sampler's name in any spelling and a spacing to ours, see samplers.split_sampler.
    """
    said = {name: value for name, value in given.items() if value is not None}
    own = values(preset, mode, "")["sampler"]
    sampler, spacing = split(said.get("sampler", own), said.get("spacing"))
    if spacing is not None:  # of "DPM++ 2M Karras", too
        said["spacing"] = spacing
    if "hires_sampler" in said:  # has levels of its own
        said["hires_sampler"], second = split(said["hires_sampler"], said.get("hires_spacing"))
        second = second or values(preset, mode, said["hires_sampler"]).get("spacing")
        said |= {} if second is None else {"hires_spacing": second}
    return {**values(preset, mode, sampler, said), **said, "sampler": sampler}


def page() -> str:
    """Write the table as docs/presets.md has it, in Markdown."""
    programs = [f"- `{name}`: {program}" for name, program in PRESETS.items()]
    said = []
    for row in TABLE:
        cells = [_cell(row.values.get(preset)) for preset in PRESETS]
        where = "" if len(row.modes) == len(Row.modes) else f" ({', '.join(row.modes)})"
        said.append(f"| `{row.option}`{where} | {' | '.join(cells)} |")
    for row in TABLE:
        places: dict[str, list[str]] = {}
        for preset, source in row.sources.items():
            places.setdefault(source, []).append(preset)
        where = "; ".join(f"{', '.join(of)}: {source}" for source, of in places.items())
        said.append(f"| `{row.option}` | {where} |")
    head = f"| option | {' | '.join(PRESETS)} |\n|{'---|' * (len(PRESETS) + 1)}"
    count = len(TABLE)
    sources = "| option | where the original says so |\n|---|---|"
    return "\n".join([*programs, "", head, *said[:count], "", sources, *said[count:], ""])


def _cell(value: Any) -> str:
    return "" if value is None else str(value)


def rules() -> set[str]:
    """Name the options that some preset sets, less those that a program only begins with, as its number of steps."""
    return {row.option for row in TABLE if not row.is_start}


def names() -> set[str]:
    """Name the options that some preset sets."""
    return {row.option for row in TABLE}
