"""The bench of the samplers: their orders are what it says, and its table and plot come out."""

import pytest

from bench import samplers as bench

# The slopes of the papers, on levels even in log sigma without fresh noise. 3M SDE's weights are of the second order.
ORDERS = {
    "ddim": 1, "euler": 1, "euler_a": 1, "ddim_cfg_pp": 1, "plms": 2, "heun": 2, "dpm2": 2, "dpm2_a": 2,
    "dpmpp_2s_a": 2, "dpmpp_sde": 2, "dpm_solver": 2, "dpmpp_2m": 2, "dpmpp_2m_sde": 2, "dpmpp_2m_sde_heun": 2,
    "dpmpp_3m_sde": 2, "restart": 2, "dpm_fast": 3,
}  # fmt: skip


@pytest.mark.slow
def test_slopes_are_the_orders_of_the_papers():
    for name, order in ORDERS.items():
        errors = [bench.error_of(name, steps, {})[0] for steps in bench.STEPS]
        assert bench.slope_of(errors) == pytest.approx(order, abs=0.2), name
    errors = [bench.error_of("lms", steps, {"order": 3})[0] for steps in bench.STEPS]
    assert bench.slope_of(errors) == pytest.approx(3, abs=0.2)


@pytest.mark.slow
def test_the_table_and_the_plot_hold_every_row(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench, "STEPS", (5, 10))
    bench.main(["--repeats", "1", "--results", str(tmp_path / "out.json")])
    table = (tmp_path / "out.md").read_text()
    assert all(f"| {name} |" in table for name in ORDERS) and "| lms order=2 |" in table
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
