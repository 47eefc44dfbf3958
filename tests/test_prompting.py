"""Prompts in other programs' languages, painted: what each bracket does to the picture."""

import functools
from dataclasses import replace

import pytest
import torch
from keyed import keyed_input, weight
from lora_files import write_lora_for
from tiny import tiny_model
from tiny_networks import control_shapes

import ldm
from ldm.adapters import PAG, SAG, ControlNet, Embedding, LoRA
from ldm.advice import advice
from ldm.checkpoints import save_safetensors
from ldm.cli import painting_parser
from ldm.cli.painting import lay_out
from ldm.cli.prompts import Line
from ldm.errors import AbsentError, UsageError
from ldm.pipeline import StableDiffusion
from ldm.prompt import read
from ldm.prompt.encode import at_step, encode
from ldm.prompting import explanations

RED, BLUE, GREEN = "a large red circle", "a small blue square", "a green cross"
LONG = ", ".join(["a red circle above a blue square on a white background"] * 18)  # 200 tokens


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion(tiny_model(), name="tiny")


def latents(sd, prompt, syntax="a1111", **options):
    options = {"steps": 3, "seed": 3, "output_type": "latent", "progress": False, **options}
    return sd.txt2img(prompt, prompt_syntax=syntax, **options).latents


def far(one, other):
    return (one - other).abs().max().item()


def states(sd, prompt, syntax="a1111", **options):
    options = {"steps": 4, "seed": 3, "output_type": "latent", "prompt_syntax": syntax, **options}
    return [step.x_t.clone() for step in sd.stream(prompt, **options)]


def test_a_prompt_without_brackets_is_the_same_in_every_language(sd):
    plain = latents(sd, RED, "plain")
    for syntax in ("a1111", "comfyui", "compel"):
        assert far(latents(sd, RED, syntax), plain) < 1e-3, syntax
    assert far(latents(sd, BLUE), plain) > 1e-2


# One that means the same, and one that does not: near and far.
SAME = [
    ("a1111", "(red:1.21) circle", "((red)) circle"),
    ("a1111", "[red] circle", "(red:0.9090909) circle"),
    ("a1111", r"a \(red\) circle", r"a \( red \) circle"),
    ("a1111", f"{RED} AND {BLUE}:0", RED),
    ("a1111", f"{RED}:0.25 AND {RED}:0.75", RED),
    ("a1111", f"[{RED}:{BLUE}:0]", BLUE),
    ("a1111", f"[{RED}:{BLUE}:1.0]", RED),
    ("a1111", f"[{RED}|{RED}]", RED),
    ("a1111", "(red:1.4) circle <hypernet:x:1>", "(red:1.4) circle "),
    ("comfyui", "(red:1.1) circle", "(red) circle"),
    ("compel", "red++ circle", "(red)1.21 circle"),
    ("compel", f'("{RED}", "{RED}").and(0.25, 0.75)', RED, {"emphasis": "ignore", "steps": 1}),
    ("a1111", f"[{RED}:{BLUE}:0]", BLUE, {"emphasis": "none", "steps": 1}),
]
OTHER = [
    ("a1111", "(red:1.4) circle", "red circle"),
    ("comfyui", "(red:1.4) circle", "red circle"),
    ("compel", "(red)1.4 circle", "red circle"),
    ("a1111", f"{RED} AND {BLUE}", RED),
    ("a1111", f"{RED} AND {BLUE}", f"{BLUE}"),
    ("a1111", f"{RED} BREAK {BLUE}", f"{RED} {BLUE}"),
    ("a1111", f"[{RED}|{BLUE}]", RED),
    ("a1111", LONG, LONG[: len(LONG) // 2]),
]


def test_brackets_mean_what_they_say(sd):
    @functools.cache
    def painted(text, syntax):  # a few are compared with several
        return latents(sd, text, syntax)

    for syntax, one, other, *more in SAME:
        for scale in (None, 1.0) if more else (None,):
            options = {"guidance_scale": scale, **(more[0] if more else {})}
            paint = functools.partial(latents, sd, **options) if more else painted
            assert far(paint(one, syntax), paint(other, syntax)) < 2e-3, (syntax, one)
    marked = "a (red:1.4) BREAK circle"  # which are text with the web UI's emphasis "None"
    assert far(*(latents(sd, marked, one, emphasis="none", steps=1) for one in ("a1111", "plain"))) < 1e-3
    for syntax, one, other in OTHER:
        assert far(painted(one, syntax), painted(other, syntax)) > 5e-3, (syntax, one)


def test_a_schedule_changes_after_its_step_as_the_web_uis_sampler_counts(sd):
    # Half of four steps is two, counted from 1; the sampler counts from 0, and reads the first text at 0, 1 and 2.
    changing = states(sd, f"[{RED}:{BLUE}:0.5]")
    red = states(sd, RED)
    assert [far(a, b) < 1e-5 for a, b in zip(changing, red, strict=True)] == [True, True, True, False, False]
    # Heun asks the network twice a step, so that the change falls within the same share of the run.
    changing = states(sd, f"[{RED}:{BLUE}:0.5]", sampler="heun")
    red = states(sd, RED, sampler="heun")
    assert [far(a, b) < 1e-5 for a, b in zip(changing, red, strict=True)] == [True, True, False, False, False]


def test_and_guides_along_the_sum_of_the_differences(sd):
    """At one step of DDIM to x0: guided = u + s (w1 (c1 - u) + w2 (c2 - u)), from the model's own answers."""
    model = sd.model
    options = {"guidance_scale": 3.0, "steps": 1, "seed": 3}
    x_T = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([1])  # CompVis's level of a single step
    rows, _ = at_step(
        encode(
            model.cond_stage_model, [read(text, encoder=model.cond_stage_model) for text in (RED, BLUE, "")]
        ),
        0,
    )
    with torch.no_grad():
        red, blue, none = (model.apply_model(x_T, t, row[None]) for row in rows)
    wanted = none + 3.0 * (0.5 * (red - none) + 1.5 * (blue - none))
    alpha_bar = model.alphas_cumprod[1]
    x0 = (x_T - (1 - alpha_bar).sqrt() * wanted) / alpha_bar.sqrt()
    (step, *_) = sd.stream(f"{RED}:0.5 AND {BLUE}:1.5", prompt_syntax="a1111", **options)
    assert far(step.pred_x0, x0) < 1e-3 * x0.abs().max()


@pytest.mark.parametrize("beside", ["cache_interval", "optimize", "ControlNet"])
def test_and_keeps_its_sums_beside(sd, beside, tmp_path):
    """Weights that add up to one of the same text are that text; a part of weight 0 leaves the other alone."""
    options = {"steps": 2} | ({"cache_interval": 2} if beside == "cache_interval" else {})
    if beside == "optimize":
        sd = StableDiffusion(tiny_model(), name="tiny")
        sd.optimize()
    if beside == "ControlNet":
        shapes = control_shapes(attention=(1, 2), num_heads=4, context_dim=128)
        file = tmp_path / "control.safetensors"
        save_safetensors(file, {name: weight(f"and.{name}", shape) for name, shape in shapes.items()}, {})
        hint = (0.3 * keyed_input("and.hint", (3, 64, 64)) + 0.5).clamp(0, 1)
        options |= {"adapters": [ControlNet(file, hint)]}
    red, blue = latents(sd, RED, **options), latents(sd, BLUE, **options)
    assert far(red, blue) > 1e-2
    assert far(latents(sd, f"{RED}:0.25 AND {RED}:0.75", **options), red) < 1e-3
    assert far(latents(sd, f"{RED}:0 AND {BLUE}", **options), blue) < 1e-3
    if beside != "optimize":  # which changes nothing
        assert far(red, latents(sd, RED, steps=2)) > 1e-2


def test_comfyuis_embedding_is_painted(sd, tmp_path, caplog):
    table = sd.model.cond_stage_model.transformer.text_model.embeddings.token_embedding.weight
    torch.save({"string_to_param": {"*": keyed_input("birb", (2, table.shape[1]))}}, tmp_path / "birb.pt")
    options = {"adapters": [Embedding(tmp_path / "birb.pt", width=table.shape[1])], "steps": 1}
    wanted, without = latents(sd, f"birb {RED}", "plain", **options), latents(sd, RED, "plain", steps=1)
    for name in ("birb", "birb.pt", "styles/birb.safetensors"):
        assert far(latents(sd, f"embedding:{name} {RED}", "comfyui", **options), wanted) < 1e-4, name
    assert far(wanted, without) > 1e-2 and not caplog.records
    # What is not there is left out, as in ComfyUI, and said.
    for more, hint in ((options, "did you mean 'birb'?"), ({"steps": 1}, "give --embedding FILE")):
        caplog.clear()
        assert far(latents(sd, f"embedding:a/bird {RED}", "comfyui", **more), without) < 1e-4
        assert f"no embedding goes by 'a/bird', it is painted without; {hint}" in caplog.text


def test_weights_count_without_guidance_and_beside_other_prompts(sd):
    joined, alone = f"{RED} AND {BLUE}:0.5", latents(sd, f"{RED} AND {BLUE}:0.5")
    several = latents(sd, [joined, LONG, BLUE], batch_size=3, seed=[3, 4, 3])
    assert far(several[:1], alone) > 0  # the longest prompt of a batch pads the others, as in the web UI
    assert far(latents(sd, [joined, BLUE], batch_size=2, seed=[3, 3])[:1], alone) < 1e-3
    assert far(latents(sd, joined, guidance_scale=1.0), latents(sd, RED, guidance_scale=1.0)) > 5e-3


def test_nine_channels_and_masks_take_schedules():
    sd9 = StableDiffusion(tiny_model(in_channels=9), name="tiny9")
    one, other = latents(sd9, f"[{RED}:{BLUE}:1] AND {BLUE}:0"), latents(sd9, f"[{RED}:{BLUE}:1]")
    assert far(one, other) < 1e-3 and far(one, latents(sd9, RED)) > 1e-3


def test_clip_skip_reads_an_earlier_layer_of_both_prompts(sd):
    encoder = sd.model.cond_stage_model
    rows, _ = at_step(encode(encoder, [read(one, encoder=encoder) for one in (RED, BLUE)], clip_skip=2), 0)
    wanted = latents(sd, RED, "plain", prompt_embeds=rows[:1], negative_prompt_embeds=rows[1:])
    assert far(latents(sd, RED, negative_prompt=BLUE, clip_skip=2), wanted) < 1e-4
    assert far(latents(sd, RED, "plain", negative_prompt=BLUE, clip_skip=2), wanted) < 1e-3
    assert far(latents(sd, RED, negative_prompt=BLUE), wanted) > 1e-3


@pytest.mark.parametrize("syntax", ["plain", "a1111"])
def test_every_distinct_chunk_is_encoded_once(sd, syntax):
    """Also where a prompt is in several batches, and in both passes of hires fix."""
    rows = []
    transformer = sd.model.cond_stage_model.transformer
    hook = transformer.register_forward_hook(
        lambda module, args, kwargs, out: rows.extend(map(tuple, kwargs["input_ids"].tolist())),
        with_kwargs=True,
    )
    joined = [f"({RED}:1.2)", f"{RED} AND {BLUE}"] if syntax == "a1111" else []
    twice = {"hires_scale": 1.25, "hires_steps": 1, "hires_prompt": GREEN}
    try:
        latents(sd, [RED, *joined, BLUE] * 2, syntax, batch_size=3, steps=1, **twice)
    finally:
        hook.remove()
    assert len(rows) == len(set(rows)) == 4  # red, blue, green, and the empty negative prompt


def test_tags_name_files_of_a_folder(sd, tmp_path, caplog):
    write_lora_for(tmp_path / "ink.safetensors", sd.model)
    options = {"lora_dir": tmp_path, "steps": 2}
    tagged = latents(sd, f"{RED}<lora:ink:0.5:0.75>", **options)
    lora = LoRA(tmp_path / "ink.safetensors", 0.75, 0.5)
    assert far(tagged, latents(sd, RED, adapters=[lora], steps=2)) < 1e-4
    assert far(tagged, latents(sd, RED, steps=2)) > 1e-3
    request = sd.plan(f"{RED}<lora:ink:0.5:0.75>", prompt_syntax="a1111", lora_dir=tmp_path)
    assert request.adapters[0].describe()["name"] == "ink"
    # The web UI paints on where it finds none, and so it is here.
    unknown = latents(sd, f"{RED}<lora:inc:1>", **options)
    assert "no LoRA goes by 'inc', it is painted without; did you mean 'ink'?" in caplog.text
    assert far(unknown, latents(sd, RED, steps=2)) < 1e-5
    latents(sd, f"{RED}<lora:ink:1>", steps=1)
    assert "give lora_dir (--lora-dir)" in caplog.text


@pytest.mark.parametrize(
    ("syntax", "tagged", "wrong"),
    [("a1111", "a <lora:ink:1>", "a <lora:"), ("compel", "a withLora(ink, 1)", '("a", "b").blend(x)')],
)
def test_lines_with_other_tags_are_requests_of_their_own(syntax, tagged, wrong):
    args = painting_parser("txt2img.py", "", outdir="o", scale=7.5).parse_args(["--syntax", syntax])
    lines = [Line(prompt, {"seed": 1}) for prompt in (tagged, tagged, "a", wrong)]
    assert [len(group.prompts) for group in lay_out(args, lines, "ddim", ({},))] == [2, 2]


def test_a_swap_is_said_not_to_be_done(sd, caplog):
    for prompt in (
        "a cat.swap(dog)",
        '("a cat.swap(dog)", "b").blend(1, 1)',
        '("b", "a cat.swap(dog)").and()',
    ):
        caplog.clear()
        sd.plan(prompt, prompt_syntax="compel")
        assert "a .swap() exchanges attention while denoising, which is not done here" in caplog.text, prompt
    caplog.clear()
    sd.plan("a cat. swap(dog)", prompt_syntax="compel")
    assert not caplog.records


def test_the_old_rule_of_schedules_is_painted_and_told(sd):
    """[a:b:1] in a second pass: by the old rule after its first step, by the new one before it."""
    how = {"steps": 2, "hires_scale": 1.25, "hires_strength": 0.9, "seed": 3, "progress": False}
    changing = f"[{RED}:{BLUE}:1]"
    out = sd.txt2img(changing, prompt_syntax="a1111", old_schedule=True, **how)
    new, blue = (latents(sd, changing, hires_prompt=text, **how) for text in (None, BLUE))
    assert far(new, blue) < 1e-5 < 1e-3 < far(out.latents, blue)
    assert "Old prompt editing timelines: True" in out.infotexts[0]


# Input, the words of the error, and nothing painted.
REFUSED = [
    ({"prompt_syntax": "a111"}, "prompt_syntax must be one of plain, a1111, comfyui, compel; got 'a111'"),
    ({"prompt_syntax": None}, "prompt_syntax must be one of"),
    ({"clip_skip": 13}, "clip_skip must be a whole number from 1 to 12, got 13"),
    ({"clip_skip": 0}, "clip_skip must be a whole number from 1 to 12, got 0"),
    ({"clip_skip": 12}, "clip_skip should be a whole number from 1 to"),
    ({"emphasis": "loud"}, "emphasis must be one of original, no norm, ignore, none, comfyui; got 'loud'"),
    ({"prompt": "a <lora:x:y>", "prompt_syntax": "a1111", "lora_dir": "HERE"}, "strength in <lora:x:y>"),
    ({"prompt": ["a <lora:x:1>", "b"], "prompt_syntax": "a1111"}, "different <lora:...> tags"),
    ({"lora_dir": 3}, "lora_dir must be a path, got 3"),
    ({"prompt": "[" * 10_001, "prompt_syntax": "a1111"}, "a prompt may have 10000 brackets open at once"),
    ({"prompt": "(a:1e999)", "prompt_syntax": "comfyui"}, "a weight in the prompt is not a finite number"),
    ({"prompt": "(a:1e16)", "prompt_syntax": "comfyui"}, "a weight in the prompt is larger than 1e+15"),
    (
        {"prompt": "a" + "+" * 5000, "prompt_syntax": "compel"},
        "a weight in the prompt is larger than 1e+15",
    ),
    ({"prompt": "(" * 400 + "a", "prompt_syntax": "a1111"}, "a weight in the prompt is larger than 1e+15"),
    ({"prompt": "(a:1.2)", "prompt_syntax": "comfyui", "emphasis": "none"}, "emphasis 'none' (brackets are"),
    (
        {"prompt": "a AND b", "prompt_syntax": "a1111", "pag_scale": 3.0},
        "PAG does not go together with a prompt",
    ),
    ({"prompt": ["b", "a:0.5"], "prompt_syntax": "a1111", "adapters": [SAG(0.75)]}, "SAG does not go"),
    (
        {
            "prompt": '("a", "b").and()',
            "prompt_syntax": "compel",
            "emphasis": "ignore",
            "sag_scale": 1.0,
        },
        "SAG does not go together",
    ),
    ({"prompt": '("a", "b").blend(x)', "prompt_syntax": "compel"}, "blend"),
]


def test_bad_input_is_refused_with_one_line(sd, tmp_path):
    write_lora_for(tmp_path / "x.safetensors", sd.model)
    for options, words in REFUSED:
        options = {"prompt": RED, **options}
        if options.get("lora_dir") == "HERE":
            options["lora_dir"] = tmp_path
        with pytest.raises(UsageError) as found:
            sd.plan(**options)
            pytest.fail(f"{options} passed")
        assert words in str(found.value) and len(str(found.value)) <= 400 and "\n" not in str(found.value), (
            options
        )
    for options in (
        {"prompt": "a b", "pag_scale": 3.0},
        {"prompt": "a AND b", "adapters": [PAG(0.0)]},
        {"prompt": "a", "negative_prompt": "b AND c", "sag_scale": 1.0},
    ):
        sd.plan(prompt_syntax="a1111", **options)
    for syntax in ("plain", "a1111", "comfyui", "compel"):
        with pytest.raises(
            UsageError, match="prompt must have at most 100000 characters, got 1000000; shorten"
        ):
            sd.plan("x" * 10**6, prompt_syntax=syntax)
    with pytest.raises(AbsentError, match="lora_dir 'nowhere' is no folder"):
        sd.plan(f"{RED} <lora:x:1>", prompt_syntax="a1111", lora_dir="nowhere")


@pytest.mark.parametrize(
    "prompt",
    [
        "((((red",
        "red))))",
        "[a:b",
        "[a|b",
        "(a:b:c:1)",
        "(a:high)",
        "AND AND",
        "[" * 3000,
        "[a:b:99]",
        "[a:b:-1]",
        "[a:b:1e400]",
        "[a:b:99.0]",
        "<lora:",
        "<lora:nowhere:high>",
        "",
    ],
)
def test_what_the_web_ui_paints_is_painted(sd, prompt):
    assert latents(sd, prompt, steps=1).isfinite().all()


def test_options_of_other_languages_are_said_to_do_nothing(sd, tmp_path):
    def said(*given):
        requests = [sd.plan(RED, **one) for one in given]
        return {kind: line for kind, line in advice(requests, sd.defaults).items() if "does nothing" in line}

    for syntaxes, given in (
        (("a1111", "comfyui", "compel"), {"emphasis": "ignore"}),
        (("a1111",), {"old_schedule": True}),
        (("a1111", "compel"), {"lora_dir": tmp_path}),
    ):
        (name,) = given
        for syntax in ("plain", "a1111", "comfyui", "compel"):
            lines = said({**given, "prompt_syntax": syntax})
            assert list(lines) == ([] if syntax in syntaxes else [name]), (name, syntax)
            assert all(
                f"does nothing to {syntax} ones: give prompt_syntax='a1111'" in one for one in lines.values()
            )
        # Lines of a file share what is given once for all.
        assert not said(given, {**given, "prompt_syntax": "a1111"}, {}) and not said({})


def test_a_joint_is_no_word_where_it_joins(sd):
    knows = replace(sd.defaults, known_words=frozenset(f"{RED} {BLUE}".split()))
    for prompt, syntax, kinds in (
        (f"{RED} AND {BLUE}", "a1111", set()),
        (f"{RED}:0.6 AND {BLUE} : 0.75", "a1111", set()),
        (f"{RED} : 0.6 AND {BLUE} 0.75", "a1111", {"words"}),
        (f"{RED} # of whatever kind", "a1111", set()),
        (f"{RED} # of whatever kind", "plain", {"words"}),
        (f"{RED} and (blue:1.2)", "a1111", {"words"}),
        (f"{RED} and (blue:1.2)", "plain", {"words", "a weight"}),
    ):
        request = sd.plan(prompt, prompt_syntax=syntax, steps=20)
        assert advice([request], knows).keys() == kinds, (prompt, syntax)


@pytest.mark.parametrize(
    ("given", "begins"),
    [
        ({}, ["a1111: 'a [red:blue:0.5]'", "negative a1111: 'b'"]),
        ({"hires_scale": 1.5, "hires_prompt": "a (dog)"}, [
            "pass 1: a1111: 'a [red:blue:0.5]'", "pass 1: negative a1111: 'b'", "pass 2: a1111: 'a (dog)'",
            "pass 2: negative a1111: 'b'",
        ]),
        ({"regions": [("ring", (0, 0, 1, 1)), ("a [red:blue:0.5]", (0, 0, 1, 1))]}, [
            "a1111: 'a [red:blue:0.5]'", "region a1111: 'ring'", "negative a1111: 'b'",
        ]),
    ],
)  # fmt: skip
def test_it_is_explained_pass_by_pass_where_that_is_not_the_same(sd, given, begins):
    request = sd.plan("a [red:blue:0.5]", negative_prompt="b", prompt_syntax="a1111", steps=4, **given)
    lines = explanations(sd.model, request)
    assert [line.split("\n")[0] for line in lines] == begins
    plain = sd.plan("a", steps=4, **{**given, "hires_prompt": None})
    assert not any("pass" in line for line in explanations(sd.model, plain))  # both passes are read alike


def test_the_picture_says_how_its_prompt_was_read(sd, tmp_path):
    out = sd.txt2img(
        "(red:1.4)", prompt_syntax="a1111", clip_skip=2, emphasis="no norm", seed=1, steps=1, progress=False
    )
    told = ldm.read_metadata(out.save(tmp_path)[0])
    assert (told["prompt_syntax"], told["clip_skip"], told["emphasis"]) == ("a1111", 2, "no norm")
    assert ", Prompt syntax: a1111, Clip skip: 2, Emphasis: No norm, " in out.infotexts[0]
