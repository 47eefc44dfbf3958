"""Configurations of other people's classes: what ldm does not know is theirs, and keywords beside the params win."""

import logging

import pytest
import torch
from omegaconf import OmegaConf
from tiny import TEXT, tiny_config
from torch import nn

from ldm.errors import MismatchError
from ldm.models.autoencoder import AutoencoderKL, VQModelInterface
from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.util import instantiate_from_config

HERE = __name__


class ReadsItsOwn(LatentDiffusion):
    """Reads a key of its own and hands all of them on, without taking it out."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.hint_key = kwargs.get("hint_key", "hint")


class ReadsDeeper(ReadsItsOwn):
    """Inherits a constructor that takes anything."""


class NamesItsOwn(LatentDiffusion):
    def __init__(self, hint_key, *args, lock=True, **kwargs):
        super().__init__(*args, **kwargs)
        self.hint_key, self.lock = hint_key, lock


class TakesOnlyNamed(LatentDiffusion):
    def __init__(self, hint_key, first_stage_config, cond_stage_config, unet_config):
        super().__init__(first_stage_config, cond_stage_config, unet_config=unet_config)
        self.hint_key = hint_key


class Inherits(LatentDiffusion):
    """Has no constructor."""


class OwnUNet(UNetModel):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate = kwargs["gate"]


class OwnVAE(AutoencoderKL):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.gate = kwargs["gate"]


class OwnVQ(VQModelInterface):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.gate = kwargs["gate"]


class OwnText(FrozenCLIPEmbedder):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.gate = kwargs["gate"]


class OwnPixels(DDPM):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.gate = kwargs["gate"]


class Anything(nn.Module):
    """Not a class of ldm at all."""

    def __init__(self, **kwargs):
        super().__init__()
        self.given = kwargs


def config(cls, **params):
    made = tiny_config()["model"]
    made["target"] = f"{HERE}.{cls.__name__}"
    made["params"].update(params)
    return OmegaConf.create(made)


def part(cls, name, **params):
    made = tiny_config()["model"]["params"][name]
    return OmegaConf.create(
        {"target": f"{HERE}.{cls.__name__}", "params": {**made["params"], **params, "gate": 7}}
    )


@pytest.fixture(autouse=True)
def on_meta():
    with torch.device("meta"):
        yield


@pytest.mark.parametrize("cls", [ReadsItsOwn, ReadsDeeper])
def test_a_class_that_takes_anything_keeps_a_key_of_its_own(cls, caplog):
    with caplog.at_level(logging.WARNING):
        model = instantiate_from_config(config(cls, hint_key="pose"))
    assert model.hint_key == "pose" and model.cond_stage_key == "txt"
    said = [r.getMessage() for r in caplog.records if "left to" in r.getMessage()]
    assert said == [f"left to {cls.__name__}, for ldm does not know these parameters: hint_key"]


def test_a_slip_of_the_pen_among_them_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        instantiate_from_config(config(ReadsItsOwn, hint_key="pose", scale_factr=0.5, log_every=3))
    said = next(r.getMessage() for r in caplog.records if "left to" in r.getMessage())
    assert said.endswith(
        "hint_key, scale_factr (did you mean 'scale_factor'?), log_every (did you mean 'log_every_t'?)"
    )


def test_what_all_classes_know_is_not_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        model = instantiate_from_config(config(NamesItsOwn, hint_key="pose", lock=False))
    assert (model.hint_key, model.lock) == ("pose", False)
    assert not [r for r in caplog.records if "left to" in r.getMessage()]


@pytest.mark.parametrize(
    ("cls", "name", "kwargs"),
    [
        (OwnUNet, "unet_config", {}),
        (OwnVAE, "first_stage_config", {}),
        (OwnVQ, "first_stage_config", {"n_embed": 11}),
        (OwnText, "cond_stage_config", {}),
    ],
)
def test_parts_too(cls, name, kwargs):
    made = part(cls, name, **kwargs)
    if cls is OwnVQ:
        made.params.ddconfig.double_z = False
    assert instantiate_from_config(made).gate == 7


def test_a_pixel_model_too():
    unet = tiny_config()["model"]["params"]["unet_config"]
    unet["params"].update(in_channels=3, out_channels=3, use_spatial_transformer=False, context_dim=None)
    params = {"unet_config": unet, "use_ema": False, "gate": 7}
    assert instantiate_from_config({"target": f"{HERE}.OwnPixels", "params": params}).gate == 7


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (config(Inherits, hint_key=1), "Inherits' has no parameter 'hint_key'"),
        (config(NamesItsOwn, lock=False), "lack 'hint_key'"),
        (
            {**tiny_config()["model"], "params": {**tiny_config()["model"]["params"], "scale_factr": 1}},
            "LatentDiffusion' has no parameter 'scale_factr'; did you mean 'scale_factor'",
        ),
    ],
)
def test_other_classes_are_held_to_what_is_known(made, message):
    with pytest.raises(MismatchError, match=message):
        instantiate_from_config(made)


def test_a_subclass_that_names_all_is_held_to_its_names():
    made = config(TakesOnlyNamed, hint_key=1)
    made.params = {k: made.params[k] for k in ("unet_config", "first_stage_config", "cond_stage_config")}
    made.params.update(hint_key="pose", conditioning_key="concat")
    with pytest.raises(MismatchError, match="TakesOnlyNamed' has no parameter 'conditioning_key'"):
        instantiate_from_config(made)


def test_python_callers_are_held_to_the_same():
    params = tiny_config()["model"]["params"]
    assert ReadsItsOwn(**params, hint_key="pose").hint_key == "pose"
    with pytest.raises(TypeError, match="unexpected keyword argument 'hint_key'"):
        LatentDiffusion(**params, hint_key="pose")
    with pytest.raises(TypeError, match="unexpected keyword argument 'gate'"):
        FrozenCLIPEmbedder(TEXT, gate=7)


@pytest.mark.parametrize("wrap", [dict, OmegaConf.create])
def test_keywords_beside_the_params_go_to_the_constructor_and_win(wrap):
    made = wrap({"target": f"{HERE}.Anything", "params": {"a": 1, "b": [2, 3]}})
    assert instantiate_from_config(made).given == {"a": 1, "b": [2, 3]}
    model = torch.empty(3)
    built = instantiate_from_config(made, b=5, model=model)
    assert built.given["model"] is model and {**built.given, "model": 0} == {"a": 1, "b": 5, "model": 0}
    assert instantiate_from_config(wrap({"target": f"{HERE}.Anything"}), c=4).given == {"c": 4}
    assert instantiate_from_config(made, allow=()).given["a"] == 1
    assert instantiate_from_config("__is_first_stage__", a=1) is None


def test_a_keyword_that_nothing_takes_is_named():
    with pytest.raises(MismatchError, match="'torch.nn.Linear' has no parameter 'wide'"):
        instantiate_from_config({"target": "torch.nn.Linear", "params": {"in_features": 2}}, wide=3)
