"""ComfyUI's graphs: what is found, however the nodes are wired, and that no graph takes long."""

import json

import pytest

from ldm.comfyui import MAX_CHARACTERS, MAX_VISITS, _Graph, read_graph
from ldm.metadata import _from_comfyui

BASE = {
    "3": {
        "class_type": "KSampler",
        "inputs": {"seed": 5, "steps": 20, "cfg": 8.0, "sampler_name": "ddim", "denoise": 1.0}
        | {"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]},
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 640, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "good", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "bad", "clip": ["4", 1]}},
}
FOUND = {
    "seed": 5,
    "steps": 20,
    "guidance_scale": 8.0,
    "sampler": "ddim",
    "prompt": "good",
    "negative_prompt": "bad",
    "width": 512,
    "height": 640,
    "model": "v1-5",
}


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def sampler(**inputs):
    """The base's sampler with other inputs; None takes one away."""
    own = BASE["3"]["inputs"] | inputs
    return {"3": {"class_type": "KSampler", "inputs": {k: v for k, v in own.items() if v is not None}}}


ADVANCED = {
    "3": node(
        "KSamplerAdvanced", add_noise="enable", noise_seed=9, steps=25, cfg=7, sampler_name="euler", scheduler="normal",
        start_at_step=5, end_at_step=10000, return_with_leftover_noise="disable", positive=["6", 0], negative=["7", 0],
        latent_image=["5", 0], model=["4", 0],
    )
}  # fmt: skip
CUSTOM = {
    "3": node(
        "SamplerCustom", add_noise=True, noise_seed=77, cfg=4.5, positive=["6", 0], negative=["7", 0],
        latent_image=["5", 0], sampler=["20", 0], sigmas=["21", 0], model=["4", 0],
    ),
    "20": node("KSamplerSelect", sampler_name="dpmpp_2m"),
    "21": node("KarrasScheduler", steps=33, sigma_max=14.6, sigma_min=0.03, rho=7),
}  # fmt: skip
GUIDED = {
    "3": node(
        "SamplerCustomAdvanced", noise=["22", 0], guider=["23", 0], sampler=["20", 0], sigmas=["24", 0],
        latent_image=["5", 0],
    ),
    "20": node("KSamplerSelect", sampler_name="euler"),
    "22": node("RandomNoise", noise_seed=123),
    "23": node("CFGGuider", model=["4", 0], positive=["6", 0], negative=["7", 0], cfg=3.5),
    "24": node("SplitSigmas", sigmas=["25", 0], step=3),
    "25": node("BasicScheduler", model=["4", 0], scheduler="simple", steps=12, denoise=0.6),
}  # fmt: skip
LONG = "a " * 60_000

OTHER = ("steps", "guidance_scale", "sampler", "strength", "seed")
GRAPHS = {
    "the plain one": ({}, {}),
    "KSamplerAdvanced": (
        ADVANCED,
        {"seed": 9, "steps": 25, "guidance_scale": 7, "sampler": "euler", "strength": 0.8, "spacing": "normal"},
    ),
    "SamplerCustom": (
        CUSTOM,
        {"seed": 77, "steps": 33, "guidance_scale": 4.5, "sampler": "dpmpp_2m", "strength": None},
    ),
    "SamplerCustomAdvanced": (
        GUIDED,
        {"seed": 123, "steps": 12, "guidance_scale": 3.5, "sampler": "euler", "strength": 0.6, "spacing": "simple"},
    ),
    "a guider without guidance": (
        GUIDED | {"23": node("BasicGuider", model=["4", 0], conditioning=["6", 0])},
        {"seed": 123, "steps": 12, "sampler": "euler", "strength": 0.6, "spacing": "simple"}
        | {"guidance_scale": 1.0, "negative_prompt": None},
    ),
    "seed, steps and cfg from primitives": (
        sampler(seed=["8", 0], steps=["9", 0], cfg=["10", 0])
        | {"8": node("PrimitiveInt", value=42), "9": node("INTConstant", value=7)}
        | {"10": node("PrimitiveFloat", value=2.5)},
        {"seed": 42, "steps": 7, "guidance_scale": 2.5},
    ),
    "a seed node, through two reroutes": (
        sampler(seed=["8", 0]) | {"8": node("Reroute", **{"": ["9", 0]}), "9": node("Reroute", any=["10", 0])}
        | {"10": node("Seed (rgthree)", seed=11)},
        {"seed": 11},
    ),
    "steps that are a whole float": (sampler(steps=20.0), {}),
    "conditioning and latents through reroutes": (
        sampler(positive=["8", 0], latent_image=["9", 0])
        | {"8": node("Reroute", **{"": ["6", 0]}), "9": node("Reroute", **{"": ["5", 0]})},
        {},
    ),
    "text from a primitive": (
        {"6": node("CLIPTextEncode", text=["8", 0]), "8": node("PrimitiveStringMultiline", value="linked")},
        {"prompt": "linked"},
    ),
    "text from a literal of another pack": (
        {"6": node("CLIPTextEncode", text=["8", 0]), "8": node("String Literal", string="linked")},
        {"prompt": "linked"},
    ),
    "text that is shown on the way": (
        {"6": node("CLIPTextEncode", text=["8", 0]), "8": node("ShowText|pysssss", text=["9", 0], text_0="shown")}
        | {"9": node("Text Multiline", text="linked")},
        {"prompt": "linked"},
    ),
    "text put together": (
        {"6": node("CLIPTextEncode", text=["8", 0])}
        | {"8": node("StringConcatenate", string_a="a cat", string_b=["9", 0], delimiter=", ")}
        | {"9": node("StringFunction|pysssss", action="append", tidy_tags="no", text_a="b", text_b="c", text_c="")},
        {"prompt": "a cat, bc"},
    ),
    "ten pieces in their order": (
        {"6": node("CLIPTextEncode", text=["8", 0])}
        | {"8": node("JoinStringMulti", delimiter="-", **{f"string_{i}": str(i) for i in range(10, 0, -1)})},
        {"prompt": "1-2-3-4-5-6-7-8-9-10"},
    ),
    "two texts of SDXL": (
        {"6": node("CLIPTextEncodeSDXL", text_g="big", text_l="small", width=1024, height=1024)},
        {"prompt": "big"},
    ),
    "conditioning through ControlNet": (
        sampler(positive=["8", 0], negative=["8", 1])
        | {"8": node("ControlNetApplyAdvanced", positive=["6", 0], negative=["7", 0], control_net=["9", 0])}
        | {"9": node("ControlNetLoader", control_net_name="x.pth")},
        {},
    ),
    "conditioning put together": (
        sampler(positive=["8", 0])
        | {"8": node("ConditioningCombine", conditioning_1=["6", 0], conditioning_2=["9", 0])}
        | {"9": node("FluxGuidance", conditioning=["10", 0], guidance=3.5), "10": node("CLIPTextEncode", text="more")},
        {"prompt": "good, more"},
    ),
    "negative conditioning of zeros": (
        sampler(negative=["8", 0]) | {"8": node("ConditioningZeroOut", conditioning=["6", 0])},
        {"negative_prompt": ""},
    ),
    "a loader that is the text encoder, too": (
        sampler(positive=["8", 1], negative=["8", 2]) | {"8": node("Efficient Loader", positive="ep", negative="en")},
        {"prompt": "ep", "negative_prompt": "en"},
    ),
    "a picture scaled and encoded": (
        sampler(latent_image=["8", 0], denoise=0.5)
        | {"8": node("VAEEncode", pixels=["9", 0], vae=["4", 2]), "10": node("LoadImage", image="a.png")}
        | {"9": node("ImageScale", image=["10", 0], width=768, height=512)},
        {"width": 768, "height": 512, "strength": 0.5, "mode": "img2img"},
    ),
    "sizes from primitives": (
        {"5": node("EmptyLatentImage", width=["8", 0], height=["8", 0]), "8": node("PrimitiveInt", value=704)},
        {"width": 704, "height": 704},
    ),
    "a second pass, listed first": (
        {"1": node("KSampler", seed=6, steps=9, cfg=1, positive=["6", 0], negative=["7", 0], latent_image=["2", 0])}
        | {"2": node("LatentUpscale", samples=["3", 0], width=1024, height=1280)} | BASE,
        {},
    ),
    "a second pass over the decoded picture": (
        {"1": node("KSampler", seed=6, steps=9, cfg=1, positive=["6", 0], negative=["7", 0], latent_image=["2", 0])}
        | {"2": node("VAEEncode", pixels=["11", 0]), "11": node("ImageUpscale", image=["12", 0])}
        | {"12": node("VAEDecode", samples=["3", 0])} | BASE,
        {},
    ),
    "NaN where nobody reads": ({"5": node("EmptyLatentImage", width=512, height=640, is_changed=float("nan"))}, {}),
    "NaN in a number": (sampler(cfg=float("nan"), denoise=float("inf")), {"guidance_scale": None, "strength": None}),
    "a long prompt": ({"6": node("CLIPTextEncode", text=LONG)}, {"prompt": LONG}),
    "ids that are numbers": (sampler(positive=[6, 0], negative=[7, 0]), {}),
    "a seed beyond any": (sampler(seed=10**400), {"seed": None}),
    "values of other types": (sampler(steps=-3, cfg="x", sampler_name=7, denoise=True, seed=1.5), dict.fromkeys(OTHER)),
    "a graph beside large other nodes": ({str(i): node("Note", text="x" * 999) for i in range(100, 200)}, {}),
}  # fmt: skip


def over_base(nodes):
    return {**nodes, **{k: v for k, v in BASE.items() if k not in nodes}}


# What standard nodes do that no option of ours says: (nodes, what is said of them).
BESIDE = {
    "nothing": ({}, None),
    "four at once": ({"5": node("EmptyLatentImage", width=512, height=640, batch_size=4)},
                     "EmptyLatentImage (5): its batch_size is 4"),
    "steps that are left to another sampler": (
        {"3": node(
            "KSamplerAdvanced", add_noise="disable", noise_seed=9, steps=20, cfg=7, sampler_name="euler",
            scheduler="normal", start_at_step=0, end_at_step=15, return_with_leftover_noise="enable",
            positive=["6", 0], negative=["7", 0], latent_image=["5", 0], model=["4", 0])},
        "KSamplerAdvanced (3): its add_noise is 'disable', KSamplerAdvanced (3): its return_with_leftover_noise is "
        "'enable', KSamplerAdvanced (3): its end_at_step is 15"),
    "no noise in words of yes and no": (
        sampler(add_noise=False) | {"3": {**sampler(add_noise=False)["3"], "class_type": "SamplerCustom"}},
        "SamplerCustom (3): its add_noise is False"),
    "zeros, which no prompt gives": (
        sampler(negative=["8", 0]) | {"8": node("ConditioningZeroOut", conditioning=["6", 0])},
        "ConditioningZeroOut (8)"),
    "a picture greyed under its mask": (
        sampler(latent_image=["8", 0]) | {"8": node("VAEEncodeForInpaint", pixels=["9", 0], grow_mask_by=6)}
        | {"9": node("LoadImage", image="a.png")}, "VAEEncodeForInpaint (8)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_what_no_option_says_of_standard_nodes_is_said(name):
    nodes, said = BESIDE[name]
    assert _from_comfyui(json.dumps(over_base(nodes))).get("extra", {}).get("nodes") == said


@pytest.mark.parametrize("name", GRAPHS)
def test_what_a_graph_tells(name):
    nodes, differs = GRAPHS[name]
    want = {key: value for key, value in (FOUND | differs).items() if value is not None}
    found = _from_comfyui(json.dumps(over_base(nodes)))
    found.pop("extra", None)
    assert found == want


@pytest.mark.parametrize(
    "graph",
    [
        {},
        {"1": None, "2": [], "3": {"inputs": 5}, "4": {"class_type": ["KSampler"]}},
        sampler(positive=["3", 0], negative=["3", 0], latent_image=["3", 0], seed=["3", 0]),
        sampler(
            positive=[],
            negative=["6"],
            latent_image=[None, 0],
            seed=[["6"], 0],
            cfg=[True, 0],
            steps=["9", 0, 0],
        ),
        sampler(positive=["6", 0]) | {"6": node("CLIPTextEncode", text=["6", 0])},
        sampler(positive=["6", 0]) | {"6": node("Reroute", **{"": ["6", 0]})},
        sampler(positive=["6", 0]) | {"6": {"class_type": 5, "inputs": {"text": {"a": []}}}},
        GUIDED | {"23": node("Reroute", guider=["23", 0]), "24": node("SplitSigmas", sigmas=["24", 0])},
    ],
)
def test_graphs_that_lead_nowhere_or_round_and_round(graph):
    found = read_graph(graph)
    assert not {"prompt", "negative_prompt", "width"} & found.keys() or found["negative_prompt"] == "bad"


def chain(count, make):
    """Nodes that each lead to the next, to a text at last."""
    nodes = {f"n{i}": make([f"n{i + 1}", 0]) for i in range(count)} | {
        f"n{count}": node("T", text="z" * 5000)
    }
    first = ["n0", 0]
    return sampler(positive=first, negative=first, latent_image=first, seed=first, steps=first) | nodes


@pytest.mark.parametrize(
    "graph",
    [
        chain(60, lambda link: node("StringConcatenate", string_a=link, string_b=link, delimiter="")),
        chain(60, lambda link: node("ConditioningCombine", conditioning_1=link, conditioning_2=link)),
        chain(60, lambda link: node("Switch", value=link, seed=link, int=link, steps=link)),
        chain(9000, lambda link: node("Reroute", any=link)),
        {f"s{i}": sampler(latent_image=["a", 0])["3"] for i in range(900)}
        | {"a": node("Wide", **{f"in{i}": [f"s{i}", 0] for i in range(5000)})},
    ],
    ids=[
        "texts that double",
        "conditioning that doubles",
        "numbers that branch",
        "a long chain",
        "wide nodes",
    ],
)
def test_graphs_with_more_paths_than_nodes_end_soon(graph):
    """Walked along every path, the first three would take longer than anybody waits, or gigabytes."""
    walker = _Graph(graph)
    found = walker.read()
    assert walker.visits < 10 * MAX_VISITS
    assert len(str(found.get("prompt", ""))) <= MAX_CHARACTERS
