"""Texts of other programs' pictures, each as its program writes it, become the right request; nothing is lost."""

import json

import pytest
from PIL import Image
from test_comfyui import BASE, node, over_base

from ldm import metadata
from ldm.comfyui_workflow import to_graph
from ldm.containers import take_apart, write_comment
from ldm.images import save_png

A1111 = (
    "a (red:1.2) cat <lora:ink:0.8>\nNegative prompt: easynegative\nSteps: 28, Sampler: DPM++ 2M, "
    "Schedule type: Karras, CFG scale: 6.5, Seed: 965400086, Size: 512x768, Model hash: 6ce0161689, "
    "Model: v1-5-pruned-emaonly, VAE hash: f921fb3f29, VAE: vae-ft-mse.safetensors, "
)
COMMON = {
    "prompt": "a (red:1.2) cat <lora:ink:0.8>",
    "negative_prompt": "easynegative",
    "steps": 28,
    "sampler": "dpmpp_2m",
    "spacing": "karras",
    "guidance_scale": 6.5,
    "seed": 965400086,
    "width": 512,
    "height": 768,
    "model_hash": "6ce0161689",
    "model": "v1-5-pruned-emaonly",
    "vae_hash": "f921fb3f29",
    "vae": "vae-ft-mse",
}
# What the end of A1111's line says -> what is read beside COMMON, and under extra.
LINES = {
    "hires fix of 1.10": (
        "Denoising strength: 0.55, Clip skip: 2, Hires CFG Scale: 5, Hires upscale: 2, Hires steps: 12, "
        'Hires upscaler: Latent (bicubic), Hires prompt: "a red cat, sharp", Version: v1.10.1',
        {"hires_scale": 2.0, "hires_steps": 12, "hires_upscaler": "latent bicubic", "hires_strength": 0.55}
        | {
            "hires_guidance_scale": 5.0,
            "hires_prompt": "a red cat, sharp",
            "clip_skip": 2,
            "version": "v1.10.1",
        },
        set(),
    ),
    "LoRAs, embeddings, styles, ADetailer": (
        'Lora hashes: "ink: 0123456789ab", TI hashes: "easynegative: c74b4e810b03", Style Selector: cinematic, '
        "ADetailer model: face_yolov8n.pt, ADetailer confidence: 0.3, Version: v1.9.4",
        {"version": "v1.9.4"},
        {"Lora hashes", "TI hashes", "Style Selector", "ADetailer model", "ADetailer confidence"},
    ),
    "img2img with a mask": (
        "Denoising strength: 0.75, Conditional mask weight: 0.5, RNG: NV",
        {"strength": 0.75, "rng": "nv"},
        {"Conditional mask weight"},
    ),
    "Forge": (
        "RNG: CPU, Module 1: ae, Beta schedule alpha: 0.6, Version: f2.0.1v1.10.1-previous-313-g8a042934",
        {"rng": "image", "version": "f2.0.1v1.10.1-previous-313-g8a042934"},
        {"Module 1", "Beta schedule alpha"},
    ),
    "SD.Next": (
        "App: SD.Next, Version: 1b7f7a1, Parser: native, Operations: txt2img, Pipeline: StableDiffusionPipeline",
        {"version": "1b7f7a1"},
        {"App", "Parser", "Operations", "Pipeline"},
    ),
    "variations and other noise": (
        "Variation seed: 5, Variation seed strength: 0.2, Seed resize from: 512x512, ENSD: 31337, Refiner: x [1]",
        {"variation_seed": 5, "variation_strength": 0.2, "seed_resize_from": [512, 512]}
        | {"eta_noise_seed_delta": 31337},
        {"Refiner"},
    ),
    "numbers that are none": ("Hires upscale: x, Clip skip: -2", {}, {"Hires upscale", "Clip skip"}),
    "cut in the middle of a value": ('Lora hashes: "ink: 0123', {}, {"Lora hashes"}),
}


@pytest.mark.parametrize("name", LINES)
def test_a1111s_lines(name):
    end, more, extra = LINES[name]
    found = metadata.from_infotext(A1111 + end)
    assert set(found.pop("extra", {})) == extra
    assert found == COMMON | more


def test_an_infotext_that_is_cut_anywhere_gives_what_is_there():
    """What a beginning of a text says is what the whole says, but for the value that is cut."""
    text = A1111 + LINES["hires fix of 1.10"][0]
    whole = metadata.from_infotext(text)
    for end in range(text.index("Seed"), len(text), 3):
        found = metadata.from_infotext(text[:end])
        own = found.keys() - {"extra", "strength"}  # the strength's meaning hangs on what follows
        wrong = {key for key in own if found[key] != whole.get(key)}
        assert own <= whole.keys() and len(wrong) <= 2 and wrong != {"width"}, end
        assert found["prompt"] == COMMON["prompt"] and found["steps"] == 28, end


INVOKEAI = {
    "generation_mode": "txt2img", "positive_prompt": "a cat++", "negative_prompt": "", "width": 512, "height": 640,
    "seed": 7, "rand_device": "cpu", "cfg_scale": 7.5, "cfg_rescale_multiplier": 0.0, "steps": 30,
    "scheduler": "dpmpp_2m_k", "seamless_x": False, "seamless_y": False, "controlnets": [], "ipAdapters": [],
}  # fmt: skip
FROM_INVOKEAI = {
    "mode": "txt2img", "prompt": "a cat++", "negative_prompt": "", "width": 512, "height": 640, "seed": 7,
    "rng": "image", "guidance_scale": 7.5, "guidance_rescale": 0.0, "steps": 30, "sampler": "dpmpp_2m_k",
    "source": "invokeai",
}  # fmt: skip
INK = {"kind": "LoRA", "name": "ink", "weight": 0.75}
DREAM = '"a cat [dog]" -s 50 -S 1234 -W 512 -H 640 -C 7.5 -A k_lms'
FROM_DREAM = {
    "source": "invokeai", "prompt": "a cat", "negative_prompt": "dog", "steps": 50, "seed": 1234, "width": 512,
    "height": 640, "guidance_scale": 7.5, "sampler": "k_lms",
}  # fmt: skip
DIFFUSERS = {
    "prompt": "a cat", "negative_prompt": "dog", "num_inference_steps": 25, "guidance_scale": 5.0, "seed": 3,
    "width": 512, "height": 640, "scheduler": "EulerAncestralDiscreteScheduler", "clip_skip": 1,
    "model": "a/b.safetensors",
}  # fmt: skip
FROM_DIFFUSERS = {
    "source": "diffusers", "prompt": "a cat", "negative_prompt": "dog", "steps": 25, "guidance_scale": 5.0, "seed": 3,
    "width": 512, "height": 640, "sampler": "EulerAncestralDiscreteScheduler", "clip_skip": 2, "model": "b",
}  # fmt: skip
NOVELAI = {
    "steps": 28, "sampler": "k_euler_ancestral", "seed": 9, "strength": 0.69, "noise": 0.667, "scale": 11.0,
    "uc": "lowres",
}  # fmt: skip
# (texts of the PNG, what is read, keys under extra)
TEXTS = {
    "InvokeAI 3": (
        {"invokeai_metadata": INVOKEAI | {"app_version": "3.7.0", "clip_skip": 1, "hrf_enabled": False}
         | {"model": {"model_name": "sd15", "base_model": "sd-1"}, "vae": {"model_name": "mse", "base_model": "sd-1"}}
         | {"loras": [{"lora": {"model_name": "ink", "base_model": "sd-1"}, "weight": 0.75}]}},
        FROM_INVOKEAI | {"model": "sd15", "vae": "mse", "clip_skip": 2, "adapters": [INK]},
        {"app_version"},
    ),
    "InvokeAI 5": (
        {"invokeai_metadata": INVOKEAI | {"app_version": "5.4.2", "seamless_x": True, "seamless_y": True}
         | {"model": {"key": "k", "hash": "blake3:00ff", "name": "sd15", "base": "sd-1"}, "strength": 0.6}
         | {"loras": [{"model": {"key": "k", "hash": "blake3:11", "name": "ink"}, "weight": 0.75}]}
         | {"hrf_method": "ESRGAN", "init_image": "b.png"}},
        FROM_INVOKEAI | {"model": "sd15", "adapters": [INK], "tiling": True, "strength": 0.6},
        {"app_version", "hrf_method", "init_image"},
    ),
    "InvokeAI 2": (
        {"sd-metadata": {"model": "stable diffusion", "model_weights": "sd15", "model_hash": "cc6cb27103417325",
         "image": {"prompt": [{"prompt": "a cat [dog]", "weight": 1.0}], "steps": 50, "cfg_scale": 7.5, "width": 512,
            "height": 640, "seed": 1234, "sampler": "k_lms", "type": "txt2img", "seamless": False, "threshold": 0,
            "postprocessing": [{"type": "gfpgan"}]}},
         "Dream": DREAM},
        FROM_DREAM | {"model": "sd15", "model_hash": "cc6cb27103417325", "mode": "txt2img"},
        {"postprocessing"},
    ),
    "Dream": ({"Dream": DREAM + " -f 0.5 --hires_fix -G0.8"}, FROM_DREAM | {"strength": 0.5}, {"--hires_fix", "-G0.8"}),
    "Dream, a quote open": ({"Dream": '"a cat -s 5'}, {"source": "invokeai", "prompt": '"a cat', "steps": 5}, set()),
    "diffusers": ({"parameters": DIFFUSERS | {"generator": "cpu"}}, FROM_DIFFUSERS, {"generator"}),
    "SwarmUI": (
        {"parameters": {"sui_image_params": {"prompt": "a cat", "negativeprompt": "dog", "model": "b", "seed": 3,
         "steps": 25, "cfgscale": 5.0, "width": 512, "height": 640, "sampler": "euler", "scheduler": "karras",
         "loras": ["ink"], "loraweights": ["0.75"], "swarm_version": "0.9.3"}}},
        {"source": "swarmui", "prompt": "a cat", "negative_prompt": "dog", "model": "b", "seed": 3, "steps": 25,
         "guidance_scale": 5.0, "width": 512, "height": 640, "sampler": "euler", "spacing": "karras",
         "adapters": [INK]},
        {"swarm_version"},
    ),
    "NovelAI": (
        {"Title": "AI generated image", "Description": "a {cat}", "Software": "NovelAI", "Comment": NOVELAI},
        {"source": "novelai", "prompt": "a {cat}", "negative_prompt": "lowres", "steps": 28, "seed": 9,
         "guidance_scale": 11.0, "sampler": "k_euler_ancestral", "strength": 0.69},
        {"noise"},
    ),
    "a comment of GIMP": ({"Comment": "Created with GIMP"}, {}, set()),
    "two programs, the first cut": (
        {"invokeai_metadata": json.dumps(INVOKEAI)[:99], "parameters": DIFFUSERS}, FROM_DIFFUSERS, set(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_other_programs_texts(tmp_path, name):
    texts, want, extra = TEXTS[name]
    info = metadata.PngInfo()
    for key, text in texts.items():
        info.add_text(key, text if isinstance(text, str) else json.dumps(text))
    found = metadata.read_parameters(save_png(Image.new("RGB", (16, 8)), tmp_path / "a.png", info))
    assert set(found.pop("extra", {})) == extra
    found.pop("unread", None)
    assert found == want


def test_json_in_exif_and_xmp_is_read_as_in_a_png(tmp_path):
    Image.new("RGB", (16, 8)).save(tmp_path / "a.jpg", exif=write_comment(json.dumps(DIFFUSERS)))
    found = metadata.read_parameters(tmp_path / "a.jpg")
    assert found == FROM_DIFFUSERS
    said = {"c": 'a "cat" & dog', "uc": "n", "steps": 20, "scale": 7, "seed": 4, "sampler": "DPM++ 2M Karras"}
    said |= {
        "size": "512x640",
        "model": "sd_v1.5_f16.ckpt",
        "lora": [{"model": "ink.ckpt", "weight": 0.75}],
        "v2": {"a": 1},
    }
    text = json.dumps(said).replace("&", "&amp;").replace('"', "&quot;")
    xmp = f'<x><exif:UserComment><rdf:Alt><rdf:li xml:lang="x-default">{text}</rdf:li></rdf:Alt></exif:UserComment></x>'
    info = metadata.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp)
    assert metadata.read_parameters(save_png(Image.new("RGB", (16, 8)), tmp_path / "a.png", info)) == {
        "source": "draw things", "prompt": 'a "cat" & dog', "negative_prompt": "n", "steps": 20, "guidance_scale": 7,
        "seed": 4, "sampler": "DPM++ 2M Karras", "width": 512, "height": 640, "model": "sd_v1.5_f16", "adapters": [INK],
    }  # fmt: skip
    assert take_apart((tmp_path / "a.jpg").read_bytes()).orientation == 1


# --- ComfyUI ---


def k_sampler(**inputs):
    return node("KSampler", **BASE["3"]["inputs"] | inputs)


END = {"90": node("VAEDecode", samples=["3", 0], vae=["4", 2]), "91": node("SaveImage", images=["90", 0])}
TWO = {
    "30": node("LatentUpscale", samples=["3", 0], upscale_method="bicubic", width=1024, height=1280, crop="disabled"),
    "31": node("KSampler", seed=5, steps=12, cfg=8.0, sampler_name="euler", scheduler="karras", denoise=0.5,
               model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=["30", 0]),
    "90": node("VAEDecode", samples=["31", 0], vae=["4", 2]), "91": node("SaveImage", images=["90", 0]),
}  # fmt: skip
SECOND = {
    "hires_size": [1024, 1280],
    "hires_upscaler": "latent bicubic",
    "hires_steps": 12,
    "hires_strength": 0.5,
}
SECOND |= {"hires_sampler": "euler", "hires_spacing": "karras"}
# (nodes over those of the plain graph, what is said beside it, the nodes that are named as not read)
NODES = {
    "the plain one": (END, {}, []),
    "LoRAs, a VAE and a layer": (
        END | {"3": k_sampler(model=["41", 0]), "42": node("VAELoader", vae_name="mse.pt")}
        | {"40": node("LoraLoader", model=["4", 0], clip=["4", 1], lora_name="x\\ink.safetensors",
                      strength_model=0.75, strength_clip=0.5)}
        | {"41": node("LoraLoaderModelOnly", model=["40", 0], lora_name="b.pt", strength_model=0.25)}
        | {"6": node("CLIPTextEncode", text="good", clip=["43", 0])}
        | {"90": node("VAEDecode", samples=["3", 0], vae=["42", 0])}
        | {"43": node("CLIPSetLastLayer", clip=["40", 1], stop_at_clip_layer=-2)},
        {"adapters": [INK | {"text_weight": 0.5}, {"kind": "LoRA", "name": "b", "weight": 0.25, "text_weight": 0}],
         "clip_skip": 2, "vae": "mse"},
        [],
    ),
    "ControlNet": (
        END | {"3": k_sampler(positive=["50", 0], negative=["50", 1])}
        | {"50": node("ControlNetApplyAdvanced", positive=["6", 0], negative=["7", 0], control_net=["51", 0],
                      image=["52", 0])}
        | {"51": node("ControlNetLoader", control_net_name="canny.pth"), "52": node("LoadImage", image="e.png")},
        {}, ["ControlNetApplyAdvanced (50)", "ControlNetLoader (51)"],
    ),
    "conditioning put together, and a switch of the model": (
        END | {"3": k_sampler(positive=["50", 0], model=["52", 0])}
        | {"50": node("ConditioningCombine", conditioning_1=["6", 0], conditioning_2=["51", 0])}
        | {"51": node("CLIPTextEncode", text="more"), "52": node("FreeU_V2", model=["4", 0], b1=1.3)},
        {"prompt": "good, more"}, ["FreeU_V2 (52)", "ConditioningCombine (50)"],
    ),
    "a second pass": (TWO, SECOND, []),
    "a second pass by a factor, of the picture": (
        TWO | {"30": node("VAEEncode", pixels=["32", 0], vae=["4", 2])}
        | {"33": node("VAEDecode", samples=["3", 0], vae=["4", 2])}
        | {"32": node("ImageScaleBy", image=["33", 0], upscale_method="lanczos", scale_by=1.5)},
        {**SECOND, "hires_scale": 1.5, "hires_upscaler": "lanczos", "hires_size": None}, [],
    ),
    "a second pass with a seed of its own": (
        TWO | {"31": node("KSampler", **TWO["31"]["inputs"] | {"seed": 6})}, SECOND, ["KSampler (31): its seed is 6"],
    ),
    "an upscaler that is not here": (
        TWO | {"30": node("LatentUpscale", samples=["3", 0], upscale_method="bislerp", width=1024, height=1280)}, {},
        ["KSampler (31)", "LatentUpscale (30)"],
    ),
    "a picture made larger at the end": (
        END | {"91": node("SaveImage", images=["92", 0]), "93": node("UpscaleModelLoader", model_name="4x.pth")}
        | {"92": node("ImageUpscaleWithModel", image=["90", 0], upscale_model=["93", 0])},
        {}, ["ImageUpscaleWithModel (92)", "UpscaleModelLoader (93)"],
    ),
    "a picture to begin with, masked": (
        END | {"3": k_sampler(latent_image=["60", 0], denoise=0.6)}
        | {"60": node("SetLatentNoiseMask", samples=["61", 0], mask=["62", 1])}
        | {"61": node("VAEEncode", pixels=["62", 0], vae=["4", 2])}
        | {"62": node("LoadImage", image="in.png")},
        {"mode": "inpaint", "strength": 0.6, "width": None, "height": None}, [],
    ),
    "a circle, and a thousand unknown nodes": (
        END | {"91": node("SaveImage", images=["92", 0]), "92": node("X", image=["90", 0], again=["92", 0])}
        | {"90": node("Y", samples=["3", 0], **{f"i{k}": [f"u{k}", 0] for k in range(90)})}
        | {f"u{k}": node("U", back=["92", 0]) for k in range(90)},
        {}, ["X (92)", "Y (90)", *(f"U (u{k})" for k in range(18)), "72 more"],
    ),
}  # fmt: skip
PLAIN = {
    "seed": 5,
    "steps": 20,
    "guidance_scale": 8.0,
    "sampler": "ddim",
    "prompt": "good",
    "negative_prompt": "bad",
}
PLAIN |= {"width": 512, "height": 640, "model": "v1-5"}


@pytest.mark.parametrize("name", NODES)
def test_what_comfyuis_graph_tells_and_does_not(name):
    nodes, more, unread = NODES[name]
    found = metadata._from_comfyui(json.dumps(over_base(nodes)))
    extra = found.pop("extra", {})
    assert found == {key: value for key, value in (PLAIN | more).items() if value is not None}
    assert extra.get("nodes", "") == ", ".join(unread)


def drawn(graph):
    """The workflow that ComfyUI's page draws for a graph: links numbered, values without names."""
    from ldm.comfyui_workflow import WIDGETS

    nodes, links = [], []
    for key, one in graph.items():
        inputs, values = [], []
        for name, value in one["inputs"].items():
            if isinstance(value, list):
                links.append([len(links) + 1, value[0], value[1], key, len(inputs), "X"])
                inputs.append({"name": name, "type": "X", "link": len(links)})
        for name in WIDGETS.get(one["class_type"], ()):
            values.append("fixed" if name == "control_after_generate" else one["inputs"].get(name))
        nodes.append(
            {"id": key, "type": one["class_type"], "mode": 0, "inputs": inputs, "widgets_values": values}
        )
    return {"nodes": nodes, "links": links, "version": 0.4}


@pytest.mark.parametrize("name", [name for name in NODES if "thousand" not in name])
def test_a_workflow_tells_what_its_graph_tells(name):
    graph = over_base(NODES[name][0])
    found = metadata._from_workflow(json.dumps(drawn(graph)))
    want = metadata._from_comfyui(json.dumps(graph))
    for one in (found, want):
        nodes = one.get("extra", {}).get("nodes", "")
        one["extra"] = sorted(nodes.split(", "))
    assert found == want


def test_nodes_that_are_switched_off():
    """A muted node is not there; a bypassed one hands on its input of the same type; links may be objects."""
    graph = over_base(NODES["LoRAs, a VAE and a layer"][0])
    workflow = drawn(graph)
    for one in workflow["nodes"]:
        if one["id"] in ("40", "41"):
            one["mode"], one["outputs"] = 4, [{"type": "MODEL"}, {"type": "CLIP"}]
            for slot in one["inputs"]:
                slot["type"] = slot["name"].upper()
    workflow["links"] = [
        {"id": link[0], "origin_id": link[1], "origin_slot": link[2], "target_id": link[3]}
        for link in workflow["links"]
    ]
    found = metadata._from_workflow(json.dumps(workflow))
    assert "adapters" not in found and (found["model"], found["clip_skip"]) == ("v1-5", 2)
    workflow["nodes"] = [one | {"mode": 2} if one["id"] == "6" else one for one in workflow["nodes"]]
    assert "prompt" not in metadata._from_workflow(json.dumps(workflow))


@pytest.mark.parametrize(
    "workflow",
    [
        {"nodes": 5},
        {"nodes": [5, {}, {"id": []}, {"id": 1, "type": [], "widgets_values": [1], "inputs": [{"name": 3}]}]},
        {"nodes": [{"id": 1, "mode": 4, "type": "A", "inputs": [{"type": "X", "name": "x", "link": 1}]},
                   {"id": 2, "type": "KSampler", "inputs": [{"name": "model", "link": 1}], "widgets_values": {}}],
         "links": [[1, 1, 0, 1, 0, "X"], [1, {}, 0], ["a"], 5]},
    ],
)  # fmt: skip
def test_workflows_of_any_shape_give_graphs(workflow):
    for one in to_graph(workflow).values():
        assert isinstance(one["inputs"], dict)
    json.dumps(metadata._from_workflow(json.dumps(workflow)))
