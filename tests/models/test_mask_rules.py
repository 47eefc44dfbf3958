"""How a run keeps what a mask keeps: by four programs' rules."""

import pytest
import torch
from linear_gaussian import Wavy, mix, normals

from ldm.models.diffusion.samplers import sample_steps
from ldm.models.diffusion.samplers.masks import kept_at_last

SHAPE = (2, 4, 5, 3)
MASK = torch.zeros(2, 1, 5, 3)
MASK[:, :, 1:4, :2] = 1
KEPT = MASK.expand(SHAPE).bool()


class Watched(Wavy):
    """Remembers what the network saw."""

    def __init__(self, kind):
        super().__init__(kind)
        self.seen = []

    def apply_model(self, x, t, cond):
        self.seen.append((x.clone(), float(t[0])))
        return super().apply_model(x, t, cond)


def run(rule, sampler="ddim", kind="eps", mask=MASK, **options):
    x_T, z = normals(*SHAPE, count=2, seed=3, dtype=torch.float32)
    drawn = []

    def draw(like):
        drawn.append(torch.randn(like.shape, generator=torch.Generator().manual_seed(len(drawn))))
        return drawn[-1]

    model = Watched(kind)
    steps = list(
        sample_steps(
            sampler, model, x_T, None, steps=5, mask=mask, x0=z, mask_rule=rule, noise=draw, **options
        )
    )
    return model, steps, x_T, z, drawn


def noised_of(model, z, noise, t):
    return mix(z, noise, model.alphas_cumprod[int(t)])


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_by_comfyuis_rule_the_kept_part_is_noised_by_one_noise_and_its_clean_sample_known(kind):
    model, steps, x_T, z, _ = run("comfyui", kind=kind)
    for seen, t in model.seen:
        torch.testing.assert_close(seen[KEPT], noised_of(model, z, x_T, t)[KEPT], rtol=0, atol=1e-5)
    for step in steps:
        torch.testing.assert_close(step.pred_x0[KEPT], z[KEPT], rtol=0, atol=1e-4)
        assert not torch.allclose(step.pred_x0[~KEPT], z[~KEPT], atol=0.1)


def test_by_a1111s_rule_only_the_predicted_clean_sample_is_known():
    model, steps, x_T, z, drawn = run("a1111", "euler")
    assert not drawn  # Euler draws nothing, and neither does the rule
    assert all(torch.allclose(step.pred_x0[KEPT], z[KEPT], atol=1e-4) for step in steps)
    # From pure noise the kept part begins as that, and comes nearer to z.
    torch.testing.assert_close(model.seen[0][0][KEPT], x_T[KEPT], rtol=0, atol=1e-2)
    torch.testing.assert_close(steps[-1].x_t[KEPT], z[KEPT], rtol=0, atol=1e-4)


def test_by_diffusers_rule_the_first_step_begins_with_noise_alone():
    model, steps, x_T, z, _ = run("diffusers")
    (first, _), *others = model.seen
    assert torch.equal(first, x_T)
    for seen, t in others:
        torch.testing.assert_close(seen[KEPT], noised_of(model, z, x_T, t)[KEPT], rtol=0, atol=1e-5)
    assert not torch.allclose(steps[0].pred_x0[KEPT], z[KEPT], atol=0.1)


def test_by_compviss_rule_noise_is_drawn_afresh():
    model, _, _, z, drawn = run("compvis")
    fresh = drawn[::2]  # before each step, and then DDIM's own
    for (seen, t), noise in zip(model.seen, fresh, strict=True):
        torch.testing.assert_close(seen[KEPT], noised_of(model, z, noise, t)[KEPT], rtol=0, atol=1e-5)


def test_shares_of_a_mask_are_blended():
    """ComfyUI's masks are bilinear: a cell of a half is the mean of both."""
    half = MASK / 2
    (_, steps, _, z, _), (_, free, *_) = run("comfyui", mask=half), run("a1111", mask=half)
    assert torch.equal(kept_at_last("comfyui", half, z, steps[-1].x_t), steps[-1].x_t)
    assert not torch.allclose(steps[-1].x_t, free[-1].x_t, atol=1e-3)
    for rule in ("compvis", "diffusers", "a1111"):
        last = kept_at_last(rule, MASK, z, steps[-1].x_t)
        assert torch.equal(last, torch.where(KEPT, z, steps[-1].x_t))
