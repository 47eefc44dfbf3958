"""Every option of a painting, one entry each: what may be asked for is written down here and nowhere else.

From `TABLE` are derived: the keywords of StableDiffusion.plan and its like (with their check, their help and the
nearest name for a misspelt one), the flags of the painting scripts, what a line of a prompt file or of a .jsonl may
set, what a picture's metadata say in our own words and in A1111's, what --like repeats of it, and the JSON Schema of a
request (`schema`).

How to add an option: write one entry into TABLE, where A1111 has its key in a picture's text (anywhere, if it has
none), and use its value, which a request has in the entry's section: `request.draw.NAME`, or in short `request.NAME`.
Of "size", "sampling", "guidance" and "start" each pass has its own: `request.passes[0].start.NAME`. Values of
"sampling" and "guidance" are handed to generate.denoise, and on to the samplers, as keywords. Only a check that needs
the model, or two options together, is written in ldm.request.check_request. Flags that name files (--lora FILE:weight,
repeatable) and become members of `adapters` have a function in ldm.cli.adapters that reads the flag's text, an entry of
kind `Files` here with `keyword=False`, and a line in ldm.cli.painting that makes the adapters of them. What concerns a
whole run of a script (--ckpt, --outdir) is no option of a painting: such flags are in ldm.cli.painting_options.

The kinds of values are in ldm.option_kinds. Knows no torch, as the scripts answer --help and a wrong option before that
is imported.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ldm import limits
from ldm.option_kinds import (
    Choice,
    Files,
    Folder,
    Interval,
    Kind,
    Levels,
    Number,
    Numbers,
    Part,
    Prompt,
    Regions,
    Seed,
    Size,
    Switch,
    Upscaler,
    Whole,
    Wholes,
    Words,
)
from ldm.presets import PRESETS
from ldm.sampler_names import NAMES

# A1111's words for samplers and spacings.
SAMPLER_WORDS = {names.name: names.a1111 for names in NAMES}
OWN_ETA = {names.name: names.own_eta for names in NAMES}  # which is not said
SPACING_WORDS = {
    "karras": "Karras",
    "exponential": "Exponential",
    "polyexponential": "Polyexponential",
    "normal": "Normal",
    "sgm_uniform": "SGM Uniform",
    "simple": "Simple",
    "ddim_uniform": "DDIM",
    "beta_sigma": "Beta",
    "kl_optimal_open": "KL Optimal",
    "align_your_steps": "Align Your Steps",
    "turbo": "Turbo",
}
# Ours -> A1111's; and its words in small letters -> ours.
CONTROL_MODES = {
    "balanced": "Balanced",
    "prompt": "My prompt is more important",
    "control": "ControlNet is more important",
    "middle": "",
}
_CONTROL_WORDS = {word.lower(): name for name, word in CONTROL_MODES.items() if word}
# Of hires fix: ours -> A1111's.
UPSCALERS = {
    "latent": "Latent",
    "latent antialiased": "Latent (antialiased)",
    "latent bicubic": "Latent (bicubic)",
    "latent bicubic antialiased": "Latent (bicubic antialiased)",
    "latent nearest": "Latent (nearest)",
    "latent nearest-exact": "Latent (nearest-exact)",
    "lanczos": "Lanczos",
    "nearest": "Nearest",
}
PICTURE_UPSCALERS = {name: UPSCALERS[name] for name in ("lanczos", "nearest")}

SAME = object()  # as the keyword

# Parts of a request (ldm.request) -> what the values of their options are about.
SECTIONS = {
    "images": "each image: its prompts and seeds",
    "size": "a pass: how large it paints",
    "sampling": "a pass: handed to generate.denoise, and on to the samplers, as keywords",
    "guidance": "a pass: handed on in the same way",
    "start": "a pass: what it begins with",
    "further": "the passes that come after the first",
    "language": "how prompts are read, and which parts of a picture have their own",
    "draw": "noise, and the order in which it is drawn",
    "network": "what becomes adapters, unless it is its default: ldm.adapters.use.OF_OPTIONS",
    "output": "what is given back",
}

# --- one option -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Option:
    """An option of a painting.

    Args:
        name: the keyword, the request's attribute, the key in our own metadata, the destination of its flags.
        default: of the keyword; None is what the model advises, or nothing.
        kind: what its values are.
        words: what it does, for --help and help(), which adds `more`: what only Python can say.
        section: of SECTIONS: the part of a request that its value is in.
        group: of the flags in --help.
        flags: of the painting scripts; without any no line of a prompt file sets it either.
        also: other programs' names: understood as flags and in prompt files, named in errors about keywords.
        infotext: A1111's key, or one of ours in A1111's text; options at their default are left out there, but for
            `always`, and where all of `beside`, other options, are at their defaults.
        script: default of the flag, where that is not the keyword's.
        line: kind in a prompt file, where that is not `kind`; None where lines have no such option.
        keyword: False for what only the scripts have.
        told: the picture's metadata say it; what they say is repeated by --like.
        part: "sampler" for an option that only some samplers or spacings have, which is handed on where it is set.
        syntaxes: of prompts that it acts on; nothing is all.
        into: of a Part: the name of the list that its values join.
        metavar: of the flag in --help.
    """

    name: str
    default: Any
    kind: Kind
    words: str
    more: str = ""
    group: str = "how"
    flags: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    infotext: str | None = None
    script: Any = SAME
    line: Kind | None | bool = True
    keyword: bool = True
    told: bool = True
    always: bool = False
    beside: tuple[str, ...] = ()
    part: str | None = None
    syntaxes: tuple[str, ...] = ()
    into: str | None = None
    metavar: Any = None
    section: str = field(kw_only=True)

    @property
    def each(self) -> bool:
        """Whether it may differ from picture to picture of a request."""
        return self.section == "images"

    @property
    def dest(self) -> str:
        """Where the scripts keep what its flags say."""
        return self.into or self.name

    @property
    def line_kind(self) -> Kind | None:
        """What a line of a prompt file sets it to; None if none does."""
        if not self.flags or self.line in (None, False):
            return None
        return self.kind if self.line is True else self.line

    @property
    def names(self) -> tuple[str, ...]:
        """The name and all others that stand for it, as identifiers."""
        bare = (flag.lstrip("-").replace("-", "_") for flag in self.flags)
        return tuple(dict.fromkeys((self.name, *bare, *self.also)))


@dataclass(frozen=True, eq=False)
class Fact:
    """What a picture's A1111 text says beside the options: a name among its parameters, and A1111's key."""

    name: str
    infotext: str


def _said_of_adapter(
    name: str, kind: Kind, words: str, also: tuple[str, ...] = (), metavar: Any = None, begins: bool = False
) -> Option:
    """Make an option whose flag names a ControlNet and its like, or is said of the one that was named before it."""
    dashed = f"--{name.replace('_', '-')}"
    return Option(
        name, (), Part(name, kind, begins), words, group=WITH, flags=tuple(dict.fromkeys((dashed, f"--{name}"))),
        also=also, keyword=False, told=False, into="controls", metavar=metavar or "NUMBER", section="network",
    )  # fmt: skip


WHAT, HOW, FASTER, BESIDE, WITH, START, MASK, HIRES = (
    "what to paint",
    "how",
    "faster, for a little fidelity (docs/knobs.md)",
    "what guides besides, and the edges (docs/guidance.md)",
    "with what besides (docs/adapters.md)",
    "the picture to begin with (docs/pictures.md)",
    "the part of it that is repainted (docs/pictures.md)",
    "hires fix: painted once more, larger (docs/hires.md)",
)
SEED_WORDS = "picture i has seed + i; -1 or 'random' draws one; 32 bits count: 2^32 + 5 paints what 5 paints"
_EVEN = "multiples of the model's f (8); default the picture's or the model's own."

_EMPHASES = {
    "original": "Original",
    "no norm": "No norm",
    "ignore": "Ignore",
    "none": "None",
    "comfyui": "ComfyUI",
}


def _one_of(names: Sequence[str]) -> Choice:
    """Make the kind of an option with words of ours alone."""
    return Choice(dict(zip(names, names, strict=True)))


# Ours -> A1111's, and others' in the same place.
RNG_WORDS = {
    "image": "CPU",
    "nv": "NV",
    "compvis": "CompVis",
    "diffusers": "Diffusers",
    "comfyui": "ComfyUI",
}
SYNTAX, PRESET = "prompt_syntax", "preset"

# How a picture comes to the size that is painted, what is under a mask, and how strength moves over loops.
RESIZE_MODES = {
    "just resize": "Just resize",
    "crop and resize": "Crop and resize",
    "resize and fill": "Resize and fill",
    "latent upscale": "Just resize (latent upscale)",
}
FILLS = {name: name for name in ("original", "fill", "latent noise", "latent nothing")}
CURVES = {"linear": "Linear", "aggressive": "Aggressive", "lazy": "Lazy"}


def _by_a1111(words: Mapping[str, str]) -> dict[str, str]:
    """Give A1111's words in small letters, for our names."""
    return {word.lower(): name for name, word in words.items()}


# In the order of A1111's text.
TABLE: tuple[Option | Fact, ...] = (
    Option(
        "prompt", None, Prompt(),
        "what to paint (default: one that suits the model); one that begins with - as --prompt=-x",
        section="images", group=WHAT, flags=("--prompt",), keyword=False,
    ),
    Option(
        "negative_prompt", "", Prompt(),
        "what to keep away from",
        more="one text for all, or one for each prompt; None is the empty one.",
        section="images", group=WHAT,
        flags=("--negative_prompt", "--negative-prompt"), also=("negative", "n_prompt"),
    ),
    Option(
        PRESET, None, _one_of(tuple(PRESETS)),
        "paint as this program does, in all that is left open: noise, levels, steps, guidance, masks, rounding "
        "(docs/presets.md)",
        more="what is given goes before it.",
        section="output", flags=("--preset",), metavar="{" + ",".join(PRESETS) + "}",
    ),
    Option(
        "steps", None, Whole(*limits.STEPS),
        "denoising steps (default: the model's; for Stable Diffusion v1: 50)",
        more="1 to the model's number of levels; with strength, that share of them is run. None is the "
             "model's (`defaults`), or the fewest that it advises for this sampler if those are more.",
        section="sampling",
        flags=("--ddim_steps", "--steps"), also=("num_inference_steps", "num_steps"), infotext="Steps",
    ),
    Option(
        "sampler", "ddim", Words(SAMPLER_WORDS),
        "ddim, plms, euler, euler_a, heun, lms, dpmpp_2m, dpmpp_2m_sde, ... (docs/samplers.md); also with its "
        "spacing, as 'DPM++ 2M Karras' (default: ddim)",
        more=f"in any usual spelling. There are {', '.join(SAMPLER_WORDS)}.",
        section="sampling",
        flags=("--sampler",), also=("sampler_name", "scheduler"), script=None, infotext="Sampler", always=True,
    ),
    Option(
        "spacing", None, Levels(SPACING_WORDS, {"Uniform": "normal", "Automatic": None}),
        "which levels are visited: karras, exponential, sgm_uniform, trailing, ... (docs/samplers.md); or they "
        "themselves, as t=999,749,499,249 or sigma=14.6,3,0.5,0",
        more="or a list of steps + 1 sigmas; None is the sampler's own.",
        section="sampling", flags=("--spacing",), also=("schedule_type",), infotext="Schedule type",
    ),
    Option(
        "guidance_scale", None, Number(*limits.GUIDANCE_SCALE),
        "guidance: how strictly to follow the prompt (default: the model's; for Stable Diffusion v1: "
        "{scale})",
        more="0 to 100; 1 ignores the negative prompt and takes half the time; None is the model's.",
        section="guidance",
        flags=("--scale", "--cfg-scale", "--cfg_scale", "--guidance_scale"), also=("cfg", "guidance"),
        infotext="CFG scale",
    ),
    Option(
        "guidance_rescale", 0.0, Number(*limits.SHARE),
        "bring the spread of guided predictions back to the unguided ones' by this share",
        section="guidance", flags=("--guidance_rescale",),
    ),
    Option(
        "separate_passes", False, Switch(),
        "guide by two calls of the network, the prompt's first, as ControlNet's sampler does, in place of one",
        section="guidance", flags=("--separate_passes", "--separate-passes"), infotext="Separate passes",
    ),
    Option(
        "seed", None, Seed(),
        SEED_WORDS,
        more="a list names each; None, -1 and \"random\" draw one, which is in the result's seeds. 0 to "
             '2^64 - 1, of which the generator on the CPU keeps 32 bits (not with rng="nv", which keeps '
             "all).",
        section="images", group=WHAT, flags=("--seed",), script=42, infotext="Seed",
    ),
    Fact("size", "Size"),
    Option(
        "height", None, Whole(*limits.SIDE),
        "pixels (default: the model's)",
        more=_EVEN,
        section="size", group=WHAT, flags=("--H", "--height"),
    ),
    Option(
        "width", None, Whole(*limits.SIDE),
        "pixels (default: the model's)",
        more=_EVEN,
        section="size", group=WHAT, flags=("--W", "--width"),
    ),
    Option(
        "batch_size", 4, Whole(*limits.BATCH_SIZE, word=limits.AUTO),
        "pictures painted at once; auto: so many as are fast, which rounds otherwise than one at a time",
        more='no image depends on it but for rounding (not rng="compvis"). "auto": as many as have '
             "together the latent cells of one of 512 x 512, 16 at most.",
        section="draw", group=WHAT,
        flags=("--n_samples", "--batch_size"), script=1, line=Whole(*limits.BATCH_SIZE),
        told=False,
    ),
    Option(
        "num_images", 1, Whole(*limits.NUM_IMAGES),
        "how many pictures of each prompt",
        section="draw", also=("n_iter", "batch_count", "num_images_per_prompt"), told=False,
    ),
    Option(
        "n_iter", 1, Whole(*limits.N_ITER),
        "how often to paint n_samples",
        section="draw", group=WHAT,
        flags=("--n_iter",), also=("num_images", "num_images_per_prompt", "batch_count"),
        keyword=False, told=False,
    ),
    Fact("model_hash", "Model hash"),
    Fact("model", "Model"),
    Fact("vae_hash", "VAE hash"),
    Fact("vae", "VAE"),
    Option(
        "variation_seed", None, Seed(),
        "with variation_strength: the seed of other noise; picture i then has variation_seed + i and one seed",
        more="None draws one. A list names one for each picture, and a list of seeds stays as it is.",
        section="images", flags=("--variation_seed",), also=("subseed",), infotext="Variation seed",
        beside=("variation_strength",),
    ),
    Option(
        "variation_strength", 0.0, Number(*limits.SHARE),
        "how far the starting noise is turned to the other seed's, A1111's formula; 1 is all the way",
        section="draw", flags=("--variation_strength",), also=("subseed_strength", "variation_seed_strength"),
        infotext="Variation seed strength",
    ),
    Option(
        "seed_resize_from", None, Size(*limits.SIDE),
        "WIDTHxHEIGHT: put the noise that the seed gives at this size into the middle, A1111's rule",
        more="(width, height) in pixels.",
        section="draw", flags=("--seed_resize_from",), infotext="Seed resize from", metavar="WxH",
    ),
    Option(
        "strength", None, Number(*limits.SHARE),
        "how much of the picture is forgotten: 0 returns it",
        more="default 0.75, with a mask 1.",
        section="start", group=START, flags=("--strength",), also=("denoising_strength", "denoise"),
        infotext="Denoising strength",
    ),
    Option(
        "eta", None, Number(*limits.SHARE),
        "fresh noise in each step of DDIM (default 0) and the ancestral samplers (1)",
        section="sampling", flags=("--ddim_eta", "--eta"), infotext="Eta",
    ),
    Option(
        "eta_noise_seed_delta", 0, Whole(*limits.SEED),
        "add this to the seed for all noise but the starting noise (A1111's ENSD; 31337 is NovelAI's)",
        section="draw", flags=("--eta_noise_seed_delta", "--ensd"), also=("ensd",), infotext="ENSD",
    ),
    Option(
        "rho", None, Number(*limits.TABLE_OPTION),
        "how much denser low noise is in karras (7) and polyexponential (1)",
        section="sampling", flags=("--rho",), infotext="Schedule rho", part="sampler",
    ),
    Option(
        "beta_dist_alpha", None, Number(*limits.TABLE_OPTION),
        "of beta and beta_sigma (0.6): less than 1 makes low noise denser",
        section="sampling", flags=("--beta_dist_alpha",), infotext="Beta scheduler alpha", part="sampler",
    ),
    Option(
        "beta_dist_beta", None, Number(*limits.TABLE_OPTION),
        "of beta and beta_sigma (0.6): less than 1 makes high noise denser",
        section="sampling", flags=("--beta_dist_beta",), infotext="Beta scheduler beta", part="sampler",
    ),
    Option(
        "sigma_min", None, Number(*limits.SIGMA),
        "lowest sigma above 0 of the spacing, where it is a table (default: the model's)",
        section="sampling", flags=("--sigma_min",), infotext="Schedule min sigma", part="sampler",
    ),
    Option(
        "sigma_max", None, Number(*limits.SIGMA),
        "highest sigma of the spacing (default: the model's)",
        section="sampling", flags=("--sigma_max",), infotext="Schedule max sigma", part="sampler",
    ),
    Option(
        "discard_next_to_last", None, Switch(),
        "leave out the last sigma above 0 of the spacing",
        section="sampling", flags=("--discard_next_to_last",), also=("always_discard_next_to_last_sigma",),
        infotext="Discard penultimate sigma", part="sampler",
    ),
    Option(
        "s_churn", None, Number(*limits.SIGMA),
        "noise added before the steps of euler, heun, dpm2, heunpp2 and restart, over all steps",
        section="sampling", flags=("--s_churn",), infotext="Sigma churn", part="sampler",
    ),
    Option(
        "s_tmin", None, Number(*limits.SIGMA),
        "lowest sigma with s_churn; of sa_solver, with fresh noise",
        section="sampling", flags=("--s_tmin",), infotext="Sigma tmin", part="sampler",
    ),
    Option(
        "s_tmax", None, Number(*limits.SIGMA),
        "highest sigma with s_churn; of sa_solver, with fresh noise",
        section="sampling", flags=("--s_tmax",), infotext="Sigma tmax", part="sampler",
    ),
    Option(
        "s_noise", None, Number(0, 10),
        "factor on a sampler's fresh noise",
        section="sampling", flags=("--s_noise",), infotext="Sigma noise", part="sampler",
    ),
    Option(
        "order", None, Whole(1, 9),
        "of a sampler that has several",
        section="sampling", flags=("--order",), infotext="Solver order", part="sampler",
    ),
    Option(
        "solver_type", None, Kind(),
        "of a sampler that has several: midpoint, heun, ...",
        section="sampling", flags=("--solver_type",), infotext="Solver type", part="sampler",
    ),
    Option(
        "gamma", None, Number(0, 10),
        "of tcd: how fresh its noise is, 0 to 1; of gradient_estimation: how far a slope goes beyond the last",
        section="sampling", flags=("--gamma",), infotext="Sampler gamma", part="sampler",
    ),
    Option(
        "brownian", None, Choice({"torchsde": "torchsde"}),
        "of dpmpp_sde and its kin: torchsde takes the paths that A1111 has for a seed (needs torchsde installed)",
        section="sampling", flags=("--brownian",), infotext="Brownian paths", part="sampler",
    ),
    Fact("init_image_hash", "Init image hash"),
    Option(
        SYNTAX, "plain", Choice(dict(zip(limits.SYNTAXES, limits.SYNTAXES, strict=True))),
        "how prompts are read: as plain text, or with the brackets of a1111, comfyui or compel (docs/prompts.md)",
        section="language",
        flags=("--syntax", "--prompt_syntax"), infotext="Prompt syntax", metavar="{" + ",".join(limits.SYNTAXES) + "}",
    ),
    Option(
        "variants", False, Switch(),
        "prompts are templates, of which texts are drawn by each picture's seed: red or blue in braces with a | "
        "between (docs/prompts.md)",
        section="language", flags=("--variants",), also=("dynamic_prompts",), told=False,
    ),
    Option(
        "wildcards", None, Folder(),
        "the same, and __name__ is a line of name.txt in this folder",
        section="language", flags=("--wildcards",), also=("wildcard_dir", "wildcards_dir"), told=False,
        metavar="FOLDER",
    ),
    Fact("template", "Template"),
    Fact("negative_template", "Negative Template"),
    Option(
        "clip_skip", 1, Whole(*limits.CLIP_SKIP),
        "which layer of the text encoder is read: 1 the last, 2 the one before, as web UIs count",
        section="language", flags=("--clip_skip",), infotext="Clip skip",
    ),
    Option(
        "clip_skip_of", "both", _one_of(limits.CLIP_SKIP_OF),
        "which prompts clip_skip is of: both, as in web UIs, or only the prompt, as in diffusers, whose 1 is "
        "2 here",
        section="language", flags=("--clip_skip_of", "--clip-skip-of"), infotext="Clip skip of",
        metavar="{" + ",".join(limits.CLIP_SKIP_OF) + "}",
    ),
    Option(
        "emphasis", None, Choice(_EMPHASES, {"no_norm": "no norm"}),
        "how weights of a prompt act: original, 'no norm', ignore, none (a1111's brackets are text), comfyui "
        "(default: the syntax's own)",
        section="language", flags=("--emphasis",), infotext="Emphasis", syntaxes=("a1111", "comfyui", "compel"),
    ),
    Option(
        "regions", (), Regions(),
        "a part of the picture, as shares of its sides, with a prompt of its own, and its weight (1) if given; may be "
        "repeated (docs/regions.md)",
        more="a list of (prompt, (x, y, width, height)) or (prompt, box, weight), or such texts.",
        section="language", group=WHAT, flags=("--region",), infotext="Regions",
        metavar="X,Y,WIDTH,HEIGHT[,WEIGHT]:PROMPT",
    ),
    Option(
        "old_schedule", False, Switch(),
        "read the numbers of [a:b:0.5] as A1111 did before 1.6: below 1 a share of each pass, else a step of it",
        section="language", flags=("--old_schedule", "--old-schedule"), also=("use_old_scheduling",),
        infotext="Old prompt editing timelines", syntaxes=("a1111",),
    ),
    Option(
        "lora_dir", None, Folder(),
        "folder with the LoRAs that <lora:name:0.8> in a prompt names, with --syntax a1111",
        section="language", group=WITH, flags=("--lora_dir", "--lora-dir"), told=False, syntaxes=("a1111", "compel"),
        metavar="FOLDER",
    ),
    Option(
        "guidance_interval", (0.0, 1.0), Interval(*limits.SHARE),
        "guide only levels of this part of the noise schedule; 0 is its clean end",
        more="(low, high): only levels t of T with low <= t / T < high are guided, the others take half "
             "the time.",
        section="guidance", group=FASTER, flags=("--guidance_interval",), infotext="Guidance interval",
        metavar=("LOW", "HIGH"),
    ),
    Option(
        "cache_interval", 1, Whole(*limits.CACHE_INTERVAL),
        "steps from one whole UNet to the next",
        more="between them its outermost blocks alone are computed: docs/knobs.md.",
        section="sampling", group=FASTER, flags=("--cache_interval",), infotext="Cache interval",
    ),
    Option(
        "cache_depth", 1, Whole(*limits.CACHE_DEPTH),
        "blocks computed at the steps between",
        more="on either way.",
        section="sampling", group=FASTER,
        flags=("--cache_depth",), infotext="Cache depth", beside=("cache_interval",),
    ),
    Option(
        "merge_ratio", 0.0, Number(*limits.MERGE_RATIO),
        "share of tokens merged where most are",
        more="0 to 0.75, before the finest self-attentions.",
        section="sampling", group=FASTER, flags=("--merge_ratio",), infotext="Token merging ratio",
    ),
    Option(
        "merge_seed", None, Whole(*limits.SEED),
        "draws the tokens that others are merged into",
        section="sampling", group=FASTER,
        flags=("--merge_seed",), infotext="Token merging seed", beside=("merge_ratio",),
    ),
    Option(
        "freeu", None, Numbers(4, *limits.FREEU),
        "FreeU: factors of a UNet's backbone and of its skips' low frequencies; 1.5,1.6,0.9,0.2 for Stable "
        "Diffusion 1",
        more="(b1, b2, s1, s2) of the lowest two resolutions; None = 1 each: docs/guidance.md.",
        section="network", group=BESIDE, flags=("--freeu",), infotext="FreeU", metavar="B1,B2,S1,S2",
    ),
    Option(
        "pag_scale", 0.0, Number(*limits.GUIDANCE_SCALE),
        "perturbed-attention guidance: 3 is usual; half as much time again",
        section="network", group=BESIDE, flags=("--pag", "--pag-scale"), infotext="PAG Scale",
    ),
    Option(
        "sag_scale", 0.0, Number(*limits.GUIDANCE_SCALE),
        "self-attention guidance: 0.75 is usual; half as much time again",
        section="network", group=BESIDE, flags=("--sag", "--sag-scale"), infotext="SAG Guidance Scale",
    ),
    Option(
        "tiling", False, Switch(),
        "a picture whose opposite edges meet",
        section="network", group=BESIDE, flags=("--tiling",), infotext="Tiling",
    ),
    Option(
        "attention_slicing", False, Switch(),
        "attention for a few heads at a time: less memory on devices without a fused kernel",
        section="network", group=BESIDE, flags=("--attention-slicing", "--attention_slicing"), told=False,
    ),
    Option(
        "plms", False, Switch(),
        "the same as --sampler plms",
        section="sampling", flags=("--plms",), keyword=False, told=False,
    ),
    Option(
        "dpm_solver", False, Switch(),
        "goes before --plms",
        section="sampling", flags=("--dpm_solver",), keyword=False, told=False,
    ),
    Option(
        "fixed_code", False, Switch(),
        "begin every batch with the same noise",
        section="draw", flags=("--fixed_code",), told=False,
    ),
    Option(
        "lora", (), Files("ldm.cli.adapters", "lora_flag"),
        "a LoRA or its kin, at a strength (1 = as trained), in the text encoder at another; may be "
        "repeated",
        section="network", group=WITH, flags=("--lora",), also=("loras",), keyword=False, told=False,
        metavar="FILE[:WEIGHT[:TEXT_WEIGHT]]",
    ),
    Option(
        "embedding", (), Files("ldm.cli.adapters", "embedding_flag"),
        "a textual inversion and its name in prompts, or a folder of them; may be repeated",
        section="network", group=WITH,
        flags=("--embedding",), also=("embeddings", "textual_inversion"), keyword=False,
        told=False, metavar="FILE[:TOKEN]",
    ),
    _said_of_adapter(
        "control", Kind(),
        "a ControlNet; --hint and the flags that follow are said of it; may be repeated (docs/controls.md)",
        also=("controlnet", "control_net"), metavar="FILE", begins=True,
    ),
    _said_of_adapter("t2i_adapter", Kind(), "a T2I-Adapter, in the same way", metavar="FILE", begins=True),
    _said_of_adapter(
        "hint", Kind(),
        "what to paint along: a ready map, or a picture for --preprocess (default: the picture to begin with); "
        "several are a batch's, one each",
        also=("control_image", "control_hint"), metavar="PICTURE",
    ),
    _said_of_adapter(
        "preprocess", Kind(),
        "how to make the hint of it: canny, inpaint, invert, scribble, shuffle, threshold, tile; with numbers as "
        "canny:100:200",
        also=("preprocessor", "control_module"), metavar="KIND[:NUMBER...]",
    ),
    _said_of_adapter(
        "control_scale", Number(-100, 100), "how strongly (default: 1)",
        also=("control_weight", "controlnet_conditioning_scale", "control_strength"),
    ),
    _said_of_adapter(
        "control_start", Number(*limits.SHARE), "share of the steps from which on (default: 0)",
        also=("control_guidance_start",),
    ),
    _said_of_adapter(
        "control_end", Number(*limits.SHARE), "share of the steps up to which (default: 1)",
        also=("control_guidance_end",),
    ),
    _said_of_adapter(
        "control_mode", Choice(CONTROL_MODES, _CONTROL_WORDS),
        "who leads where prompt and hint differ: balanced, prompt (soft weights), control (guess mode); or middle, "
        "the middle's map alone",
        metavar="MODE",
    ),
    _said_of_adapter(
        "control_fit", Choice(dict.fromkeys(("crop", "pad", "stretch"), "")),
        "of a hint of another aspect: crop, pad or stretch (default: crop)", metavar="FIT",
    ),
    _said_of_adapter(
        "ip_adapter", Kind(),
        "an IP-Adapter, which paints after a picture; --ip-image and the flags that follow are said of it; may be "
        "repeated (docs/controls.md)",
        metavar="FILE", begins=True,
    ),
    _said_of_adapter(
        "ip_image", Kind(), "the picture to paint after; several are seen together", also=("ip_adapter_image",),
        metavar="PICTURE",
    ),
    _said_of_adapter(
        "ip_scale", Number(-100, 100), "how strongly (default: 1)", also=("ip_adapter_scale", "ip_weight"),
    ),
    _said_of_adapter(
        "ip_start", Number(*limits.SHARE), "share of the steps from which on (default: 0)",
        also=("ip_adapter_start",),
    ),
    _said_of_adapter(
        "ip_end", Number(*limits.SHARE), "share of the steps up to which (default: 1)", also=("ip_adapter_end",)
    ),
    _said_of_adapter(
        "ip_mask", Kind(),
        "where in what is painted the picture has a say: white; one, or one for each --ip-image",
        also=("ip_adapter_mask",), metavar="PICTURE",
    ),
    _said_of_adapter(
        "image_encoder", Kind(),
        "CLIP's vision model that the IP-Adapter was trained with, folder or file (default: of the one before)",
        also=("clip_vision",), metavar="PATH",
    ),
    *(Fact(f"controlnet_{i}", f"ControlNet {i}") for i in range(3)),
    Option(
        "hires_scale", None, Number(1, 32),
        "paint a second time, so many times as large, beginning with what the first gave; 2 is usual",
        more="sides are rounded down to multiples of the model's f (8).",
        section="further", group=HIRES,
        flags=("--hires_scale", "--hires-scale"), also=("hr_scale", "hires_upscale"),
        infotext="Hires upscale",
    ),
    Option(
        "hires_size", None, Size(0, limits.SIDE[1]),
        "the same to WIDTHxHEIGHT pixels; a side of 0 follows from the other, and another aspect is cut",
        more="(width, height) in place of hires_scale.",
        section="further", group=HIRES,
        flags=("--hires_size", "--hires-size"), also=("hires_resize",), infotext="Hires resize",
        metavar="WxH",
    ),
    Option(
        "hires_steps", 0, Whole(0, limits.STEPS[1]),
        "steps that the second pass runs, whatever its strength, as A1111 counts; 0 is as many as the first",
        section="further", group=HIRES,
        flags=("--hires_steps", "--hires-steps"), also=("hr_second_pass_steps",),
        infotext="Hires steps",
    ),
    Option(
        "hires_upscaler", "latent", Upscaler(UPSCALERS),
        "how the first pass is enlarged: " + ", ".join(UPSCALERS),
        section="further", group=HIRES, flags=("--hires_upscaler", "--hires-upscaler"), also=("hr_upscaler",),
        infotext="Hires upscaler", beside=("hires_scale", "hires_size"), metavar="NAME",
    ),
    Option(
        "hires_strength", 0.7, Number(*limits.SHARE),
        "how much of the first pass the second forgets (A1111's denoising strength); above 0",
        section="further", group=HIRES,
        flags=("--hires_strength", "--hires-strength"), also=("hires_denoising_strength",),
    ),
    Option(
        "hires_prompt", None, Prompt(),
        "prompt of the second pass (default: the first's)",
        more="one text for all.",
        section="further", group=HIRES,
        flags=("--hires_prompt", "--hires-prompt"), also=("hr_prompt",), infotext="Hires prompt",
    ),
    Option(
        "hires_negative_prompt", None, Prompt(),
        "its negative prompt (default: the first's)",
        more="one text for all.",
        section="further", group=HIRES,
        flags=("--hires_negative_prompt", "--hires-negative-prompt"), also=("hr_negative_prompt",),
        infotext="Hires negative prompt",
    ),
    Option(
        "hires_sampler", None, Words(SAMPLER_WORDS),
        "its sampler, with eta and options of that sampler's own (default: the first's)",
        section="further", group=HIRES,
        flags=("--hires_sampler", "--hires-sampler"), also=("hr_sampler_name",),
        infotext="Hires sampler",
    ),
    Option(
        "hires_spacing", None, Words(SPACING_WORDS, {"Uniform": "normal", "Automatic": None}),
        "which levels it visits (default: as the first; with hires_sampler, that sampler's own)",
        section="further", group=HIRES, flags=("--hires_spacing", "--hires-spacing"), also=("hr_scheduler",),
        infotext="Hires schedule type",
    ),
    Option(
        "hires_guidance_scale", None, Number(*limits.GUIDANCE_SCALE),
        "its guidance (default: the first's)",
        section="further", group=HIRES,
        flags=("--hires_guidance_scale", "--hires-guidance-scale", "--hires_cfg"), also=("hr_cfg",),
        infotext="Hires CFG Scale",
    ),
    Option(
        "upscaler_dir", None, Folder(),
        "folder with upscalers' weight files (ESRGAN and its kin), which are then called by their names",
        section="output", group=WITH, flags=("--upscaler_dir", "--upscaler-dir"), told=False, metavar="FOLDER",
    ),
    Option(
        "resize_mode", "just resize", Choice(RESIZE_MODES, _by_a1111(RESIZE_MODES)),
        "how a picture of another aspect comes to --W x --H: " + ", ".join(RESIZE_MODES),
        section="start", group=START, flags=("--resize_mode", "--resize-mode"), infotext="Resize mode", metavar="MODE",
    ),
    Option(
        "color_match", False, Switch(),
        "give what is painted the colours of the picture that it begins with (A1111's colour correction)",
        section="start", group=START, flags=("--color_match", "--color-match"),
        also=("color_correction", "img2img_color_correction"), infotext="Color correction",
    ),
    Option(
        "outpaint", None, Wholes(4, 0, limits.SIDE[1]),
        "LEFT,UP,RIGHT,DOWN: let the picture grow by so many pixels, and paint what is new",
        more="(left, up, right, down).",
        section="start", group=START, flags=("--outpaint",), infotext="Outpaint", metavar="L,U,R,D",
    ),
    Option(
        "loops", 1, Whole(1, 64),
        "repaint what came of it, so many times in all, each with the next seed",
        section="further", group=START, flags=("--loops",), infotext="Loops",
    ),
    Option(
        "loop_strength", None, Number(*limits.SHARE),
        "strength of the last of these loops (default: of all)",
        section="further", group=START, flags=("--loop_strength", "--loop-strength"),
        also=("final_denoising_strength",), infotext="Final denoising strength", beside=("loops",),
    ),
    Option(
        "loop_curve", "linear", Choice(CURVES, _by_a1111(CURVES)),
        "how strength goes there: linear, aggressive (most of it soon), lazy",
        section="further", group=START, flags=("--loop_curve", "--loop-curve"),
        also=("denoising_curve", "denoising_strength_curve"), infotext="Denoising curve", beside=("loops",),
        metavar="CURVE",
    ),
    Option(
        "upscale_by", None, Number(1, 8),
        "enlarge the picture so many times, and repaint it in tiles of --W x --H (A1111's SD upscale); 2 is usual",
        section="further", group=START, flags=("--upscale_by", "--upscale-by"), also=("scale_factor",),
        infotext="SD upscale factor",
    ),
    Option(
        "upscale_overlap", 64, Whole(0, limits.SIDE[1]),
        "pixels over which neighbouring tiles are mixed",
        section="further", group=START, flags=("--upscale_overlap", "--upscale-overlap"), also=("tile_overlap",),
        infotext="SD upscale overlap", beside=("upscale_by",),
    ),
    Option(
        "upscaler", "lanczos", Upscaler(PICTURE_UPSCALERS),
        "how it is enlarged before: lanczos, nearest, a weight file, or its name in --upscaler_dir",
        section="further", group=START, flags=("--upscaler",), infotext="SD upscale upscaler",
        beside=("upscale_by",), metavar="NAME",
    ),
    Option(
        "mask_blur", 0, Whole(0, 256),
        "soften the mask's edge: standard deviation in pixels; web UIs have 4",
        section="start", group=MASK, flags=("--mask_blur", "--mask-blur"), infotext="Mask blur",
    ),
    Option(
        "mask_blur_x", None, Whole(0, 256),
        "sideways, where that is another",
        section="start", group=MASK, flags=("--mask_blur_x", "--mask-blur-x"), infotext="Mask blur x",
    ),
    Option(
        "mask_blur_y", None, Whole(0, 256),
        "up and down, where that is another",
        section="start", group=MASK, flags=("--mask_blur_y", "--mask-blur-y"), infotext="Mask blur y",
    ),
    Option(
        "mask_invert", False, Switch("Inpaint not masked"),
        "repaint what is black, and keep what is white",
        section="start", group=MASK, flags=("--mask_invert", "--mask-invert"), also=("inpainting_mask_invert",),
        infotext="Mask mode",
    ),
    Option(
        "inpaint_fill", "original", Choice(FILLS),
        "what the model sees under the mask: " + ", ".join(FILLS),
        section="start", group=MASK, flags=("--inpaint_fill", "--inpaint-fill"),
        also=("inpainting_fill", "masked_content"), infotext="Masked content", metavar="FILL",
    ),
    Option(
        "inpaint_full_res", False, Switch("Only masked"),
        "paint the masked region alone, at the whole size, and lay it back",
        section="start", group=MASK, flags=("--inpaint_full_res", "--inpaint-full-res"), also=("only_masked",),
        infotext="Inpaint area",
    ),
    Option(
        "inpaint_full_res_padding", 32, Whole(0, 1024),
        "pixels around the mask that belong to that region",
        section="start", group=MASK, flags=("--inpaint_full_res_padding", "--inpaint-full-res-padding"),
        also=("only_masked_padding",), infotext="Masked area padding", beside=("inpaint_full_res",),
    ),
    Fact("lora_hashes", "Lora hashes"),
    Fact("ti_hashes", "TI hashes"),
    Option(
        "rng", "image", Choice(RNG_WORDS, {"cpu": "image", "gpu": "nv"}),
        "a generator for each picture; what an NVIDIA GPU draws, as in web UIs (64 bits of a seed); or "
        "one for all as CompVis's scripts, diffusers or ComfyUI draw",
        more='"image" draws image i from its own CPU generator; "nv" draws it as an NVIDIA GPU does, on '
             'any device; "compvis" seeds the global generators once, at the call, and draws whole '
             "batches in the original's order: picture encoding, x_T, then each step. With \"compvis\" a "
             "picture depends on its place in its batch. \"diffusers\" draws all pictures of a call from one CPU "
             "generator, as generator= does there; \"comfyui\" draws their x_T so, and the rest as the GPU does. "
             "With these two a picture depends on its place in its call.",
        section="draw", flags=("--rng",), infotext="RNG", always=True, metavar="{" + ",".join(RNG_WORDS) + "}",
    ),
    Option(
        "rounding", "truncate", _one_of(limits.ROUNDINGS),
        "how a picture becomes bytes: truncate 255 x (CompVis, web UIs), truncate_127.5 (ControlNet's 127.5 x + "
        "127.5), round (diffusers)",
        section="output", flags=("--rounding",), infotext="Rounding", metavar="{" + ",".join(limits.ROUNDINGS) + "}",
    ),
    Option(
        "arithmetic", "own", _one_of(limits.ARITHMETICS),
        "in whose tables and order of operations steps are computed: our own float64 factors, or digit by digit as "
        "diffusers does (ddim, plms, euler, euler_a, dpmpp_2m)",
        section="sampling", flags=("--arithmetic",), infotext="Arithmetic",
        metavar="{" + ",".join(limits.ARITHMETICS) + "}",
    ),
    Option(
        "first_noise", None, _one_of(limits.FIRST_NOISES),
        "how much noise samplers of k-diffusion begin with: sigma, or unit, as if there were no signal (ComfyUI's, "
        "A1111's SGM noise multiplier)",
        more="None is the sampler's own.",
        section="sampling", flags=("--first_noise", "--first-noise"), infotext="First noise",
        metavar="{" + ",".join(limits.FIRST_NOISES) + "}",
    ),
    Option(
        "final_alpha", None, _one_of(limits.FINAL_ALPHAS),
        "where the last step goes: one, the clean end, or lowest, the model's level 0 (DDIM's and PLMS's)",
        more="None is what sampler and spacing say.",
        section="sampling", flags=("--final_alpha", "--final-alpha"), infotext="Final alpha",
        metavar="{" + ",".join(limits.FINAL_ALPHAS) + "}",
    ),
    Option(
        "strength_rule", "compvis", _one_of(limits.STRENGTH_RULES),
        "how many steps strength leaves: its share (compvis), never all (bubbliiiing), one more (a1111), or all, as "
        "the last of a longer run (comfyui)",
        section="start", group=START, flags=("--strength_rule", "--strength-rule"), infotext="Strength rule",
        metavar="{" + ",".join(limits.STRENGTH_RULES) + "}",
    ),
    Option(
        "mask_rule", "compvis", _one_of(limits.MASK_RULES),
        "how each step keeps what the mask keeps: noised afresh (compvis), by the starting noise (diffusers), in the "
        "predicted clean sample (a1111), in both (comfyui)",
        section="start", group=MASK, flags=("--mask_rule", "--mask-rule"), infotext="Mask rule",
        metavar="{" + ",".join(limits.MASK_RULES) + "}",
    ),
    Option(
        "mask_cells", "any", _one_of(limits.MASK_CELLS),
        "which latent cells a mask repaints: those with any marked pixel, the nearest pixel's, or bilinear and bicubic "
        "means, the second rounded",
        section="start", group=MASK, flags=("--mask_cells", "--mask-cells"), infotext="Mask cells",
        metavar="{" + ",".join(limits.MASK_CELLS) + "}",
    ),
    Option(
        "kept", "pixels", _one_of(limits.KEPT),
        "what comes back unchanged where the mask keeps: the picture's pixels, byte for byte, or only its latents",
        section="start", group=MASK, flags=("--kept",), infotext="Kept", metavar="{" + ",".join(limits.KEPT) + "}",
    ),
    Option(
        "output_type", "pil", Choice(dict.fromkeys(("pil", "np", "pt", "latent"), "")),
        "what the pictures are given as",
        more='"pil"; "np" (n, height, width, 3) and "pt" (n, 3, height, width) in [0, 1]; "latent".',
        section="output", told=False,
    ),
    Fact("script", "Script"),
    *(
        fact
        for axis in "xyz"
        for fact in (
            Fact(f"{axis}_type", f"{axis.upper()} Type"),
            Fact(f"{axis}_values", f"{axis.upper()} Values"),
            Fact(f"fixed_{axis}_values", f"Fixed {axis.upper()} Values"),
        )
    ),
    Fact("version", "Version"),
)  # fmt: skip


# --- views of the table ---------------------------------------------------------------------------


def options() -> tuple[Option, ...]:
    """List all options."""
    return tuple(one for one in TABLE if isinstance(one, Option))


def keywords() -> dict[str, Any]:
    """Give the keywords of StableDiffusion.plan with their defaults."""
    return {one.name: one.default for one in options() if one.keyword}


def told() -> tuple[Option, ...]:
    """List the options that a picture's metadata say."""
    return tuple(one for one in options() if one.told)


def option(name: str) -> Option:
    """Give the option of a name."""
    return next(one for one in options() if one.name == name)


def of_samplers() -> tuple[str, ...]:
    """Name the options that only some samplers or spacings have."""
    return tuple(one.name for one in options() if one.part == "sampler")


def repeated() -> tuple[str, ...]:
    """Name the lists of files, which flags that may be given several times fill."""
    return tuple(dict.fromkeys(one.dest for one in options() if one.kind.is_repeated))


def line_names() -> dict[str, Option]:
    """Give the options that a line of a prompt file may set, by each of their names."""
    return _line_names(TABLE)


@functools.lru_cache(maxsize=4)
def _line_names(table: tuple[Option | Fact, ...]) -> dict[str, Option]:
    found = [one for one in table if isinstance(one, Option) and one.line_kind is not None]
    return {name: one for one in found for name in one.names}


def other_names(get: Callable[[Option], bool]) -> dict[str, str]:
    """Give what other programs, and our own flags, call the options that `get` takes: their name -> the option's."""
    return {name: one.name for one in options() if get(one) for name in one.names if name != one.name}


def describe() -> str:
    """Describe the keywords as the `Args:` of a docstring does."""
    entries = (
        f"{one.name}: {one.words.format(scale='7.5')}" + (f"; {one.more}" if one.more else "")
        for one in options()
        if one.keyword
    )
    return "\n".join(textwrap.fill(entry, 110, subsequent_indent=" " * 4) for entry in entries)


def schema() -> dict[str, Any]:
    """Describe a request's options as a JSON Schema (2020-12) of one object: for an HTTP server, or a page's widgets.

    Each property has its description and its default, `x-section` (see SECTIONS) and `x-group`, under which --help
    lists it. What the model decides, or several options together, StableDiffusion.plan checks.
    """
    properties = {}
    for one in options():
        if not one.keyword and one.name != "prompt":
            continue
        ways = [one.kind.schema()]
        if one.each:
            ways.append({"type": "array", "items": ways[0], "minItems": 1})
        if one.keyword and one.default is None:
            ways.append({"type": "null"})
        values = ways[0] if len(ways) == 1 else {"anyOf": ways}
        about = {"description": one.words.format(scale="7.5"), "x-section": one.section, "x-group": one.group}
        if one.keyword:
            about["default"] = None if one.default is None else one.kind.plain(one.default)
        properties[one.name] = {**values, **about}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": properties,
        "required": ["prompt"],
        "additionalProperties": False,
    }


def defaults_of(section: str) -> dict[str, Any]:
    """Give the keywords of a section with their defaults."""
    return {one.name: one.default for one in options() if one.section == section and one.keyword}


class Values:
    """Values by name, read as attributes and never changed: those of options, and others beside them."""

    def __init__(self, **values: Any):
        self.__dict__.update(values)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen; replace({name}=...) makes another one")

    @classmethod
    def of(cls, section: str, values: Mapping[str, Any], **others: Any) -> Any:
        """Take the options of a section out of values by name, with others beside them."""
        own = {
            one.name: values[one.name] for one in options() if one.section == section and one.name in values
        }
        return cls(**own, **others)

    def replace(self, **changes: Any) -> Any:
        """Make another one, of which these values differ."""
        unknown = changes.keys() - self.__dict__.keys()
        if unknown:
            raise TypeError(f"{type(self).__name__} has no {', '.join(sorted(unknown))}")
        return type(self)(**{**self.__dict__, **changes})

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"
        )

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    __hash__ = None
