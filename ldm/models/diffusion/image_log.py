"""Pictures to look at while a diffusion model is trained: log_images and its rows, as mixins of ddpm.py."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.helpers import isimage, ismap
from ldm.models.autoencoder import VQModelInterface
from ldm.util import log_txt_as_img


class ImageLog:
    """What DDPM shows of a batch."""

    def _logged_levels(self, batch_size: int) -> Iterator[Tensor]:
        """Yield every log_every_t-th level and the last, each as (batch_size,)."""
        for level in range(self.num_timesteps):
            if level % self.log_every_t == 0 or level == self.num_timesteps - 1:
                yield torch.full((batch_size,), level, device=self.device, dtype=torch.long)

    @torch.no_grad()
    def log_images(
        self,
        batch: Mapping[str, Any],
        N: int = 8,
        n_row: int = 2,
        sample: bool = True,
        return_keys: Iterable[str] | None = None,
        split: str = "train",
    ) -> dict[str, Tensor]:
        """Return pictures to look at: inputs, their noising level by level, samples and their denoising.

        `split` is what CompVis's ImageLogger says; it changes nothing.
        """
        x = self.get_input(batch, self.first_stage_key)[:N].to(self.device)
        log = {"inputs": x}
        start = x[:n_row]
        log["diffusion_row"] = _rows([self.q_sample(start, t) for t in self._logged_levels(len(start))])
        if sample:
            with self.ema_scope("Plotting"):
                log["samples"], row = self.sample(batch_size=len(x), return_intermediates=True)
            log["denoise_row"] = _rows(row)
        return _only(log, return_keys)


class LatentImageLog:
    """What LatentDiffusion shows of a batch."""

    def _get_denoise_row_from_list(
        self, samples: Iterable[Tensor], desc: str = "", force_no_decoder_quantization: bool = False
    ) -> Tensor:
        """Decode latents of successive levels into one grid, a row for each sample."""
        decode = partial(self.decode_first_stage, force_not_quantize=force_no_decoder_quantization)
        return _rows([decode(z.to(self.device)) for z in samples])

    @torch.no_grad()
    def log_images(
        self,
        batch: Mapping[str, Any],
        N: int = 8,
        n_row: int = 4,
        sample: bool = True,
        ddim_steps: int | None = 200,
        ddim_eta: float = 1.0,
        return_keys: Iterable[str] | None = None,
        quantize_denoised: bool = True,
        inpaint: bool = True,
        plot_denoise_rows: bool = False,
        plot_progressive_rows: bool = True,
        plot_diffusion_rows: bool = True,
        unconditional_guidance_scale: float = 1.0,
        unconditional_guidance_label: Any = None,
        split: str = "train",
    ) -> dict[str, Tensor]:
        """Return pictures to look at, each (b, c, height, width) or a grid (c, height, width).

        Args:
            N, n_row: at most so many samples, and so many in rows of levels.
            ddim_steps, ddim_eta: of DDIM; None samples ancestrally.
            return_keys: give back only these.
            quantize_denoised: show samples through the codebook too, where the first stage has one.
            inpaint: show the middle repainted, and everything but the middle.
            plot_denoise_rows, plot_progressive_rows, plot_diffusion_rows: show sampling and noising by level.
            unconditional_guidance_scale, unconditional_guidance_label: above 1, show guided samples too.
            split: what CompVis's ImageLogger says; it changes nothing.
        """
        z, c, x, xrec, original = self.get_input(
            batch,
            self.first_stage_key,
            return_first_stage_outputs=True,
            force_c_encode=True,
            return_original_cond=True,
            bs=N,
        )
        N, n_row = len(x), min(len(x), n_row)
        log = {"inputs": x, "reconstruction": xrec}
        if self.model.conditioning_key is not None:
            log.update(self._log_conditions(x, c, original))
        if plot_diffusion_rows:
            noised = [self.q_sample(z[:n_row], t) for t in self._logged_levels(n_row)]
            log["diffusion_row"] = self._get_denoise_row_from_list(noised)
        draw = partial(
            self.sample_log, cond=c, batch_size=N, ddim=ddim_steps is not None, ddim_steps=ddim_steps
        )
        if ddim_steps is not None:
            draw = partial(draw, eta=ddim_eta)
        if sample:
            with self.ema_scope("Plotting"):
                samples, row = draw()
            log["samples"] = self.decode_first_stage(samples)
            if plot_denoise_rows:
                row = row["x_inter"] if isinstance(row, Mapping) else row
                log["denoise_row"] = self._get_denoise_row_from_list(row)
            if quantize_denoised and isinstance(self.first_stage_model, VQModelInterface):
                with self.ema_scope("Plotting quantized"):
                    samples, _ = draw(quantize_denoised=True)
                log["samples_x0_quantized"] = self.decode_first_stage(samples)
            if unconditional_guidance_scale > 1.0:
                empty = self.get_unconditional_conditioning(N, unconditional_guidance_label)
                if isinstance(c, Mapping):
                    empty = {**c, "c_crossattn": empty if isinstance(empty, list) else [empty]}
                with self.ema_scope("Plotting guided"):
                    samples, _ = draw(
                        unconditional_guidance_scale=unconditional_guidance_scale,
                        unconditional_conditioning=empty,
                    )
                name = f"samples_cfg_scale_{unconditional_guidance_scale:.2f}"
                log[name] = self.decode_first_stage(samples)
            if inpaint:
                h, w = z.shape[2:]
                mask = torch.ones(N, 1, h, w, device=z.device, dtype=z.dtype)
                mask[:, :, h // 4 : 3 * h // 4, w // 4 : 3 * w // 4] = 0.0
                log["mask"] = mask
                for name, keep in (("inpainting", mask), ("outpainting", 1.0 - mask)):
                    with self.ema_scope(f"Plotting {name}"):
                        samples, _ = draw(x0=z, mask=keep)
                    log[f"samples_{name}"] = self.decode_first_stage(samples)
        if plot_progressive_rows:
            with self.ema_scope("Plotting progressives"):
                shape = (self.channels, self.image_size, self.image_size)
                _, row = self.progressive_denoising(c, shape=shape, batch_size=N, verbose=False)
            log["progressive_row"] = self._get_denoise_row_from_list(row)
        return _only(log, return_keys)

    def _log_conditions(self, x: Tensor, c: Any, original: Any) -> dict[str, Tensor]:
        """Show conditions as pictures: captions and classes drawn, maps coloured, pictures as they are."""
        size = (x.shape[3], x.shape[2])
        if callable(getattr(self.cond_stage_model, "decode", None)):
            c = c["c_concat"][0] if isinstance(c, Mapping) else c
            return {"conditioning": self.cond_stage_model.decode(c)}
        if self.cond_stage_key in ("caption", "txt"):
            return {"conditioning": log_txt_as_img(size, original)}
        if self.cond_stage_key in ("class_label", "cls"):
            names = original["human_label"] if "human_label" in original else original[self.cond_stage_key]
            names = [str(n.item()) if isinstance(n, Tensor) else str(n) for n in names]
            return {"conditioning": log_txt_as_img(size, names[: len(x)])}
        if isimage(original):
            return {"conditioning": original}
        if ismap(original):
            return {"original_conditioning": self.to_rgb(original)}
        return {}

    def to_rgb(self, x: Tensor) -> Tensor:
        """Show maps with many channels as colours in [-1, 1], by fixed random weights."""
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(3, x.shape[1], 1, 1, generator=generator).to(x)
        x = F.conv2d(x, weight)
        return 2.0 * (x - x.min()) / (x.max() - x.min()) - 1.0


def _rows(levels: Sequence[Tensor], padding: int = 2) -> Tensor:
    """Lay pictures of successive levels, each (b, c, h, w), out as one (c, height, width) grid, a row a sample."""
    pictures = torch.stack(list(levels), dim=1)  # (b, n, c, h, w)
    if pictures.shape[2] == 1:
        pictures = pictures.expand(-1, -1, 3, -1, -1)
    b, n, c, h, w = pictures.shape
    grid = pictures.new_zeros(c, b * (h + padding) + padding, n * (w + padding) + padding)
    for i in range(b):
        for j in range(n):
            top, left = i * (h + padding) + padding, j * (w + padding) + padding
            grid[:, top : top + h, left : left + w] = pictures[i, j]
    return grid


def _only(log: dict[str, Tensor], keys: Iterable[str] | None) -> dict[str, Tensor]:
    """Keep the pictures under `keys`, or all of them where none of those is there."""
    chosen = {key: log[key] for key in keys or () if key in log}
    return chosen or log
