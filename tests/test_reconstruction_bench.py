"""The table of how well pictures come back: what its cells say, and that a second run goes on where one ended."""

import json

import pytest

from bench.reconstruction import CEILING, GUIDANCE, METHODS, all_rows, choose_rows, main, make_table
from ldm.errors import UsageError
from ldm.models.diffusion.inversion import METHODS as EVERY


def row(psnr, error, up, down):
    n = len(psnr)
    return {"psnr": psnr, "error": [error] * n, "calls_up": [up] * n, "calls_down": [down] * n, "seconds": 1.0,
            "machine": "a machine"}  # fmt: skip


def test_a_cell_compares_with_the_ceiling_of_the_same_pictures():
    rows = {
        CEILING: row([30.0, 32.0, 40.0], 0.0, 0, 0),
        "ddim/g1": row([29.0, 31.5], 0.25, 50, 50),  # fewer pictures: their ceiling is 31
        "ddim/g3": row([20.0, 21.0, 22.0], 0.5, 100, 99),
        "belm/g7.5": row([30.0, 32.0, 40.0], 0.0, 100, 98),
    }
    table = make_table({"model": "m", "weights": "0123456789ab", "steps": 50, "rows": rows})
    assert "| `ddim` | 30.25 (-0.75), 2.5e-01 | 21.00 (-13.00), 5.0e-01 | - | 100 | 99 | 2 - 3 |" in table
    assert "| `belm` | - | - | 34.00 (+0.00), 0.0e+00 | 100 | 98 | 3 |" in table
    assert "edict" not in table and "34.00 dB: the ceiling" in table and "up to 3 renders" in table


def test_rows_are_every_method_at_each_guidance_and_the_ceiling():
    assert set(METHODS) == {*EVERY, "dpmpp_2m"} and len(all_rows()) == 1 + len(METHODS) * len(GUIDANCE)
    assert choose_rows(["belm/*", "*/g3"])[:3] == [CEILING, "ddim/g3", "belm/g1"]
    with pytest.raises(UsageError, match="--rows 'bell' matches no row"):
        choose_rows(["bell"])


@pytest.mark.slow
def test_a_second_run_goes_on_where_the_first_ended(tmp_path, capsys):
    how = ["--rows", "ddim/g3", "belm/g3", "--steps", "3", "--batch", "1", "--device", "cpu"]
    path = tmp_path / "r.json"
    main([*how, "--pictures", "1", "--results", str(path)])
    first = json.loads(path.read_text())["rows"]
    main([*how, "--pictures", "2", "--results", str(path)])
    rows = json.loads(path.read_text())["rows"]
    assert {key: len(one["psnr"]) for key, one in rows.items()} == {CEILING: 2, "ddim/g3": 2, "belm/g3": 2}
    for key, one in rows.items():
        assert one["psnr"][:1] == first[key]["psnr"] and one["machine"]
    assert rows["belm/g3"]["psnr"] == pytest.approx(rows[CEILING]["psnr"], abs=0.01)
    assert rows["belm/g3"]["calls_up"] == [6, 6] and rows["belm/g3"]["calls_down"] == [4, 4]
    assert max(rows["ddim/g3"]["psnr"]) < min(rows[CEILING]["psnr"])
    assert path.with_suffix(".md").read_text() in capsys.readouterr().out
