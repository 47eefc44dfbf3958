"""What the values of a configuration may be: kinds, ranges, sizes; every wrong one is one line that names its key."""

import copy
import functools
import importlib
import inspect
import math
import pkgutil
import random
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import ldm
from ldm import values
from ldm.config import _is_buildable, instantiate_from_config
from ldm.config_text import load_config, resolved
from ldm.errors import FormatError, LdmError, MismatchError, UnsafeFileError, UsageError, shown
from ldm.models.introspect import native_size
from ldm.paths import CHECKOUT
from ldm.values import RANGES, Range, Unfit, fit

# Those for pictures of one's own are no models, but laid over one: tests/training/test_own_pictures.py.
CONFIGS = sorted(
    path for path in (CHECKOUT / "configs").glob("*.yaml") if not path.name.startswith("own-pictures")
)
UNET = "model.params.unet_config.params"
STAGE = "model.params.first_stage_config.params"


def plain(name):
    """A shipped configuration as plain data, without weights to load."""
    config = resolved(load_config(CHECKOUT / "configs" / f"{name}.yaml"))
    stage = config["model"]["params"].get("first_stage_config")
    if stage:
        stage["params"].pop("ckpt_path", None)
    return config


def put(config, path, value):
    *way, last = path.split(".") if isinstance(path, str) else path
    for name in way:
        config = config[name]
    config[last] = value


def build(config, part="model"):
    with torch.device("meta"):
        return instantiate_from_config(OmegaConf.create(config)[part])


# -- one value ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "kind", "wanted"),
    [
        (3, int, 3),
        (3.0, int, 3),
        ("1e4", int, 10_000),
        (3, float, 3),
        ("1e-4", float, 1e-4),
        ("-2.5E+3", float, -2500.0),
        (True, bool, True),
        (0, bool, 0),
        (None, int | None, None),
        (5, int | None, 5),
        ([1, 2], tuple[int, ...], [1, 2]),
        ((1, 2), list[int], (1, 2)),
        ({1, 2}, typing.Iterable[int], {1, 2}),
        (["1e-6", 1], tuple[float, ...], [1e-6, 1]),
        ([64, 48], int | tuple[int, int], [64, 48]),
        ([], typing.Sequence[str], []),
        ("a", str | Path, "a"),
        (Path("a"), str | Path, Path("a")),
        ("last", typing.Literal["last", "pooled"], "last"),
        ({"a": 1}, typing.Mapping[str, typing.Any], {"a": 1}),
        ("anything", typing.Any, "anything"),
        ("anything", inspect.Parameter.empty, "anything"),
    ],
)
def test_a_value_that_fits_is_taken(value, kind, wanted):
    found = fit(OmegaConf.create(value) if isinstance(value, dict) else value, kind)
    assert found == wanted and type(found) in (type(wanted), type(OmegaConf.create({})))
    if isinstance(value, list):
        assert fit(OmegaConf.create(value), kind) == wanted


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("3", int),
        ("x", float),
        ("1e", float),
        ("1e9999", float),
        (3.5, int),
        (True, int),
        (False, float),
        (None, int),
        ([3], int),
        ({}, float),
        (math.nan, float),
        (math.inf, float),
        (-math.inf, int),
        (10**400, float),
        (10**400, int),
        (2**70, int),
        (1j, float),
        ("true", bool),
        (2, bool),
        (None, bool),
        (3, str),
        (None, str),
        (["a"], str),
        (b"a", str),
        ("ab", list[str]),
        ("12", tuple[int, ...]),
        ({"a": 1}, list[str]),
        ([1, "2"], list[int]),
        ([1, 2, 3], tuple[int, int]),
        (7, list[int]),
        ("other", typing.Literal["last", "pooled"]),
        ([], typing.Mapping[str, int]),
        (0, type(None)),
    ],
    ids=lambda value: shown(value),
)
def test_a_value_that_does_not_fit_is_refused(value, kind):
    with pytest.raises(Unfit):
        fit(value, kind)


@pytest.mark.parametrize(
    ("within", "inside", "outside"),
    [
        (Range(1, 8), (1, 8), (0, 9, -1)),
        (Range(0, 1), (0, 0.5, 1), (-1e-9, 1.0000001)),
        (Range(0, 8, above=True), (1e-9, 8), (0, -1)),
    ],
)
def test_the_ends_of_a_range_belong_to_it(within, inside, outside):
    for number in inside:
        assert fit(number, float, within) == number and fit([number], list[float], within) == [number]
    for number in outside:
        for value, kind in ((number, float), ([number], list[float])):
            with pytest.raises(Unfit):
                fit(value, kind, within)


def test_a_list_may_be_too_short_or_too_long():
    within = Range(1, 8, least=2, most=3)
    assert fit([1, 2], list[int], within) == [1, 2]
    for wrong in ([1], [1, 2, 3, 4], []):
        with pytest.raises(Unfit):
            fit(wrong, list[int], within)


class Loop(dict):
    def __repr__(self):
        raise RecursionError


@pytest.mark.parametrize(
    "value",
    ["x" * 10_000, 10**100_000, [[0] * 999], {"a\nb": "\t"}, Loop(), -(7**9000)],
    ids=[str(i) for i in range(6)],
)
def test_whatever_is_wrong_is_shown_in_a_line(value):
    text = shown(value)
    assert len(text) <= 90 and "\n" not in text


# -- the law: nothing that a file can name is without a range -------------------------------------------------------


@functools.cache
def constructors():
    return list(_constructors())


def _constructors():
    for module in pkgutil.walk_packages(ldm.__path__, "ldm."):
        if module.name.endswith("triton_kernels"):
            continue
        found = importlib.import_module(module.name)
        for name, cls in vars(found).items():
            if inspect.isclass(cls) and cls.__module__ == module.name and _is_buildable(cls):
                yield name, cls


def numbers_in(annotation):
    parts = typing.get_args(annotation)
    if typing.get_origin(annotation) is typing.Literal:
        return False
    return annotation in (int, float) or any(map(numbers_in, parts))


WORDS = {"lightning.trainer.precision"}  # 32 is one of its words


def test_every_number_that_a_configuration_can_give_has_a_range():
    from ldm.training.options import trainer_options, training_options

    seen = [*constructors()]
    assert {"UNetModel", "LatentInpaintDiffusion", "LambdaLinearScheduler", "Shapes", "ImageLogger"} <= {
        name for name, _ in seen
    }
    seen += [("training", training_options), ("lightning.trainer", trainer_options)]
    lacking = {
        f"{name}.{parameter}"
        for name, kind in seen
        for parameter, about in values.parameters_of(kind).items()
        if numbers_in(about.annotation) and parameter not in RANGES and f"{name}.{parameter}" not in RANGES
    }
    assert lacking == WORDS


def test_defaults_lie_in_their_ranges():
    for name, cls in constructors():
        defaults = {
            p.name: p.default
            for p in values.parameters_of(cls).values()
            if p.default not in (p.empty, None) and p.annotation is not p.empty
        }
        assert values.check(defaults, cls, name) == defaults


def test_parameters_are_found_through_the_constructors_they_are_handed_on_to():
    from ldm.guided_diffusion.pixel_diffusion import PixelDiffusion
    from ldm.models.autoencoder import IdentityFirstStage
    from ldm.models.diffusion.ddpm import LatentInpaintDiffusion

    assert {"masked_image_key", "finetune_keys", "scale_factor", "timesteps"} <= set(
        values.parameters_of(LatentInpaintDiffusion)
    )
    assert {"ema_rate", "num_channels", "diffusion_steps"} <= set(values.parameters_of(PixelDiffusion))
    assert values.takes_anything(IdentityFirstStage) and not values.takes_anything(LatentInpaintDiffusion)


# -- wrong values in shipped files ----------------------------------------------------------------------------------

WHOLE = "should be a whole number from 1 to 65536, got "
ROWS = [
    ("v1-inference", f"{UNET}.model_channels", "64", UsageError, WHOLE + "'64'"),
    ("v1-inference", f"{UNET}.model_channels", -32, UsageError, WHOLE + "-32"),
    ("v1-inference", f"{UNET}.model_channels", 0, UsageError, WHOLE + "0"),
    ("v1-inference", f"{UNET}.model_channels", 32.5, UsageError, WHOLE + "32.5"),
    ("v1-inference", f"{UNET}.model_channels", None, UsageError, WHOLE + "None"),
    ("v1-inference", f"{UNET}.model_channels", [32], UsageError, WHOLE + r"\[32\]"),
    ("v1-inference", f"{UNET}.model_channels", {"a": 32}, UsageError, WHOLE + "{'a': 32}"),
    ("v1-inference", f"{UNET}.model_channels", True, UsageError, WHOLE + "True"),
    ("v1-inference", f"{UNET}.model_channels", 10**9, UsageError, WHOLE + "1000000000"),
    ("v1-inference", f"{UNET}.model_channels", math.nan, UsageError, WHOLE + "nan"),
    (
        "v1-inference",
        f"{UNET}.model_channels",
        48,
        MismatchError,
        "48 channels does not divide into 32 groups",
    ),
    (
        "v1-inference",
        f"{UNET}.num_res_blocks",
        10**9,
        UsageError,
        "from 1 to 256, or a list .* got 1000000000",
    ),
    ("v1-inference", f"{UNET}.num_res_blocks", [2, 2, 2, 10**9], UsageError, r"got \[2, 2, 2, 1000000000\]"),
    (
        "v1-inference",
        f"{UNET}.num_res_blocks",
        256,
        UnsafeFileError,
        "more than 10000 tensors or 3e.09 parameters",
    ),
    (
        "v1-inference",
        f"{UNET}.transformer_depth",
        256,
        UnsafeFileError,
        "more than 10000 tensors or 3e.09 param",
    ),
    (
        "v1-inference",
        f"{UNET}.model_channels",
        32768,
        UnsafeFileError,
        "more than 10000 tensors or 3e.09 param",
    ),
    ("v1-inference", f"{UNET}.channel_mult", [], UsageError, "a list of at least 1 .*got "),
    ("v1-inference", f"{UNET}.channel_mult", [1] * 17, UsageError, "at most 16"),
    ("v1-inference", f"{UNET}.channel_mult", [1, 0], UsageError, "above 0"),
    ("v1-inference", f"{UNET}.channel_mult", "1,2", UsageError, "got '1,2'"),
    ("v1-inference", f"{UNET}.attention_resolutions", 4, UsageError, "a list .* got 4"),
    ("v1-inference", f"{UNET}.use_checkpoint", "no", UsageError, "true or false, got 'no'"),
    ("v1-inference", f"{UNET}.context_dim", "768", UsageError, "got '768'"),
    ("v1-inference", f"{UNET}.num_heads", 0, MismatchError, "num_heads should be at least 1, or -1"),
    ("v1-inference", f"{UNET}.dropout", 1.5, UsageError, "a number from 0 to 1, got 1.5"),
    ("v1-inference", f"{STAGE}.ddconfig.ch", "128", UsageError, WHOLE + "'128'"),
    (
        "v1-inference",
        f"{STAGE}.ddconfig.ch",
        100,
        MismatchError,
        "100 channels do not divide into num_groups=32",
    ),
    ("v1-inference", f"{STAGE}.ddconfig.ch_mult", [], UsageError, "a list of at least 1"),
    ("v1-inference", f"{STAGE}.ddconfig.num_res_blocks", 10**9, UsageError, "from 1 to 256, got 1000000000"),
    ("v1-inference", f"{STAGE}.ddconfig.chh", 1, MismatchError, "has no parameter 'chh'; did you mean 'ch'"),
    (
        "v1-inference",
        "model.params.unet_config.params",
        {"a": 1},
        MismatchError,
        r"no parameter 'a'; it takes .* \.\.\.$",
    ),
    ("v1-inference", "model.params.unet_config.params", {"a" * 900: 1}, MismatchError, "no parameter 'aaaa"),
    ("v1-inference", f"{STAGE}.ddconfig", None, UsageError, "a mapping, got None"),
    ("v1-inference", f"{STAGE}.ddconfig", [1], UsageError, "a mapping, got "),
    ("v1-inference", f"{STAGE}.ddconfig", {"ch": 128}, MismatchError, "lacks 'out_ch', 'num_res_blocks', "),
    ("v1-inference", f"{STAGE}.embed_dim", None, UsageError, WHOLE + "None"),
    ("v1-inference", f"{STAGE}.lossconfig", "x", UsageError, "a mapping, got 'x'"),
    (
        "v1-inference",
        "model.params.scale_factor",
        "x",
        UsageError,
        "a number above 0 and up to 1e.06, got 'x'",
    ),
    ("v1-inference", "model.params.scale_factor", math.inf, UsageError, "got inf"),
    ("v1-inference", "model.params.scale_factor", 0, UsageError, "got 0"),
    ("v1-inference", "model.params.timesteps", 1.5, UsageError, "a whole number from 1 to 100000, got 1.5"),
    ("v1-inference", "model.params.timesteps", 300_000_000, UsageError, "to 100000, got 300000000"),
    (
        "v1-inference",
        "model.params.timesteps",
        10**4000,
        UsageError,
        "to 100000, got 10{76}[.]{3}$",
    ),
    ("v1-inference", "model.params.linear_start", "a", UsageError, "a number from 0 to 1, got 'a'"),
    ("v1-inference", "model.params.given_betas", [2.0], UsageError, r"got \[2.0\]"),
    ("v1-inference", "model.params.given_betas", "x", UsageError, "got 'x'"),
    ("v1-inference", "model.params.parameterization", "vv", UsageError, "'eps' or 'x0' or 'v', got 'vv'"),
    ("v1-inference", "model.params.image_size", [64, 64, 64], UsageError, "got "),
    ("v1-inference", "model.params.conditioning_key", 3, UsageError, "a text, or null, got 3"),
    ("v1-inference", "model.params.unet_config", [], UsageError, "a mapping, got "),
    ("v1-inference", "model.params.cond_stage_config", 7, UsageError, "a mapping, or a text, got 7"),
    (
        "v1-inference",
        "model.params",
        [1],
        MismatchError,
        r"should be a mapping of names to values, got \[1\]",
    ),
    ("v1-inference", "model.params", "x", MismatchError, "should be a mapping of names to values, got 'x'"),
    ("v1-inference", f"{UNET[:-7]}.params", [1], MismatchError, "should be a mapping of names to values"),
    (
        "v1-inference",
        "model.params.ucg_training",
        {"txt": 1},
        UsageError,
        "ucg_training.txt should be a mapping",
    ),
    (
        "v1-inference",
        "model.params.ucg_training",
        {"txt": {"p": 2}},
        UsageError,
        "ucg_training.txt.p should be",
    ),
    (
        "v1-inference",
        "model.params.ucg_training",
        {"txt": {}},
        UsageError,
        "ucg_training.txt should have 'p'",
    ),
    (
        "v1-inference",
        "model.params.scheduler_config.params.warm_up_steps",
        [-1],
        UsageError,
        r"scheduler_config.params.warm_up_steps should be a list .* got \[-1\]",
    ),
    ("v1-inpainting", "model.params.finetune_keys", "x", UsageError, "a list .* got 'x'"),
    ("shapes-pixels", "model.params.num_res_blocks", 10**9, UsageError, "from 1 to 256, got 1000000000"),
    (
        "shapes-pixels",
        "model.params.diffusion_steps",
        300_000_000,
        UsageError,
        "from 1 to 100000, got 300000000",
    ),
    ("shapes-pixels", "model.params.channel_mult", "1,1e9", UsageError, "at most 1024 and 16 of them"),
    ("shapes-pixels", "model.params.ema_rate", 1.5, UsageError, "got 1.5"),
    ("shapes-pixels", "model.params.num_chanels", 3, MismatchError, "did you mean 'num_channels'"),
    (
        "shapes-first-stage",
        "model.params.lossconfig.params.kl_weight",
        "x",
        UsageError,
        "lossconfig.params.kl_weight",
    ),
]


@pytest.mark.parametrize(
    ("name", "path", "value", "error", "message"),
    ROWS,
    ids=[f"{row[1]}={shown(row[2])}" for row in ROWS],
)
@pytest.mark.thinned(3)
def test_a_wrong_value_is_one_line_with_its_key(name, path, value, error, message):
    config = plain(name)
    put(config, path, value)
    with pytest.raises(error, match=message) as caught:
        build(config)
    text = str(caught.value)
    assert type(caught.value) is error and "\n" not in text and len(text) <= 400
    if error is UsageError and "ucg_training" not in path and "num_chanels" not in path and value != "1,1e9":
        assert text.startswith(f"{path} should be ")


def test_a_place_is_said_for_plain_data_too():
    config = plain("v1-inference")["model"]
    config["params"]["unet_config"]["params"]["model_channels"] = "64"
    for where, wanted in (("", "params"), ("model", "model.params")):
        with pytest.raises(UsageError, match=f"^{wanted}.unet_config.params.model_channels should"):
            instantiate_from_config(config, where=where)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.params.linear_start", "8.5e-4"),
        ("model.params.linear_end", "1e-2"),
        ("model.params.timesteps", "1e3"),
        ("model.params.timesteps", 1000.0),
        ("model.params.v_posterior", 0),
        ("model.params.scale_factor", 1),
        ("model.params.use_ema", 0),
        ("model.params.image_size", [64, 64]),
        (f"{UNET}.num_res_blocks", [1, 1, 1]),
        (f"{UNET}.image_size", [64, 64]),
        (f"{UNET}.channel_mult", [1, 2, 2.0]),
        (f"{UNET}.num_heads", -1),
        (f"{STAGE}.ddconfig.attn_resolutions", [16]),
        ("model.params.scheduler_config.params.f_start", ["1e-6"]),
    ],
)
@pytest.mark.thinned(7)
def test_what_public_files_write_is_read(path, value):
    config = plain("shapes-diffusion")
    put(config, path, value)
    model = build(config)
    assert model.num_timesteps == 1000 and model.betas[-1] < 0.0196
    if path == "model.params.image_size":
        assert native_size(model) == (512, 512)


def test_numbers_written_as_text_are_numbers_to_the_model():
    config = plain("shapes-diffusion")
    put(config, "model.params.linear_start", "1.5e-3")
    assert torch.equal(build(config).betas, build(plain("shapes-diffusion")).betas)


def test_the_classes_of_others_are_their_own_business():
    class Own(nn.Module):
        def __init__(self, width: int = 3, num_res_blocks=7):
            super().__init__()
            self.width, self.num_res_blocks = width, num_res_blocks

    target = f"{__name__}.Own"
    globals()["Own"] = Own
    made = instantiate_from_config({"target": target, "params": {"width": "x", "num_res_blocks": -4}})
    assert (made.width, made.num_res_blocks) == ("x", -4)


@pytest.mark.parametrize(
    ("target", "params", "message"),
    [
        (
            "torch.nn.Linear",
            {"in_features": "x", "out_features": 3},
            "params.in_features should be a whole number",
        ),
        (
            "torch.nn.Linear",
            {"in_features": -3, "out_features": 3},
            "Linear cannot be built from these values",
        ),
        (
            "torch.nn.Linear",
            {"in_features": 10**6, "out_features": 10**6},
            "more than 10000 tensors or 3e.09",
        ),
        (
            "torch.nn.Conv2d",
            {"in_channels": 3, "out_channels": 5, "kernel_size": 3, "groups": 2},
            "cannot be built",
        ),
    ],
)
def test_layers_of_torch_are_held_to_their_annotations(target, params, message):
    with pytest.raises(LdmError, match=message), torch.device("meta"):
        instantiate_from_config({"target": target, "params": params})


def test_a_size_is_counted_over_all_that_one_configuration_builds(monkeypatch):
    monkeypatch.setattr(values, "MAX_TENSORS", 3)
    linear = {"target": "torch.nn.Linear", "params": {"in_features": 3, "out_features": 5, "bias": False}}
    both = {
        "target": "ldm.modules.diffusionmodules.util.HybridConditioner",
        "params": {"c_concat_config": linear, "c_crossattn_config": linear},
    }
    instantiate_from_config(both)
    instantiate_from_config(both)  # a second one begins at none
    linear["params"]["bias"] = True
    with pytest.raises(
        UnsafeFileError, match="asks for a model of more than 3 tensors .*Linear.bias was one too"
    ):
        instantiate_from_config(both)
    nn.Linear(3, 5)  # and nobody counts outside


@pytest.mark.parametrize(
    ("name", "place", "value", "is_giant"),
    [
        ("v1-inference", f"{UNET}.model_channels", 320, False),
        ("v1-inference", f"{UNET}.model_channels", 2048, True),
        ("v1-inference", f"{UNET}.channel_mult", [1, 2, 4, 16], True),
        ("v1-inference", f"{UNET}.transformer_depth", 10, True),
        ("v1-inference", f"{UNET}.num_classes", 1 << 24, True),
        ("v1-inference", f"{STAGE}.ddconfig.ch", 4096, True),
        ("shapes-pixels", "model.params.channel_mult", "1,1,2", False),
        ("shapes-pixels", "model.params.channel_mult", "1,1,200", True),
    ],
)
def test_only_a_model_that_may_be_very_large_is_built_twice(name, place, value, is_giant):
    config = plain(name)
    put(config, place, value)
    assert values.may_be_giant(OmegaConf.create(config).model.params) == is_giant


# -- any leaf, any wrong value --------------------------------------------------------------------------------------

WRONG = ("x", "64", "", -3, -0.5, 0, 0.5, 32.5, None, [], [32], ["x"], [[1]], {}, {"a": 1}, True, False)
WRONG += (10**9, 10**18, math.nan, math.inf, -1)


def leaves(tree, place=()):
    """Yield the places of all values, mappings and lists too."""
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    if place:
        yield place
    for key, part in parts:
        yield from leaves(part, (*place, key))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
@pytest.mark.thinned(3)
def test_any_leaf_of_a_shipped_file_may_be_anything(file):
    """It builds, or an LdmError of one line names the key, what holds it, or the value."""
    draw = random.Random(file.stem)
    whole = plain(file.stem)
    for part in [name for name in ("model", "data") if name in whole]:
        for place in draw.sample(list(leaves(whole[part])), 6):
            value = draw.choice(WRONG)
            config = copy.deepcopy(whole)
            put(config[part], place, value)
            try:
                build(config, part)
            except LdmError as error:
                names = [str(key) for key in place if not isinstance(key, int)][-2:]
                text = str(error)
                assert any(name in text for name in [*names, shown(value)]), (place, value, text)
                assert len(text) <= 400 and "\n" not in text, (place, value, text)


# -- files that would eat a machine ---------------------------------------------------------------------------------


def nine(levels):
    lines = ["l0: [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"l{i}: [" + ", ".join([f"'${{l{i - 1}}}'"] * 9) + "]" for i in range(1, levels)]
    return "\n".join(lines)


def doubled(levels):
    return "l0: abcdefgh\n" + "\n".join(f"l{i}: '${{l{i - 1}}}${{l{i - 1}}}'" for i in range(1, levels))


TEXTS = {
    "nine of nine of nine": (nine(9), "too large: references multiply"),
    "texts doubled": (doubled(40), "too large: references multiply"),
    "circle": ("a: ${a}", "cannot be resolved: Recursive reference: 'a' leads back"),
    "circle of two": ("a: ${b}\nb: ${a}", "cannot be resolved: Recursive"),
    "circle through a list": ("a: [1, '${a}']", "cannot be resolved: Recursive"),
    "circle through a mapping": ("a: {b: '${a}'}", "cannot be resolved: Recursive"),
    "circle, relative": ("a: {b: '${.c}', c: '${.b}'}", "cannot be resolved: Recursive"),
    "circle within a path": ("a: ${a.b}", "cannot be resolved"),
    "a long chain": ("\n".join(f"l{i}: ${{l{i + 1}}}" for i in range(4000)), "cannot be resolved"),
    "nowhere": ("a: ${b}", "cannot be resolved: Interpolation key 'b' not found"),
    "inside of another": ("a: ${${b}}\nb: c\nc: 1", "has a reference inside of another"),
    "missing": ("a: ???", "cannot be resolved: Missing mandatory value"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_references_that_cannot_be_followed_are_one_line(tmp_path, case):
    text, message = TEXTS[case]
    path = tmp_path / "a.yaml"
    path.write_text(text + "\n")
    with pytest.raises(FormatError, match=message) as caught:
        resolved(load_config(path))
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_references_are_followed(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "a: {b: 3, c: '${.b}', d: ['${a.b}', '${e.0}']}\ne: [5, '${..a.c}x']\nf: ${a}\ng: ${f.b}\n"
    )
    assert resolved(load_config(path)) == {
        "a": {"b": 3, "c": 3, "d": [3, 5]},
        "e": [5, "3x"],
        "f": {"b": 3, "c": 3, "d": [3, 5]},
        "g": 3,
    }


SCALARS = {
    "digits": ("a: " + "1" * 100_000, "line 1: a number of 100000 digits; at most 100"),
    "digits in a list": ("a: 1\nb: [1, " + "7" * 5000 + "]", "line 2: a number of 5000 digits"),
    "hexadecimal": ("a: 0x" + "f" * 50_000, "a number of 50002 digits"),
    "in sixties": ("a: 1" + ":1" * 50_000, "a number of 100001 digits"),
    "with underscores": ("a: 1" + "_1" * 50_000, "a number of 100001 digits"),
    "of endless precision": ("a: 0." + "1" * 50_000, "a number of 50002 digits"),
    "a key": ("1" * 5000 + ": 1", "digits|simple key|not readable YAML"),
    "maybe": ("a: !!bool maybe", "line 1: 'maybe' is no value of !!bool"),
    "a whole number": ("a: 1\nb: !!int x", "line 2: 'x' is no value of !!int"),
    "a number": ("a: !!float x", "'x' is no value of !!float"),
    "a long number": ("a: !!int '" + "1" * 5000 + "'", "is no value of !!int"),
    "a day": ("a: !!timestamp x", "'x' is no value of !!timestamp"),
    "a mapping that is none": ("a: !!map x", "expected a mapping node|is no value of !!map"),
}


@pytest.mark.parametrize("case", SCALARS)
def test_a_scalar_that_cannot_be_read_is_named_with_its_line(tmp_path, case):
    text, message = SCALARS[case]
    path = tmp_path / "a.yaml"
    path.write_text(text + "\n")
    with pytest.raises(FormatError, match=message) as caught:
        load_config(path)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_long_texts_of_digits_stay_texts(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"a: '{'1' * 500}'\nb: {'ab12' * 100}\nc: 0x1f\nd: 1_000\ne: 1e-4\nf: !!bool yes\n")
    assert load_config(path) == {"a": "1" * 500, "b": "ab12" * 100, "c": 31, "d": 1000, "e": 1e-4, "f": True}


BUDGET = """
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
import torch
from ldm.errors import LdmError
from ldm.config import instantiate_from_config
from ldm.config_text import load_config, resolved
from ldm.guided_diffusion import pixel_diffusion
from ldm.models.diffusion import ddpm
from ldm.modules.diffusionmodules import openaimodel
import ldm.modules.encoders.modules, omegaconf, yaml
from transformers import CLIPTextConfig, CLIPTextModel
def used():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024
for path in sys.argv[1:]:
    before = used()
    try:
        config = load_config(path)
        resolved(config)
        instantiate_from_config(config.model)
        end = "built"
    except LdmError as error:
        end = type(error).__name__
    after = used()
    print(end, after[0] - before[0] < 2, after[1] - before[1] < 200, flush=True)
"""


@pytest.mark.slow
def test_hostile_files_take_less_than_two_seconds_and_200_megabytes(tmp_path):
    """Of the processor's time; the models are really built, not on the meta device."""
    changes = {
        "timesteps": ("shapes-diffusion", "model.params.timesteps", 300_000_000),
        "blocks": ("shapes-diffusion", f"{UNET}.num_res_blocks", 10**9),
        "depth": ("shapes-diffusion", f"{UNET}.num_res_blocks", 256),
        "width": ("shapes-diffusion", f"{UNET}.model_channels", 16384),
        "width of the stage": ("shapes-diffusion", f"{STAGE}.ddconfig.ch", 16384),
        "levels": ("shapes-diffusion", f"{UNET}.channel_mult", [1] * 10_000),
        "flags": ("shapes-pixels", "model.params.num_res_blocks", 10**9),
        "classes": ("shapes-pixels", "model.params.num_classes", 10**12),
        "betas": ("shapes-diffusion", "model.params.given_betas", [0.5] * 3000),
    }
    paths = []
    for case, (name, place, value) in changes.items():
        config = plain(name)
        put(config, place, value)
        paths.append(tmp_path / f"{case}.yaml")
        OmegaConf.save(OmegaConf.create({"model": config["model"]}), paths[-1])
    for case, text in {"nine": nine(9), "doubled": doubled(40), "digits": "a: " + "1" * 900_000}.items():
        paths.append(tmp_path / f"{case}.yaml")
        paths[-1].write_text(text)
    done = subprocess.run([sys.executable, "-c", BUDGET, *paths], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    ends = dict(zip([path.stem for path in paths], done.stdout.splitlines(), strict=True))
    assert {case: end.split()[1:] for case, end in ends.items()} == dict.fromkeys(ends, ["True", "True"]), (
        ends
    )
    assert [case for case, end in ends.items() if end.startswith("built")] == ["betas"]
