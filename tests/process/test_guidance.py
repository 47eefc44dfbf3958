"""Joining conditions and mixing answers."""

import pytest
import torch

from ldm.errors import UsageError
from ldm.process.guidance import first_tensor, guide, join, rescale

U, C = torch.zeros(2, 3, 5), torch.ones(2, 3, 5)


def test_unconditional_comes_first_in_every_structure():
    joined = join(
        {"c_crossattn": [U, U[:, :1]], "c_adm": U[:, 0], "none": None},
        {"c_crossattn": [C, C[:, :1]], "c_adm": C[:, 0], "none": None},
    )
    assert joined["none"] is None
    parts = [*joined["c_crossattn"], joined["c_adm"], join(U, C), *join([U], [C])]
    assert [tuple(p.shape) for p in parts] == [(4, 3, 5), (4, 1, 5), (4, 5), (4, 3, 5), (4, 3, 5)]
    for part in parts:
        assert (part[:2] == 0).all() and (part[2:] == 1).all()


@pytest.mark.parametrize(
    ("uncond", "cond", "message"),
    [
        (U, C[:, :2], r"conditioning: unconditional \(2, 3, 5\) and conditional \(2, 2, 5\) must agree"),
        ({"a": U}, {"b": C}, "dict with keys a and conditional dict with keys b"),
        (
            {"a": [U]},
            {"a": [C, C]},
            r"conditioning\['a'\]: unconditional list of 1 and conditional list of 2",
        ),
        ({"a": None}, {"a": [C]}, r"\['a'\]: unconditional None and conditional list of 1"),
        (U, "a prompt", r"tensor \(2, 3, 5\) and conditional str"),
        ([U], [[C]], r"conditioning\[0\]: unconditional tensor \(2, 3, 5\) and conditional list of 1"),
    ],
)
def test_what_does_not_join_is_named_with_its_place(uncond, cond, message):
    with pytest.raises(UsageError, match=message + ".*separate passes"):
        join(uncond, cond)


def test_the_first_tensor_is_found_in_any_structure():
    assert first_tensor({"c_concat": None, "c_crossattn": [[], [U]]}) is U
    assert first_tensor(["a prompt"]) is None


def test_guidance_is_a_line_through_both_answers():
    for scale, want in [(0.0, 0.0), (1.0, 1.0), (7.5, 7.5), (-2.0, -2.0)]:
        assert (guide(U, C, scale) == want).all()


def test_rescale_gives_each_image_the_spread_of_its_conditional_answer():
    g = torch.Generator().manual_seed(0)
    guided, cond = (torch.randn(2, 4, 5, 3, generator=g, dtype=torch.float64) for _ in range(2))
    guided[1] *= 9
    axes = (1, 2, 3)
    full = rescale(guided, cond, 1.0)
    torch.testing.assert_close(full.std(dim=axes), cond.std(dim=axes), rtol=0, atol=1e-12)
    torch.testing.assert_close(rescale(guided, cond, 0.0), guided, rtol=0, atol=0)
    assert torch.equal(
        guide(0.25 * guided, cond, 1.5, 0.5), rescale(guide(0.25 * guided, cond, 1.5), cond, 0.5)
    )
    half = (full + guided) / 2
    torch.testing.assert_close(rescale(guided, cond, 0.5), half, rtol=0, atol=1e-12)
