"""No sampler waits for a GPU: tensors of `meta` have no values, so that whoever looks at one is stopped."""

import pytest
import torch

from ldm.models.diffusion.samplers import SAMPLERS, sample_steps

# DPM adaptive decides by what it sees, and waits for it.
NAMED = sorted(SAMPLERS.keys() - {"dpm_adaptive"})


class Model:
    """A network that only has shapes, and a schedule on the CPU, from where a sampler reads its levels once."""

    num_timesteps = 50

    def __init__(self, parameterization):
        self.parameterization = parameterization
        self.alphas_cumprod = (1 - torch.linspace(1e-4, 0.3, self.num_timesteps)).cumprod(0)

    def apply_model(self, x, t, conditioning):
        assert x.is_meta and t.is_meta and conditioning.is_meta and len(x) == len(t) == len(conditioning)
        return x * conditioning.mean()


def x_meta(*size):
    return torch.empty(size, device="meta")


@pytest.mark.parametrize("parameterization", ["eps", "v", "x0"])
@pytest.mark.parametrize("name", NAMED)
def test_steps_are_queued_without_a_look_at_any_value(name, parameterization):
    x, words = x_meta(3, 4, 5, 6), x_meta(3, 7, 2)
    options = {"eta": 0.5} if name == "ddim" else {}
    run = sample_steps(
        name,
        Model(parameterization),
        x,
        words,
        steps=9,
        guidance_scale=5.0,
        unconditional_conditioning=words,
        guidance_rescale=0.3,
        guidance_interval=(0.1, 0.9),
        **options,
    )
    steps = list(run)
    assert len(steps) == (4 if name == "dpm_fast" else 9) and all(
        step.x_t.is_meta and step.x_t.shape == x.shape for step in steps
    )


@pytest.mark.parametrize("name", NAMED)
def test_a_masked_run_looks_at_no_value_either(name):
    x, words = x_meta(2, 4, 5, 6), x_meta(2, 7, 2)
    run = sample_steps(name, Model("eps"), x, words, steps=5, mask=x_meta(2, 1, 5, 6), x0=x_meta(2, 4, 5, 6))
    assert all(step.x_t.is_meta for step in run)


def test_a_look_would_be_noticed():
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(x_meta(2).isfinite().all())
