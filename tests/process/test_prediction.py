"""eps, x0 and v are three names for one line: every conversion agrees with every other."""

import pytest
import torch

from ldm.errors import UsageError
from ldm.process.prediction import PREDICTIONS, check_prediction, to_eps, to_v, to_x0, velocity

ALPHA_BAR = torch.tensor([0.2, 0.97], dtype=torch.float64).reshape(2, 1, 1, 1)


@pytest.fixture
def line():
    """A clean sample, its noise, what lies between, and what each kind of network would answer there."""
    g = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(2, 4, 5, 3, generator=g, dtype=torch.float64) for _ in range(2))
    x_t = ALPHA_BAR.sqrt() * x0 + (1 - ALPHA_BAR).sqrt() * eps
    v = ALPHA_BAR.sqrt() * eps - (1 - ALPHA_BAR).sqrt() * x0
    return x_t, {"eps": eps, "x0": x0, "v": v}


@pytest.mark.parametrize("given", PREDICTIONS)
@pytest.mark.parametrize("wanted, convert", [("eps", to_eps), ("x0", to_x0), ("v", to_v)])
def test_any_prediction_gives_the_other_two(line, given, wanted, convert):
    x_t, answers = line
    got = convert(given, answers[given], x_t, ALPHA_BAR)
    torch.testing.assert_close(got, answers[wanted], rtol=0, atol=1e-13)


def test_velocity_is_what_a_v_network_is_asked_for(line):
    _, answers = line
    torch.testing.assert_close(
        velocity(answers["x0"], answers["eps"], ALPHA_BAR), answers["v"], rtol=0, atol=1e-15
    )


def test_a_given_sigma_is_used_instead_of_the_rounded_one(line):
    """At alpha_bar = 1 - 1e-6, float32 has lost a tenth of 1 - alpha_bar's digits; the table has not."""
    _, answers = line
    exact = torch.tensor(1 - 1.0e-6, dtype=torch.float64)
    x_t = exact.sqrt() * answers["x0"] + (1 - exact).sqrt() * answers["eps"]
    rounded = exact.float()
    with_table = to_x0("v", answers["v"], x_t, rounded.double(), (1 - exact).sqrt())
    torch.testing.assert_close(
        with_table, rounded.double().sqrt() * x_t - 1e-3 * answers["v"], rtol=0, atol=1e-12
    )
    without = to_eps("x0", answers["x0"], x_t.float(), rounded).double()
    held = to_eps("x0", answers["x0"], x_t, exact, torch.tensor(1e-3, dtype=torch.float64))
    assert (held - answers["eps"]).abs().max() < 1e-9 < 1e-3 < (without - answers["eps"]).abs().max()


def test_a_velocity_stays_finite_where_no_signal_is_left(line):
    x_t, answers = line
    none = torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(to_x0("v", -answers["x0"], x_t, none), answers["x0"], rtol=0, atol=0)


@pytest.mark.parametrize("convert", [to_eps, to_x0, to_v])
def test_an_unknown_kind_is_named(convert):
    x = torch.zeros(2, 3)
    with pytest.raises(
        UsageError, match="prediction 'epsilon' is unknown; a network predicts one of eps, x0, v"
    ):
        convert("epsilon", x, x, torch.tensor(0.5))
    with pytest.raises(UsageError, match="'score' is unknown"):
        check_prediction("score")
