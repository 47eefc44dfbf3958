"""The gate before any timing: a contestant whose numbers are wrong is not timed.

Float32 is held to diffusers' own float32. In half precision the two libraries round in different places, so there
ours may be wrong by little more than diffusers is itself, both measured from the float32 answer to the same weights
and inputs (which every dtype holds exactly; see models.py).
"""

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

FLOAT32_LIMIT = 1e-4  # of the largest difference, relative to the largest number
PICTURE_LIMIT = 60.0  # dB of whole pictures, in float32
HALF_FACTOR = 1.1  # how much larger our error may be than diffusers'


@dataclass(frozen=True)
class Verdict:
    """What the gate says of one contestant.

    Attributes:
        max_error: largest difference from the reference, relative to its largest number.
        rms_error: the difference's norm, relative to the reference's.
        psnr: of pictures in [0, 1], in dB; None for anything else.
        passed, rule: the judgement, and what was asked.
    """

    max_error: float
    rms_error: float
    psnr: float | None
    passed: bool
    rule: str

    def as_dict(self) -> dict[str, object]:
        """Give the fields for JSON, which has no infinity: null stands for it."""
        fields = {name: value for name, value in asdict(self).items() if value is not None}
        return {name: None if value in (math.inf, -math.inf) else value for name, value in fields.items()}


def relative_errors(answer: Tensor, reference: Tensor) -> tuple[float, float]:
    """Measure (largest difference / largest number, norm of difference / norm) in float64."""
    a, b = answer.double(), reference.double()
    if a.shape != b.shape or not torch.isfinite(a).all():
        return math.inf, math.inf
    difference = a - b
    return (difference.abs().max() / b.abs().max()).item(), (difference.norm() / b.norm()).item()


def decibels(answer: Tensor, reference: Tensor) -> float:
    """Measure the peak signal-to-noise ratio of pictures in [0, 1], in dB; 200 for equal ones."""
    if answer.shape != reference.shape or not torch.isfinite(answer).all():
        return -math.inf
    mse = (answer.double() - reference.double()).square().mean().item()
    return -10 * math.log10(max(mse, 1e-20))


def judge(
    answer: Tensor,
    reference: Tensor,
    dtype: torch.dtype,
    *,
    pictures: bool = False,
    yardstick: float | None = None,
) -> Verdict:
    """Hold an answer against diffusers' float32 answer.

    In half precision the norm of the error is compared and not its maximum, whose chance is as large as the tenth
    that is allowed.

    Args:
        dtype: what the contestant computed in.
        pictures: answers are pictures in [0, 1], that many steps made: in float32 they are judged in dB.
        yardstick: diffusers' own rms_error in this dtype; None where the answer is a rival's, which is only
            asked to be finite in half precision.
    """
    most, rms = relative_errors(answer, reference)
    psnr = decibels(answer, reference) if pictures else None
    if dtype == torch.float32 and psnr is not None:
        passed, rule = psnr >= PICTURE_LIMIT, f"at least {PICTURE_LIMIT:g} dB"
    elif dtype == torch.float32:
        passed, rule = most <= FLOAT32_LIMIT, f"max error at most {FLOAT32_LIMIT:g}"
    elif yardstick is None:
        passed, rule = math.isfinite(rms), "finite"
    else:
        passed = rms <= HALF_FACTOR * yardstick
        rule = f"rms error at most {HALF_FACTOR:g} x {yardstick:.3g}"
    return Verdict(most, rms, psnr, passed, rule)
