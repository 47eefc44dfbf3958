"""A LoRA from two checkpoints: what a training changed, module by module, as a product of two small matrices.

    extract_lora("style.safetensors", "base.safetensors", "tuned.safetensors", rank=32)

W_tuned - W_base = U S V^T (SVD), of which the first r singular values are the best product of rank r there is (Eckart
and Young 1936). Layout and choice of modules are those of kohya's sd-scripts; its clamping of outliers is not done.
"""

import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.adapters.lora_weights import alpha_in
from ldm.checkpoints import save_safetensors
from ldm.checkpoints.compvis import CompVisWeights, check_fit, check_output, network_of, sha256_of
from ldm.checkpoints.key_mapping import TEXT, UNET, unet_to_diffusers
from ldm.checkpoints.report import first_few
from ldm.checkpoints.tensors import check_dtype, check_finite
from ldm.errors import MismatchError
from ldm.values import Range, check_value

RANK = 32
_TEXT_MODEL = f"{TEXT}transformer."
# Parts of diffusers' names that kohya's trainings change; the others with conv=True.
_ATTENTION = (".attentions.",)
_CONVOLUTIONS = (".resnets.", ".downsamplers.", ".upsamplers.")
_TEXT_PARTS = (".self_attn.", ".mlp.")


@dataclass
class Extraction:
    """What became of the differences.

    Attributes:
        ranks: module, as the file names it -> its rank.
        errors: module -> the share of the difference that is missing, as a norm.
        left: tensors that differ and that no LoRA of this kind changes.
    """

    ranks: dict[str, int] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        ranks = ", ".join(f"{rank} x {count}" for rank, count in sorted(Counter(self.ranks.values()).items()))
        lines = [
            f"{len(self.ranks)} modules differ; rank {ranks}",
            f"  of a difference at most {max(self.errors.values()):.3g} is missing",
        ]
        if self.left:
            lines.append(f"  {len(self.left)} other tensors differ and are left out ({first_few(self.left)})")
        return "\n".join(lines)


def extract_lora(
    output: str | os.PathLike,
    base: str | os.PathLike,
    tuned: str | os.PathLike,
    *,
    rank: int | None = None,
    error: float | None = None,
    conv: bool = False,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Extraction:
    """Write what one model has over another as a LoRA, in kohya's layout; alpha is each module's rank.

    Changed are the linear layers and 1 x 1 convolutions of the UNet's transformers and of the text encoder's layers.

    Args:
        output: name.safetensors.
        base, tuned: files or folders of Stable Diffusion v1's layout; models without a text encoder give none of it.
        rank: the most of a module; None = 32, or without a bound where error is given.
        error: |D - D_r| / |D| (Frobenius) that each module may have; the smallest rank that keeps it is taken.
        conv: the ResBlocks' layers and the sampling convolutions, too, as LoCon has them.
        dtype: of the factors; None = as the tuned model's.
        overwrite: whether a file that has the output's name may be replaced.

    Raises:
        UsageError: an option out of range, or an output that is one of the inputs.
        MismatchError: models that do not fit one another, or that do not differ in these modules.
        Others: as `ldm.merging.merge`.
    """
    place = check_output(output, [base, tuned], overwrite)
    most = check_value(
        RANK if rank is None and error is None else rank, int | None, "rank", Range(1, 1 << 16)
    )
    share = 0.0 if error is None else float(check_value(error, float, "error", Range(0, 1)))
    check_value(conv, bool, "conv")
    check_dtype(dtype)
    found, tensors = Extraction(), {}
    with CompVisWeights(base) as first, CompVisWeights(tuned) as second:
        check_fit(second, first)
        bodies = _bodies(first, conv)
        for name in second.infos:
            if network_of(name) not in ("UNet", "text encoder") or name not in first.infos:
                continue
            difference = (
                second.read(name).float() - first.read(name).reshape(second.infos[name].shape).float()
            )
            if not difference.any():
                continue
            if name not in bodies:
                found.left.append(name)
                continue
            check_finite(second.path, name, difference)
            up, down, missing = _factors(difference, most, share)
            body, kept = bodies[name], dtype or second.infos[name].dtype
            found.ranks[body], found.errors[body] = len(down), missing
            tensors[f"{body}.lora_up.weight"] = up.to(kept)
            tensors[f"{body}.lora_down.weight"] = down.to(kept)
            tensors[f"{body}.alpha"] = alpha_in(kept, torch.tensor(float(len(down))))
        if not tensors:
            advice = (
                "; conv=True (--conv) takes the convolutions' differences" if found.left and not conv else ""
            )
            raise MismatchError(
                f"the two models do not differ in what a LoRA changes ({len(found.left)} other tensors differ){advice}"
            )
        save_safetensors(place, tensors, _metadata(first, second, found, error))
    return found


def _bodies(model: CompVisWeights, conv: bool) -> dict[str, str]:
    """Name the modules that are changed: CompVis's name of their weight -> kohya's name of the module."""
    unet = {name.removeprefix(UNET): name for name in model.infos if name.startswith(UNET)}
    wanted = (*_ATTENTION, *(_CONVOLUTIONS if conv else ()))
    theirs = {unet[bare]: f"unet.{known}" for bare, known in unet_to_diffusers(unet).items()}
    theirs = {name: known for name, known in theirs.items() if any(part in known for part in wanted)}
    theirs |= {
        name: f"te.{name.removeprefix(_TEXT_MODEL)}"
        for name in model.infos
        if name.startswith(_TEXT_MODEL) and any(part in name for part in _TEXT_PARTS)
    }
    return {
        name: f"lora_{known.removesuffix('.weight').replace('.', '_')}"
        for name, known in theirs.items()
        if known.endswith(".weight") and len(model.infos[name].shape) > 1
    }


def _factors(difference: Tensor, most: int | None, share: float) -> tuple[Tensor, Tensor, float]:
    """Part a difference (out, in, ...) into up (out, r, 1, ...) and down (r, in, ...); give the share missing."""
    shape = difference.shape
    u, s, v = torch.linalg.svd(difference.flatten(1), full_matrices=False)
    # tail[r] = |D - D_r|^2, summed from the smallest on.
    tail = torch.cat([s.double().square().flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)])
    allowed = (share**2 * tail[0]).item()
    rank = next(r for r in range(len(tail)) if r == len(s) or tail[r].item() <= allowed)
    rank = max(1, rank if most is None else min(rank, most))
    root = s[:rank].sqrt()
    up = (u[:, :rank] * root).reshape(shape[0], rank, *(1 for _ in shape[2:]))
    down = (root[:, None] * v[:rank]).reshape(rank, *shape[1:])
    return up, down, float((tail[rank] / tail[0]).sqrt())


def _metadata(
    first: CompVisWeights, second: CompVisWeights, found: Extraction, error: float | None
) -> dict[str, str]:
    most = str(max(found.ranks.values()))
    made: dict[str, Any] = {"type": "extracted by SVD", "largest_error": max(found.errors.values())}
    if error is not None:
        made["error"] = error
    for word, model in (("base", first), ("tuned", second)):
        made[word] = [{"name": Path(file).name, "sha256": sha256_of(file)} for file in model.files]
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": most,
        "ss_network_alpha": most,
        "ldm_recipe": json.dumps(made),
    }
