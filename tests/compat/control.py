"""A ControlNet as other people's code would write one on `ldm`: subclasses, parts and patches, by their contract.

Written for the tests after the paper (arXiv:2302.05543) and the original's names, so that its checkpoints' keys and
every attribute of `ldm` that it touches are touched here. Nothing in the package knows of it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.openaimodel import (
    AttentionBlock,
    Downsample,
    ResBlock,
    TimestepEmbedSequential,
    UNetModel,
)
from ldm.modules.diffusionmodules.util import (
    conv_nd,
    extract_into_tensor,
    linear,
    make_ddim_sampling_parameters,
    make_ddim_timesteps,
    noise_like,
    timestep_embedding,
    zero_module,
)
from ldm.util import exists, instantiate_from_config, log_txt_as_img

# (channels, stride) of the hint's path from pixels to latent cells; a zero convolution follows.
HINT_PATH = ((16, 1), (16, 1), (32, 2), (32, 1), (96, 2), (96, 1), (256, 2))


class ControlledUnetModel(UNetModel):
    """A UNet that adds a control to its middle and to its skips, and is frozen up to there."""

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor | None = None,
        context: Tensor | None = None,
        control: list[Tensor] | None = None,
        only_mid_control: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        control = list(control or [])
        skips = []
        with torch.no_grad():
            emb = self.time_embed(timestep_embedding(timesteps, self.model_channels, repeat_only=False))
            h = x.type(self.dtype)
            for module in self.input_blocks:
                h = module(h, emb, context)
                skips.append(h)
            h = self.middle_block(h, emb, context)
        if control:
            h = h + control.pop()
        for module in self.output_blocks:
            skip = skips.pop()
            if control and not only_mid_control:
                skip = skip + control.pop()
            h = module(torch.cat([h, skip], dim=1), emb, context)
        return self.out(h.type(x.dtype))


class ControlNet(nn.Module):
    """A copy of the UNet's path down that reads a hint, and gives one map for each skip and one for the middle."""

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        hint_channels: int,
        num_res_blocks: int | list[int],
        attention_resolutions: list[int],
        dropout: float = 0,
        channel_mult: tuple[int, ...] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        use_checkpoint: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        transformer_depth: int = 1,
        context_dim: int | None = None,
        legacy: bool = True,
        disable_self_attentions: list[bool] | None = None,
        num_attention_blocks: list[int] | None = None,
        disable_middle_self_attn: bool = False,
        use_linear_in_transformer: bool = False,
    ):
        super().__init__()
        self.dims = dims
        self.model_channels = model_channels
        self.dtype = torch.float32
        width = 4 * model_channels
        self.time_embed = nn.Sequential(linear(model_channels, width), nn.SiLU(), linear(width, width))

        def residual(channels: int, **options: Any) -> ResBlock:
            return ResBlock(
                channels,
                width,
                dropout,
                dims=dims,
                use_checkpoint=use_checkpoint,
                use_scale_shift_norm=use_scale_shift_norm,
                **options,
            )

        def attention(channels: int, disabled: bool) -> nn.Module:
            heads = num_heads if num_head_channels == -1 else channels // num_head_channels
            dim_head = channels // heads if legacy or num_head_channels == -1 else num_head_channels
            if not use_spatial_transformer:
                return AttentionBlock(
                    channels,
                    use_checkpoint=use_checkpoint,
                    num_heads=heads,
                    num_head_channels=dim_head,
                    use_new_attention_order=use_new_attention_order,
                )
            return SpatialTransformer(
                channels,
                heads,
                dim_head,
                depth=transformer_depth,
                context_dim=context_dim,
                disable_self_attn=disabled,
                use_linear=use_linear_in_transformer,
                use_checkpoint=use_checkpoint,
            )

        ch = model_channels
        blocks = [TimestepEmbedSequential(conv_nd(dims, in_channels, ch, 3, padding=1))]
        zero_convs = [self.make_zero_conv(ch)]
        levels = len(channel_mult)
        repeats = [num_res_blocks] * levels if isinstance(num_res_blocks, int) else list(num_res_blocks)
        for level, mult in enumerate(channel_mult):
            for block in range(repeats[level]):
                layers = [residual(ch, out_channels=mult * model_channels)]
                ch = mult * model_channels
                wanted = not exists(num_attention_blocks) or block < num_attention_blocks[level]
                if 2**level in attention_resolutions and wanted:
                    disabled = disable_self_attentions[level] if exists(disable_self_attentions) else False
                    layers.append(attention(ch, disabled))
                blocks.append(TimestepEmbedSequential(*layers))
                zero_convs.append(self.make_zero_conv(ch))
            if level != levels - 1:
                down = (
                    residual(ch, out_channels=ch, down=True)
                    if resblock_updown
                    else Downsample(ch, conv_resample, dims=dims, out_channels=ch)
                )
                blocks.append(TimestepEmbedSequential(down))
                zero_convs.append(self.make_zero_conv(ch))
        self.input_blocks = nn.ModuleList(blocks)
        self.zero_convs = nn.ModuleList(zero_convs)

        hint: list[nn.Module] = []
        before = hint_channels
        for channels, stride in HINT_PATH:
            hint += [conv_nd(dims, before, channels, 3, padding=1, stride=stride), nn.SiLU()]
            before = channels
        self.input_hint_block = TimestepEmbedSequential(
            *hint, zero_module(conv_nd(dims, before, model_channels, 3, padding=1))
        )
        self.middle_block = TimestepEmbedSequential(
            residual(ch), attention(ch, disable_middle_self_attn), residual(ch)
        )
        self.middle_block_out = self.make_zero_conv(ch)

    def make_zero_conv(self, channels: int) -> TimestepEmbedSequential:
        return TimestepEmbedSequential(zero_module(conv_nd(self.dims, channels, channels, 1, padding=0)))

    def forward(
        self, x: Tensor, hint: Tensor, timesteps: Tensor, context: Tensor, **kwargs: Any
    ) -> list[Tensor]:
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels, repeat_only=False))
        guide = self.input_hint_block(hint, emb, context)
        h, outs = x.type(self.dtype), []
        for i, (module, zero_conv) in enumerate(zip(self.input_blocks, self.zero_convs, strict=True)):
            h = module(h, emb, context)
            if i == 0:
                h = h + guide
            outs.append(zero_conv(h, emb, context))
        h = self.middle_block(h, emb, context)
        return [*outs, self.middle_block_out(h, emb, context)]


class ControlLDM(LatentDiffusion):
    """Latent diffusion whose UNet takes a control, computed from a picture of the batch."""

    def __init__(
        self, control_stage_config: Any, control_key: str, only_mid_control: bool, *args: Any, **kwargs: Any
    ):
        super().__init__(*args, **kwargs)
        self.control_model = instantiate_from_config(control_stage_config)
        self.control_key = control_key
        self.only_mid_control = only_mid_control
        self.control_scales = [1.0] * 13
        self.sd_locked = True

    @torch.no_grad()
    def get_input(
        self, batch: Mapping[str, Any], k: str, bs: int | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        x, c = super().get_input(batch, self.first_stage_key, *args, **kwargs)
        control = batch[self.control_key][:bs].to(self.device).permute(0, 3, 1, 2)
        return x, {"c_crossattn": [c], "c_concat": [control.contiguous().float()]}

    def apply_model(self, x_noisy: Tensor, t: Tensor, cond: Any, *args: Any, **kwargs: Any) -> Tensor:
        assert isinstance(cond, dict)
        diffusion_model = self.model.diffusion_model
        context = torch.cat(cond["c_crossattn"], 1)
        control = None
        if cond["c_concat"] is not None:
            hint = torch.cat(cond["c_concat"], 1)
            control = self.control_model(x=x_noisy, hint=hint, timesteps=t, context=context)
            # Thirteen scales for the full size; of a smaller model's controls each takes its own from the front.
            control = [c * scale for c, scale in zip(control, self.control_scales, strict=False)]
        return diffusion_model(
            x=x_noisy, timesteps=t, context=context, control=control, only_mid_control=self.only_mid_control
        )

    @torch.no_grad()
    def get_unconditional_conditioning(self, N: int) -> Tensor:
        return self.get_learned_conditioning([""] * N)

    @torch.no_grad()
    def log_images(
        self,
        batch: Mapping[str, Any],
        N: int = 4,
        n_row: int = 2,
        sample: bool = False,
        ddim_steps: int = 50,
        ddim_eta: float = 0.0,
        plot_diffusion_rows: bool = False,
        unconditional_guidance_scale: float = 9.0,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        z, c = self.get_input(batch, self.first_stage_key, bs=N)
        hint, context = c["c_concat"][0][:N], c["c_crossattn"][0][:N]
        N, n_row = min(z.shape[0], N), min(z.shape[0], n_row)
        log = {
            "reconstruction": self.decode_first_stage(z),
            "control": hint * 2.0 - 1.0,
            "conditioning": log_txt_as_img((512, 512), batch[self.cond_stage_key], size=16),
        }
        if plot_diffusion_rows:
            row, start = [], z[:n_row]
            for t in range(self.num_timesteps):
                if t % self.log_every_t == 0 or t == self.num_timesteps - 1:
                    level = torch.tensor([t]).repeat(n_row).to(self.device).long()
                    row.append(self.q_sample(x_start=start, t=level, noise=torch.randn_like(start)))
            log["diffusion_row"] = self._get_denoise_row_from_list(row)
        cond = {"c_concat": [hint], "c_crossattn": [context]}
        options = {"batch_size": N, "ddim": True, "ddim_steps": ddim_steps, "eta": ddim_eta}
        if sample:
            samples, _ = self.sample_log(cond=cond, **options)
            log["samples"] = self.decode_first_stage(samples)
        if unconditional_guidance_scale > 1.0:
            empty = {"c_concat": [hint], "c_crossattn": [self.get_unconditional_conditioning(N)]}
            samples, _ = self.sample_log(
                cond=cond,
                unconditional_guidance_scale=unconditional_guidance_scale,
                unconditional_conditioning=empty,
                **options,
            )
            log[f"samples_cfg_scale_{unconditional_guidance_scale:.2f}"] = self.decode_first_stage(samples)
        return log

    @torch.no_grad()
    def sample_log(self, cond: Any, batch_size: int, ddim: bool, ddim_steps: int, **kwargs: Any) -> Any:
        _, _, height, width = cond["c_concat"][0].shape
        shape = (self.channels, height // 8, width // 8)
        return DDIMSampler(self).sample(ddim_steps, batch_size, shape, cond, verbose=False, **kwargs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        params = list(self.control_model.parameters())
        if not self.sd_locked:
            params += list(self.model.diffusion_model.output_blocks.parameters())
            params += list(self.model.diffusion_model.out.parameters())
        return torch.optim.AdamW(params, lr=self.learning_rate)

    def low_vram_shift(self, is_diffusing: bool, busy: str = "cpu", idle: str = "cpu") -> None:
        """Keep on the busy device only what the present stage needs."""
        for part in (self.model, self.control_model):
            part.to(busy if is_diffusing else idle)
        for part in (self.first_stage_model, self.cond_stage_model):
            part.to(idle if is_diffusing else busy)


class HackedDDIMSampler:
    """A DDIM sampler of its own that knows a model by its attributes alone, and guides in two passes."""

    def __init__(self, model: Any, schedule: str = "linear", **kwargs: Any):
        self.model = model
        self.ddpm_num_timesteps = model.num_timesteps
        self.schedule = schedule

    def register_buffer(self, name: str, attr: Any) -> None:
        if isinstance(attr, Tensor) and attr.device != self.model.device:
            attr = attr.to(self.model.device)
        setattr(self, name, attr)

    def make_schedule(
        self,
        ddim_num_steps: int,
        ddim_discretize: str = "uniform",
        ddim_eta: float = 0.0,
        verbose: bool = True,
    ) -> None:
        self.ddim_timesteps = make_ddim_timesteps(
            ddim_discr_method=ddim_discretize,
            num_ddim_timesteps=ddim_num_steps,
            num_ddpm_timesteps=self.ddpm_num_timesteps,
            verbose=verbose,
        )
        alphas_cumprod = self.model.alphas_cumprod
        assert alphas_cumprod.shape[0] == self.ddpm_num_timesteps
        for name in ("betas", "alphas_cumprod", "alphas_cumprod_prev"):
            table = getattr(self.model, name)
            self.register_buffer(name, table.clone().detach().to(torch.float32).to(self.model.device))
        self.register_buffer("sqrt_alphas_cumprod", np.sqrt(alphas_cumprod.cpu()))
        self.register_buffer("sqrt_one_minus_alphas_cumprod", np.sqrt(1.0 - alphas_cumprod.cpu()))
        sigmas, alphas, alphas_prev = make_ddim_sampling_parameters(
            alphacums=alphas_cumprod.cpu(),
            ddim_timesteps=self.ddim_timesteps,
            eta=ddim_eta,
            verbose=verbose,
        )
        self.register_buffer("ddim_sigmas", sigmas)
        self.register_buffer("ddim_alphas", alphas)
        self.register_buffer("ddim_alphas_prev", alphas_prev)
        self.register_buffer("ddim_sqrt_one_minus_alphas", np.sqrt(1.0 - alphas))
        prev, now = self.alphas_cumprod_prev, self.alphas_cumprod
        original = ddim_eta * torch.sqrt((1 - prev) / (1 - now) * (1 - now / prev))
        self.register_buffer("ddim_sigmas_for_original_num_steps", original)

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: tuple[int, int, int],
        conditioning: Any,
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        x_T: Tensor | None = None,
        temperature: float = 1.0,
        quantize_denoised: bool = False,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        verbose: bool = True,
        **kwargs: Any,
    ) -> tuple[Tensor, list[Tensor]]:
        self.make_schedule(ddim_num_steps=S, ddim_eta=eta, verbose=verbose)
        img = torch.randn((batch_size, *shape), device=self.model.device) if x_T is None else x_T
        predicted = []
        for index in reversed(range(len(self.ddim_timesteps))):
            t = torch.full(
                (batch_size,), self.ddim_timesteps[index], device=self.model.device, dtype=torch.long
            )
            if mask is not None:
                img = self.model.q_sample(x0, t) * mask + (1.0 - mask) * img
            out = self.answer(img, t, conditioning, unconditional_guidance_scale, unconditional_conditioning)
            img, pred_x0 = self.step(img, t, index, out, temperature, quantize_denoised)
            predicted.append(pred_x0)
        return img, predicted

    def answer(self, x: Tensor, t: Tensor, c: Any, scale: float, uc: Any) -> Tensor:
        """Ask the model under the condition first, then without it."""
        model_t = self.model.apply_model(x, t, c)
        if uc is None or scale == 1.0:
            return model_t
        model_uncond = self.model.apply_model(x, t, uc)
        return model_uncond + scale * (model_t - model_uncond)

    def step(
        self, x: Tensor, t: Tensor, index: int, out: Tensor, temperature: float, quantize_denoised: bool
    ) -> tuple[Tensor, Tensor]:
        def at(table: Any) -> Tensor:
            return torch.full((x.shape[0], 1, 1, 1), table[index], device=x.device)

        a_t, a_prev, sigma = at(self.ddim_alphas), at(self.ddim_alphas_prev), at(self.ddim_sigmas)
        if self.model.parameterization == "v":
            e_t = self.model.predict_eps_from_z_and_v(x, t, out)
            pred_x0 = self.model.predict_start_from_z_and_v(x, t, out)
        else:
            e_t = out
            pred_x0 = (x - at(self.ddim_sqrt_one_minus_alphas) * e_t) / a_t.sqrt()
        if quantize_denoised:
            pred_x0, _, *_ = self.model.first_stage_model.quantize(pred_x0)
        direction = (1.0 - a_prev - sigma**2).sqrt() * e_t
        noise = sigma * noise_like(x.shape, x.device, False) * temperature
        return a_prev.sqrt() * pred_x0 + direction + noise, pred_x0

    @torch.no_grad()
    def encode(self, x0: Tensor, c: Any, t_enc: int, scale: float = 1.0, uc: Any = None) -> Tensor:
        """Walk up the deterministic path; the network is told the level of the noisier end."""
        for i in range(t_enc):
            t = torch.full((x0.shape[0],), self.ddim_timesteps[i], device=self.model.device, dtype=torch.long)
            eps = self.answer(x0, t, c, scale, uc)
            now, after = self.ddim_alphas_prev[i], self.ddim_alphas[i]
            change = after.sqrt() * ((1 / after - 1).sqrt() - (1 / now - 1) ** 0.5)
            x0 = (after / now).sqrt() * x0 + change * eps
        return x0

    @torch.no_grad()
    def stochastic_encode(
        self, x0: Tensor, t: Tensor, use_original_steps: bool = False, noise: Tensor | None = None
    ) -> Tensor:
        if use_original_steps:
            signal, sigma = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        else:
            signal, sigma = torch.sqrt(self.ddim_alphas), self.ddim_sqrt_one_minus_alphas
        noise = torch.randn_like(x0) if noise is None else noise
        return extract_into_tensor(signal, t, x0.shape) * x0 + extract_into_tensor(sigma, t, x0.shape) * noise
