"""Variations of a seed, seed resize and the noise after x_T: A1111's formulas, from any generator."""

import math

import numpy as np
import pytest
import torch
from tiny import tiny_model

from ldm import metadata
from ldm.cli import painting, painting_parser
from ldm.errors import UsageError
from ldm.noise import ImageNoise, NvNoise, SeedOptions, noise_sources, put_in_the_middle, slerp
from ldm.pipeline import StableDiffusion

SHAPE = (4, 6, 5)
EACH = pytest.mark.parametrize("source", [ImageNoise, NvNoise])


def like(images=1, shape=SHAPE):
    return torch.empty(images, *shape)


@EACH
def test_without_options_x_T_is_the_seeds_first_draw(source):
    assert torch.equal(source([5, 6]).begin(like(2)), source([5, 6])(like(2)))


@EACH
def test_a_variation_turns_the_seeds_noise_towards_the_variations(source):
    first, other = source([5])(like()), source([9])(like())

    def varied(strength):
        return source([5], SeedOptions([9], strength)).begin(like())

    torch.testing.assert_close(varied(0.0), first)
    torch.testing.assert_close(varied(1.0), other)
    got = varied(0.3)
    # One column, by the formula for two vectors.
    a, b = first[0, 2, :, 3].double().numpy(), other[0, 2, :, 3].double().numpy()
    angle = math.acos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    want = (math.sin(0.7 * angle) * a + math.sin(0.3 * angle) * b) / math.sin(angle)
    np.testing.assert_allclose(got[0, 2, :, 3].numpy(), want, rtol=1e-4, atol=1e-5)
    # Later draws are the seed's own, and no image knows of another.
    pair = source([7, 5], SeedOptions([8, 9], 0.3))
    assert torch.equal(pair.begin(like(2))[1], got[0])
    plain = source([5])
    plain(like())
    assert torch.equal(pair(like(2))[1], plain(like())[0])


def test_noise_towards_itself_stays_and_one_row_gives_numbers():
    noise, other = torch.randn(2, 3, 1, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(slerp(0.4, noise, noise), noise * 0.4 + noise * 0.6)
    assert slerp(0.4, noise, other).isfinite().all()


RESIZED = [  # (from h, w, to h, w; rows and columns of x_T, and of the seed's own noise of that size)
    (4, 3, 6, 5, (1, 5), (1, 4), (0, 4), (0, 3)),
    (4, 8, 6, 5, (1, 5), (0, 4), (0, 4), (2, 6)),  # (5 - 8) // 2 is -2: A1111's, a column is left
    (8, 5, 6, 5, (0, 6), (0, 5), (1, 7), (0, 5)),
    (6, 5, 6, 5, (0, 6), (0, 5), (0, 6), (0, 5)),
]


@EACH
@pytest.mark.parametrize(("h", "w", "to_h", "to_w", "rows", "columns", "of_rows", "of_columns"), RESIZED)
def test_seed_resize_puts_the_other_sizes_noise_into_the_middle(
    source, h, w, to_h, to_w, rows, columns, of_rows, of_columns
):
    got = source([5], SeedOptions(resize_from=(h, w))).begin(like(1, (4, to_h, to_w)))[0]
    small, around = source([5])(like(1, (4, h, w)))[0], source([5])(like(1, (4, to_h, to_w)))[0]
    inside = torch.zeros(to_h, to_w, dtype=torch.bool)
    inside[slice(*rows), slice(*columns)] = True
    assert torch.equal(got[:, inside], small[:, slice(*of_rows), slice(*of_columns)].flatten(1))
    assert torch.equal(got[:, ~inside], around[:, ~inside])


def test_the_middle_does_not_change_what_it_is_put_into():
    around = torch.zeros(1, 3, 3)
    assert put_in_the_middle(torch.ones(1, 1, 1), around).sum() == 1 and around.sum() == 0


@EACH
def test_ensd_moves_the_seed_of_all_noise_but_the_first(source):
    noise, plain, moved = (
        source([5, 2], SeedOptions(seed_delta=31337)),
        source([5, 2]),
        source([31342, 31339]),
    )
    assert torch.equal(noise.begin(like(2)), plain.begin(like(2)))
    for _ in range(2):
        assert torch.equal(noise(like(2)), moved(like(2)))


def test_options_reach_the_sources_of_noise_but_not_the_encoder_of_nv():
    options = SeedOptions([9], 0.5, (4, 3), 2)
    for rng, same in (("image", True), ("nv", False)):
        noise, encoder = noise_sources(rng, [5], options)
        assert noise.options is options and (encoder is noise) is same


# --- at the request ---------------------------------------------------------------------------------

PROMPT = "a large red circle"


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion(tiny_model(), name="tiny")


SEEDS = [  # (what is asked for, seeds, variation seeds)
    ({"seed": 5}, [5, 6, 7], [None, None, None]),
    ({"seed": 5, "variation_strength": 0.2, "variation_seed": 9}, [5, 5, 5], [9, 10, 11]),
    ({"seed": [5, 2, 4], "variation_strength": 0.2, "variation_seed": 9}, [5, 2, 4], [9, 10, 11]),
    ({"seed": 2**64 - 1, "variation_strength": 0.2, "variation_seed": 9}, [2**64 - 1] * 3, [9, 10, 11]),
    ({"seed": 2**64 - 1, "rng": "compvis"}, [2**64 - 1] * 3, [None] * 3),
    ({"seed": 5, "variation_strength": 1, "variation_seed": [9, 3, 1]}, [5, 5, 5], [9, 3, 1]),
]


def test_variations_are_of_one_seed(sd):
    for asked, seeds, variations in SEEDS:
        images = sd.plan(PROMPT, num_images=3, **asked).images
        assert [one.seed for one in images] == seeds
        assert [one.variation_seed for one in images] == variations
    drawn = {one.variation_seed for one in sd.plan(PROMPT, num_images=3, variation_strength=0.1).images}
    assert len(drawn) == 3 and None not in drawn


def test_pictures_say_their_extra_seeds_and_are_painted_again_by_them(sd):
    asked = {"seed_resize_from": (80, 72), "eta_noise_seed_delta": 31337, "sampler": "euler_a", "rng": "nv"}
    asked |= {"steps": 2, "width": 72, "height": 64, "variation_strength": 0.25}
    out = sd.txt2img(PROMPT, seed=5, variation_seed=9, num_images=2, batch_size=2, **asked)
    text = out.infotexts[1]
    said = "Variation seed: 10, Variation seed strength: 0.25, Seed resize from: 80x72, "
    assert ", Seed: 5, " in text and said in text and ", ENSD: 31337, " in text
    read = metadata.from_infotext(text)
    repeated = {name: read[name] for name in ("seed", "variation_seed", *asked)}
    again = sd.txt2img(PROMPT, **repeated)
    torch.testing.assert_close(again.latents[0], out.latents[1], rtol=0, atol=1e-5)
    others = {"variation_strength": 0.3, "seed_resize_from": (72, 72), "eta_noise_seed_delta": 1}
    for name, value in others.items():
        changed = sd.txt2img(PROMPT, **repeated | {name: value})
        assert (changed.latents[0] - out.latents[1]).abs().max() > 1e-3, name
    plain = sd.txt2img(PROMPT, seed=5, steps=2).infotexts[0]
    assert not any(key in plain for key in ("Variation", "resize", "ENSD"))


REFUSED = [
    ({"variation_seed": 3}, "variation_seed needs a variation_strength above 0"),
    ({"variation_strength": 1.5}, "variation_strength must be a number from 0 to 1, got 1.5"),
    ({"variation_strength": 0.5, "variation_seed": "x"}, "variation_seed must be a whole number from 0"),
    (
        {"variation_strength": 0.5, "variation_seed": [1, 2]},
        "a list of variation_seeds must name one for each",
    ),
    (
        {"variation_strength": 0.5, "rng": "compvis"},
        'variation_strength is of the noise of single pictures, and rng="',
    ),
    (
        {"eta_noise_seed_delta": 5, "rng": "compvis"},
        "eta_noise_seed_delta is of the noise of single pictures",
    ),
    ({"eta_noise_seed_delta": -1}, "eta_noise_seed_delta must be a whole number from 0 to"),
    ({"seed_resize_from": 512}, r"seed_resize_from must be \(width, height\) in pixels, each from 1 to"),
    ({"seed_resize_from": (512,)}, r"seed_resize_from must be \(width, height\) in pixels"),
    ({"seed_resize_from": (512, 0)}, r"seed_resize_from must be \(width, height\) in pixels"),
    (
        {"seed_resize_from": (4, 64)},
        "seed_resize_from must be from 8 x 8 pixels, a latent cell, to 2048 x 2048, got 4 x 64",
    ),
    ({"seed_resize_from": (64, 2056)}, "to 2048 x 2048, got 64 x 2056"),
    ({"seed_resize_from": (10**6, 10**6)}, "to 2048 x 2048, got 1000000 x 1000000"),
]


def test_extra_seeds_without_meaning_are_refused(sd):
    for asked, message in REFUSED:
        with pytest.raises(UsageError, match=message) as told:
            sd.plan(PROMPT, **asked)
        assert len(str(told.value)) <= 400 and "\n" not in str(told.value)


def laid_out(words):
    parser = painting_parser("txt2img.py", "x", outdir="o", scale=7.5)
    args = parser.parse_args(["--prompt", "a", *words.split()])
    return [(group.seeds, group.variation_seeds) for group in painting.check(args, {})]


def test_scripts_count_variation_seeds_and_keep_the_seed():
    assert laid_out("--seed 5 --n_iter 2 --n_samples 2") == [([5, 6, 7, 8], [])]
    varied = "--seed 5 --n_iter 2 --n_samples 2 --variation_strength 0.1 --variation_seed 9"
    assert laid_out(varied) == [([5, 5, 5, 5], [9, 10, 11, 12])]
    with pytest.raises(UsageError, match="--variation_seed needs a --variation_strength above 0"):
        laid_out("--variation_seed 9")
