"""Every option of every sampler does something: it changes where some run ends, or its other values are refused."""

import functools

import pytest
import torch
from linear_gaussian import Wavy, normals

from ldm.errors import UsageError
from ldm.models.diffusion.samplers import SAMPLERS, sample_steps, sampler_options

SHAPE = (2, 3, 4, 1)
OTHER = {  # of each option values that are not its default; the first that the sampler takes is tried
    "quantize_denoised": (True,),
    "dynamic_threshold": (0.2,),
    "temperature": (0.5,),
    "noise_dropout": (0.5,),
    "repeat_noise": (True,),
    "v_posterior": (1.0,),
    "clip_denoised": (True,),
    "predict_x0": (False,),
    "lower_order_final": (False,),
    "solver_type": ("taylor", "heun", "midpoint", "bh1"),
    "order": (1, 2),
    "s_churn": (3.0,),
    "s_noise": (0.5,),
    "s_tmin": (2.0,),
    "s_tmax": (2.0,),
    "always_draw": (False,),
    "brownian": (False,),
    "r": (0.3,),
    "rtol": (0.001,),
    "atol": (0.0001,),
    "h_init": (0.2,),
    "pcoeff": (0.3,),
    "icoeff": (0.5,),
    "dcoeff": (0.3,),
    "accept_safety": (0.99,),
    "corrector": (False,),
    "clock": ("t",),
    "gamma": (0.7,),
    "c2": (0.3,),
    "corrector_order": (0,),
    "simple_order_2": (False,),
    "final_orders": ("none",),
    "timestep_scaling": (None,),
}
# Beside which it may have to be asked for: fresh noise, churn, a higher order, a step that is too long at first, an end
# with noise.
BESIDE = (
    {},
    {"eta": 0.6},
    {"s_churn": 4.0, "s_tmin": 0.3, "s_tmax": 3.0},
    {"order": 3},
    {"rtol": 0.001, "h_init": 2.0},
    {"spacing": (10.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.1)},
)


class Coarse(Wavy):
    """A network whose first stage knows halves alone."""

    def __init__(self):
        super().__init__()
        self.first_stage_model = self

    def quantize(self, x):
        return ((2 * x).round() / 2,)


@functools.cache
def end(name, options):
    draws = iter(normals(*SHAPE, count=60, seed=1))
    noise = lambda like: next(draws)[: len(like), :, : like.shape[2], : like.shape[3]].to(like)  # noqa: E731
    if name in BROWNIAN:  # a path begins with a draw of another shape
        noise = lambda like: torch.full(like.shape, 0.3, dtype=like.dtype)  # noqa: E731
    (x_T,) = normals(*SHAPE)
    steps = 21 if name == "restart" else 6
    *_, last = sample_steps(name, Coarse(), 3 * x_T, None, steps=steps, noise=noise, **dict(options))
    return last.x_t


BROWNIAN = {name for name, cls in SAMPLERS.items() if "brownian" in sampler_options(cls)}
# Options whose other value is refused by the sampler's own words, which name who has it.
REFUSED = {("dpmpp_2m", "predict_x0")}


def acts(name, option):
    for value in OTHER[option]:
        for beside in BESIDE:
            beside = {key: other for key, other in beside.items() if key != option}
            try:
                plain = end(name, tuple(beside.items()))
                changed = end(name, (*beside.items(), (option, value)))
            except UsageError:
                continue
            if not torch.equal(plain, changed):
                return True
    return False


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.thinned(5)
def test_every_option_of_a_sampler_acts(name):
    idle = {option for option in sampler_options(SAMPLERS[name]) if not acts(name, option)}
    assert idle == {option for sampler, option in REFUSED if sampler == name}


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("euler_cfg_pp", "s_noise"),
        ("plms", "temperature"),
        ("plms", "noise_dropout"),
        ("plms", "repeat_noise"),
    ],
)
def test_options_of_noise_that_is_not_drawn_are_refused(name, option):
    with pytest.raises(UsageError, match=f"{name} has no option {option}; it has "):
        sample_steps(name, Wavy(), normals(*SHAPE)[0], None, steps=3, **{option: 0.5})
