"""Other programs' words for what is here: keywords and attributes, and what to write instead."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ldm import options
from ldm.errors import OptionError, nearest

AT_MOST = 3  # unknown keywords that one error tells of

# A keyword elsewhere -> ours. A target that a function does not have is no answer there and is passed over.
KEYWORDS = {
    # what neither a flag nor a line of a prompt file is called
    "generator": "seed",
    "mask_image": "mask",
    "init_image": "image",
    "callback_on_step_end": "callback",
    "callback_steps": "callback",
    "latents": "seed",
    "torch_dtype": "dtype",
    "original_config": "config",
    "original_config_file": "config",
    "config_file": "config",
    "disable_progress_bar": "progress",
    "sampler_index": "sampler",
    "denoising": "strength",
    "init_images": "image",
    "unconditional_guidance_scale": "guidance_scale",
    "init_img": "image",
    "ckpt_config": "config",
    "precision": "dtype",
    "num_samples": "num_images",
    "num_outputs": "num_images",
    "n": "num_images",
    "manual_seed": "seed",
    "seeds": "seed",
    "prompts": "prompt",
    "show_progress": "progress",
    "progress_bar": "progress",
    "verbose": "progress",
    "lowvram": "low_vram",
    "medvram": "low_vram",
    "ema": "use_ema",
    # and what one is
    **options.other_names(lambda option: option.keyword),
}
# What a value of ours looks like where it differs from theirs.
HOW = {"seed": "a number, or a list with one for each picture", "sampler": "by name, such as 'plms'"}

PIPELINE = "ldm.diffusers_style.StableDiffusionPipeline has diffusers' words"
_LOCAL = "leave it out: files are local, nothing is downloaded"
_NO_FILTER = "leave it out: no picture is filtered"
# A keyword elsewhere that has no counterpart -> what there is.
KEYWORD_ADVICE = {
    "safety_checker": _NO_FILTER,
    "requires_safety_checker": _NO_FILTER,
    "feature_extractor": _NO_FILTER,
    "load_safety_checker": _NO_FILTER,
    "return_dict": "leave it out: a GenerationResult comes, with .images",
    "use_safetensors": "leave it out: the file that is named is read",
    "variant": "name the file or folder itself",
    "revision": _LOCAL,
    "cache_dir": _LOCAL,
    "local_files_only": _LOCAL,
    "token": _LOCAL,
    "use_auth_token": _LOCAL,
    "low_cpu_mem_usage": "leave it out: a model is always built without a second copy",
    "device_map": "give device=",
    "disable_mmap": "leave it out: weights are always copied out of their file",
    "custom_pipeline": PIPELINE,
    "lora": "give adapters=[LoRA(file, weight)] of ldm.adapters",
    "loras": "give adapters=[LoRA(file, weight)] of ldm.adapters",
    "embeddings": "give adapters=[Embedding(file)] of ldm.adapters",
    "cross_attention_kwargs": "attention is not exchanged by a keyword",
    "restore_faces": "no face restorer is here",
    "enable_hr": "give hires_scale, or hires_size=(width, height)",
    "hr_resize_x": "give hires_size=(width, height)",
    "hr_resize_y": "give hires_size=(width, height)",
}

# An attribute elsewhere -> what there is here. `enable_*` and `disable_*` that are not listed get ENABLE.
ENABLE = "optimize() is the one switch: sd.optimize(), also with tiled_vae, sliced_vae, low_vram, compile"
ATTRIBUTES = {
    "scheduler": "samplers are chosen at each call: sd.txt2img(prompt, sampler='plms')",
    "sampler": "samplers are chosen at each call: sd.txt2img(prompt, sampler='plms')",
    "unet": "it is sd.model.model.diffusion_model",
    "transformer": "it is sd.model.model.diffusion_model",
    "vae": "it is sd.model.first_stage_model; another one is loaded by from_single_file(path, vae=file)",
    "text_encoder": "it is sd.model.cond_stage_model.transformer",
    "tokenizer": "it is sd.model.cond_stage_model.tokenizer; another one by from_single_file(path, tokenizer=folder)",
    "safety_checker": "no picture is filtered here: leave this line out",
    "feature_extractor": "no picture is filtered here: leave this line out",
    "requires_safety_checker": "no picture is filtered here: leave this line out",
    "components": "the parts are sd.model.model.diffusion_model, .first_stage_model and .cond_stage_model",
    "config": "sd.defaults holds what is done where nothing is said; sd.report what was loaded",
    "set_progress_bar_config": "sd.txt2img(prompt, progress=False) turns the bar off",
    "progress_bar": "sd.txt2img(prompt, progress=False) turns the bar off; sd.stream() yields every step",
    "load_lora_weights": "sd.load_lora(file, weight), or adapters=[LoRA(file, weight)] of ldm.adapters in a call",
    "load_lora_into_unet": "sd.load_lora(file, weight), or adapters=[LoRA(file, weight)] of ldm.adapters in a call",
    "fuse_lora": "nothing has to be fused: a LoRA costs nothing after the first step",
    "unfuse_lora": "nothing is fused: sd.adapters.clear() takes LoRAs off, bit for bit",
    "set_adapters": "sd.adapters lists what every picture is painted with; weights are those of each LoRA",
    "load_textual_inversion": "sd.adapters.append(Embedding(file)), or adapters=[Embedding(file)] of ldm.adapters",
    "load_ip_adapter": "IP-Adapters are not read here",
    "save_pretrained": "sd.save(folder) writes diffusers' layout",
    "save_checkpoint": "sd.save('name.safetensors') writes one file",
    "state_dict": "it is sd.model.state_dict()",
    "load_state_dict": "it is sd.model.load_state_dict()",
    "parameters": "they are sd.model.parameters()",
    "eval": "the model is in evaluation mode already: leave this line out",
    "train": "training is scripts/train.py's; the network is sd.model",
    "cuda": "sd.to('cuda')",
    "cpu": "sd.to('cpu')",
    "half": "sd.to(torch.float16)",
    "float": "sd.to(torch.float32)",
    "bfloat16": "sd.to(torch.bfloat16)",
    "encode_prompt": "ldm.generate.encode_prompt(sd.model, [prompt]), or prompt_embeds= at the call",
    "decode_latents": "ldm.generate.decode(sd.model, latents)",
    "from_config": "StableDiffusion.from_single_file(weights, config=yaml)",
    "from_ckpt": "StableDiffusion.from_single_file(path)",
    "load": "StableDiffusion.from_single_file(path), from_pretrained(folder), default()",
    "generate": "sd.txt2img(prompt), img2img, inpaint",
    "text2img": "sd.txt2img(prompt)",
    "text_to_image": "sd.txt2img(prompt)",
    "image_to_image": "sd.img2img(prompt, image)",
    "interrupt": "a callback that returns False ends a run",
    "enable_model_cpu_offload": "sd.optimize(low_vram='cuda'), or from_single_file(path, low_vram=True)",
    "enable_sequential_cpu_offload": "sd.optimize(low_vram='cuda'), or from_single_file(path, low_vram=True)",
    "enable_vae_tiling": "sd.optimize(tiled_vae=True)",
    "enable_vae_slicing": "sd.optimize(sliced_vae=True)",
    "enable_freeu": "FreeU is not here; docs/knobs.md lists what is",
}


def instead_of(name: str, known: Iterable[str]) -> str | None:
    """Say what to write instead of a keyword, by its meaning elsewhere or by its spelling."""
    known = list(known)
    ours = KEYWORDS.get(name)
    if ours in known:
        return f"here it is {ours}" + (f" ({HOW[ours]})" if ours in HOW else "")
    if name in KEYWORD_ADVICE:
        return KEYWORD_ADVICE[name]
    ours = nearest(name, known)
    return f"did you mean {ours}?" if ours else None


def check_keywords(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Refuse keywords that a function does not have, with what to write instead.

    Raises:
        OptionError: a UsageError that is a TypeError as well, as Python's own.
    """
    known = list(known)
    unknown = [name for name in given if name not in known]
    if not unknown:
        return
    parts = []
    for name in unknown[:AT_MOST]:
        advice = instead_of(name, known)
        parts.append(f"'{name[:40]}'" + (f" ({advice})" if advice else ""))
    more = f" and {len(unknown) - AT_MOST} more" if len(unknown) > AT_MOST else ""
    raise OptionError(
        f"{what}() got an unexpected keyword argument {', '.join(parts)}{more}; help({what}) lists what there is"
    )


def taking_options_of(
    source: Callable | None = None, *, without: Sequence[str] = ()
) -> Callable[[Callable], Callable]:
    """Let a function that hands its **options on to `source` show them as its own, and refuse all others.

    help(), completion and inspect.signature then list every option with its default, and help() what it means; they
    are written down once, at the source. Without a source the function's own keywords are checked.

    Args:
        without: options of the source that the function gives itself.
    """

    def decorate(function: Callable) -> Callable:
        signature = inspect.signature(function)
        kinds = inspect.Parameter
        own = [p for p in signature.parameters.values() if p.kind is not kinds.VAR_KEYWORD]
        handed = [] if source is None else inspect.signature(source).parameters.values()
        names = {*without, *(p.name for p in own)}
        # Whoever hands options on has words of its own for the source's positional ones.
        further = [p for p in handed if p.name not in names and p.kind is kinds.KEYWORD_ONLY]
        further += [
            p.replace(kind=kinds.KEYWORD_ONLY)
            for p in handed
            if p.name not in names and p.default is not p.empty and p.kind is kinds.POSITIONAL_OR_KEYWORD
        ]
        signature = signature.replace(parameters=own + further)
        known = [p.name for p in signature.parameters.values() if p.name not in ("self", "cls")]

        @functools.wraps(function)
        def checked(*args: Any, **given: Any) -> Any:
            # Options of ldm.options are asked for anew: there may be more of them by now.
            more = getattr(source, "further_keywords", tuple)()
            check_keywords(
                function.__name__, given, [*known, *(name for name in more if name not in without)]
            )
            return function(*args, **given)

        if hasattr(source, "further_keywords"):
            checked.further_keywords = source.further_keywords

        checked.__signature__ = signature
        about = inspect.cleandoc(getattr(source, "__doc__", None) or "")
        _, args, meaning = about.partition("\nArgs:\n")
        if args:
            own_doc = inspect.cleandoc(function.__doc__ or "")
            checked.__doc__ = f"{own_doc}\n\nOptions of {source.__name__}:\n{meaning}"
        return checked

    return decorate


def attribute_advice(name: str) -> str | None:
    """Say what there is here instead of another library's attribute."""
    if name in ATTRIBUTES:
        return ATTRIBUTES[name]
    return ENABLE if name.startswith(("enable_", "disable_")) else None
