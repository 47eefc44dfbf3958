"""Which levels are visited: the recorded lists, and exactly as many as were asked for."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from ldm.errors import UsageError
from ldm.process.schedule import NoiseSchedule
from ldm.process.spacing import (
    COMPVIS_METHODS,
    CONTINUOUS_METHODS,
    EXACT_METHODS,
    compvis_levels,
    continuous_levels,
    exact_levels,
)


@pytest.mark.parametrize("method", COMPVIS_METHODS)
@pytest.mark.parametrize("num_steps", [10, 20, 50])
def test_historic_lists_are_the_recorded_ones(golden, method, num_steps):
    want = load_file(golden / "modules.safetensors")[f"ddim.{method}.{num_steps}.t"]
    np.testing.assert_array_equal(compvis_levels(method, num_steps, 1000), want)


@pytest.mark.parametrize("method", EXACT_METHODS)
@pytest.mark.parametrize("num_train", [1000, 37, 1])
def test_every_count_gives_that_many_distinct_levels_in_range(method, num_train):
    for num_steps in range(1, num_train + 1):
        levels = exact_levels(method, num_steps, num_train)
        assert levels.dtype == np.int64 and levels.shape == (num_steps,)
        assert levels[0] >= 0 and levels[-1] <= num_train - 1
        assert (np.diff(levels) > 0).all()


def test_uniform_is_the_historic_list_for_every_divisor():
    divisors = [s for s in range(1, 1000) if 1000 % s == 0]
    for num_steps in divisors:
        np.testing.assert_array_equal(
            exact_levels("uniform", num_steps, 1000), compvis_levels("uniform", num_steps, 1000)
        )
    assert len(divisors) == 15
    assert exact_levels("uniform", 1000, 1000).tolist() == list(range(1000))


def test_uniform_is_the_stated_formula_elsewhere():
    assert exact_levels("uniform", 3, 1000).tolist() == [1, 334, 667]
    assert exact_levels("uniform", 30, 1000)[-3:].tolist() == [901, 934, 967]


def test_historic_uniform_keeps_its_wrong_counts():
    counts = [len(compvis_levels("uniform", s, 1000)) for s in range(1, 1001)]
    tops = [compvis_levels("uniform", s, 1000)[-1] for s in range(1, 1001)]
    assert sum(n != s for s, n in enumerate(counts, start=1)) == 984
    assert sum(top == 1000 for top in tops) == 599


def test_quad_moves_only_what_repeats():
    for num_steps in (10, 20):
        np.testing.assert_array_equal(
            exact_levels("quad", num_steps, 1000), compvis_levels("quad", num_steps, 1000)
        )
    assert exact_levels("quad", 50, 1000)[:5].tolist() == [1, 2, 3, 4, 6]
    assert compvis_levels("quad", 50, 1000)[:5].tolist() == [1, 1, 2, 3, 6]


@pytest.mark.parametrize("method", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("num_steps", [2, 7, 30, 64, 333, 999])
def test_the_spacings_of_diffusers_are_diffusers_own(method, num_steps):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(timestep_spacing=method, steps_offset=1 if method == "leading" else 0)
    theirs.set_timesteps(num_steps)
    np.testing.assert_array_equal(exact_levels(method, num_steps, 1000)[::-1], theirs.timesteps.numpy())


@pytest.mark.parametrize("spaced", [compvis_levels, exact_levels])
@pytest.mark.parametrize("num_steps", [0, -1, 1001, 10**9, 2.5, True, "ten", None])
def test_counts_out_of_range_are_named(spaced, num_steps):
    with pytest.raises(UsageError, match="whole number from 1 to 1000, got") as caught:
        spaced("uniform", num_steps, 1000)
    assert repr(num_steps) in str(caught.value) and caught.value.exit_code == 2


def test_unknown_methods_are_answered_with_the_known_ones():
    with pytest.raises(UsageError, match="uniform, quad; got 'linear'"):
        compvis_levels("linear", 10, 1000)
    with pytest.raises(UsageError, match="uniform, quad, leading, trailing, linspace; got 'karras'"):
        exact_levels("karras", 10, 1000)


ALPHA_BAR = NoiseSchedule.named("linear", 1000, linear_start=0.00085, linear_end=0.012).alpha_bar


@pytest.mark.parametrize("method", CONTINUOUS_METHODS)
@pytest.mark.parametrize("num_steps", [1, 7, 20, 1000])
def test_continuous_levels_divide_the_whole_range(method, num_steps):
    t, alpha_bar = continuous_levels(method, num_steps, ALPHA_BAR)
    assert t.shape == alpha_bar.shape == (num_steps + 1,)
    np.testing.assert_allclose(t[[0, -1]], [0, 999], atol=1e-9)
    np.testing.assert_allclose(alpha_bar[[0, -1]], ALPHA_BAR[[0, 999]], rtol=1e-12)
    np.testing.assert_allclose(np.log(alpha_bar), np.interp(t, np.arange(1000), np.log(ALPHA_BAR)), rtol=1e-9)
    evenly = {
        "time_uniform": t,
        "time_quadratic": np.sqrt((t + 1) / 1000),
        "logSNR": np.log(alpha_bar) - np.log1p(-alpha_bar),
    }[method]
    np.testing.assert_allclose(np.diff(evenly), np.diff(evenly)[0], rtol=1e-7)


def test_continuous_levels_refuse_what_they_cannot_divide():
    with pytest.raises(UsageError, match="time_uniform, time_quadratic, logSNR; got 'uniform'"):
        continuous_levels("uniform", 5, ALPHA_BAR)
    with pytest.raises(UsageError, match="from 1 to 1000, got 1001"):
        continuous_levels("logSNR", 1001, ALPHA_BAR)
