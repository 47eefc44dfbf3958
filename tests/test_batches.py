"""A picture does not depend on its neighbours: between batch sizes lies the rounding of float32, and nothing else.

Convolutions and matrix products add in another order when the batch has another size, and guidance and fresh noise
carry such a last bit on. With weights in float64 those last bits vanish when the latents are rounded to float32.
"""

import pytest
import torch

import ldm

PROMPT = "a small yellow star to the left of a large purple ring on a gray background"


@pytest.fixture(scope="module")
def exact() -> ldm.StableDiffusion:
    """The model in the box, computing in float64."""
    sd = ldm.StableDiffusion.default()
    sd.model.double()
    return sd


def latents(sd: ldm.StableDiffusion, batch_size: int, **options) -> torch.Tensor:
    return sd.txt2img(
        PROMPT, seed=42, num_images=3, batch_size=batch_size, output_type="latent", **options
    ).latents


@pytest.mark.parametrize(
    ("sampler", "eta"),
    [
        ("ddim", 1.0),
        ("dpmpp_2m", 0.0),
        *(pytest.param(name, 0.0, marks=pytest.mark.slow) for name in ("ddim", "ddpm", "plms", "dpm_solver")),
    ],
)
@pytest.mark.thinned(2)
def test_latents_of_a_batch_are_those_of_its_pictures_alone(exact, sampler, eta):
    options = {"sampler": sampler, "eta": eta, "steps": 3, "guidance_scale": 7.5}
    alone, together = latents(exact, 1, **options), latents(exact, 2, **options)
    largest = alone.abs().amax((1, 2, 3), keepdim=True)
    # 5e-6 is for the one value in millions that lies on the edge between two float32 numbers.
    assert ((together - alone).abs() <= 5e-6 * largest).all()
    assert not torch.equal(alone[0], alone[1])
