"""Conditions of areas: the mean of what the whole and each area answer, by ComfyUI's rule."""

import pytest
import torch

from ldm.errors import UsageError
from ldm.models.diffusion.conditions import Condition, ScheduledCondition, feathered
from ldm.models.diffusion.denoiser import Denoiser

X = torch.linspace(-1, 1, 2 * 3 * 16 * 20, dtype=torch.float64).reshape(2, 3, 16, 20)
HALF = torch.tensor(0.5, dtype=torch.float64)


class Pointwise:
    """Answers each cell by itself, with a number of the context; keeps what it was asked."""

    parameterization, num_timesteps = "eps", 1000

    def __init__(self):
        self.asked = []

    def apply_model(self, x, t, cond):
        extra = cond["c_concat"][0] if isinstance(cond, dict) else 0
        context = cond["c_crossattn"][0] if isinstance(cond, dict) else cond
        self.asked.append((tuple(x.shape), extra))
        return 0.1 * x + extra + context[:, 0, 0].reshape(-1, 1, 1, 1)


def context(value):
    return torch.full((7, 5), float(value), dtype=torch.float64)


def answer(own, *, scale=3.0, concat=None, guided=True, model=None, **options):
    """eps of two pictures, each with these (value, weight, area) conditions; the negative one has the value 0.5."""
    pictures = [[Condition(context(value), weight, area=area) for value, weight, area in own]] * 2
    without = ScheduledCondition([[Condition(context(0.5))]] * 2, concat) if guided else None
    denoise = Denoiser(
        model or Pointwise(),
        ScheduledCondition(pictures, concat),
        unconditional_conditioning=without,
        guidance_scale=scale,
        **options,
    )
    return denoise(X, 500, HALF)[0]


def flat(value, scale=3.0):
    return 0.1 * X + 0.5 + scale * (value - 0.5)


def test_an_area_of_the_whole_picture_with_the_same_prompt_is_the_plain_prompt():
    for scale, guided in ((3.0, True), (1.0, True), (1.0, False)):
        got = answer([(2, 1.0, None), (2, 1.0, (0, 0, 20, 16))], scale=scale, guided=guided)
        torch.testing.assert_close(got, answer([(2, 1.0, None)], scale=scale, guided=guided))


def test_outside_of_areas_the_prompt_rules_and_inside_the_mean():
    """By their weights, where they overlap as well; the negative prompt answers in areas as it does elsewhere."""
    left, right = (0, 0, 12, 16), (8, 0, 8, 16)  # of 20 x 16 cells; they overlap in columns 8 to 11
    got = answer([(1, 1.0, None), (2, 2.0, left), (4, 0.5, right)])
    torch.testing.assert_close(got[..., 16:], flat(1)[..., 16:])
    torch.testing.assert_close(got[..., :8], flat((1 + 2 * 2) / (1 + 2))[..., :8])
    for column, of_left, of_right in ((8, 1.0, 0.5), (10, 2 / 3, 1.0), (13, 0.0, 1.0), (15, 0.0, 0.5)):
        shares = 1, 2 * of_left, 0.5 * of_right
        both = (1 * shares[0] + 2 * shares[1] + 4 * shares[2]) / sum(shares)
        torch.testing.assert_close(got[..., column], flat(both)[..., column])


class OfSize(Pointwise):
    """Answers a part by its width as well, so that what is averaged is seen."""

    def apply_model(self, x, t, cond):
        return super().apply_model(x, t, cond) + x.shape[3]


def test_without_conditions_two_areas_of_one_box_are_one():
    """ComfyUI's rule: the negative prompt is asked once for a box, with the weight of the first region that has it."""
    left, model = (0, 0, 12, 16), OfSize()
    own = [(1, 1.0, None), (2, 3.0, left), (4, 0.5, left), (6, 2.0, (16, 0, 4, 16))]
    got = answer(own, model=model, separate_passes=True)
    assert [shape[3] for shape, _ in model.asked] == [20, 20, 12, 12, 12, 4, 4]
    guided = 0.1 * X[..., :9] + (1 + 20 + 3.0 * (2 + 12) + 0.5 * (4 + 12)) / (1 + 3.0 + 0.5)
    without = 0.1 * X[..., :9] + 0.5 + (20 + 3.0 * 12) / (1 + 3.0)
    torch.testing.assert_close(got[..., :9], without + 3.0 * (guided - without))


def test_an_area_is_answered_alone_and_once_with_each_prompt():
    """The network sees the cells of the area, what 9-channel inpainting adds is cut out with them."""
    concat = torch.arange(2 * 1 * 16 * 20, dtype=torch.float64).reshape(2, 1, 16, 20)
    model = Pointwise()
    answer([(1, 1.0, None), (2, 1.0, (3, 4, 8, 9))], concat=concat, model=model)
    assert [shape for shape, _ in model.asked] == [(4, 3, 16, 20), (4, 3, 9, 8)]
    assert torch.equal(model.asked[1][1], torch.cat([concat[:, :, 4:13, 3:11]] * 2))
    apart = Pointwise()
    answer([(1, 1.0, None), (2, 1.0, (3, 4, 8, 9))], model=apart, separate_passes=True)
    assert [shape for shape, _ in apart.asked] == [(2, 3, 16, 20)] * 2 + [(2, 3, 9, 8)] * 2
    alone = Pointwise()
    answer([(1, 1.0, None), (2, 1.0, (3, 4, 8, 9))], scale=1, model=alone)
    assert [shape for shape, _ in alone.asked] == [(2, 3, 16, 20), (2, 3, 9, 8)]


def test_parts_of_the_whole_are_added_up_before_areas_are_averaged():
    area = (0, 0, 20, 16)
    got = answer([(1, 1.0, None), (3, 0.5, None), (2, 1.0, area)])
    summed = 0.5 + (1 - 0.5) + 0.5 * (3 - 0.5)
    torch.testing.assert_close(got, flat((summed + 2) / 2))
    with pytest.raises(UsageError, match=r"\(AND\) need an unconditional one"):
        answer([(1, 1.0, None), (3, 0.5, None), (2, 1.0, area)], guided=False, scale=1)


def test_weights_of_an_area_fade_out_towards_the_rest_of_the_picture():
    """ComfyUI's: over 8 cells, a quarter of the side at most, and not at the picture's own edges."""
    x = torch.zeros(1, 4, 40, 12, dtype=torch.float64)
    down = [1.0] * 24 + [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert feathered((0, 0, 12, 32), x)[0, 0, :, 5].tolist() == down
    assert feathered((0, 8, 12, 32), x)[0, 0, :, 5].tolist() == down[::-1]
    both = feathered((2, 0, 9, 40), x)[0, 0]
    assert both[7].tolist() == [0.5, 1, 1, 1, 1, 1, 1, 1, 0.5] and torch.equal(both[0], both[39])
    assert feathered((2, 3, 3, 3), x).unique().tolist() == [1.0]  # no quarter of 3 cells
    corner = feathered((4, 8, 8, 32), x)[0, 0]
    assert corner[0, 0] == 1 / 8 * 1 / 2 and corner[-1, -1] == 1


def test_a_condition_is_there_from_its_first_call_to_its_last():
    own = [Condition(context(1), end=1), Condition(context(2), begin=2), Condition(context(9), 0.5, 1, 1)]
    scheduled = ScheduledCondition([own, [Condition(context(5))]])
    seen = [
        [(part.given[:, 0, 0].tolist(), list(part.weights)) for part in scheduled.at(call)]
        for call in range(4)
    ]
    assert seen == [
        [([1, 5], [1, 1])],
        [([1, 5], [1, 1]), ([9, 5], [0.5, 0])],
        [([2, 5], [1, 1])],
        [([2, 5], [1, 1])],
    ]
