"""The quality table: its rows, its distance, and a run that is taken up again."""

import json
import shutil

import numpy as np
import pytest
import torch
from tiny import write_tiny

from bench import quality
from ldm.errors import FormatError, MismatchError, OutputError, UsageError


def normal_sample(mean, spread, count=7):
    """Points whose sample mean and covariance are exactly (mean, diag(spread^2))."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(count, len(mean)))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x * spread + mean


def test_the_frechet_distance_of_axis_parallel_normals_is_the_closed_form():
    """W2^2 of diagonal normals: squared distance of means and of standard deviations."""
    mean, spread = np.array([0.5, -1.0, 2.0]), np.array([1.0, 2.0, 0.25])
    other, width = np.array([0.0, 1.0, 2.5]), np.array([3.0, 0.5, 0.25])
    found = quality.frechet(normal_sample(mean, spread), normal_sample(other, width, 11))
    wanted = ((mean - other) ** 2).sum() + ((spread - width) ** 2).sum()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-10)


def test_the_frechet_distance_is_symmetric_and_nothing_to_itself():
    rng = np.random.default_rng(4)
    a, b = rng.normal(size=(50, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(40, 5)) + 1
    np.testing.assert_allclose(quality.frechet(a, b), quality.frechet(b, a), rtol=0, atol=1e-10)
    np.testing.assert_allclose(quality.frechet(a, a), 0, rtol=0, atol=1e-10)


def test_the_signal_to_noise_ratio_is_that_of_the_error_and_ends_at_half_a_step():
    dark, light = np.zeros((2, 3, 3), np.uint8), np.full((2, 3, 3), 255, np.uint8)
    np.testing.assert_allclose(quality.psnr(dark, light), 0.0, atol=1e-12)
    np.testing.assert_allclose(quality.psnr(light, light - 51), 20 * np.log10(5), rtol=1e-12)
    np.testing.assert_allclose(quality.psnr(light, light), 20 * np.log10(510), rtol=1e-12)


def test_pooling_averages_blocks_of_cells():
    z = torch.arange(2 * 3 * 8 * 12, dtype=torch.float32).reshape(2, 3, 8, 12)
    flat = quality.pooled(z)
    assert flat.shape == (2, 3 * 16)
    np.testing.assert_allclose(flat[1, 16 + 5], z[1, 1, 2:4, 3:6].mean().item(), rtol=0, atol=1e-4)


def test_the_rows_are_those_of_the_table_once_each():
    rows = quality.all_rows(3.0)
    keys = [row.key for row in rows]
    assert len(set(keys)) == len(keys)
    per_split = 1 + 6 * 5 + 2 + 3  # first stage, samplers x steps, 1000 steps, guidance beside 3
    assert len(rows) == 2 * per_split
    assert {
        "ddpm/1000/g3/seen",
        "ddim-0.5/5/g3/never-seen",
        "ddim-0/20/g7.5/seen",
        "first-stage/seen",
    } <= set(keys)


def test_rows_are_chosen_by_patterns():
    rows = quality.all_rows(3.0)
    chosen = [row.key for row in quality.choose_rows(rows, ["plms/*/seen", "first-stage/*"])]
    assert chosen == [
        "first-stage/seen",
        "first-stage/never-seen",
        *(f"plms/{n}/g3/seen" for n in quality.STEPS),
    ]
    assert quality.choose_rows(rows, None) == rows
    with pytest.raises(UsageError, match=r"--rows 'heun/\*' matches no row; --list shows them all"):
        quality.choose_rows(rows, ["heun/*"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    checkpoint, config = write_tiny(tmp_path_factory.mktemp("tiny"))
    return ["--ckpt", str(checkpoint), "--config", str(config), "--device", "cpu"]


@pytest.fixture(autouse=True)
def few_references(monkeypatch):
    monkeypatch.setattr(quality, "REFERENCE", 11)


@pytest.mark.slow
def test_a_run_saves_each_row_and_a_second_does_what_is_missing(tiny, tmp_path, capsys):
    results = tmp_path / "deep" / "r.json"
    base = [*tiny, "--prompts", "3", "--results", str(results), "--guidance", "3"]
    quality.main([*base, "--rows", "ddim-1/5/*/seen"])
    before = json.loads(results.read_text())["rows"]
    assert list(before) == ["ddim-1/5/g3/seen"]
    row = before["ddim-1/5/g3/seen"]
    assert row["prompts"] == 3 and row["right"] == 3 - len(row["wrong"]) and row["frechet"] > 0
    # Another batch size paints the same pictures, so it may go on with the same file.
    quality.main([*base, "--batch", "2", "--rows", "ddim-1/5/*", "first-stage/seen"])
    after = json.loads(results.read_text())["rows"]
    assert after["ddim-1/5/g3/seen"] == row and len(after) == 3
    text = results.with_suffix(".md").read_text()
    assert 0 < after["first-stage/seen"]["psnr"] < 30 and "psnr" not in row
    assert f", {after['first-stage/seen']['psnr']:.1f} dB |" in text
    assert "| DDIM, eta 1 | 0.0 % (" in text and "| DDPM | - |" in text
    assert results.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert "[1/3] first-stage/seen: 0.0 % right" in capsys.readouterr().out


@pytest.mark.slow
def test_the_batch_size_changes_no_picture(tiny):
    pipeline = quality.load_pipeline(tiny[1], tiny[3], "cpu")
    row = quality.Row("ddim-1", 5, 3.0, "seen")
    prompts = ["a red star", "a blue ring", "a green cross"]
    one, two = (torch.cat(list(quality.paint(pipeline, prompts, row, b, {}))) for b in (2, 3))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-3 * float(one.abs().max()))


@pytest.mark.slow
def test_results_of_another_kind_are_not_mixed(tiny, tmp_path):
    results = tmp_path / "r.json"
    row = ["--rows", "first-stage/seen", "--results", str(results)]
    quality.main([*tiny, "--prompts", "3", *row])
    with pytest.raises(MismatchError, match="has results for prompts 3, this run is for 4"):
        quality.main([*tiny, "--prompts", "4", *row])
    quality.main([*tiny, "--prompts", "4", "--fresh", *row])
    assert json.loads(results.read_text())["prompts"] == 4
    results.write_text("{}")
    with pytest.raises(FormatError, match="is no file of quality results"):
        quality.main([*tiny, "--prompts", "4", *row])


@pytest.mark.slow
def test_results_of_another_precision_are_not_mixed(tiny, tmp_path):
    results = tmp_path / "r.json"
    rest = ["--rows", "ddim-0/5/*/seen", "--prompts", "3", "--results", str(results), "--guidance", "3"]
    quality.main([*tiny, *rest, "--precision", "bfloat16"])
    assert "UNet in bfloat16" in results.with_suffix(".md").read_text()
    assert (
        f"torch {torch.__version__}" in json.loads(results.read_text())["rows"]["ddim-0/5/g3/seen"]["machine"]
    )
    with pytest.raises(MismatchError, match="has results for precision bfloat16, this run is for float32"):
        quality.main([*tiny, *rest])


@pytest.mark.slow
def test_results_of_other_knobs_are_not_mixed(tiny, tmp_path):
    results = tmp_path / "r.json"
    rest = ["--rows", "ddim-0/5/*/seen", "--prompts", "3", "--results", str(results)]
    turned = ["--knob", "guidance_interval=0.2,0.8", "--knob", "cache_interval=2"]
    quality.main([*tiny, *rest, *turned])
    found = json.loads(results.read_text())
    assert found["knobs"] == {"guidance_interval": [0.2, 0.8], "cache_interval": 2}
    text = results.with_suffix(".md").read_text()
    assert "UNet in float32, guidance_interval [0.2, 0.8], cache_interval 2. Made by" in text
    quality.main([*tiny, *rest, *turned[2:], *turned[:2]])  # in any order
    with pytest.raises(
        MismatchError, match=r"has results for knobs .*'cache_interval': 2}, this run is for {}"
    ):
        quality.main([*tiny, *rest])
    # A file from before there were knobs is one without any.
    del found["knobs"]
    quality.save_results(results, found)
    with pytest.raises(MismatchError, match="has results for knobs {}, this run is for {'merge_ratio': 0.5}"):
        quality.main([*tiny, *rest, "--knob", "merge_ratio=0.5"])
    quality.main([*tiny, *rest])
    assert "UNet in float32. Made by" in results.with_suffix(".md").read_text()


@pytest.mark.slow
def test_knobs_change_what_is_painted(tiny):
    """Each is the library's: latents are those of the doors that people use, with the same knobs."""
    pipeline = quality.load_pipeline(tiny[1], tiny[3], "cpu")
    row, prompts = quality.Row("ddim-0", 5, 3.0, "seen"), ["a red star", "a blue ring"]
    plain = torch.cat(list(quality.paint(pipeline, prompts, row, 2, {})))
    for knobs in ({"guidance_interval": [0.2, 0.8]}, {"cache_interval": 2}, {"merge_ratio": 0.5}):
        turned = torch.cat(list(quality.paint(pipeline, prompts, row, 2, {}, **knobs)))
        door = pipeline.txt2img(prompts, steps=5, guidance_scale=3.0, seed=0, output_type="latent", **knobs)
        torch.testing.assert_close(turned, door.latents, rtol=0, atol=1e-5 * float(plain.abs().max()))
        assert (turned - plain).abs().max() > 1e-3 * plain.abs().max()


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("speed=9", "--knob wants NAME=VALUE once for any of guidance_interval, .*; got 'speed=9'"),
        ("cache_interval", "--knob cache_interval wants a number .*, got ''"),
        ("merge_ratio=much", "--knob merge_ratio wants a number .*, got 'much'"),
        ("cache_interval=0", "cache_interval must be a whole number from 1 to 1000, got 0"),
        ("guidance_interval=0.2", r"guidance_interval must be \(low, high\).*, got \[0.2\]"),
    ],
)
def test_knobs_that_do_not_turn_are_refused(tiny, tmp_path, word, words):
    results = tmp_path / "r.json"
    with pytest.raises(UsageError, match=words):
        quality.main([*tiny, "--rows", "ddim-0/5/*", "--results", str(results), "--knob", word])
    assert not results.exists()
    with pytest.raises(UsageError, match="once for any of"):
        quality.read_knobs(["cache_depth=2", "cache_depth=2"])


def paint_three(tiny, **options):
    pipeline = quality.load_pipeline(tiny[1], tiny[3], "cpu", **options)
    row = quality.Row("ddim-1", 5, 3.0, "seen")
    return torch.cat(
        list(quality.paint(pipeline, ["a red star", "a blue ring", "a green cross"], row, 3, {}))
    )


@pytest.mark.slow
def test_bfloat16_paints_almost_the_same(tiny):
    exact, rounded = paint_three(tiny), paint_three(tiny, precision="bfloat16")
    error = ((rounded - exact).norm() / exact.norm()).item()
    assert rounded.dtype == torch.float32 and 1e-5 < error < 3e-2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_model_paints_the_same(tiny, monkeypatch):
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor, "freezing", False)  # put back afterwards
    one, two = paint_three(tiny), paint_three(tiny, compiled=True)
    assert inductor.freezing
    torch.testing.assert_close(two, one, rtol=0, atol=1e-3 * float(one.abs().max()))


@pytest.mark.slow
def test_the_grid_has_twenty_four_labelled_pictures(tiny, tmp_path, capsys, monkeypatch):
    from PIL import Image

    monkeypatch.setattr(quality, "GRID_STEPS", 1)
    quality.main([*tiny, "--grid", str(tmp_path / "g.png")])
    assert Image.open(tmp_path / "g.png").size == (6 * (64 + 36), 4 * (64 + 54))
    assert "0 of 24 right" in capsys.readouterr().out


@pytest.mark.slow
def test_the_guidance_is_the_models_where_none_is_given(tiny, capsys):
    """The box's configuration advises 3; one that says nothing is painted at Stable Diffusion v1's."""
    for argv, scale in (([], "3"), (["--guidance", "5"], "5"), (tiny, "7.5")):
        quality.main([*argv, "--list", "--rows", "plms/10/*"])
        assert capsys.readouterr().out == f"plms/10/g{scale}/seen\nplms/10/g{scale}/never-seen\n"


def test_a_configuration_without_a_model_is_refused():
    with pytest.raises(UsageError, match="--config describes --ckpt, which is not given"):
        quality.main(["--config", "x.yaml"])


def test_a_folder_of_weights_is_refused(tmp_path):
    with pytest.raises(UsageError, match="--ckpt wants one file, got the folder"):
        quality.weights_hash(tmp_path)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write '.*file/r.json'"):
        quality.write(tmp_path / "file" / "r.json", b"x")
