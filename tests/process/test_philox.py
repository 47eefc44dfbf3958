"""NVIDIA's generator: the published answers of Philox, and numbers that torch drew on GPUs."""

import numpy as np
import pytest

from ldm.process.philox import cuda_normal, philox4x32

# Random123's kat_vectors: philox 4x32, 10 rounds (counter, key, answer).
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_philox_gives_its_authors_answers(counter, key, answer):
    both = np.array([words(counter), words(KNOWN[0][0])], dtype=np.uint32).T  # one beside another
    got = philox4x32(both, tuple(words(key)))
    assert got.dtype == np.uint32 and got[:, 0].tolist() == words(answer)


def test_normal_numbers_are_those_of_a_gpu():
    """What torch.randn(3, 4, device="cuda") gives after seed 0, as A1111's web UI and many pages print it."""
    gpu = [-0.92466259, -0.42534415, -2.6438457, 0.14518388, -0.12086647, -0.57972564]
    gpu += [-0.62285122, -0.32838709, -1.07454231, -0.36314407, -1.67105067, 2.26550497]
    drawn = cuda_normal(0, 0, 12)
    assert drawn.dtype == np.float32
    np.testing.assert_allclose(drawn, gpu, rtol=0, atol=1e-6)


def test_normal_numbers_have_the_moments_of_normal_numbers():
    drawn = cuda_normal(7, 3, 40_000).astype(np.float64)
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3)):
        assert abs((drawn**power).mean() - moment) < 0.1
    assert np.isfinite(drawn).all() and abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.02


def test_each_number_depends_on_seed_draw_and_place_alone():
    first = cuda_normal(5, 0, 100)
    np.testing.assert_array_equal(cuda_normal(5, 0, 37), first[:37])  # not on how many are drawn
    others = [cuda_normal(seed, draw, 100) for seed, draw in ((6, 0), (5, 1), (2**32 + 5, 0), (2**64 - 1, 0))]
    for other in others:  # all 64 bits of the seed count
        assert np.abs(other - first).max() > 1
