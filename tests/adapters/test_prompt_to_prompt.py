"""Prompt-to-prompt: the recorded controllers and local blend, laws in a batch of a tiny model, and refusals."""

import json
import re

import pytest
import torch
from keyed import keyed_input
from safetensors.torch import load_file
from tiny import tiny_model

from ldm.adapters import LocalBlend, PromptToPrompt
from ldm.adapters.attention_control import Opened, places_of
from ldm.adapters.prompt_to_prompt import _Blending, blend_mask
from ldm.denoising import denoise
from ldm.encoding import encode_prompt
from ldm.errors import UsageError
from ldm.kernels import optimize, restore
from ldm.modules.encoders.modules import _ReadsPrompts
from ldm.modules.encoders.tokenizer import find_tokenizer
from ldm.modules.seams import StepInfo, attached
from ldm.noise import ImageNoise
from ldm.pipeline import StableDiffusion

TOTAL = 5  # steps of the recorded controllers
PROMPTS = SOURCE, REPLACED, REFINED = "a red circle", "a blue circle", "a small red circle"
PROMPTS = [*PROMPTS]


class Reader(_ReadsPrompts):
    """What reads prompts in an encoder with CLIP's own vocabulary, without its network."""

    max_length = 77
    tokenizer = find_tokenizer(None, beside=(), vocab_size=49408, max_length=77)


@pytest.fixture(scope="module")
def recorded(request):
    folder = request.path.parents[1] / "golden"
    return json.loads((folder / "editing.json").read_text()), load_file(folder / "editing.safetensors")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def attend_with(control, place, maps):
    """What comes of maps (b, heads, n, m) in an attention: queries, keys and values are made so that it shows them."""
    m = maps.shape[-1]
    eye = torch.eye(m).expand(*maps.shape[:2], m, m)
    return Opened(None, place, (control,)).attending(maps.log(), eye, eye, None, 1.0)


def test_the_recorded_controllers(recorded, model):
    """Replace, refine, and reweight over refine: three steps of a cross attention, a self attention and another."""
    facts, tensors = recorded
    places = places_of(model.model.diffusion_model)
    cross = next(place for place in places if place.is_cross)
    selfish = next(place for place in places if not place.is_cross and place.halvings == 1)
    for kind in ("replace", "refine", "reweight"):
        given = facts[f"ctl.{kind}"]
        control = PromptToPrompt(
            given.get("over", kind),
            cross_replace_steps=given["cross_replace_steps"],
            self_replace_steps=given["self_replace_steps"],
            equalizer=given.get("equalizer"),
        )
        control = control.for_batch(Reader(), given["prompts"], [3, 3]).begin()
        control._latents = (7, 8)  # 4 x 4 cells after one halving
        summed = [0, 0, 0]
        for step in range(2 if kind == "reweight" else 3):
            control.at(StepInfo(step, TOTAL, unconditional=2, images=2))
            for layer, place in enumerate((cross, selfish, cross)):
                m = 77 if place.is_cross else 16
                raw = keyed_input(f"p2p.{step}.{layer}", (8, 16, m))
                maps = (1.5 * raw).softmax(-1).unflatten(0, (4, 2))
                got = attend_with(control, place, maps).flatten(0, 1)
                assert torch.allclose(got[:4], maps[:2].flatten(0, 1), atol=1e-6), "without the condition"
                summed[layer] = summed[layer] + got[4:]
                if step:  # of the first step its store was kept, to which the others are added
                    want = tensors[f"{kind}.{step}.{layer}"]
                    assert torch.allclose(got[6:], want, rtol=1e-5, atol=1e-5), (kind, step, layer)
        for layer, got in enumerate(summed):
            assert torch.allclose(got, tensors[f"{kind}.0.{layer}"], rtol=1e-5, atol=1e-5), (kind, layer)


def test_the_recorded_local_blend(recorded):
    facts, tensors = recorded
    prompts, words = facts["localblend"]["prompts"], facts["localblend"]["words"]
    x = keyed_input("lb.x", (2, 4, 64, 64))
    for name, options in {
        "plain": {},
        "th": {"threshold": 0.6},
        "substruct": {"keep": ["a", "with"]},
    }.items():
        blend = LocalBlend(words, start=0.0, **options)
        control = PromptToPrompt(local_blend=blend).for_batch(Reader(), prompts, [3, 3]).begin()
        for layer in ("d0", "d1", "u0", "u1", "u2"):
            maps = (1.5 * keyed_input(f"lb.{layer}", (4, 256, 77))).softmax(-1).unflatten(0, (2, 2))
            control._blending.note(maps, (16, 16))
        got = control._blending.blend(x, StepInfo(0, TOTAL))
        assert torch.equal(got[0], x[0])
        assert torch.allclose(got[1, :, ::8, ::8], tensors[f"localblend.{name}.x"], rtol=1e-5, atol=1e-5), (
            name
        )
        mask = blend_mask(control._blending.seen[0], (16, 16), (64, 64), blend.threshold, pool=True)
        assert torch.equal(mask[:, :, ::4, ::4], tensors[f"localblend.{name}.mask"].bool()), name


@pytest.mark.parametrize(
    ("sides", "want"),
    [((64, 64), 2), ((96, 96), 3), ((48, 80), 2), ((128, 128), 3), ((16, 16), 0), ((8, 8), 0)],
)
def test_a_local_blend_reads_the_maps_that_are_nearest_to_16_cells_a_side(sides, want):
    """At 512 pixels those of the original; of others the nearest: 96 / 4 = 24 is further from 16 than 12 is."""
    blending = _Blending(LocalBlend("cat"), torch.ones(2, 77), None)
    blending.halvings = frozenset({0, 1, 2, 3})
    assert [times for times in range(4) if blending.reads(times, sides)] == [want]


# --- in a batch -------------------------------------------------------------------------------------


def paint(model, prompts, adapters=(), **options):
    given = {
        "steps": 3,
        "sampler": "ddim",
        "guidance_scale": 3.0,
        "output_type": "latent",
        "width": 72,
        "height": 64,
    }
    seeds = [7] * len(prompts)
    return (
        StableDiffusion(model).txt2img(prompts, seed=seeds, adapters=list(adapters), **given | options).images
    )


def near(got, want, slack=2e-5):
    return (got - want).abs().max() <= slack * want.abs().max()


@pytest.fixture(scope="module")
def alone(model):
    return paint(model, PROMPTS)


@pytest.fixture(scope="module")
def edited(model):
    return paint(model, PROMPTS, [PromptToPrompt(self_replace_steps=0.7)])


def test_the_source_stays_and_each_edit_is_changed_by_itself(model, alone, edited):
    assert (
        near(edited[0], alone[0])
        and not near(edited[1], alone[1], 1e-3)
        and not near(edited[2], alone[2], 1e-3)
    )
    pair = paint(model, [SOURCE, REFINED], [PromptToPrompt(self_replace_steps=0.7)])
    assert near(pair[1], edited[2])


def test_of_no_step_and_of_the_same_prompt_it_changes_nothing(model, alone):
    nothing = PromptToPrompt(cross_replace_steps=0, self_replace_steps=0)
    assert torch.equal(paint(model, PROMPTS, [nothing]), alone)
    same = paint(model, [SOURCE, SOURCE], [PromptToPrompt(cross_replace_steps=1, self_replace_steps=1)])
    assert near(same[1], same[0]) and near(same[0], alone[0])


@pytest.mark.slow
def test_the_same_optimized_and_with_guidance_in_two_calls(model, edited):
    adapters = [PromptToPrompt(self_replace_steps=0.7)]
    optimize(model)
    try:
        assert near(paint(model, PROMPTS, adapters), edited)
    finally:
        restore(model)
    contexts = [encode_prompt(model, texts) for texts in (PROMPTS, [""] * 3)]
    x_T = ImageNoise([7] * 3).begin(torch.empty(3, 4, 8, 9))
    told = [adapters[0].for_batch(model.cond_stage_model, PROMPTS, [7] * 3)]
    options = {
        "sampler": "ddim",
        "steps": 3,
        "guidance_scale": 3.0,
        "unconditional_conditioning": contexts[1],
    }
    for separate in (False, True):
        with torch.no_grad():
            *_, last = denoise(model, x_T, contexts[0], adapters=told, separate_passes=separate, **options)
        assert near(last.x_t, edited), separate


def test_a_local_blend_keeps_the_source_where_its_words_are_not(model, alone):
    """With no place of the words all is the source's; with every place of them nothing is."""
    for threshold, row in ((1.0, 0), (0.0, 1)):
        blend = LocalBlend("circle", threshold=threshold, start=0.0)
        options = {"cross_replace_steps": 0, "self_replace_steps": 0}
        got = paint(model, PROMPTS[:2], [PromptToPrompt(local_blend=blend, **options)])
        assert near(got[1], alone[row]), threshold
    late = LocalBlend("circle", threshold=1.0, start=1.0)
    got = paint(model, PROMPTS[:2], [PromptToPrompt(local_blend=late, **options)])
    assert near(got[1], alone[1])


def test_a_word_of_factor_1_is_as_it_is_and_others_are_not(model, edited):
    for factor, is_same in ((1.0, True), (3.0, False)):
        control = PromptToPrompt(self_replace_steps=0.7, equalizer={"blue": factor})
        got = paint(model, PROMPTS, [control])
        assert near(got[1], edited[1], 1e-3) == is_same and near(got[2], edited[2]), factor


# --- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "swap"}, "kind should be 'replace', 'refine' or None, got 'swap'"),
        ({"cross_replace_steps": 1.5}, "cross_replace_steps should be a number from 0 to 1"),
        (
            {"cross_replace_steps": {"red": (0.9, 0.1)}},
            "cross_replace_steps of 'red' should begin before it ends",
        ),
        ({"self_replace_steps": "half"}, "self_replace_steps"),
        ({"equalizer": ["red"]}, "equalizer should be a dictionary"),
        ({"equalizer": {"red": float("nan")}}, "equalizer of 'red'"),
        ({"local_blend": "cat"}, "local_blend should be a LocalBlend"),
        ({"self_cells": -1}, "self_cells"),
    ],
)
def test_what_it_does_not_take(options, message):
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        PromptToPrompt(**options)
    assert len(str(caught.value)) <= 400 and caught.value.exit_code == 2


@pytest.mark.parametrize(
    "options",
    [
        {"words": []},
        {"words": [[], []]},
        {"words": 3},
        {"words": "a", "keep": [""]},
        {"words": "a", "start": 2},
    ],
)
def test_what_a_local_blend_does_not_take(options):
    with pytest.raises(UsageError):
        LocalBlend(**options)


BLEND = {"local_blend": LocalBlend(["circle", "ball"])}


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({}, {"prompt": SOURCE}, "a source and its edits in one batch, got 1 picture"),
        ({}, {"batch_size": 2}, "a source and its edits in one batch, got 1 picture"),
        ({}, {"seed": 7}, "must begin with the same noise, got the seeds [7, 8, 9]; give seed=[7, 7, 7]"),
        ({"kind": "replace"}, {}, "3 in 'a red circle', 4 in 'a small red circle', without a pair: 'small'"),
        ({"equalizer": {"bleu": 2.0}}, {}, "equalizer names 'bleu', which is in none of 2 prompts; did you mean"),
        ({"cross_replace_steps": {"gray": 0.1}}, {}, "cross_replace_steps names 'gray'"),
        (BLEND, {}, "words of a LocalBlend should be of each of 3 prompts, the source's first, got 2"),
        (BLEND, {"prompt": [SOURCE, REPLACED]}, "words of a LocalBlend names 'ball', which is not in 'a blue circle'"),
        ({}, {"prompt_syntax": "a1111"}, "looks at the words of plain prompts"),
        ({}, {"merge_ratio": 0.5}, "needs tokens one by one"),
    ],
)  # fmt: skip
def test_what_is_refused_and_nothing_painted(model, given, options, message):
    options = dict(options)
    prompts = options.pop("prompt", PROMPTS)
    options.setdefault("seed", [7] * (1 if isinstance(prompts, str) else len(prompts)))
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        StableDiffusion(model).txt2img(
            prompts,
            adapters=[PromptToPrompt(**given)],
            width=72,
            height=64,
            steps=3,
            progress=False,
            **options,
        )
    assert len(str(caught.value)) <= 400


def test_a_processor_that_answers_by_itself_is_named(model):
    attn = places_of(model.model.diffusion_model)[1].attention
    attn.set_processor(
        lambda attn, hidden_states, encoder_hidden_states=None, attention_mask=None: hidden_states
    )
    try:
        with pytest.raises(
            UsageError, match=r"PromptToPrompt looks into attention, and .*lambda.* answers in down_blocks"
        ):
            StableDiffusion(model).plan(PROMPTS, seed=[7] * 3, adapters=[PromptToPrompt()])
    finally:
        attn.set_processor(None)


def test_a_unet_alone_does_not_know_what_it_is_about(model):
    with pytest.raises(UsageError, match="give it to adapters="):
        with attached(model.model.diffusion_model, PromptToPrompt()):
            pass


def test_what_goes_into_the_metadata(model):
    control = PromptToPrompt(
        "refine",
        cross_replace_steps={"red": 0.2},
        equalizer={"red": 2},
        local_blend=LocalBlend("circle", keep="red"),
    )
    said = control.describe()
    assert json.loads(json.dumps(said)) == said
    assert said["equalizer"] == {"red": 2.0} and said["local_blend"]["keep"] == "red"
