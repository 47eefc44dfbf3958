"""Maps of words: attention by hand, what is watched, the pictures that are made of it, and refusals."""

import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from keyed import keyed_input
from tiny import tiny_model

from ldm.adapters import PAG, PromptToPrompt, WordMaps
from ldm.adapters.attention_control import places_of
from ldm.errors import UsageError
from ldm.explain import Explained
from ldm.pipeline import StableDiffusion

PROMPT = "a red circle on a white background"
HOW = {"steps": 1, "sampler": "ddim", "width": 72, "height": 64, "progress": False, "seed": 3}


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion(tiny_model())


def watched(sd, *adapters, prompt=PROMPT, **options):
    maps = WordMaps()
    images = sd.txt2img(prompt, adapters=[*adapters, maps], output_type="latent", **HOW | options).images
    return maps.average, images


def near(got, want, slack=2e-5):
    return (got - want).abs().max() <= slack * want.abs().max()


def test_maps_are_those_of_the_attention_by_hand(sd):
    """Queries and keys as they come in, by hooks: softmax, mean of the heads, enlarged to 8 x 9 cells, mean of all."""
    found, hooks = [], []

    def seen(attn, given, options, out, cells):
        context = options.get("context", given[1] if len(given) > 1 else None)
        q, k = (
            y.unflatten(2, (attn.heads, -1)).transpose(1, 2)
            for y in (attn.to_q(given[0]), attn.to_k(context))
        )
        maps = (q @ k.transpose(2, 3) * attn.scale).softmax(-1).mean(1)[0]  # (n, tokens)
        whole = F.interpolate(maps.T.unflatten(1, cells)[None], size=(8, 9), mode="bilinear")
        found.append(whole[0])

    for place in places_of(sd.model.model.diffusion_model):
        if place.is_cross:
            look = partial(seen, cells=place.cells((8, 9)))
            hook = place.attention.register_forward_hook(look, with_kwargs=True)
            hooks.append(hook)
    plain = sd.txt2img(PROMPT, output_type="latent", guidance_scale=1.0, **HOW).images
    for hook in hooks:
        hook.remove()
    average, images = watched(sd, guidance_scale=1.0)
    assert len(found) == 7 and torch.allclose(average[0], torch.stack(found).mean(0), atol=1e-6)
    assert near(images, plain)
    assert torch.allclose(
        average.sum(1), torch.ones(1, 8, 9), atol=1e-5
    )  # of each cell all attention is shared out


def test_only_rows_with_the_condition_are_watched_and_each_picture_by_itself(sd):
    alone = watched(sd, guidance_scale=1.0)[0]
    for adapters in ((), (PAG(2.0),)):
        assert near(watched(sd, *adapters, guidance_scale=4.0)[0], alone), adapters
    two = watched(sd, prompt=["a blue star", PROMPT], seed=[4, 3])[0]
    assert two.shape == (2, 32, 8, 9) and near(two[1:], alone)
    edited = watched(
        sd, PromptToPrompt("replace", cross_replace_steps=1.0), prompt=[PROMPT] * 2, seed=[3, 3]
    )[0]
    assert near(edited[1], edited[0])  # what it is given, others' changes included


def test_the_last_run_is_kept_and_a_part_of_the_steps(sd):
    first, several = WordMaps((0.0, 0.34)), WordMaps()
    for maps in (first, several):
        with pytest.raises(UsageError, match="has watched no step of a run"):
            maps.average  # noqa: B018
    how = {"output_type": "latent", **HOW, "steps": 3}
    sd.txt2img(PROMPT, adapters=[first, several], **how)
    once = first.average
    assert not near(several.average, once, 1e-4)
    assert (
        near(once, watched(sd, steps=3)[0], 1.0)
        and first._last[0].count == 7
        and several._last[0].count == 21
    )
    sd.txt2img(PROMPT, adapters=[first], **how)
    assert torch.equal(first.average, once)


@pytest.fixture(scope="module")
def explained(sd):
    return sd.explain(PROMPT, **HOW)


def test_a_heat_map_for_each_word(sd, explained):
    assert explained.words == ["a", "red", "circle", "on", "white", "background"]  # "a" stands there twice
    average = watched(sd)[0]
    size = {"size": (64, 72), "mode": "bilinear"}
    want = F.interpolate(average[:, [1, 5]].sum(1, keepdim=True), **size)[0, 0]
    assert torch.allclose(explained.maps[0], want, atol=1e-6)
    heat, image = np.asarray(explained.heat("red")), np.asarray(explained.image)
    assert heat.shape == image.shape == (64, 72, 3) and heat.max() == 255
    assert np.array_equal(np.asarray(explained.overlay("red", 0.0)), image)
    over = np.asarray(explained.overlay("red", 1.0))
    assert np.array_equal(over[..., 0], heat[..., 0]) and not over[..., 2].any()
    sheet = explained.sheet()
    assert sheet.width == 7 * 72 and explained._repr_png_()[:4] == b"\x89PNG"


def test_words_that_are_asked_for_and_a_picture_of_one_s_own(sd, explained):
    some = sd.explain(PROMPT, words=["circle", "white background"], **HOW)
    assert some.words == ["circle", "white background"]
    assert torch.equal(some.map("circle"), explained.map("circle"))
    picture = keyed_input("explain.picture", (1, 3, 64, 72)).clamp(-1, 1)
    own = sd.explain(picture, PROMPT, words="red", steps=2)
    assert own.image.size == (72, 64) and own.maps.shape == (1, 64, 72) and own.prompt == PROMPT


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        ("", {}, "there is no word to show in the prompt ''"),
        (PROMPT, {"words": "cirkle"}, "words names 'cirkle', which is not in 'a red circle on a white background'"),
        (PROMPT, {"words": ["red", "sea"]}, "words names 'sea'"),
        (3, {}, "explain wants a prompt, or a picture and the prompt of what it shows; got 3"),
        ("no.png", {"prompt": PROMPT}, "no.png"),
        (PROMPT, {"num_images": 2}, "explain shows one picture"),
        (PROMPT, {"words": 3}, "words should be a word or a list of them, got 3"),
        (PROMPT, {"words": []}, "words should be a word or a list of them, got []"),
        (__file__, {}, "is a file here; give what it shows as well, by prompt="),
        (PROMPT, {"adapters": None}, "adapters must be a list such as [LoRA('style.safetensors')], got None"),
        (PROMPT, {"span": (0.5, 0.6)}, "has watched no step of a run: none lies in its span (0.5, 0.6)"),
        (PROMPT, {"span": (0.9, 0.1)}, "span should begin before it ends"),
        (PROMPT, {"prompt_syntax": "a1111"}, "explain reads plain prompts, got prompt_syntax='a1111'"),
    ],
)  # fmt: skip
def test_what_is_refused(sd, what, options, message):
    with pytest.raises((UsageError, FileNotFoundError), match=re.escape(message)) as caught:
        sd.explain(what, **(HOW if "prompt" not in options else {}), **options)
    assert len(str(caught.value)) <= 400


def test_a_word_without_a_map_is_refused_with_the_nearest(explained):
    with pytest.raises(UsageError, match="there is no map of 'cirkle'; did you mean 'circle'"):
        explained.overlay("cirkle")
    with pytest.raises(UsageError, match="strength must be from 0 to 1, got 2"):
        explained.overlay("circle", 2)
    assert isinstance(explained, Explained)
