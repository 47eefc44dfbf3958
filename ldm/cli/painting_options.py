"""The options of the painting scripts, and what --like fills in of them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ldm import limits
from ldm.cli.adapters import embedding_flag, lora_flag, told_adapters
from ldm.cli.parser import Parser, integer, number, seed
from ldm.cli.prompts import rng
from ldm.cli.running import say
from ldm.errors import FormatError, UsageError

# Words for what is computed in; torch's names for them.
PRECISIONS = {"full": "float32", "half": "float16", "bfloat16": "bfloat16"}
DEFAULT_PROMPT = "a large red circle above a small blue square on a white background"
COMPVIS_PROMPT = "a painting of a virus monster playing guitar"
GRID_AT_MOST = 64  # pictures in one grid
GRID_ROW = 8  # pictures in its row, where no option says
SEED_HELP = "picture i has seed + i; -1 or 'random' draws one; 32 bits count: 2^32 + 5 paints what 5 paints"
# What trades a little fidelity for time, in the words of StableDiffusion.plan: docs/knobs.md.
KNOBS = ("guidance_interval", "cache_interval", "cache_depth", "merge_ratio", "merge_seed")


# What a script needs beside a prompt.
EXAMPLES = {"img2img.py": "--init-img a.png ", "inpaint.py": "--init-img a.png --mask m.png "}
# Other programs' names of options -> ours; "_" stands for "-" as well.
OTHER_FLAGS = {
    "cfg": "scale",
    "guidance": "scale",
    "model": "ckpt",
    "weights": "ckpt",
    "checkpoint": "ckpt",
    "ckpt_path": "ckpt",
    "model_path": "ckpt",
    "num_images": "n_iter",
    "num_images_per_prompt": "n_iter",
    "batch_count": "n_iter",
    "num_inference_steps": "ddim_steps",
    "num_steps": "ddim_steps",
    "sampler_name": "sampler",
    "scheduler": "sampler",
    "schedule_type": "spacing",
    "n_prompt": "negative_prompt",
    "negative": "negative_prompt",
    "image": "init_img",
    "init_image": "init_img",
    "mask_image": "mask",
    "denoising_strength": "strength",
    "denoise": "strength",
    "prompts_file": "from_file",
    "prompt_file": "from_file",
    "output": "outdir",
    "output_dir": "outdir",
    "out_dir": "outdir",
    "low_vram": "lowvram",
    "loras": "lora",
    "embeddings": "embedding",
    "textual_inversion": "embedding",
}
FORMATS = {"png": ".png", "jpg": ".jpg", "jpeg": ".jpg", "webp": ".webp"}


def add_optimize(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--optimize", action="store_true", help="compute faster on this machine, same numbers up to rounding"
    )


def painting_parser(name: str, about: str, *, outdir: str, scale: float) -> Parser:
    """Make the parser of a painting script: CompVis's options by their names, others' names beside them.

    Args:
        scale: the guidance that CompVis's script has for Stable Diffusion v1: where neither options nor model say one.
    """
    beside = EXAMPLES.get(name, "")
    usage = (
        f"{name} {beside}--prompt TEXT [options]\n       {name} {beside}--prompt 'a red circle' --steps 20"
    )
    p = _PaintingParser(prog=name, description=about, usage=usage)
    p.also = OTHER_FLAGS
    p.set_defaults(v1_scale=scale)
    _add_prompts(p.add_argument_group("what to paint"))
    _add_sampling(p.add_argument_group("how"), scale)
    _add_knobs(p.add_argument_group("faster, for a little fidelity (docs/knobs.md)"))
    _add_model(p.add_argument_group("with what"))
    _add_adapters(p.add_argument_group("with what besides (docs/adapters.md)"))
    _add_output(p.add_argument_group("where to"), outdir)
    return p


def _batch_size(text: str) -> int | str:
    """Read a batch size as an argparse type: a whole number or "auto"."""
    return text if text == limits.AUTO else integer(*limits.BATCH_SIZE)(text)


def _add_prompts(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prompt",
        help="what to paint (default: one that suits the model); one that begins with - as --prompt=-x",
    )
    group.add_argument("--negative_prompt", "--negative-prompt", default="", help="what to keep away from")
    group.add_argument(
        "--from-file", "--from_file", metavar="FILE",
        help="prompts, one a line, also with options (--prompt a cat --steps 20), or .jsonl; # begins a comment",
    )  # fmt: skip
    group.add_argument(
        "--like", metavar="PICTURE",
        help="paint as this picture says it was painted; options given beside it go before",
    )  # fmt: skip
    group.add_argument("--H", "--height", type=integer(*limits.SIDE), help="pixels (default: the model's)")
    group.add_argument("--W", "--width", type=integer(*limits.SIDE), help="pixels (default: the model's)")
    group.add_argument(
        "--n_samples",
        "--batch_size",
        type=_batch_size,
        default=1,
        help="pictures painted at once; auto: so many as are fast, which rounds otherwise than one at a time",
    )
    group.add_argument(
        "--n_iter", type=integer(*limits.N_ITER), default=1, help="how often to paint n_samples"
    )
    group.add_argument("--seed", type=seed, default=42, help=SEED_HELP)


def _add_sampling(group: argparse._ArgumentGroup, scale: float) -> None:
    group.add_argument(
        "--ddim_steps", "--steps", type=integer(*limits.STEPS),
        help="denoising steps (default: the model's; for Stable Diffusion v1: 50)",
    )  # fmt: skip
    group.add_argument(
        "--scale", "--cfg-scale", "--cfg_scale", "--guidance_scale", type=number(*limits.GUIDANCE_SCALE),
        help="guidance: how strictly to follow the prompt (default: the model's; for Stable Diffusion v1: "
        f"{scale:g})",
    )  # fmt: skip
    group.add_argument(
        "--sampler",
        help="ddim (default), plms, ddpm, dpm_solver, dpmpp_2m, euler, euler_a, heun, dpm2, dpm2_a, lms or "
        "dpmpp_2s_a; also with its spacing, as 'DPM++ 2M Karras'",
    )
    group.add_argument(
        "--spacing", help="which levels are visited: karras, exponential, sgm_uniform, trailing, ..."
    )
    group.add_argument("--plms", action="store_true", help="the same as --sampler plms")
    group.add_argument("--dpm_solver", action="store_true", help="goes before --plms")
    group.add_argument(
        "--ddim_eta",
        "--eta",
        type=number(*limits.SHARE),
        help="fresh noise in each step of DDIM (default 0) and the ancestral samplers (1)",
    )
    group.add_argument("--fixed_code", action="store_true", help="begin every batch with the same noise")
    group.add_argument(
        "--rng", type=rng, default="image", metavar="{image,nv,compvis}",
        help="a generator for each picture; what an NVIDIA GPU draws, as in web UIs (64 bits of a seed); or one for "
        "all in the order of CompVis's scripts",
    )  # fmt: skip


def _add_knobs(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--guidance_interval", nargs=2, metavar=("LOW", "HIGH"), type=number(*limits.SHARE), default=(0.0, 1.0),
        help="guide only levels of this part of the noise schedule; 0 is its clean end",
    )  # fmt: skip
    group.add_argument(
        "--cache_interval",
        type=integer(*limits.CACHE_INTERVAL),
        default=1,
        help="steps from one whole UNet to the next",
    )
    group.add_argument(
        "--cache_depth",
        type=integer(*limits.CACHE_DEPTH),
        default=1,
        help="blocks computed at the steps between",
    )
    group.add_argument(
        "--merge_ratio",
        type=number(*limits.MERGE_RATIO),
        default=0.0,
        help="share of tokens merged where most are",
    )
    group.add_argument(
        "--merge_seed", type=integer(*limits.SEED), help="draws the tokens that others are merged into"
    )


def _add_model(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--ckpt", help="model file or diffusers folder (default: the model in the box)")
    group.add_argument("--config", help="its YAML file (default: the one beside it, or read off the weights)")
    group.add_argument(
        "--ignore-keys", "--ignore_keys", action="append", default=[], metavar="PATTERN",
        help="leave out of --ckpt the tensors with this name, beginning or shell pattern; may be repeated",
    )  # fmt: skip
    group.add_argument("--vae", help="file whose VAE replaces the model's")
    group.add_argument("--tokenizer", help="folder or file of the tokenizer (default: the one in ldm)")
    group.add_argument("--device", default="auto", help="cuda, mps, cpu, or auto for the best there is")
    group.add_argument(
        "--precision", choices=("autocast", *PRECISIONS), default="autocast",
        help="of the UNet; autocast is full where there is no CUDA",
    )  # fmt: skip
    add_optimize(group)
    group.add_argument(
        "--compile", action="store_true", help="the same by torch.compile, which takes minutes at first"
    )
    group.add_argument(
        "--tiled_vae",
        action="store_true",
        help="--optimize, with VAE tiling, exact, for large pictures",
    )
    group.add_argument(
        "--sliced_vae", action="store_true", help="--optimize, with VAE slicing: picture by picture"
    )
    group.add_argument(
        "--lowvram",
        action="store_true",
        help="sequential CPU offload: copy the weights to the GPU part by part (slow)",
    )
    group.add_argument(
        "--vae_precision",
        choices=tuple(PRECISIONS),
        default="full",
        help="what the VAE computes in; one that overflows goes on in full precision",
    )
    group.add_argument("--C", type=integer(1, 64), help="latent channels; checked against the model")
    group.add_argument("--f", type=integer(1, 64), help="pixels a latent cell; checked against the model")


def _add_adapters(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--lora", type=lora_flag, action="append", default=[], metavar="FILE[:WEIGHT[:TEXT_WEIGHT]]",
        help="a LoRA or its kin, at a strength (1 = as trained), in the text encoder at another; may be repeated",
    )  # fmt: skip
    group.add_argument(
        "--embedding", type=embedding_flag, action="append", default=[], metavar="FILE[:TOKEN]",
        help="a textual inversion and its name in prompts, or a folder of them; may be repeated",
    )  # fmt: skip


def _add_output(group: argparse._ArgumentGroup, outdir: str) -> None:
    group.add_argument("--outdir", default=outdir, help="folder for pictures and grids")
    group.add_argument("--format", choices=tuple(FORMATS), default="png", help="of the pictures and grids")
    group.add_argument("--skip_grid", action="store_true", help="save no grid of all pictures")
    group.add_argument("--skip_save", action="store_true", help="save no single pictures")
    group.add_argument(
        "--n_rows", type=integer(0, 1024), default=0, help="pictures in a grid row; 0 = n_samples"
    )
    group.add_argument("--no_metadata", action="store_true", help="save no metadata in the pictures")


# A parameter in a picture's metadata -> the option that sets it; LIKE_ALSO go to StableDiffusion.plan as they are.
LIKE = {
    "prompt": "prompt",
    "negative_prompt": "negative_prompt",
    "seed": "seed",
    "steps": "ddim_steps",
    "sampler": "sampler",
    "guidance_scale": "scale",
    "eta": "ddim_eta",
    "spacing": "spacing",
    "height": "H",
    "width": "W",
    "rng": "rng",
    "strength": "strength",
    **{name: name for name in KNOBS},
}
LIKE_ALSO = ("guidance_rescale",)


class _PaintingParser(Parser):
    """A parser whose --like fills in what the command line leaves open."""

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        found = super().parse_args(args, namespace)
        found.like_also, found.like_adapters = {}, []
        if found.like is not None:
            self._repeat(found, self.given(args))
        return found

    def _repeat(self, found: argparse.Namespace, given: set[str]) -> None:
        from ldm.metadata import read_metadata

        parameters = read_metadata(found.like)
        if not parameters.get("prompt") and "seed" not in parameters:
            raise FormatError(
                f"--like '{found.like}' does not say how it was painted; give a picture that does"
            )
        if parameters.get("mode") in ("img2img", "inpaint") and not hasattr(found, "strength"):
            script = parameters["mode"]
            raise UsageError(
                f"--like '{found.like}' was painted from another picture; use {script}.py and give that one "
                "as --init-img"
            )
        if "from_file" in given:
            given = given | {"prompt"}
        if given & {"plms", "dpm_solver"}:
            given = given | {"sampler"}
        if "sampler" in given:  # these were the other sampler's
            given = given | {"spacing", "ddim_eta"}
        for name, option in LIKE.items():
            value = parameters.get(name)
            if option in given or value is None or not hasattr(found, option):
                continue
            if name == "rng":
                try:
                    value = rng(str(value))
                except argparse.ArgumentTypeError:  # another program's word for where it draws
                    continue
            setattr(found, option, value)
        found.like_also = {name: parameters[name] for name in LIKE_ALSO if parameters.get(name) is not None}
        found.like_adapters = told_adapters(parameters)
        if parameters.get("rng") == "compvis" and parameters.get("batch_index"):
            say(
                f"{found.like}: was number {parameters['batch_index'] + 1} of its batch, and depends on that place; "
                "what is painted here is the first"
            )
