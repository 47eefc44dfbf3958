"""Options of samplers and spacings at a request: they reach the sampler, are said by the picture, and are refused."""

import pytest
from tiny import tiny_model

from ldm.cli import painting_parser, read_prompts
from ldm.errors import UsageError
from ldm.metadata import from_infotext
from ldm.models.diffusion.samplers import SAMPLERS, alpha_bar_table
from ldm.pipeline import StableDiffusion
from ldm.process.sigmas import sigma_of_alpha_bar

PROMPT = "a red circle"


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion(tiny_model(), name="tiny")


def latents(sd, **options):
    few = {"width": 64, "height": 64, "seed": 3, "steps": 3, "guidance_scale": 1.0}
    return sd.txt2img(PROMPT, output_type="latent", progress=False, **{**few, **options})


# (sampler, what is asked for, what A1111's text says of it)
HEARD = [
    ("heun", {"spacing": "karras", "rho": 4.0}, "Schedule rho: 4.0"),
    ("euler", {"spacing": "karras", "sigma_min": 0.5}, "Schedule min sigma: 0.5"),
    ("euler", {"spacing": "karras", "sigma_max": 9.0}, "Schedule max sigma: 9.0"),
    ("euler", {"discard_next_to_last": True}, "Discard penultimate sigma: True"),
    ("euler", {"s_churn": 3.0, "s_tmin": 0.5, "s_tmax": 12.0, "s_noise": 1.1}, "Sigma churn: 3.0"),
    ("euler_a", {"s_noise": 1.2}, "Sigma noise: 1.2"),
    ("lms", {"order": 2}, "Solver order: 2"),
    ("euler", {"spacing": "beta", "beta_dist_alpha": 0.4}, "Beta scheduler alpha: 0.4"),
    ("euler", {"spacing": "beta_sigma", "beta_dist_beta": 0.9}, "Beta scheduler beta: 0.9"),
    ("dpmpp_2m_sde", {"solver_type": "heun"}, "Solver type: heun"),
]


def test_options_reach_the_sampler_and_the_picture_says_them(sd):
    plains = {}
    for sampler, options, said in HEARD:
        key = sampler, options.get("spacing")
        plain = plains[key] = plains.get(key) or latents(sd, sampler=sampler, spacing=key[1])
        other = latents(sd, sampler=sampler, **options)
        assert not (plain.latents == other.latents).all(), said
        assert f", {said}" in other.infotexts[0] and said not in plain.infotexts[0]
        found = from_infotext(other.infotexts[0])
        assert {name: found[name] for name in options} == options
    unset = latents(sd, sampler="euler", rho=None, order=None, s_churn=None)
    assert (unset.latents == plains["euler", None].latents).all()


REFUSED = [
    ({"sampler": "euler", "order": 2}, "euler has no option order; it has always_draw, dynamic_threshold, "),
    ({"sampler": "lms", "order": 5}, "order must be 1, 2, 3 or 4, got 5"),
    ({"sampler": "lms", "order": 10}, "order must be a whole number from 1 to 9, got 10"),
    ({"sampler": "ddim", "rho": 5.0}, "the spacing 'uniform' has no option rho"),
    ({"sampler": "ddim", "s_churn": 1.0}, "ddim has no option s_churn"),
    ({"sampler": "euler", "spacing": "karras", "rho": 0}, "rho must be a number from 0.01 to 100, got 0"),
    ({"sampler": "euler", "spacing": "karras", "sigma_min": 20.0}, "sigmas must go from 1e-06 or above up"),
    ({"sampler": "euler", "spacing": [5.0, 1.0, 0.0], "sigma_max": 3.0, "steps": 2}, "or of t has no option"),
    ({"sampler": "euler", "spacing": [5.0, 5.0, 0.0], "steps": 2}, "sigmas must hold two at least, each below"),
    ({"sampler": "dpmpp_2m_sde", "solver_type": "bh2"}, "solver_type must be midpoint or heun, got 'bh2'"),
    ({"sampler": "dpmpp_2m_sde", "solver_type": 2}, "solver_type must be a text, got 2"),
    ({"sampler": "dpmpp_2m_sde", "eta": 2.0}, "eta must be a number from 0 to 1, got 2.0"),
    ({"sampler": "restart", "eta": 0.5}, "eta of restart must be 0"),
    ({"sampler": "euler", "discard_next_to_last": 3}, "discard_next_to_last must be True or False, got 3"),
    ({"sampler": "euler cgf"}, "the sampler must be one of ddim, .*; got 'euler cgf'"),
    ({"sampler": "DPM++ 3N SDE Karras"}, "got 'DPM\\+\\+ 3N SDE Karras'"),
    ({"sampler": "dpm_adaptiv"}, "did you mean dpm_adaptive"),
    ({"sampler": "euler", "spacing": "karas"}, "did you mean karras|got 'karas'"),
    ({"sampler": "dpm_fast", "steps": 0}, "steps must be a whole number from 1"),
    ({"sampler": "euler", "spacing": "turbo", "steps": 11}, "at most 10 steps, got 11"),
    ({"sampler": "heun", "spacing": [5.0, 1.0, 2.0, 0.0]}, "sigmas must hold two at least, each below"),
    ({"sampler": "lms", "spacing": [5.0, 1.0, -1.0, -2.0]}, "sigmas must hold two at least, each below"),
    ({"sampler": "lms", "spacing": [5.0, 1.0, 0.0]}, "3 steps need 4 sigmas, the end included; got 3"),
    ({"sampler": "euler_cfg_pp", "s_noise": 0.5}, "euler_cfg_pp has no option s_noise"),
    ({"sampler": "euler", "brownian": "torchsde"}, "euler has no option brownian"),
    ({"sampler": "dpmpp_sde", "brownian": "own"}, "brownian must be torchsde, got 'own'|must be one of torchsde"),
    ({"sampler": "euler", "spacing": "karras", "beta_dist_alpha": 0.5}, "no option beta_dist_alpha"),
    ({"sampler": "euler", "spacing": "beta", "beta_dist_alpha": 0}, "must be a number from 0.01 to 100, got 0"),
    ({"sampler": "euler", "spacing": "t=999,499"}, "3 steps need 3 t, got 2"),
    ({"sampler": "euler", "spacing": "t=999,499,499"}, "a list of t must fall from t to t, each from 0 to 999"),
    ({"sampler": "euler", "spacing": "t=1000,499,1"}, "each from 0 to 999, got \\[1000.0, 499.0, 1.0\\]"),
    ({"sampler": "euler", "spacing": "t=999,499,nan"}, "a list of t must fall"),
    ({"sampler": "euler", "spacing": "t=999,x,1"}, "is numbers with commas between, as t=999,749,499; got"),
    ({"sampler": "euler", "spacing": "sigma=5,6,1,0"}, "sigmas must hold two at least, each below"),
    ({"sampler": "euler", "spacing": "s=5,1,0"}, "the spacing must be one of .*got 's=5,1,0'"),
    ({"sampler": "euler", "spacing": "t=999,499,1", "rho": 5.0}, "list of sigmas or of t has no option rho"),
    ({"spacing": "t=999,499,1", "hires_scale": 1.5}, "of one pass; name hires_spacing for the second"),
]  # fmt: skip


def test_levels_that_are_listed_are_visited(sd):
    """As t, as sigmas in words, and as sigmas; the steps are counted off the list, and pictures say it."""
    sigmas = sigma_of_alpha_bar(alpha_bar_table(sd.model))
    wanted = [float(sigmas[t]) for t in (800, 400, 90)]
    words = "sigma=" + ",".join(map(repr, [*wanted, 0.0]))
    for sampler in ("euler", "dpmpp_2m", "restart", "dpm_fast"):
        listed = [
            sd.plan(PROMPT, sampler=sampler, spacing=one) for one in ("t=800, 400,90", words, [*wanted, 0.0])
        ]
        assert [one.steps for one in listed] == [3, 3, 3]
        plans = [SAMPLERS[sampler].plan(alpha_bar_table(sd.model), 3, spacing=one.spacing) for one in listed]
        for plan in plans:
            assert [level.t for level in plan[:3]] == pytest.approx([800, 400, 90])
            assert [float(level.sigma) for level in plan[:3]] == pytest.approx(wanted)
            assert float(plan[3].alpha_bar) == 1.0
    own = latents(sd, sampler="ddim", steps=4)
    plan = SAMPLERS["ddim"].plan(alpha_bar_table(sd.model), 4)
    same = latents(sd, sampler="ddim", steps=None, spacing="t=" + ",".join(str(one.t) for one in plan[:4]))
    assert (own.latents == same.latents).all()
    assert from_infotext(same.infotexts[0])["spacing"] == same.parameters[0].spacing
    half = SAMPLERS["ddim"].plan(alpha_bar_table(sd.model), 2, spacing="t=800.5,90")
    assert half[0].t == 800.5 and sigmas[800] < float(half[0].sigma) < sigmas[801]


def test_options_without_meaning_are_refused_before_anything_is_painted(sd):
    for options, message in REFUSED:
        with pytest.raises(UsageError, match=message) as caught:
            sd.plan(PROMPT, **{"steps": 3, **options})
        assert "\n" not in str(caught.value), options


def test_flags_and_prompt_files_set_them(tmp_path):
    parser = painting_parser("txt2img.py", "x", outdir="o", scale=7.5)
    args = parser.parse_args(["--sampler", "lms", "--order", "2", "--rho", "5", "--discard_next_to_last"])
    assert (args.order, args.rho, args.discard_next_to_last, args.s_noise) == (2, 5.0, True, None)
    assert parser.parse_args([]).discard_next_to_last is None
    (tmp_path / "p.txt").write_text("--prompt a --sampler euler --s_churn 2 --discard_next_to_last\n")
    assert read_prompts(str(tmp_path / "p.txt"))[0].options == {
        "sampler": "euler", "s_churn": 2.0, "discard_next_to_last": True,
    }  # fmt: skip


def test_cfg_pp_has_the_negative_prompt_at_any_scale(sd):
    options = {"sampler": "euler_cfg_pp", "guidance_scale": 1.0}
    assert not (
        latents(sd, **options).latents == latents(sd, **options, negative_prompt="blue").latents
    ).all()
    plain = {"sampler": "euler", "guidance_scale": 1.0}
    assert (latents(sd, **plain).latents == latents(sd, **plain, negative_prompt="blue").latents).all()


def test_pictures_of_sde_samplers_do_not_depend_on_their_batch(sd):
    options = {"sampler": "dpmpp_2m_sde", "num_images": 2, "spacing": "karras"}
    together, alone = latents(sd, **options, batch_size=2), latents(sd, **options, batch_size=1)
    assert (together.latents - alone.latents).abs().max() < 1e-4 * together.latents.abs().max()
    assert (together.latents[0] - together.latents[1]).abs().max() > 0.1
