"""Shorter chains: which levels they visit, that nothing but the steps changes, and what the network is told."""

import json

import numpy as np
import pytest
import torch
from linear_gaussian import normals

from ldm.errors import UsageError
from ldm.models.diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)
from ldm.models.diffusion.respace import SpacedDiffusion, _WrappedModel, space_timesteps
from ldm.process.schedule import respaced_betas

SIZES = (2, 3, 5, 4)


def options(variance=ModelVarType.FIXED_SMALL, num_steps=50, **changes):
    return {
        "betas": get_named_beta_schedule("cosine", num_steps),
        "model_mean_type": ModelMeanType.EPSILON,
        "model_var_type": variance,
        "loss_type": LossType.MSE,
        **changes,
    }


def network(x, t):
    return 0.6 * x + 0.2 * torch.sin(3 * x) + 0.001 * t.to(x.dtype).reshape(-1, 1, 1, 1)


def same(got, want, atol=1e-12):
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


# -- levels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[10], [10, 15, 5], "ddim10", "5,5"], ids=str)
def test_levels_are_the_recorded_ones(golden, counts):
    recorded = json.loads((golden / "gaussian.json").read_text())
    assert sorted(space_timesteps(50, counts)) == recorded[f"space.{counts}"]


@pytest.mark.parametrize("num_steps", [9, 50, 53])
@pytest.mark.parametrize("counts", [(3,), (1, 2), (3, 0, 1), (2, 2, 3)])
def test_each_section_has_its_count_and_both_its_ends(num_steps, counts):
    levels = sorted(space_timesteps(num_steps, counts))
    assert len(levels) == sum(counts)
    sections = np.array_split(np.arange(num_steps), len(counts))  # longer ones first, as here
    for section, count in zip(sections, counts, strict=True):
        mine = [level for level in levels if section[0] <= level <= section[-1]]
        assert len(mine) == count
        if count:
            assert mine[0] == section[0]
        if count > 1:
            assert mine[-1] == section[-1]
            gaps = np.diff(mine)
            assert gaps.max() - gaps.min() <= 1


def test_a_list_and_its_text_are_one():
    assert space_timesteps(50, "10,15,5") == space_timesteps(50, [10, 15, 5])
    assert space_timesteps(50, "50") == space_timesteps(50, "ddim50") == set(range(50))
    assert space_timesteps(50, np.array([5, 5])) == space_timesteps(50, (5, 5))
    assert space_timesteps(1, "ddim1") == {0}


def test_ddim_spacing_is_one_stride_from_the_cleanest():
    for count in (2, 13, 25, 50, 100, 250, 1000):
        levels = sorted(space_timesteps(1000, f"ddim{count}"))
        assert len(levels) == count and levels[0] == 0 and len(set(np.diff(levels))) <= 1


def test_spacings_that_cannot_be_are_refused():
    for counts, message in {
        "ddim30": "50 levels have no whole stride that visits exactly 30 of them; possible near it: 25 or 50",
        "ddim1": "exactly 1 of them; possible near it: 2$",
        "ddim51": "exactly 51 of them; possible near it: 50$",
        "51": "section 1 of 1 has 50 of 50 levels, so its count must be from 0 to 50; got 51",
        "5,5,17": "section 3 of 3 has 16 of 50 levels, so its count must be from 0 to 16; got 17",
        "-1,5": "section 1 of 2 has 25 of 50 levels, so its count must be from 0 to 25; got -1",
        "0,0": r"at least 1 level to visit, got section counts \[0, 0\]",
        "": "whole numbers, such as .*; got ''",
        "ddim": "got 'ddim'",
        "ddim5,5": "got 'ddim5,5'",
        "5;5": "got '5;5'",
    }.items():
        with pytest.raises(UsageError, match=message):
            space_timesteps(50, counts)
    with pytest.raises(UsageError, match=r"got section counts \[\]"):
        space_timesteps(50, [])
    with pytest.raises(UsageError, match=r"whole numbers, .* got \[2\.5\]"):
        space_timesteps(50, [2.5])


# -- chains ------------------------------------------------------------------------------------------------


def test_visited_levels_keep_their_noise():
    whole = GaussianDiffusion(**options())
    levels = [3, 4, 17, 49]
    short = SpacedDiffusion(reversed(levels), **options())
    assert short.num_timesteps == 4 and short.original_num_steps == 50
    assert short.timestep_map == levels and short.use_timesteps == set(levels)
    np.testing.assert_allclose(short.alphas_cumprod, whole.alphas_cumprod[levels], rtol=0, atol=1e-15)
    np.testing.assert_array_equal(short.betas, respaced_betas(whole.alphas_cumprod, levels))
    assert (short.betas > 0).all() and (short.betas < 1).all()


@pytest.mark.parametrize("variance", [ModelVarType.FIXED_SMALL, ModelVarType.FIXED_LARGE])
def test_respacing_to_all_levels_changes_nothing(variance):
    whole = GaussianDiffusion(**options(variance))
    spaced = SpacedDiffusion(space_timesteps(50, [50]), **options(variance))
    noise, x0 = normals(*SIZES, count=2)
    for run in (
        lambda d: d.p_sample_loop(network, SIZES, noise=noise),
        lambda d: d.ddim_sample_loop(network, SIZES, noise=noise, eta=0.7),
        lambda d: d.calc_bpd_loop(network, x0)["total_bpd"],
        lambda d: d.training_losses(network, x0, torch.tensor([3, 49]), noise=noise)["loss"],
    ):
        results = []
        for diffusion in (whole, spaced):
            torch.manual_seed(0)
            results.append(run(diffusion))
        same(*results)


def test_the_network_is_told_the_long_chain_s_levels():
    told = []

    def note(x, t, **kwargs):
        told.append(t.tolist())
        return 0 * x

    x = normals(*SIZES)[0]
    t = torch.tensor([0, 2])
    levels = [3, 4, 17, 49]
    plain = SpacedDiffusion(levels, **options())
    plain.p_sample(note, x, t, cond_fn=note)
    plain.ddim_sample(note, x, t, cond_fn=note)
    plain.ddim_reverse_sample(note, x, t)
    plain.training_losses(note, x, t)
    plain._vb_terms_bpd(note, x, x, t)
    assert told == [[3, 17]] * 7
    told.clear()
    scaled = SpacedDiffusion(levels, **options(rescale_timesteps=True))
    scaled.p_sample(note, x, t, cond_fn=note)
    scaled.training_losses(note, x, t)
    assert told == [[60.0, 340.0]] * 3  # 3 and 17 of 50, in thousandths


def test_learned_variances_are_respaced_with_the_chain():
    """The ends of the learned range are those of the short chain."""
    spaced = SpacedDiffusion([3, 20, 49], **options(ModelVarType.LEARNED_RANGE))
    x, x0 = normals(*SIZES, count=2)

    def wide(x, t):
        return torch.cat([network(x, t), torch.ones_like(x)], dim=1)

    out = spaced.p_mean_variance(wide, x, torch.tensor([1, 2]))
    want = torch.from_numpy(spaced.betas[[1, 2]]).reshape(-1, 1, 1, 1).expand(SIZES)
    same(out["variance"], want)
    # With learned variances the loss asks once more, of an answer that is there already.
    assert spaced.training_losses(wide, x0, torch.tensor([1, 2])).keys() == {"loss", "mse", "vb"}


def test_a_network_is_wrapped_once():
    spaced = SpacedDiffusion([3, 20, 49], **options())
    wrapped = spaced._wrap_model(network)
    assert isinstance(wrapped, _WrappedModel) and spaced._wrap_model(wrapped) is wrapped


def test_a_chain_may_be_cut_to_its_last_level():
    """One step from noise straight to the predicted clean sample."""
    noise = normals(*SIZES)[0]
    spaced = SpacedDiffusion({49}, **options())
    t = torch.full((2,), 49)
    whole = GaussianDiffusion(**options())
    want = whole.p_mean_variance(network, noise, t)["pred_xstart"]
    same(spaced.ddim_sample_loop(network, SIZES, noise=noise), want)
    same(spaced.p_sample_loop(network, SIZES, noise=noise), want)


def test_levels_that_the_chain_has_not_are_refused():
    for levels, got in (([3, 50, 99], r"\[50, 99\]"), ([-1, 3], r"\[-1\]"), ([], "none")):
        with pytest.raises(
            UsageError, match=f"use_timesteps should be levels from 0 to 49, .* one; got {got}"
        ):
            SpacedDiffusion(levels, **options())
    with pytest.raises(UsageError, match=r"betas must lie in \(0, 1\], got 0 to 0\.5"):
        SpacedDiffusion([0], **options(betas=[0.0, 0.5]))
