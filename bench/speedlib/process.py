"""Painting and strengthening, for contestants in this process; run as a script, one fresh process that paints once.

python bench/speedlib/process.py '{"contestant": "ldm", ...}'    # prints its figures as JSON
"""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from bench import load
from bench.speedlib.rows import OURS

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

PROMPT = "a large red circle above a small blue square on a white background"
SEED = 42
GUIDANCE = 7.5


def forbid_tf32() -> None:
    """Let float32 mean float32, in convolutions too, where cuDNN would round to ten bits."""
    import torch

    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


# --- strengthening --------------------------------------------------------------------------------------


def need_kernels() -> Any:
    """Find ldm.kernels.

    Raises:
        UsageError: this ldm has no optimize there.
    """
    from ldm import kernels
    from ldm.errors import UsageError

    if not (hasattr(kernels, "optimize") and hasattr(kernels, "restore")):
        raise UsageError("ldm.kernels has no optimize() in this version")
    return kernels


def use_kernels(model: Any, compiled: bool, stack: ExitStack) -> None:
    """Let ldm.kernels optimize a LatentDiffusion, and restore it when the stack closes.

    What it asks of malloc holds for the process, and so for everybody in the row: it counts as environment, not as
    a gain of ours.
    """
    kernels = need_kernels()
    kernels.optimize(model, compile=compiled)
    stack.callback(kernels.restore, model)


def strengthen(network: "nn.Module", compiled: bool) -> None:
    """Give one of diffusers' networks what its own guide to speed recommends without loss.

    That is channels_last, fused projections, and max-autotune with the guide's inductor options where compiling is
    asked for (docs/source/en/optimization/fp16.md of diffusers 0.42).
    """
    import torch

    if hasattr(network, "fuse_qkv_projections"):  # the text encoder, of transformers, has neither
        network.to(memory_format=torch.channels_last)
        network.fuse_qkv_projections()
    if not compiled:
        return
    options = inductor_options(next(network.parameters()).device)
    if hasattr(network, "decode"):
        for way in ("encode", "decode"):
            setattr(network, way, torch.compile(getattr(network, way), fullgraph=True, options=options))
    else:
        network.compile(fullgraph=True, options=options)


def strengthen_pipeline(pipe: Any, compiled: bool) -> None:
    """Strengthen the networks of diffusers' pipeline, and keep its noise schedule where the latents are."""
    for network in (pipe.unet, pipe.vae):  # the guide leaves the text encoder, a hundredth of the work
        strengthen(network, compiled)
    pipe.scheduler.alphas_cumprod = pipe.scheduler.alphas_cumprod.to(pipe.unet.device)


def inductor_options(device: "torch.device") -> dict[str, Any]:
    """List the options of torch.compile that diffusers' guide sets on CUDA; a CPU has the defaults."""
    if device.type != "cuda":
        return {}
    import torch._inductor

    return {
        **torch._inductor.list_mode_options("max-autotune"),
        "conv_1x1_as_mm": True,
        "coordinate_descent_tuning": True,
        "coordinate_descent_check_all_directions": True,
        "epilogue_fusion": False,
    }


@contextlib.contextmanager
def inductor_switches(device: "torch.device") -> Iterator[None]:
    """On a CPU, freeze the weights, so that they are packed once; read when a network is first called."""
    if device.type == "cuda":
        yield
        return
    import torch._inductor.config as inductor

    with inductor.patch(freezing=True):
        yield


# --- painting -------------------------------------------------------------------------------------------


def painter_of(model: Any) -> Any:
    """Make of a LatentDiffusion, or of diffusers' pipeline, what `paint` takes."""
    if hasattr(model, "apply_model"):
        from ldm.models.introspect import dtype_of
        from ldm.pipeline import StableDiffusion

        # The decoder computes in what the rest does, as in the rival's pipeline.
        return StableDiffusion(model, vae_dtype=dtype_of(model))
    model.set_progress_bar_config(disable=True)
    return model


def paint(painter: Any, *, px: int, steps: int, batch: int) -> "Tensor":
    """Paint pictures of one prompt by a library's own door: guided, DDIM, from the same noise.

    Returns:
        (batch, 3, px, px) in [0, 1].
    """
    import torch

    from ldm.noise import ImageNoise

    if hasattr(painter, "txt2img"):
        return painter.txt2img(
            PROMPT,
            steps=steps,
            sampler="ddim",
            guidance_scale=GUIDANCE,
            seed=SEED,
            num_images=batch,
            batch_size=batch,
            height=px,
            width=px,
            output_type="pt",
        ).images
    cells = px // painter.vae_scale_factor
    noise = ImageNoise([SEED + i for i in range(batch)])
    latents = noise(torch.empty(batch, painter.unet.config.in_channels, cells, cells))
    return painter(
        PROMPT,
        negative_prompt="",
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        num_images_per_prompt=batch,
        height=px,
        width=px,
        latents=latents.to(painter.unet.device, painter.unet.dtype),
        output_type="pt",
    ).images


# --- one fresh process ----------------------------------------------------------------------------------


def run_once(wish: dict[str, Any]) -> dict[str, float]:
    """Import, load, strengthen where that is the contestant, and paint a picture of one step.

    Returns:
        seconds of each stage and of all, and peaks of memory over all: `gb` is what the rows compare, memory that
        torch allocated on a GPU, else the resident set.
    """
    began = time.perf_counter()
    library = "ldm" if wish["contestant"] in OURS else "diffusers"
    figures = load.import_library(library)
    import torch

    device, compiled = torch.device(wish["device"]), wish["compiled"]
    torch.set_num_threads(wish["threads"])
    forbid_tf32()
    watch = load.Watch()

    def lap(name: str) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        figures[name] = time.perf_counter() - began - sum(figures.values())

    model = load.load_library(library, wish["file"], wish["dtype"], wish["config"], wish["device"])
    painter = painter_of(model)
    lap("load_seconds")
    with ExitStack() as stack:
        if wish["contestant"] == "ldm-kernels":
            use_kernels(painter.model, compiled, stack)
        elif wish["contestant"] == "diffusers-best":
            strengthen_pipeline(painter, compiled)
            if compiled:
                stack.enter_context(inductor_switches(device))
        lap("strengthen_seconds")
        picture = paint(painter, px=wish["px"], steps=1, batch=1).float().cpu()
        lap("image_seconds")
    figures["seconds"] = sum(figures.values())
    watch.stop()
    figures |= {"anonymous_gb": watch.anonymous / 1e9, "resident_gb": watch.resident / 1e9}
    figures["gb"] = figures["resident_gb"]
    if device.type == "cuda":
        figures["gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        figures["reserved_gb"] = torch.cuda.max_memory_reserved(device) / 1e9
    import numpy as np

    np.save(wish["picture"], picture.numpy())
    return figures


if __name__ == "__main__":
    print(json.dumps(run_once(json.loads(sys.argv[1]))))
