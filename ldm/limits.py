"""How far the numbers of a request may go, and the checks that hold a value against its limits.

Knows no torch: the scripts' parsers use the same limits, and answer before it is imported.
"""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from ldm.errors import UsageError, nearest, shown

MAX_SEED = 2**64 - 1  # what torch.Generator takes; the one on the CPU keeps the lowest 32 bits
MAX_PROMPT = 100_000  # characters; the tokenizer would read on for seconds and keep 75 tokens
# (low, high), both included
STEPS = (1, 1000)  # of a model with fewer levels, up to their number
SIDE = (1, 10**6)  # pixels, before the model is known; with it, CELLS decides
CELLS = (8, 256)  # latent cells a side: 64 to 2048 pixels at 8 pixels a cell
NUM_IMAGES = (1, 100_000)
N_ITER = (1, 10_000)
BATCH_SIZE = (1, 1024)
AUTO = "auto"  # the batch size that auto_batch_size chooses
AUTO_CELLS = 64 * 64  # latent cells at once: one picture of 512 x 512 at 8 pixels a cell
AUTO_AT_MOST = 16  # pictures at once; on a CPU more were not faster
GUIDANCE_SCALE = (0, 100)
SIGMA = (0, 10**6)  # noise over signal
TABLE_OPTION = (0.01, 100)  # of tables of sigmas
SHARE = (0, 1)  # strength, eta, guidance_rescale, the ends of guidance_interval
CACHE_INTERVAL = (1, 1000)  # levels; no run has more
CACHE_DEPTH = (1, 1000)  # of a UNet with fewer blocks a side, up to their number
MERGE_RATIO = (0, 0.75)  # all but one token of each cell of 2 x 2
FREEU = (0, 10)  # factors
SEED = (0, MAX_SEED)
ADAPTERS = (0, 100)  # at work together
REGIONS = (0, 16)  # of a picture, with prompts of their own
REGION_WEIGHT = (0, 10)
CLIP_SKIP = (1, 12)  # of a text encoder with fewer layers, up to their number
CLIP_SKIP_OF = ("both", "prompt")
SYNTAXES = ("plain", "a1111", "comfyui", "compel")  # of prompts
CALL_RNGS = ("diffusers", "comfyui")  # that draw for all pictures of a call at once
SHARED_RNGS = (
    "compvis",
    *CALL_RNGS,
)  # with these a picture depends on its place among others, and all have one seed
ARITHMETICS = ("own", "diffusers")  # of steps, see samplers.as_diffusers
MASK_RULES = ("compvis", "diffusers", "a1111", "comfyui")  # see samplers.masks
MASK_CELLS = ("any", "nearest", "bilinear", "bicubic")  # see images.shrink_mask
KEPT = ("pixels", "latents")  # what comes back of the part that a mask keeps
STRENGTH_RULES = ("compvis", "bubbliiiing", "a1111", "comfyui")  # see checks.sampling
STRETCHED_RULES = ("a1111", "comfyui")  # by which a picture counts at strength 1, too
FIRST_NOISES = ("sigma", "unit")  # see samplers.sample_steps
FINAL_ALPHAS = ("lowest", "one")
ROUNDINGS = ("truncate", "truncate_127.5", "round")  # of pictures to bytes, see images.unit_to_uint8


def is_whole(value: Any, low: int, high: int) -> bool:
    """Tell whether a value is a whole number within low and high, both included."""
    return isinstance(value, Integral) and not isinstance(value, bool) and low <= value <= high


def is_real(value: Any, low: float, high: float) -> bool:
    """Tell whether a value is a number within low and high, both included; NaN is in no range."""
    return isinstance(value, Real) and not isinstance(value, bool) and low <= value <= high


def about_whole(low: int, high: int) -> str:
    """Say what is_whole wants."""
    return f"a whole number from {low} to {high}"


def about_real(low: float, high: float) -> str:
    """Say what is_real wants."""
    return f"a number from {low:g} to {high:g}"


def whole(name: str, value: Any, low: int, high: int) -> int:
    """Return a whole number within low and high, both included, or raise UsageError."""
    if not is_whole(value, low, high):
        raise UsageError(f"{name} must be {about_whole(low, high)}, got {shown(value)}")
    return int(value)


def real(name: str, value: Any, low: float, high: float) -> float:
    """Return a finite number within low and high, both included, or raise UsageError."""
    if not is_real(value, low, high):
        raise UsageError(f"{name} must be {about_real(low, high)}, got {shown(value)}")
    return float(value)


def choice(name: str, value: Any, choices: Sequence[str]) -> Any:
    """Return a value that is one of the choices, or raise UsageError with all of them, and the nearest."""
    if not isinstance(value, str) or value not in choices:
        near = nearest(value, choices) if isinstance(value, str) else None
        hint = f"; did you mean {near!r}?" if near else ""
        raise UsageError(f"{name} must be one of {', '.join(choices)}; got {shown(value)}{hint}")
    return value
