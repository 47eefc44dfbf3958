"""The bench of what a step costs: its loops of k-diffusion's kind are the samplers they stand beside."""

import numpy as np
import pytest
import torch

from bench import step_cost as bench
from ldm.models.diffusion.samplers import SAMPLERS, sample_steps


class Shrinking(bench.Free):
    """A network whose answer depends on the sample and on the level."""

    def apply_model(self, x, t, conditioning):
        return 0.7 * x + t[0] / 1000


def test_the_loops_end_where_the_samplers_end():
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    model, sigmas = Shrinking(x), np.geomspace(10, 0.1, 17)  # fewer steps end on order 1
    for name in bench.LOOPS:
        ours, theirs = (torch.Generator().manual_seed(1) for _ in range(2))
        options = {"brownian": False} if hasattr(SAMPLERS[name], "brownian") else {}
        noise = lambda like, g=ours: torch.randn(like.shape, generator=g)  # noqa: E731
        *_, last = sample_steps(name, model, x, None, steps=16, spacing=sigmas, noise=noise, **options)
        draw = lambda x, here, to, g=theirs: torch.randn(x.shape, generator=g)  # noqa: E731
        # A run begins with noise times this, in sigma's units.
        scale = 101**0.5 if name == "dpmpp_2m" else 10.0
        end = bench.loop_of(name, model, draw)(scale * x, torch.from_numpy(sigmas).float())
        expected = (last.x_t * (1 + 0.1**2) ** 0.5).float()
        torch.testing.assert_close(
            end, expected, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.slow
def test_the_table_holds_every_row(tmp_path):
    bench.main(["--repeats", "1", "--results", str(tmp_path / "out.json")])
    table = (tmp_path / "out.md").read_text()
    assert all(f"| {name} |" in table for name in (*bench.LOOPS, *bench.WITHOUT_LOOP))
