"""What a training step of OpenAI's pixel diffusion minimises: errors, bounds and both, at levels that a sampler draws.

Improved DDPM (arXiv:2102.09672), sections 3.1 and 3.3.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ldm.errors import MismatchError
from ldm.models.diffusion.resample import record_losses
from ldm.training.draws import Draws
from ldm.training.objectives import Batch, Figures, pictures_of


class GaussianObjective:
    """Trains a PixelDiffusion by the loss that its flags name.

    Args:
        model: the PixelDiffusion that is trained.
        memory_format: of the pictures.
        sample_steps: of the samples that are shown while it trains (DDIM).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        memory_format: torch.memory_format = torch.contiguous_format,
        sample_steps: int = 20,
    ):
        self.model, self.memory_format = model, memory_format
        self.sample_steps = sample_steps

    def prepare(self, batch: Batch, draws: Draws, gather: Any) -> None:
        """Do what is due before the very first step: nothing."""

    def samples(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Take a batch's pictures (b, 3, size, size), and what the network is conditioned on.

        Raises:
            MismatchError: pictures or labels are missing, or pictures have another size than the model's.
        """
        model = self.model
        wanted = [model.image_key] + [model.label_key] * bool(model.flags["class_cond"])
        for key in wanted:
            if key not in batch:
                found = ", ".join(name for name in batch if name != "micro")
                raise MismatchError(
                    f"a batch has no '{key}', only {found}; "
                    "set model.params.image_key, or label_key and the data's labels"
                )
        image = pictures_of(batch, model.image_key).to(memory_format=self.memory_format)
        size = model.flags["image_size"]
        if tuple(image.shape[1:]) != (3, size, size):
            height_width_colours = " x ".join(map(str, batch[model.image_key].shape[1:]))
            raise MismatchError(
                f"the model takes pictures of {size} x {size} x 3, the data's are {height_width_colours}; set "
                "model.params.image_size or the data's"
            )
        return image, {"y": batch[model.label_key]} if model.flags["class_cond"] else {}

    def forward(self, batch: Batch, draws: Draws) -> tuple[Tensor, Figures]:
        """Compute the loss of a batch at the schedule sampler's levels; returns (loss, figures).

        A sampler that learns from losses does so here, batch by batch as in the original.
        """
        model, sampler = self.model, self.model.levels.sampler
        image, conditions = self.samples(batch)
        t, weights = draws.weighted_levels(sampler, image)
        terms = model.diffusion.training_losses(model.model, image, t, conditions, noise=draws.normal(image))
        record_losses(sampler, t, terms["loss"])
        means = {name: (weights * term).mean() for name, term in terms.items()}
        loss = means.pop("loss")
        return loss, {f"train/{name}": mean.detach() for name, mean in means.items()}

    def loss(self, outputs: tuple[Tensor, Figures], index: int, step: int) -> tuple[Tensor, Figures]:
        """Hand on what `forward` computed; there is one optimizer."""
        return outputs

    def after_step(self) -> None:
        """Take the new weights into the moving averages."""
        self.model.update_averages()

    @torch.no_grad()
    def validate(self, batch: Batch, draws: Draws, step: int) -> dict[str, float]:
        """Measure the first average's terms, one level drawn from each b-th of the chain; the same draws each time.

        The mean is that of all levels alike, whatever the schedule sampler prefers.
        """
        model = self.model
        image, conditions = self.samples(batch)
        b, count = len(image), model.diffusion.num_timesteps
        place = (torch.arange(b, device=image.device) + draws.uniform(image)) / b  # (b,) in [0, 1]
        t = (place * count).long().clamp(max=count - 1)
        with model.ema_scope():
            terms = model.diffusion.training_losses(
                model.model, image, t, conditions, noise=draws.normal(image)
            )
        return {f"val/{name}": float(term.mean()) for name, term in terms.items()}

    @torch.no_grad()
    def pictures(self, batch: Batch, count: int) -> dict[str, Tensor]:
        """Make what is worth a look: the batch's pictures, and samples for their labels from the first average."""
        taken = {key: value[:count] for key, value in batch.items() if key != "micro"}
        image, conditions = self.samples(taken)
        with self.model.ema_scope():
            samples = self.model.shorter(self.sample_steps).ddim_sample_loop(
                self.model.model, image.shape, noise=Draws(0, 0).normal(image), model_kwargs=conditions
            )
        return {"inputs": image, "samples": samples}
