"""Latent diffusion with further conditions: a small picture to enlarge, a depth map, boxes.

CompVis and Stability have these classes in ddpm.py, where they can be imported from as well.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.config import instantiate_from_config
from ldm.errors import UsageError
from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion, LatentFinetuneDiffusion, frozen


class LatentUpscaleDiffusion(LatentDiffusion):
    """An upscaler: the small picture, noised, is joined to the latents; its noise level is the network's label, c_adm.

    Args:
        low_scale_config: of what noises it, such as upscaling.ImageConcatWithNoiseAugmentation.
        low_scale_key: of the small pictures in a batch, (b, h, w, 3), as large as the latents.
        noise_level_key: None; the originals name the option and have no code for it.
        The others are LatentDiffusion's.

    Raises:
        UsageError: a noise_level_key, or a condition stage that is trained along.
    """

    def __init__(
        self,
        *args: Any,
        low_scale_config: Mapping[str, Any],
        low_scale_key: str = "LR",
        noise_level_key: str | None = None,
        **kwargs: Any,
    ):
        if noise_level_key is not None:
            raise UsageError("noise_level_key has no implementation, in the originals neither; leave it out")
        self._low_scale_config = low_scale_config
        super().__init__(*args, **kwargs)
        _refuse_trainable(self)
        self.low_scale_key, self.noise_level_key = low_scale_key, noise_level_key

    def instantiate_cond_stage(self, config: Any) -> None:
        """Build the condition stage and, before a file is read, what noises the small picture."""
        super().instantiate_cond_stage(config)
        self.instantiate_low_stage(self._low_scale_config)

    def instantiate_low_stage(self, config: Any) -> None:
        """Build and freeze what noises the small picture."""
        self.low_scale_model = frozen(instantiate_from_config(config))

    @torch.no_grad()
    def get_input(
        self,
        batch: Mapping[str, Any],
        k: str,
        cond_key: str | None = None,
        bs: int | None = None,
        log_mode: bool = False,
        return_first_stage_outputs: bool = False,
        **kwargs: Any,
    ) -> list[Any]:
        """Encode a batch as LatentDiffusion does, with the small pictures.

        Returns:
            [z, {"c_concat": [(b, 3, h, w)], "c_crossattn": [(b, n, d)], "c_adm": (b,) levels}]; with
            return_first_stage_outputs also pictures, reconstructions and the conditions as they came; with log_mode
            these, the small pictures, how they look noised, and the levels.
        """
        options = {"return_first_stage_outputs": True, "return_original_cond": True, "force_c_encode": True}
        z, c, x, xrec, original = super().get_input(batch, k, cond_key=cond_key, bs=bs, **options)
        x_low = DDPM.get_input(self, batch, self.low_scale_key)[:bs].to(self.device)
        zx, noise_level = self.low_scale_model(x_low)
        conditions = {"c_concat": [zx], "c_crossattn": [c], "c_adm": noise_level}
        out = [z, conditions]
        if log_mode or return_first_stage_outputs:
            out += [x, xrec, original]
        if log_mode:
            out += [x_low, self.low_scale_model.decode(zx), noise_level]
        return out

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], N: int = 8, *args: Any, inpaint: bool = False, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return the pictures of LatentDiffusion, and the small ones without and with noise."""
        log = super().log_images(batch, N, *args, inpaint=inpaint, **kwargs)
        x_low = DDPM.get_input(self, batch, self.low_scale_key)[:N].to(self.device)
        zx, noise_level = self.low_scale_model(x_low)
        levels = "-".join(str(level) for level in noise_level.tolist())
        return {**log, "x_lr": x_low, f"x_lr_rec_@noise_levels{levels}": self.low_scale_model.decode(zx)}


class LatentUpscaleFinetuneDiffusion(LatentFinetuneDiffusion):
    """An upscaler begun from a model without further input channels.

    Args:
        concat_keys: of the batch: one, the small pictures (b, h, w, c).
        reshuffle_patch_size: p lays each picture out as p * p times the channels at 1 / p of the size.
        low_scale_config, low_scale_key: noise them by this model; see LatentUpscaleDiffusion. The key is concat_keys'.
        The others are LatentFinetuneDiffusion's.

    Raises:
        UsageError: other than one concat key, low_scale_config without low_scale_key, or a trained condition stage.
    """

    def __init__(
        self,
        concat_keys: Sequence[str] = ("lr",),
        reshuffle_patch_size: int | None = None,
        low_scale_config: Mapping[str, Any] | None = None,
        low_scale_key: str | None = None,
        *args: Any,
        **kwargs: Any,
    ):
        _refuse_several(self, concat_keys)
        if low_scale_config is not None and low_scale_key is None:
            raise UsageError("low_scale_config needs low_scale_key, the batch's key that it noises")
        self._low_scale_config = low_scale_config
        super().__init__(concat_keys, *args, **kwargs)
        _refuse_trainable(self)
        self.reshuffle_patch_size, self.low_scale_key = reshuffle_patch_size, low_scale_key

    instantiate_low_stage = LatentUpscaleDiffusion.instantiate_low_stage

    def instantiate_cond_stage(self, config: Any) -> None:
        """Build the condition stage and, before a file is read, what noises the small picture."""
        super().instantiate_cond_stage(config)
        self.low_scale_model = None
        if self._low_scale_config is not None:
            self.instantiate_low_stage(self._low_scale_config)

    def _concat_maps(self, batch: Mapping[str, Any], z: Tensor) -> Tensor:
        x = DDPM.get_input(self, batch, self.concat_keys[0])[: len(z)].to(z.device)
        p = self.reshuffle_patch_size
        if p is None:
            return x
        b, c, height, width = x.shape
        if height % p or width % p:
            raise UsageError(
                f"reshuffle_patch_size {p} should divide the pictures' {height} x {width} pixels"
            )
        # Patch i, j of p x p, each (height / p, width / p), becomes channels (i * p + j) * c and on.
        parts = x.reshape(b, c, p, height // p, p, width // p).permute(0, 2, 4, 1, 3, 5)
        return parts.reshape(b, p * p * c, height // p, width // p)

    @torch.no_grad()
    def get_input(self, batch: Mapping[str, Any], k: str, *args: Any, **kwargs: Any) -> list[Any]:
        """Encode a batch as LatentFinetuneDiffusion does; "c_adm" is the level where the small pictures are noised."""
        z, conditions, *rest = super().get_input(batch, k, *args, **kwargs)
        if self.low_scale_model is not None and self.low_scale_key == self.concat_keys[0]:
            noised, noise_level = self.low_scale_model(conditions["c_concat"][0])
            conditions = {**conditions, "c_concat": [noised]}
            if noise_level is not None:
                conditions["c_adm"] = noise_level
        return [z, conditions, *rest]

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], N: int = 8, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return the pictures of LatentDiffusion, and the small ones."""
        log = super().log_images(batch, N, *args, **kwargs)
        log["lr"] = DDPM.get_input(self, batch, self.concat_keys[0])[:N]
        return log


class LatentDepth2ImageDiffusion(LatentFinetuneDiffusion):
    """Pictures to a depth map: the map, between -1 and 1, is joined to the latents.

    A file to begin from may lack the depth model's weights: ignore_keys: ["depth_model."] leaves them as they are.

    Args:
        depth_stage_config: of a model from pictures (b, c, height, width) to depths (b, 1, any height, any width).
        concat_keys: of the batch: one, what the depth model takes.
        The others are LatentFinetuneDiffusion's.

    Raises:
        UsageError: other than one concat key, or a trained condition stage.
    """

    def __init__(
        self,
        depth_stage_config: Mapping[str, Any],
        concat_keys: Sequence[str] = ("midas_in",),
        *args: Any,
        **kwargs: Any,
    ):
        _refuse_several(self, concat_keys)
        self._depth_stage_config = depth_stage_config
        super().__init__(concat_keys, *args, **kwargs)
        _refuse_trainable(self)
        self.depth_stage_key = concat_keys[0]

    def instantiate_cond_stage(self, config: Any) -> None:
        """Build the condition stage and, before a file is read, the depth model."""
        super().instantiate_cond_stage(config)
        self.depth_model = frozen(instantiate_from_config(self._depth_stage_config))

    def _depth(self, batch: Mapping[str, Any], count: int | None) -> Tensor:
        if self.depth_stage_key not in batch:
            raise UsageError(
                f"a batch needs the key '{self.depth_stage_key}', got {', '.join(map(repr, batch))}"
            )
        return self.depth_model(batch[self.depth_stage_key][:count].to(self.device))

    def _concat_maps(self, batch: Mapping[str, Any], z: Tensor) -> Tensor:
        depth = F.interpolate(
            self._depth(batch, len(z)), size=z.shape[2:], mode="bicubic", align_corners=False
        )
        return _to_signed(depth, 0.001)

    @torch.no_grad()
    def log_images(
        self, batch: Mapping[str, Any], N: int = 8, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return the pictures of LatentDiffusion, and the depth maps."""
        log = super().log_images(batch, N, *args, **kwargs)
        log["depth"] = _to_signed(self._depth(batch, N), 1e-6)
        return log


class Layout2ImgDiffusion(LatentDiffusion):
    """Latent diffusion from boxes with classes, as token numbers under "coordinates_bbox".

    The original also draws the boxes in its log, by its own data sets.

    Raises:
        UsageError: another cond_stage_key.
    """

    def __init__(self, cond_stage_key: str = "coordinates_bbox", *args: Any, **kwargs: Any):
        if cond_stage_key != "coordinates_bbox":
            raise UsageError(
                f"Layout2ImgDiffusion is for cond_stage_key 'coordinates_bbox', got {cond_stage_key!r}"
            )
        super().__init__(*args, cond_stage_key=cond_stage_key, **kwargs)


def _refuse_trainable(model: LatentDiffusion) -> None:
    if model.cond_stage_trainable:
        raise UsageError(
            f"{type(model).__name__} has a frozen condition stage; set cond_stage_trainable: false"
        )


def _refuse_several(model: LatentDiffusion, concat_keys: Sequence[str]) -> None:
    if isinstance(concat_keys, str) or len(concat_keys) != 1:
        raise UsageError(f"{type(model).__name__} needs one key in concat_keys, got {concat_keys!r:.80}")


def _to_signed(depth: Tensor, floor: float) -> Tensor:
    """Spread each map (b, 1, h, w) over -1 to 1; `floor` is added to the spread, so that a flat one is -1."""
    low, high = (edge(depth, dim=(1, 2, 3), keepdim=True) for edge in (torch.amin, torch.amax))
    return 2.0 * (depth - low) / (high - low + floor) - 1.0
