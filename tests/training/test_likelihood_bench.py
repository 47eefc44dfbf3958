"""bench/likelihood.py on files that image_nll.py would write."""

import json

import pytest
from PIL import Image

from bench import likelihood
from ldm.errors import FormatError, MismatchError, UsageError


def write_measure(path, totals, **other):
    """A measure of two levels, of which level 4 is fine: half of the bits there, a quarter at level 500."""
    mean = sum(totals) / len(totals)
    found = {
        "unit": "bits per dimension of pictures",
        "data": "shapes",
        "pictures": len(totals),
        "seed": 42,
        "dimensions": 12,
        "levels": [500, 4, 0],
        "vb": [mean / 4, mean / 2, mean / 4],
        "mse": [0.25, 0.5, 0.75],
        "total_bpd": mean,
        "total_bpd_error": 0.1,
        "prior_bpd": 1e-5,
        "each": {"total_bpd": totals, "prior_bpd": [1e-5] * len(totals)},
    }
    path.write_text(json.dumps({**found, **other}))
    return path


@pytest.mark.slow
def test_bounds_are_compared_picture_by_picture(tmp_path, capsys):
    a = write_measure(tmp_path / "a.json", [2.0, 4.0, 9.0])
    b = write_measure(tmp_path / "b.json", [2.5, 4.7, 9.9])
    likelihood.main([f"first={a}", f"second={b}", "--results", str(tmp_path / "out.json")])
    results = json.loads((tmp_path / "out.json").read_text())
    second = results["rows"]["second"]
    assert second["total_bpd"] == pytest.approx(5.7)
    assert second["difference"] == pytest.approx(0.7)
    # Differences 0.5, 0.7, 0.9: a deviation of 0.2, far below that of the totals.
    assert second["difference_error"] == pytest.approx(0.2 / 3**0.5)
    assert second["decoder_bpd"] == pytest.approx(5.7 / 4) and second["fine_bpd"] == pytest.approx(
        5.7 * 3 / 4
    )
    assert results["rows"]["first"]["difference"] == 0 and second["mse"] == 0.5
    assert "| second | 5.700 ± 0.100 | +0.700 ± 0.115 |" in (tmp_path / "out.md").read_text()
    assert "+0.700" in capsys.readouterr().out
    assert Image.open(tmp_path / "out.png").size == (1210, 462)


def test_what_cannot_be_compared_is_refused(tmp_path):
    a = write_measure(tmp_path / "a.json", [2.0, 4.0])
    b = write_measure(tmp_path / "b.json", [2.0, 4.0], levels=[600, 4, 0])
    with pytest.raises(MismatchError, match="'x' and 'y' differ in 'levels'"):
        likelihood.main([f"x={a}", f"y={b}"])
    with pytest.raises(UsageError, match="NAME=nll.json, each name once, got 'x="):
        likelihood.main([f"x={a}", f"x={b}"])
    (tmp_path / "c.json").write_text('{"unit": "bits"}')
    with pytest.raises(FormatError, match=r"c.json' is no result of image_nll.py: it has no data, pictures"):
        likelihood.main([f"x={tmp_path / 'c.json'}"])
    with pytest.raises(FormatError, match="absent.json' is no result of image_nll.py"):
        likelihood.main([f"x={tmp_path / 'absent.json'}"])
