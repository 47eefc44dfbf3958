"""Changed weights are those of the programs that made the families, and obey the families' own laws."""

import json
import math

import pytest
import torch
from keyed import keyed_input
from lora_files import GOLDEN
from safetensors.torch import load_file

from ldm.adapters import lora_weights
from ldm.adapters.lora_keys import split_key
from ldm.adapters.lora_weights import UnfitError, bias_delta, family_of, weight_delta

STRENGTHS = (1.0, 0.6, -0.5)
RECORDED = json.loads((GOLDEN / "lora_merge.json").read_text())
CASES = RECORDED["cases"]

# Whom we follow, by the beginnings of a case's name; the longest counts. "~": at strength 1, and W + s (W' - W) at
# others, where no two programs agree. None: nobody's answer; laws below.
FOLLOWED = {
    "lora.": "a1111",  # alpha 0 is a factor of 0 (kohya, LyCORIS: alpha = r); scale and bias keys are A1111's alone
    "dora.linear.in": "a1111",  # columns: A1111 and ComfyUI
    "dora.conv3.in": "a1111",
    "dora.square.in": "a1111",
    "dora.": "~peft",  # rows of W + dW: PEFT and LyCORIS (ComfyUI: rows of W; A1111: always columns)
    "loha.": "a1111",  # scaled once, as LyCORIS's forward; its get_merged_weight scales twice
    "loha.dora.linear.out": None,  # rows as LyCORIS, but scaled once
    "lokr.": "a1111",
    "lokr.dora.linear.out": "~lycoris",
    "glora.": "comfyui",  # both layouts, with alpha (A1111: the older one, without)
    "glora.linear.old": None,  # fits no layout
    "ia3.": "a1111",
    "ia3.conv3.out": None,  # A1111 cannot
    "full.": "comfyui",
    "norm": "comfyui",  # w_norm alone: not A1111
    "oft.": "a1111",  # the strength once (ComfyUI: twice); alpha times the rows, as those who train
    "boft.": "a1111",
}


def followed(case):
    beginning = max((one for one in FOLLOWED if case.startswith(one)), key=len)
    return FOLLOWED[beginning]


@pytest.fixture(scope="module")
def recorded():
    tensors = load_file(GOLDEN / "lora_merge.safetensors")
    same = RECORDED["same_as"]
    return lambda name: tensors.get(same.get(name, name))


def role_of(name):
    return split_key(f"lora_unet_x.{name}").role


def parts_of(case):
    parts = {}
    for name, entry in CASES[case]["tensors"].items():
        shape, dtype = tuple(entry["shape"]), getattr(torch, entry["dtype"])
        if "value" in entry:
            value = torch.full(shape, entry["value"])
        else:
            value = keyed_input(f"lora.{case}.{name}", shape)
            made = {"dora_scale": 0.5 + value.abs(), "rescale": 1 + 0.1 * value}
            value = made.get(name, 0.3 * value)
        parts[role_of(name)] = value.to(dtype)
    return parts


def weight_of(case):
    return 0.5 * keyed_input(f"lora.{case}.W", tuple(CASES[case]["shape"]))


def bias_of(case):
    return 0.5 * keyed_input(f"lora.{case}.b", (CASES[case]["shape"][0],))


def test_every_case_says_whom_we_follow():
    assert len(CASES) == 74
    assert {case for case in CASES if followed(case) is None} == {
        "loha.dora.linear.out",
        "glora.linear.old",
        "ia3.conv3.out",
    }


@pytest.mark.parametrize("case", [case for case in CASES if followed(case) is not None])
def test_merged_weights_are_the_recorded_ones(case, recorded):
    program = followed(case)
    weight, bias, parts = weight_of(case), bias_of(case), parts_of(case)
    family = family_of(parts)
    delta, shift = weight_delta(family, parts, weight), bias_delta(parts)
    halves = {entry["dtype"] for entry in CASES[case]["tensors"].values()}
    close = 2e-2 if "bfloat16" in halves else 2e-3 if "float16" in halves else 3e-6
    compared = 0
    for strength in STRENGTHS:
        key = f"{case}|{program.removeprefix('~')}|{1.0 if program[0] == '~' else strength}"
        wanted, wanted_bias = recorded(key), recorded(f"{key}|bias")
        if wanted is not None:
            if program[0] == "~":
                wanted = weight + strength * (wanted - weight)
            assert (weight + strength * delta - wanted).abs().max() < close
            compared += 1
        else:
            assert not lora_weights.changes_weight(family, parts) and not delta.any()
        if wanted_bias is not None:
            assert (bias + (0 if shift is None else strength * shift) - wanted_bias).abs().max() < 3e-6
            compared += 1
    assert compared >= len(STRENGTHS)


# --- laws ----------------------------------------------------------------------------------------------------------


def test_an_alpha_is_written_in_a_dtype_that_holds_it():
    for rank, dtype, kept in (
        (256, torch.bfloat16, torch.bfloat16),
        (257, torch.bfloat16, torch.float32),
        (257, torch.float16, torch.float16),
    ):
        alpha = lora_weights.alpha_in(dtype, torch.tensor(float(rank)))
        assert alpha.dtype == kept and alpha.item() == rank


def test_dora_gives_rows_their_lengths_and_the_direction_of_the_sum():
    """Of LoHa, where LyCORIS's own merge scales twice: once here, whatever the strength of the plain change."""
    case = "loha.dora.linear.out"
    weight, parts = weight_of(case), parts_of(case)
    changed = weight + weight_delta(family_of(parts), parts, weight)
    torch.testing.assert_close(changed.norm(dim=1, keepdim=True), parts["dora_scale"])
    plain = {role: part for role, part in parts.items() if role != "dora_scale"}
    summed = weight + weight_delta(family_of(plain), plain, weight)
    torch.testing.assert_close(changed / parts["dora_scale"], summed / summed.norm(dim=1, keepdim=True))


def test_dora_leaves_a_row_of_zeros_finite():
    weight = keyed_input("row", (5, 3))
    weight[2] = 0
    delta = lora_weights.dora(torch.ones(5, 1), weight, torch.zeros(5, 3))
    assert torch.isfinite(delta).all() and not delta[2].any()


@pytest.mark.parametrize("shape", [(7,), (7, 1), (7, 1, 1, 1)])
def test_dora_takes_lengths_of_rows_in_any_shape(shape):
    weight = keyed_input("w", (7, 5, 3, 3))
    delta = lora_weights.dora(torch.full(shape, 2.0), weight, torch.zeros_like(weight))
    torch.testing.assert_close((weight + delta).flatten(1).norm(dim=1), torch.full((7,), 2.0))


def test_ia3_scales_rows_and_input_channels_of_convolutions():
    weight = keyed_input("w", (7, 5, 3, 3))
    for on_input, count in ((False, 7), (True, 5)):
        factor = keyed_input("f", (count,))
        parts = {"weight": factor, "on_input": torch.tensor(on_input)}
        delta = weight_delta(family_of(parts), parts, weight)
        index = 2, 4
        torch.testing.assert_close(delta[index], factor[index[1] if on_input else index[0]] * weight[index])


@pytest.mark.parametrize("case", ["oft.linear", "oft.linear.alpha", "oft.conv3", "boft.linear"])
def test_oft_keeps_lengths_and_angles(case):
    """R W has the singular values of W, however far it turns."""
    weight, parts = weight_of(case), parts_of(case)
    changed = weight + weight_delta(family_of(parts), parts, weight)
    assert (changed - weight).abs().max() > 1e-2
    before, after = (torch.linalg.svdvals(one.flatten(1)) for one in (weight, changed))
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


SUMS = [
    case
    for case in CASES
    if case.startswith(("lora.", "loha.", "lokr.", "full.", "norm")) and "dora" not in case
]


@pytest.mark.parametrize("case", SUMS)
def test_sums_do_not_depend_on_the_weight(case):
    parts, weight = parts_of(case), weight_of(case)
    family = family_of(parts)
    other = keyed_input("another weight", tuple(weight.shape))
    assert torch.equal(weight_delta(family, parts, weight), weight_delta(family, parts, other))


def test_kronecker_s_norm_is_the_product_of_the_norms():
    parts = {"lokr_w1": keyed_input("k1", (3, 2)), "lokr_w2": keyed_input("k2", (5, 7, 3, 3))}
    delta = weight_delta(family_of(parts), parts, torch.zeros(15, 14, 3, 3))
    assert math.isclose(delta.norm(), parts["lokr_w1"].norm() * parts["lokr_w2"].norm(), rel_tol=1e-5)


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_core_of_any_kernel_makes_kronecker_s_second_factor(kernel):
    first, core = keyed_input("k1", (3, 2)), keyed_input("t2", (1, 1, kernel, kernel))
    rows, columns = keyed_input("a", (1, 5)), keyed_input("b", (1, 7))
    parts = {"lokr_w1": first, "lokr_t2": core, "lokr_w2_a": rows, "lokr_w2_b": columns}
    delta = weight_delta(family_of(parts), parts, torch.zeros(15, 14, kernel, kernel))
    wanted = torch.einsum("ac,b,d,kl->abcdkl", first, rows[0], columns[0], core[0, 0])
    torch.testing.assert_close(delta, wanted.reshape(15, 14, kernel, kernel))


def test_factors_may_be_written_as_convolutions():
    shapes = {"hada_w1_a": (2, 5), "hada_w1_b": (2, 7), "hada_w2_a": (2, 5), "hada_w2_b": (2, 7)}
    parts = {role: keyed_input(role, shape) for role, shape in shapes.items()}
    parts |= {role: keyed_input(role, (2, 2, 3, 3)) for role in ("hada_t1", "hada_t2")}
    weight = torch.zeros(5, 7, 3, 3)
    flat = weight_delta(family_of(parts), parts, weight)
    as_convolutions = {
        role: part.reshape(*part.shape, *(1,) * (4 - part.dim())) for role, part in parts.items()
    }
    assert torch.equal(weight_delta(family_of(as_convolutions), as_convolutions, weight), flat)


@pytest.mark.parametrize(
    ("parts", "fits"),
    [
        ({"w_norm": (6,)}, True),
        ({"diff": (6,)}, True),
        ({"weight": (6,), "on_input": (1,)}, True),
        ({"lora_up": (6, 2), "lora_down": (2, 1)}, False),
        ({"oft_blocks": (3, 2, 2)}, False),
        ({"oft_blocks": (1, 3, 2, 2)}, False),
        ({"oft_diag": (3, 2, 2)}, False),
        ({"lokr_w1": (2, 1), "lokr_w2": (3, 1)}, False),
    ],
)
def test_a_norm_s_weight_is_no_matrix(parts, fits):
    parts = {
        role: torch.zeros(shape) if role == "on_input" else torch.ones(shape) for role, shape in parts.items()
    }
    family, weight = family_of(parts), torch.ones(6)
    if fits:
        assert torch.equal(weight_delta(family, parts, weight), torch.ones(6))
    else:
        with pytest.raises(
            UnfitError, match=f"{family.name} is for matrices and convolutions, not a weight of 6"
        ):
            weight_delta(family, parts, weight)


@pytest.mark.parametrize(
    "parts",
    [
        {"lora_up": (11, 2), "lora_down": (2, 4, 3, 3)},
        {"lora_up": (11, 2), "lora_down": (2, 4, 1, 1), "lora_mid": (2, 2, 3, 3)},
        {"lora_up": (11, 2), "lora_down": (2, 4, 3, 3), "dora_scale": (11, 1, 1, 1)},
        {"lora_up": (11, 2), "lora_down": (2, 4, 3, 3), "dora_scale": (1, 4, 1, 1)},
        {"hada_w1_a": (11, 2), "hada_w1_b": (2, 36), "hada_w2_a": (11, 2), "hada_w2_b": (2, 36)},
        {"lokr_w1": (1, 2), "lokr_w2": (11, 2, 3, 3)},
        {"diff": (11, 4, 3, 3)},
        {"a1": (36, 2), "a2": (2, 36), "b1": (11, 2), "b2": (2, 36)},
    ],
    ids=lambda parts: " ".join(parts),
)
def test_changes_for_4_input_channels_leave_an_inpainting_model_s_other_5_alone(parts):
    """The first convolution of 9 channels changes in its first 4 as the plain model's does."""
    parts = {role: 0.3 * keyed_input(role, shape).abs() for role, shape in parts.items()}
    family = family_of(parts)
    wide = keyed_input("wide", (11, 9, 3, 3))
    if "a1" in parts:  # GLoRA says no sizes of its own
        with pytest.raises(UnfitError):
            weight_delta(family, parts, wide)
        return
    delta = weight_delta(family, parts, wide)
    assert torch.equal(delta[:, :4], weight_delta(family, parts, wide[:, :4]))
    assert delta[:, :4].any() and not delta[:, 4:].any()


MISFITS = [
    ({"lora_up": (6, 4), "lora_down": (3, 5)}, "lora_up 6 x 4, lora_down 3 x 5"),
    ({"lora_up": (6, 4), "lora_down": (4, 5, 1, 1), "lora_mid": (4, 3, 3, 3)}, "lora_mid 4 x 3 x 3 x 3"),
    ({"lora_up": (6,), "lora_down": (4, 5)}, "lora_up 6, lora_down 4 x 5"),
    ({"lora_up": (6, 4)}, "it has lora_up, which is no known way"),
    ({"lora_up": (6, 4), "lora_down": (4, 5), "hada_w1_a": (6, 4)}, "no known way"),
    ({"alpha": ()}, "it has alpha, which"),
    ({"hada_w1_a": (6, 3), "hada_w1_b": (2, 5), "hada_w2_a": (6, 3), "hada_w2_b": (3, 5)}, "hada_w1_a 6 x 3"),
    ({"hada_w1_a": (6, 3), "hada_w1_b": (3, 5), "hada_w2_a": (7, 3), "hada_w2_b": (3, 5)}, "hada_w2_a 7 x 3"),
    ({"lokr_w1": (2, 2), "lokr_w2_a": (3, 2)}, "it needs w2, or w2_a and w2_b, and has lokr_w1, lokr_w2_a"),
    ({"lokr_w1": (2, 2), "lokr_w1_a": (2, 1), "lokr_w1_b": (1, 2), "lokr_w2": (3, 3)}, "it needs w1, or"),
    ({"a1": (5, 2), "a2": (3, 5), "b1": (6, 2), "b2": (2, 5)}, "a1 5 x 2, a2 3 x 5"),
    ({"oft_blocks": (3, 4, 5)}, "oft_blocks 3 x 4 x 5"),
    ({"oft_blocks": (3, 4, 4), "rescale": (11, 1)}, "rescale 11 x 1"),
    (
        {"oft_blocks": (3, 2, 4, 4)},
        "oft_blocks 3 x 2 x 4 x 4",
    ),  # 8 rows have no third butterfly of blocks of 4
    ({"weight": (5,)}, "it has weight, which"),
]


@pytest.mark.parametrize(("parts", "words"), MISFITS)
def test_parts_that_do_not_fit_one_another(parts, words):
    with pytest.raises(UnfitError, match=words):
        family_of({role: torch.ones(shape) for role, shape in parts.items()})


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"lora_up": (6, 4), "lora_down": (4, 5)}, "a weight of 6 x 5, not 6 x 7"),
        ({"lora_up": (8, 4), "lora_down": (4, 7)}, "a weight of 8 x 7, not 6 x 7"),
        ({"diff": (6, 5)}, "a weight of 6 x 5, not 6 x 7"),
        ({"oft_blocks": (2, 4, 4)}, "a weight of 8 x any, not 6 x 7"),
        ({"weight": (5,), "on_input": ()}, "a weight of any x 5, not 6 x 7"),
        ({"a1": (5, 2), "a2": (2, 5), "b1": (6, 2), "b2": (2, 5)}, "not for a weight of 6 x 7"),
        (
            {"lora_up": (6, 4), "lora_down": (4, 7), "dora_scale": (5, 1)},
            "dora_scale is 5 x 1, the weight 6 x 7",
        ),
        ({"lora_up": (6, 4), "lora_down": (4, 7), "bias": (6,)}, "bias is 6, the weight 6 x 7"),
        ({"w_norm": (5,)}, "a weight of 5 x 1, not 6 x 7"),
    ],
)
def test_parts_that_do_not_fit_the_weight(parts, words):
    parts = {role: torch.ones(shape) for role, shape in parts.items()}
    with pytest.raises(UnfitError, match=words):
        weight_delta(family_of(parts), parts, torch.ones(6, 7))
