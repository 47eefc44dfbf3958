"""Tables of sigmas: the recorded ones of k-diffusion, A1111 and ComfyUI, and what holds for all of them."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from ldm.errors import UsageError
from ldm.process.schedule import NoiseSchedule
from ldm.process.sigmas import (
    SIGMA_TABLES,
    WITH_OWN_ENDS,
    alpha_bar_of_sigma,
    beta_quantile,
    check_sigmas,
    log_snr_of_sigma,
    resolve_sigma_table,
    sigma_of_alpha_bar,
    sigma_of_t,
    sigma_table,
    t_of_sigma,
)
from ldm.process.spacing import CONTINUOUS_METHODS

SCHEDULE = NoiseSchedule.named("linear", 1000, linear_start=0.00085, linear_end=0.012)
SIGMAS = SCHEDULE.sigma
NS = [1, 2, 3, 5, 8, 10, 11, 20, 25, 30, 50]


@pytest.fixture(scope="module")
def recorded(request):
    folder = request.path.parents[1] / "golden"
    files = ("sigma_schedules", "samplers_comfyui", "samplers_compvis_denoiser")
    return {key: value for name in files for key, value in load_file(folder / f"{name}.safetensors").items()}


def close(ours, theirs, rtol=2e-5):
    """Hold float64 against what float32 made of the same formulas; a last 0 is exact."""
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs.astype(np.float64), rtol=rtol, atol=0)


# (recorded as, our name, options); at the lowest sigmas float32's 1 - alpha_bar leaves 1.3e-5
RECORDED = [
    ("kdiffusion.karras", "karras", {}),
    ("kdiffusion.karras_rho5", "karras", {"rho": 5.0, "sigma_min": 0.1, "sigma_max": 10.0}),
    ("kdiffusion.exponential", "exponential", {}),
    ("kdiffusion.polyexponential", "polyexponential", {}),
    ("kdiffusion.polyexponential_rho0.5", "polyexponential", {"rho": 0.5}),
    ("kdiffusion.model", "normal", {}),
    ("a1111.uniform", "normal", {}),
    ("a1111.normal", "normal", {}),
    ("a1111.karras", "karras", {}),
    ("a1111.exponential", "exponential", {}),
    ("a1111.polyexponential", "polyexponential", {}),
    ("a1111.sgm_uniform", "sgm_uniform", {}),
    ("a1111.simple", "simple", {}),
    ("a1111.ddim", "ddim_uniform", {}),
    ("a1111.beta", "beta_sigma", {}),
    ("a1111.kl_optimal", "kl_optimal_open", {}),
    ("a1111.align_your_steps", "align_your_steps", {}),
    ("comfy.karras", "karras", {}),
    ("comfy.exponential", "exponential", {}),
    ("comfy.normal", "normal", {}),
    ("comfy.sgm_uniform", "sgm_uniform", {}),
    ("comfy.simple", "simple", {}),
    ("comfy.ddim_uniform", "ddim_uniform", {}),
    ("comfy.beta", "beta", {}),
    ("comfy.linear_quadratic", "linear_quadratic", {}),
]


@pytest.mark.parametrize(("theirs", "name", "options"), RECORDED, ids=[row[0] for row in RECORDED])
def test_tables_are_the_recorded_ones_for_every_number_of_steps(recorded, theirs, name, options):
    for n in NS:
        close(sigma_table(name, n, SIGMAS, **options), recorded[f"{theirs}.{n}"])


def test_kl_optimal_is_comfyuis_where_that_is_a_number(recorded):
    """ComfyUI divides by 0 for one step; ours goes from the top to clean."""
    for n in NS[1:]:
        close(sigma_table("kl_optimal", n, SIGMAS), recorded[f"comfy.kl_optimal.{n}"])
    assert np.isnan(recorded["comfy.kl_optimal.1"][0])
    np.testing.assert_allclose(sigma_table("kl_optimal", 1, SIGMAS), [SIGMAS[-1], 0], rtol=1e-12)


def test_the_continuous_process_is_k_diffusions_up_to_its_subtraction(recorded):
    """exp(1.1e-4) - 1 in float32 is off by 4e-4 of itself, and its square root by half of that."""
    for n in NS:
        theirs = recorded[f"kdiffusion.vp.{n}"]
        close(sigma_table("vp", n, SIGMAS), theirs, rtol=3e-4)
        close(sigma_table("vp", n, SIGMAS)[: n - 1], theirs[: n - 1])


def test_a1111s_settings_are_the_recorded_ones(recorded):
    karras = {
        "discard": {"discard_next_to_last": True},
        "minmaxrho": {"sigma_min": 0.05, "sigma_max": 12.0, "rho": 5.0},
        "old_karras": {"sigma_min": 0.1, "sigma_max": 10.0},
    }
    for setting, options in karras.items():
        close(sigma_table("karras", 8, SIGMAS, **options), recorded[f"a1111.setting.{setting}.8"])


def test_a1111s_choice_by_sampler_is_made_of_these_tables(request, recorded):
    """What each of its samplers takes for "Automatic", with the next to last sigma dropped where it does so."""
    path = request.path.parents[1] / "golden" / "sigma_schedules.json"
    for label, sampler in json.loads(path.read_text())["a1111.samplers"].items():
        options = sampler["options"]
        discard = {"discard_next_to_last": options.get("discard_next_to_last_sigma", False)}
        own = options.get("scheduler", "normal")
        for name, table in (("Automatic", own), ("Karras", "karras"), ("Exponential", "exponential")):
            for n in (6, 20):
                theirs = recorded.get(f"a1111.get_sigmas.{label}.{name}.{n}")
                if theirs is not None:
                    close(sigma_table(table, n, SIGMAS, **discard), theirs)


def test_comfyuis_denoise_takes_the_end_of_a_longer_table(recorded):
    for denoise, steps in (("None", 12), ("1.0", 12), ("0.75", 16), ("0.5", 24), ("0.1", 120)):
        for table in ("karras", "normal"):
            close(
                sigma_table(table, steps, SIGMAS)[-13:],
                recorded[f"comfy.ksampler.euler.{table}.12.{denoise}"],
            )
            dropped = sigma_table(table, steps, SIGMAS, discard_next_to_last=True)[-13:]
            close(dropped, recorded[f"comfy.ksampler.dpm_2.{table}.12.{denoise}"])


HISTORIC = ("ddim_uniform", "beta")  # whose number of steps is their own
OPEN = ("kl_optimal_open", "time_uniform", "time_quadratic", "logSNR")  # that end above 0
NOT_FROM_THE_TOP = ("vp", "ddim_uniform")


@pytest.mark.parametrize("name", SIGMA_TABLES)
def test_every_table_falls_from_the_top_to_its_end(name):
    for n in range(1, 60, 1 if name not in ("beta", "beta_sigma") else 7):
        if (name == "turbo" and n > 10) or (name == "lcm" and n > 50):
            continue
        sigmas = sigma_table(name, n, SIGMAS)
        assert sigmas.dtype == np.float64 and (np.diff(sigmas) < 0).all()
        assert name in HISTORIC or len(sigmas) == n + 1
        if name in OPEN:
            assert sigmas[-1] == pytest.approx(SIGMAS[0])
        else:
            assert sigmas[-1] == 0
        if name not in NOT_FROM_THE_TOP and n > 1:
            assert sigmas[0] == pytest.approx(SIGMAS[-1], rel=3e-5)


@pytest.mark.parametrize("name", SIGMA_TABLES)
def test_tables_are_for_a_model_of_any_length(name):
    sigmas = NoiseSchedule.named("cosine", 37).sigma
    for n in (1, 4, 10):
        made = sigma_table(name, n, sigmas)
        assert np.isfinite(made).all() and (np.diff(made) < 0).all()


# (name, steps, the levels visited): worked out by hand from the formulas of stable-diffusion.cpp and ComfyUI
WHOLE = [
    ("turbo", 1, [999]),
    ("turbo", 4, [999, 899, 799, 699]),
    ("lcm", 4, [999, 759, 499, 259]),
    ("smoothstep", 4, [999, 843, 500, 156]),
    ("smoothstep", 1, [999]),
    ("simple", 3, [999, 666, 333]),
]


@pytest.mark.parametrize(("name", "steps", "levels"), WHOLE)
def test_tables_of_whole_levels(name, steps, levels):
    np.testing.assert_array_equal(sigma_table(name, steps, SIGMAS), [*SIGMAS[levels], 0])


# (steps, published sigmas): of ComfyUI's GITSScheduler at the coefficient 1.20
PUBLISHED_GITS = [
    (2, [14.61464119, 0.803307, 0]),
    (6, [14.61464119, 5.85520077, 2.05039096, 0.95350921, 0.45573691, 0.17026083, 0]),
    (10, [14.61464119, 5.85520077, 2.84484982, 1.67050016, 1.08895338, 0.74807048, 0.50118381]
     + [0.32104823, 0.19894916, 0.09824532, 0]),
]  # fmt: skip


def test_gits_has_the_published_sigmas_and_goes_between_them():
    for steps, published in PUBLISHED_GITS:
        np.testing.assert_allclose(sigma_table("gits", steps, SIGMAS), published, rtol=1e-5)
    twenty, forty = sigma_table("gits", 20, SIGMAS), sigma_table("gits", 40, SIGMAS)
    np.testing.assert_allclose(forty[:-1:2], twenty[:-1], rtol=1e-12)
    np.testing.assert_allclose(forty[1:-3:2], np.sqrt(twenty[:-2] * twenty[1:-1]), rtol=1e-12)
    assert sigma_table("gits", 1, SIGMAS).tolist() == [pytest.approx(SIGMAS[-1]), 0]


def test_bong_tangent_is_two_arcs_that_meet_halfway():
    """Its middle is midway in sigma, and each arc is flat where the tangent saturates: steep about 0.6 of the way."""
    sigmas = sigma_table("bong_tangent", 20, SIGMAS)
    assert sigmas[12] == pytest.approx((SIGMAS[0] + SIGMAS[-1]) / 2)
    falls = -np.diff(sigmas[:-1])
    assert falls[:12].argmax() == 11 and falls[12:].argmax() == 0


def test_levels_and_their_other_names_are_the_recorded_ones(recorded):
    close(SIGMAS, recorded["sigmas"])
    close(np.log(SIGMAS), recorded["log_sigmas"], rtol=3e-5)
    close(sigma_of_t(recorded["t_to_sigma.in"].astype(float), SIGMAS), recorded["t_to_sigma"])
    given = recorded["sigma_to_t.in"].astype(float)
    np.testing.assert_allclose(t_of_sigma(given, SIGMAS), recorded["sigma_to_t"], rtol=1e-6, atol=1e-4)
    np.testing.assert_array_equal(t_of_sigma(given, SIGMAS, discrete=True), recorded["sigma_to_t.quantize"])


def test_each_name_of_a_level_leads_back():
    t = np.array([0.0, 0.3, 17.0, 500.5, 998.99, 999.0])
    np.testing.assert_allclose(t_of_sigma(sigma_of_t(t, SIGMAS), SIGMAS), t, rtol=0, atol=1e-9)
    np.testing.assert_allclose(sigma_of_alpha_bar(alpha_bar_of_sigma(SIGMAS)), SIGMAS, rtol=1e-12)
    np.testing.assert_allclose(log_snr_of_sigma(SIGMAS), SCHEDULE.log_snr, rtol=0, atol=1e-12)
    assert sigma_of_alpha_bar(np.array(0.0)) == log_snr_of_sigma(np.array(0.0)) == np.inf
    assert alpha_bar_of_sigma(np.array(0.0)) == 1
    whole = np.arange(1000)
    np.testing.assert_array_equal(t_of_sigma(SIGMAS * 1.0005, SIGMAS, discrete=True), whole)


CLOSED = [  # distributions whose quantiles are elementary
    (1, 1, lambda p: p),
    (0.5, 0.5, lambda p: np.sin(np.pi * p / 2) ** 2),
    (2, 1, np.sqrt),
    (30, 1, lambda p: p ** (1 / 30)),
    (1, 0.3, lambda p: 1 - (1 - p) ** (1 / 0.3)),
    (1, 100, lambda p: 1 - (1 - p) ** 0.01),
]


@pytest.mark.parametrize(("a", "b", "quantile"), CLOSED)
def test_beta_quantiles_where_they_are_elementary(a, b, quantile):
    p = np.linspace(0, 1, 13)
    np.testing.assert_allclose(beta_quantile(p, a, b), quantile(p), rtol=0, atol=2e-14)


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (3, 0.2), (100, 100), (0.01, 7)])
def test_beta_quantiles_mirror_each_other(a, b):
    p = np.linspace(0.05, 0.95, 13)
    np.testing.assert_allclose(beta_quantile(p, a, b), 1 - beta_quantile(1 - p, b, a), rtol=0, atol=1e-13)
    assert (np.diff(beta_quantile(p, a, b)) >= 0).all()


SPELLINGS = [
    ("Karras", "karras"),
    ("SGM Uniform", "sgm_uniform"),
    ("SGMUniform", "sgm_uniform"),
    ("KL Optimal", "kl_optimal"),
    ("Align Your Steps", "align_your_steps"),
    ("AYS", "align_your_steps"),
    ("GITS", "gits"),
    ("DDIM", "ddim_uniform"),
    ("logsnr", "logSNR"),
    ("poly-exponential", "polyexponential"),
    ("karas", None),
    (7, None),
]


@pytest.mark.parametrize(("said", "found"), SPELLINGS)
def test_names_in_any_spelling(said, found):
    assert resolve_sigma_table(said) == found


REFUSED = [
    (("karas", 5), {}, r"one of karras, .*; got 'karas' \(did you mean karras\?\)"),
    ((None, 5), {}, "got None"),
    (("karras", 0), {}, "num_steps must be a whole number from 1 to 1000, got 0"),
    (("karras", 1001), {}, "got 1001"),
    (("karras", True), {}, "got True"),
    (("karras", 5), {"alpha": 1.0}, "the sigmas 'karras' have no option alpha; it has rho"),
    (("exponential", 5), {"rho": 1.0}, "have no option rho; it has none"),
    (("karras", 5), {"rho": 0}, "rho of the sigmas 'karras' must be from 0.01 to 100, got 0"),
    (("karras", 5), {"rho": float("nan")}, "got nan"),
    (("karras", 5), {"rho": True}, "got True"),
    (
        ("beta", 5),
        {"beta_dist_alpha": 101},
        "beta_dist_alpha of the sigmas 'beta' must be from 0.01 to 100, got 101",
    ),
    (("karras", 5), {"sigma_min": 0}, "from 1e-06 or above up to at most 1000000, got 0 and 14"),
    (("karras", 5), {"sigma_min": 3.0, "sigma_max": 2.0}, r"got 3\.0 and 2\.0"),
    (("karras", 5), {"sigma_max": float("inf")}, "got .* and inf"),
    (("karras", 5), {"sigma_max": 1e300}, r"at most 1000000, got .* and 1e\+300"),
    (("karras", 5), {"sigma_min": 1e-9}, "from 1e-06 or above up .*, got 1e-09 and 14"),
    (("karras", 5), {"sigma_min": "0.1"}, "got '0.1' and"),
    (("karras", 5), {"discard_next_to_last": "yes"}, "discard_next_to_last must be True or False, got 'yes'"),
    (("linear_quadratic", 5), {"threshold": 0.9}, "do not fall with threshold 0.9; give less of it"),
    (("turbo", 11), {}, "at most 10 steps, got 11"),
    (("lcm", 51), {}, "at most 50 steps, got 51"),
]


@pytest.mark.parametrize(("given", "options", "message"), REFUSED)
def test_what_no_table_can_be_made_of_is_refused(given, options, message):
    with pytest.raises(UsageError, match=message) as refusal:
        sigma_table(*given, SIGMAS, **options)
    assert len(str(refusal.value)) <= 400


def test_other_ends_change_all_tables_but_those_with_ends_of_their_own():
    for name in SIGMA_TABLES.keys() - set(CONTINUOUS_METHODS):
        usual = sigma_table(name, 6, SIGMAS)
        for ends in ({"sigma_min": 0.5}, {"sigma_max": 5.0}):
            if (name, *ends) == ("linear_quadratic", "sigma_min"):
                continue  # it goes to 0 by itself
            same = np.array_equal(sigma_table(name, 6, SIGMAS, **ends), usual)
            assert same == (name in WITH_OWN_ENDS), (name, ends)


@pytest.mark.parametrize(
    "values",
    [
        [1.0],
        [],
        [1, 1],
        [1, 2],
        [2, -1],
        [np.inf, 1],
        [1e300, 1],
        [3, 1e-9, 0],
        [np.nan, 0],
        [[2, 1]],
        "karras",
        None,
        [2, "x"],
    ],
)
def test_a_list_of_sigmas_falls_to_0_or_above(values):
    np.testing.assert_array_equal(check_sigmas([14.6, 3, 0]), [14.6, 3, 0])
    with pytest.raises(UsageError, match="a list of sigmas must"):
        check_sigmas(values)
