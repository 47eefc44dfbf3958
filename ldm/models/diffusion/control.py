"""Latent diffusion with a ControlNet of its own (arXiv:2302.05543), by cldm's names: for its files, YAMLs and training.

For pictures, `ldm.adapters.ControlNet` attaches one to any model. This is the model that holds one: "control_model."
beside "model.diffusion_model." among its keys, 340 for Stable Diffusion v1.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import UsageError, shown
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.diffusionmodules.controlnet import ControlNetModel
from ldm.util import instantiate_from_config

MAPS = 13  # of Stable Diffusion v1


class ControlNet(ControlNetModel):
    """A ControlNet as cldm's YAMLs configure it; see ControlNetModel.

    Args:
        image_size: not needed.
        options: as UNetModel's.

    Raises:
        UsageError: without spatial transformers, for which ControlNets are made.
    """

    def __init__(
        self,
        image_size: Any,
        in_channels: int,
        model_channels: int,
        hint_channels: int,
        num_res_blocks: int | list[int],
        attention_resolutions: Any,
        **options: Any,
    ):
        if not options.pop("use_spatial_transformer", True):
            raise UsageError("a ControlNet needs use_spatial_transformer: true, got false")
        super().__init__(
            in_channels, model_channels, hint_channels, num_res_blocks, attention_resolutions, **options
        )


class ControlLDM(LatentDiffusion):
    """Latent diffusion whose UNet gets the maps of a ControlNet, which is what is trained.

    A condition is a dict with "c_crossattn" and "c_concat", hints (b, 3, 8 h, 8 w) in [0, 1]; None there is no control.

    Attributes:
        control_scales: what the maps are multiplied by.
        sd_locked: whether the UNet's way up stays as it is in training.

    Args:
        control_stage_config: of the ControlNet.
        control_key: of the hints in a batch, (b, height, width, 3) in [0, 1].
        only_mid_control: add the middle block's map alone.
        args, kwargs: LatentDiffusion's.
    """

    def __init__(
        self, control_stage_config: Any, control_key: str, only_mid_control: bool, *args: Any, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.control_model = instantiate_from_config(control_stage_config)
        self.control_key, self.only_mid_control = control_key, only_mid_control
        self.control_scales = [1.0] * MAPS
        self.sd_locked = True

    @torch.no_grad()
    def get_input(
        self, batch: Mapping[str, Any], k: str, *args: Any, bs: int | None = None, **kwargs: Any
    ) -> list[Any]:
        """Encode a batch as LatentDiffusion does, its condition as a dict with the hint."""
        if self.control_key not in batch:
            raise UsageError(f"a batch needs the key '{self.control_key}', got {', '.join(map(repr, batch))}")
        x, c, *more = super().get_input(batch, self.first_stage_key, *args, bs=bs, **kwargs)
        hint = batch[self.control_key][:bs].to(self.device).float().movedim(-1, 1).contiguous()
        return [x, {"c_crossattn": [c], "c_concat": [hint]}, *more]

    def get_learned_conditioning(self, c: Any) -> Any:
        """Encode prompts; of a condition with hints, those in its "c_crossattn"."""
        if isinstance(c, Mapping) and "c_crossattn" in c:
            return {
                **c,
                "c_crossattn": [
                    super(ControlLDM, self).get_learned_conditioning(one) for one in c["c_crossattn"]
                ],
            }
        return super().get_learned_conditioning(c)

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run the UNet on x_noisy (b, c, h, w) at levels t (b,) with the maps of a condition's hints.

        Raises:
            UsageError: a condition that is no dict.
        """
        if not isinstance(cond, Mapping) or "c_crossattn" not in cond:
            raise UsageError(
                f"a ControlLDM's condition is a dict of c_crossattn and c_concat, got {shown(cond)}"
            )
        unet, context = self.model.diffusion_model, torch.cat(cond["c_crossattn"], 1)
        hints = cond.get("c_concat")
        if hints is None:
            return unet(x_noisy, t, context=context)
        maps = self.control_model(x_noisy, torch.cat(hints, 1), t, context)
        # A smaller network than v1's has fewer maps, which take the first scales.
        control = [one * scale for one, scale in zip(maps, self.control_scales, strict=False)]
        return unet(x_noisy, t, context=context, control=control, only_mid_control=self.only_mid_control)

    def get_unconditional_conditioning(self, batch_size: int, null_label: Any = None) -> Any:
        """Encode the empty prompt, (batch_size, n, context_dim)."""
        if null_label is None:
            return self.get_learned_conditioning([""] * batch_size)
        return super().get_unconditional_conditioning(batch_size, null_label)

    def _trained(self) -> list[nn.Parameter]:
        parameters = list(self.control_model.parameters())
        if not self.sd_locked:
            unet = self.model.diffusion_model
            parameters += [*unet.output_blocks.parameters(), *unet.out.parameters()]
        return parameters

    def low_vram_shift(self, is_diffusing: bool) -> None:
        """Keep on the GPU what samples, or what encodes and decodes; the rest goes to the CPU."""
        for part, is_needed in (
            (self.model, is_diffusing),
            (self.control_model, is_diffusing),
            (self.first_stage_model, not is_diffusing),
            (self.cond_stage_model, not is_diffusing),
        ):
            part.to("cuda" if is_needed and torch.cuda.is_available() else "cpu")
