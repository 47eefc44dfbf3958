"""CompVis's DPMSolverSampler: its constructor, keywords and numbers, on the shared loop of levels.py."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.ddim import Callback, ImageCallback, collect, only_set, warn_of_unused
from ldm.models.diffusion.samplers import sample_steps


class DPMSolverSampler:
    """DPM-Solver with CompVis's signature: second order, multistep, predicting the clean sample.

    Differences: it runs on the model's device and from 1 step up, callbacks and masks have effect, conditions
    may be dicts of lists, eps, x0 and v models are understood, and intermediates are returned where the
    original gave None.

    Args:
        model: see denoiser.py.
        device: kept as an attribute, without effect: samples are where the model is.
        separate_passes: run guidance's two passes one after the other.
        solver: options of samplers.DPMSolver (predict_x0=False is DPM-Solver proper, order, solver_type,
            lower_order_final) and `spacing`.
    """

    separate_passes = False  # for subclasses that do without this constructor
    solver: dict[str, Any] = {}  # never changed in place

    def __init__(self, model: Any, device: Any = None, *, separate_passes: bool = False, **solver: Any):
        self.model = model
        self.device = getattr(model, "device", None) if device is None else device
        self.separate_passes = separate_passes
        self.solver = solver
        self.register_buffer("alphas_cumprod", model.alphas_cumprod.detach().float())

    def register_buffer(self, name: str, attr: Any) -> None:
        """Keep a table as an attribute, a tensor on the model's device."""
        setattr(self, name, attr.to(self.model.device) if isinstance(attr, Tensor) else attr)

    @torch.no_grad()
    def sample(
        self,
        S: int,
        batch_size: int,
        shape: Sequence[int],
        conditioning: Any = None,
        callback: Callback | None = None,
        normals_sequence: Any = None,
        img_callback: ImageCallback | None = None,
        quantize_x0: bool = False,
        eta: float = 0.0,
        mask: Tensor | None = None,
        x0: Tensor | None = None,
        temperature: float = 1.0,
        noise_dropout: float = 0.0,
        score_corrector: Any = None,
        corrector_kwargs: dict[str, Any] | None = None,
        verbose: bool = True,
        x_T: Tensor | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
        dynamic_threshold: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Sample a batch from noise; arguments and result as DDIMSampler.sample's.

        temperature and noise_dropout have no effect: the solver draws no noise.

        Raises:
            UsageError: eta other than 0, or a value out of range.
        """
        warn_of_unused(kwargs)
        x = torch.randn((batch_size, *shape), device=self.model.device) if x_T is None else x_T
        steps = sample_steps(
            "dpm_solver",
            self.model,
            x,
            conditioning,
            steps=S,
            guidance_scale=unconditional_guidance_scale,
            unconditional_conditioning=unconditional_conditioning,
            eta=eta,
            mask=mask,
            x0=x0,
            separate_passes=self.separate_passes,
            score_corrector=score_corrector,
            corrector_kwargs=corrector_kwargs,
            quantize_denoised=quantize_x0,
            **{**only_set(dynamic_threshold=dynamic_threshold), **self.solver},
        )
        return collect(steps, x, callback, img_callback, log_every_t)

    @torch.no_grad()
    def encode(
        self,
        S: int,
        x0: Tensor,
        conditioning: Any = None,
        t_enc: int | None = None,
        callback: Callback | None = None,
        img_callback: ImageCallback | None = None,
        log_every_t: int = 100,
        unconditional_guidance_scale: float = 1.0,
        unconditional_conditioning: Any = None,
    ) -> tuple[Tensor, dict[str, list[Tensor]]]:
        """Invert: walk x0 (b, c, h, w) up the last t_enc of S steps, or all, along the solver's path.

        What comes of all steps is an x_T that `sample` leads back from, nearer with more steps. Result as sample's.

        Raises:
            UsageError: t_enc outside 0 .. S, or a value out of range.
        """
        steps = sample_steps(
            "dpm_solver",
            self.model,
            x0,
            conditioning,
            steps=S,
            run_last=t_enc,
            invert=True,
            guidance_scale=unconditional_guidance_scale,
            unconditional_conditioning=unconditional_conditioning,
            separate_passes=self.separate_passes,
            **self.solver,
        )
        return collect(steps, x0, callback, img_callback, log_every_t)
