"""Every method of inversion against its published formula, and what comes back by it on models known in closed form."""

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from keyed import keyed_input
from linear_gaussian import LinearGaussian, Wavy, normals
from safetensors.torch import load_file

from ldm.errors import UsageError
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.inversion import METHODS, Context, Network, Run, invert, plan_of, resolve_method
from ldm.models.diffusion.inversion_base import fall, rise, walk_down
from ldm.models.diffusion.levels import Level
from ldm.models.diffusion.samplers import SAMPLERS, sample_steps
from ldm.process.guidance import guide

SHAPE = (2, 4, 5, 3)
MEANS, UNCOND = torch.tensor([0.5, -1.0]), torch.tensor([0.2, 0.1])
Z, X, Y = normals(*SHAPE, count=3)
EXACT = [name for name, cls in METHODS.items() if cls.exact]
SCALES = torch.tensor([1.0, 3.0, 7.5], dtype=torch.float64)


def guided(scale):
    return Context(MEANS, UNCOND, scale)


def bimodal(x, level, context):
    """The noise in x, guided by the scale of each row, for data whose every value is 0.8 or -0.8, give or take 0.3.

    Under the condition it is mostly 0.8, without it as often one as the other.
    """
    a, m, spread = level.alpha_bar, 0.8, 0.3
    v = a * spread**2 + 1 - a

    def noise(prior):
        p = torch.sigmoid(2 * a.sqrt() * m * x / v + prior)
        clean = (2 * p - 1) * m * (1 - a) / v + a.sqrt() * spread**2 / v * x
        return (x - a.sqrt() * clean) / (1 - a).sqrt()

    scale = context.conditioning.to(x.dtype).reshape(-1, 1, 1, 1)
    return noise(0.0) + scale * (noise(1.0) - noise(0.0))


@pytest.mark.parametrize("steps", [10, *(pytest.param(n, marks=pytest.mark.slow) for n in (50, 200))])
def test_exact_methods_come_back_up_to_rounding_at_any_guidance(steps):
    """At guidance 1, 3 and 7.5, where plain DDIM does not; down to the clean end as well."""
    assert EXACT == ["edict", "bdia", "belm", "edit_friendly"]
    signs, spread = normals(3, 4, 5, 3, count=2)
    z, found = 0.8 * signs.sign() + 0.3 * spread, {}
    how = {"steps": steps, "model": LinearGaussian()}
    for name in EXACT:
        for dtype, most in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
            inversion = invert(name, bimodal, z.to(dtype), Context(SCALES), **how)
            assert inversion.latents.dtype == inversion.reconstruction.dtype == dtype
            if not (inversion.error < most).all():
                found[name, dtype] = inversion.error.tolist()
        clean = (
            invert(name, bimodal, z, Context(SCALES), spacing="karras", **how) if steps == 10 else inversion
        )
        if not (clean.error < 1e-4).all() or (steps == 10 and clean.levels[-1].alpha_bar < 1):
            found[name, "clean"] = clean.error.tolist()
    assert found == {}
    plain = invert("ddim", bimodal, z, Context(SCALES), **how).error
    assert plain.min() > 1e-3 and plain[2] > plain[0], plain


def test_exact_methods_come_back_through_a_network_that_answers_in_steps():
    """As one in bfloat16 does: where x is off by a rounding, the answer is another one."""
    z, how = torch.cat([Z, X]).float(), {"steps": 10, "model": LinearGaussian()}
    for name in EXACT:
        inversion = invert(name, lambda x, *_: (4096 * x).floor() % 7 / 3 - 1, z, Context(z[:, 0]), **how)
        assert inversion.error.max() < 1e-6, name


def test_exact_methods_come_back_through_a_network_with_guidance_and_under_others_they_do_not():
    for name in EXACT:
        inversion = invert(name, Network(LinearGaussian()), Z, guided(3.0), steps=4)
        assert inversion.error.max() < 1e-10
        other = inversion.sample(Context(MEANS + 1, UNCOND, 3.0), start_step=2)
        assert (other - Z).abs().max() > 0.1
        # From any step on it comes back.
        torch.testing.assert_close(inversion.sample(start_step=2), Z, rtol=0, atol=1e-10)
        # A picture does not depend on its neighbours, and one may be sampled under several contexts.
        alone = invert(name, Network(LinearGaussian()), Z[:1], Context(MEANS[:1], UNCOND[:1], 3.0), steps=4)
        torch.testing.assert_close(alone[-1], inversion[-1][:1], rtol=0, atol=1e-12)
        both = alone.sample(Context(torch.stack([MEANS[0], MEANS[0] + 1]), UNCOND[:1].expand(2), 3.0), 2)
        torch.testing.assert_close(both[:1], Z[:1], rtol=0, atol=1e-10)
        torch.testing.assert_close(both[1:], other[:1], rtol=0, atol=1e-10)


def test_a_chain_without_signal_at_its_end_can_be_walked_up():
    table = LinearGaussian()
    table.alphas_cumprod[-1] = 0.0
    for name in ("ddim", *EXACT):
        inversion = invert(name, bimodal, Z, Context(SCALES[:2]), steps=7, model=table)
        assert inversion.levels[0].t == 999 and torch.isfinite(inversion.latents).all()
        assert name == "ddim" or inversion.error.max() < 1e-8, name


def test_any_spacing_and_number_of_steps_can_be_walked_up():
    """Also those that step from the level 0, where DDIM's end is the same level; as many latents as steps each time."""
    for name in (*EXACT, "ddim", "dpm_solver"):
        for spacing, steps in (
            ("linspace", 3),
            ("linspace", 1),
            (None, 1),
            ("trailing", 2),
            ("karras", 4),
            (None, 5),
        ):
            how = {"steps": steps, "spacing": spacing}
            inversion = invert(name, Network(LinearGaussian()), Z, Context(MEANS), **how)
            assert len(inversion) == steps and (name not in EXACT or inversion.error.max() < 1e-10), (
                name,
                how,
            )
    levels = plan_of(resolve_method("belm"), LinearGaussian(), 1000)
    assert levels[-1].alpha_bar == 1 and len(levels) == 1001


# --- EDICT, BDIA, BELM ---


def test_edict_moves_as_recorded(golden):
    told = json.loads((golden / "editing.json").read_text())
    recorded = load_file(golden / "editing.safetensors")
    x, eps = (keyed_input(f"edict.{name}", (2, 4, 2, 2)).double() for name in ("x", "eps"))
    rows = 0
    for steps in (30, 50):
        for t, alpha, _, alpha_prev in told[f"edict.{steps}.alpha"]:
            here, to = (Level(0, torch.tensor(a, dtype=torch.float64)) for a in (alpha, alpha_prev))
            for got, way in ((fall(x, eps, here, to), "forward"), (rise(x, eps, to, here), "reverse")):
                torch.testing.assert_close(got, recorded[f"edict.{steps}.{t}.{way}"], rtol=1e-9, atol=1e-9)
                rows += 1
    assert rows == 16


def levels_of(name, steps=4, **options):
    return plan_of(resolve_method(name, **options), LinearGaussian(), steps)


def down(method, network, state, i, levels):
    """One step down, from level i of a plan."""
    run = Run(network, Context(None), levels, torch.float64)
    return method.down(run, state, levels[i], levels[i + 1], None)


def wavy(x, level, context=None):
    return Wavy().raw(x, torch.tensor([level.t]))


@pytest.mark.parametrize("i", [0, 1])
def test_edict_steps_in_turn_and_then_mixes(golden, i):
    """Eq. 14 with p = 0.93; the first sample goes first at the first step, then they take turns, as the program
    whose moves and protocol are recorded does (salesforce/EDICT: the offset of step i is i % 2)."""
    protocol = json.loads((golden / "editing.json").read_text())["edict_protocol"]
    assert (
        protocol["leapfrog_steps"]
        and METHODS["edict"]().weight(levels_of("edict")[0]) == protocol["mix_weight"]
    )
    levels = levels_of("edict")
    here, to = levels[i], levels[i + 1]
    a = (to.alpha_bar / here.alpha_bar).sqrt()
    b = (1 - to.alpha_bar).sqrt() - a * (1 - here.alpha_bar).sqrt()
    x, y = X, Y
    if i == 0:
        x = a * x + b * wavy(y, here)
        y = a * y + b * wavy(x, here)
    else:
        y = a * y + b * wavy(x, here)
        x = a * x + b * wavy(y, here)
    x = 0.93 * x + 0.07 * y
    y = 0.07 * x + 0.93 * y
    got = down(METHODS["edict"](), wavy, (X, Y), i, levels)
    for mine, want in zip(got, (x, y), strict=True):
        torch.testing.assert_close(mine, want, rtol=0, atol=1e-12)


def test_what_changes_a_sample_changes_both_of_edict_alike_and_not_the_level_above():
    for name, want in (("edict", (2 * X, Y + X)), ("bdia", (2 * X, Y)), ("belm", (2 * X, Y))):
        got = METHODS[name]().changed((X, Y), lambda x: 2 * x)
        assert all(map(torch.allclose, got, want)), name


def test_edict_mixes_less_in_more_steps():
    """So that 200 steps widen the gap between its two samples by no more than 50 do."""
    weights = [METHODS["edict"]().weight(SimpleNamespace(total=steps)) for steps in (10, 50, 200)]
    assert weights[:2] == [0.93, 0.93] and weights[2] ** 200 == pytest.approx(0.93**50)
    assert METHODS["edict"](mix_weight=0.8).weight(SimpleNamespace(total=200)) == 0.8


def test_bdia_averages_a_step_down_with_the_step_up_before_it():
    """z_below = gamma z_above + [a z + b eps] - gamma [z / a' - (b' / a') eps] of its paper."""
    levels = levels_of("bdia")
    above, here, below = levels[:3]

    def ddim(high, low):
        a = (low.alpha_bar / high.alpha_bar).sqrt()
        return a, (1 - low.alpha_bar).sqrt() - a * (1 - high.alpha_bar).sqrt()

    (a, b), (a2, b2), eps = ddim(here, below), ddim(above, here), wavy(Y, here)
    for gamma in (1.0, 0.9):
        want = gamma * X + (a * Y + b * eps) - gamma * (Y / a2 - b2 / a2 * eps)
        got, x = down(METHODS["bdia"](gamma=gamma), wavy, (Y, X), 1, levels)
        assert x is Y
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_belm_is_of_second_order():
    """x_below = a2 x_above + a1 x + b1 h eps of O-BELM, in x / sqrt(alpha_bar) and noise over signal; and its way down
    nears the exact flow with the square of the step, where DDIM's does with the step."""
    levels = levels_of("belm")
    above, here, below = levels[:3]
    h, k = here.sigma - below.sigma, above.sigma - here.sigma
    bars = [z / level.alpha_bar.sqrt() for z, level in ((X, above), (Y, here))]
    want = h**2 / k**2 * bars[0] + (k**2 - h**2) / k**2 * bars[1] - h * (h + k) / k * wavy(Y, here)
    got, _ = down(METHODS["belm"](), wavy, (Y, X), 1, levels)
    torch.testing.assert_close(got, want * below.alpha_bar.sqrt(), rtol=0, atol=1e-12)

    model, errors = LinearGaussian(), {"ddim": [], "belm": []}
    for name, found in errors.items():
        for steps in (50, 200):
            levels = levels_of(name, steps)
            top, second, *_, end = (float(level.alpha_bar) for level in levels)
            exact = [
                torch.cat([model.flow(X[i : i + 1], MEANS[i].item(), top, a) for i in range(2)])
                for a in (top, second, end)
            ]
            run, method = Run(Network(model), Context(MEANS), levels, torch.float64), METHODS[name]()
            state = method.resume(run, exact[1], exact[0])
            found.append((walk_down(run, method, state, 1) - exact[2]).abs().max())
    assert 3 < errors["ddim"][0] / errors["ddim"][1] < 6 and errors["belm"][0] / errors["belm"][1] > 10, (
        errors
    )


# --- fixed points ---


def test_a_fixed_point_is_consistent_with_itself_and_anderson_finds_it_in_fewer_calls(caplog):
    inversions = {}
    for name in ("fixed_point", "anderson"):
        network = Network(LinearGaussian())
        inversions[name] = found = invert(name, network, Z, guided(3.0), steps=10, tolerance=1e-9)
        assert torch.stack(found.memory).max() <= 1e-9 and found.error.max() < 1e-8
        for here, to in pairwise(found.levels):
            x = found.states[here.left]
            up = rise(found.states[to.left], network(x, here, guided(3.0)), to, here)
            assert (up - x).square().mean().sqrt() < 2e-8
    assert inversions["anderson"].calls < 0.6 * inversions["fixed_point"].calls
    torch.testing.assert_close(inversions["anderson"][-1], inversions["fixed_point"][-1], rtol=0, atol=1e-7)
    assert caplog.text == ""
    alone = invert("anderson", Network(Wavy()), Z[:1], Context(None), steps=5, tolerance=1e-9)
    both = invert(
        "anderson", Network(Wavy()), torch.cat([Z[:1], 9 * Z[1:]]), Context(None), steps=5, tolerance=1e-9
    )
    torch.testing.assert_close(both[-1][:1], alone[-1], rtol=0, atol=1e-8)
    few = invert("fixed_point", Network(LinearGaussian()), Z, guided(3.0), steps=10, iterations=2)
    assert (
        few.calls == 10 * 2 * 2
        and "10 of 10 steps were not consistent to 1e-05 after 2 iterations" in caplog.text
    )
    plain = invert("ddim", Network(LinearGaussian()), Z, guided(3.0), steps=10)
    assert (few.error < plain.error).all()


# --- with guidance ---


def test_edit_friendly_noises_each_level_afresh_and_keeps_what_each_step_is_off_by():
    inversion = invert("edit_friendly", Network(LinearGaussian()), Z, guided(2.0), steps=4, seed=3)
    again = invert("edit_friendly", Network(LinearGaussian()), Z, guided(2.0), steps=4, seed=3)
    generator = torch.Generator().manual_seed(3)
    network = Network(LinearGaussian())
    for k, level in enumerate(inversion.levels[-2::-1]):
        noise = torch.randn(SHAPE[1:], generator=generator, dtype=torch.float64)
        x = level.alpha_bar.sqrt() * Z + (1 - level.alpha_bar).sqrt() * noise
        torch.testing.assert_close(inversion[k], x, rtol=0, atol=1e-12)
        assert torch.equal(again[k], inversion[k])
        low = inversion.levels[-2 - k + 1]
        variance = (1 - low.alpha_bar) / (1 - level.alpha_bar) * (1 - level.alpha_bar / low.alpha_bar)
        eps = network(x, level, guided(2.0))
        x0 = (x - (1 - level.alpha_bar).sqrt() * eps) / level.alpha_bar.sqrt()
        mean = low.alpha_bar.sqrt() * x0 + (1 - low.alpha_bar - variance).sqrt() * eps
        before = Z if k == 0 else inversion[k - 1]
        torch.testing.assert_close(inversion.memory[k], before - mean, rtol=0, atol=1e-10)
    # eta scales the variance: less of it keeps less in the maps.
    half = invert("edit_friendly", Network(LinearGaussian()), Z, guided(2.0), steps=4, seed=3, eta=0.5)
    assert half.error.max() < 1e-10 and not torch.equal(half.memory[1], inversion.memory[1])


def test_the_sources_prompt_in_place_of_the_empty_one_cancels_the_guidance():
    plain = invert("ddim", Network(LinearGaussian()), Z, Context(MEANS), steps=8)
    for name in ("negative_prompt", "proximal"):
        inversion = invert(name, Network(LinearGaussian()), Z, guided(7.5), steps=8)
        torch.testing.assert_close(inversion.reconstruction, plain.reconstruction, rtol=0, atol=1e-10)
        torch.testing.assert_close(inversion.latents, plain.latents, rtol=0, atol=1e-12)
        assert inversion.calls == 8  # the way up is not guided
    # Under another prompt it guides away from the source's.
    other = Context(MEANS + 0.7, UNCOND, 3.0)
    inversion = invert("negative_prompt", Network(LinearGaussian()), Z, guided(3.0), steps=8)
    want = plain.sample(Context(MEANS + 0.7, MEANS, 3.0))
    torch.testing.assert_close(inversion.sample(other), want, rtol=0, atol=1e-10)


def test_proximal_drops_what_guidance_changes_little():
    """Soft and hard thresholds by hand; with all dropped it is the source's own answer, with none negative_prompt's."""

    def network(x, level, context):
        def noise(condition):
            return wavy(x, level) + 0.1 * torch.tanh(x + condition.reshape(-1, 1, 1, 1))

        cond, scale = noise(context.conditioning), context.guidance_scale
        return cond if scale == 1 else guide(noise(context.unconditional), cond, scale)

    other, how = Context(MEANS + 0.7, UNCOND, 3.0), {"steps": 5, "model": LinearGaussian()}
    own, all_dropped, none_dropped = (
        invert(name, network, Z, guided(3.0), **options, **how)
        for name, options in (
            ("negative_prompt", {}), ("proximal", {"quantile": 1.0}), ("proximal", {"quantile": 0.0}),
        )
    )  # fmt: skip
    torch.testing.assert_close(all_dropped.sample(other), own.sample(), rtol=0, atol=1e-10)
    torch.testing.assert_close(
        none_dropped.sample(other), own.sample(other), rtol=0, atol=0.02
    )  # all but one value
    change = torch.stack([X[0], 2 * X[0]])
    for prox in ("l0", "l1"):
        got = METHODS["proximal"](quantile=0.7, prox=prox).shrink(change)
        assert (got == 0).float().mean() == pytest.approx(0.7, abs=0.02)
        for row, want in zip(change, got, strict=True):
            kept = want != 0
            least = row.abs()[~kept].max()
            assert row.abs()[kept].min() > least
            short = 0.0 if prox == "l0" else row.float().abs().quantile(0.7).double()
            torch.testing.assert_close(want[kept], row[kept] - short * row[kept].sign(), rtol=0, atol=1e-6)


def test_null_text_optimises_as_its_protocol_says(golden):
    """Written out for one picture: Adam, the rate of each step, its early stop, what the next step begins with."""
    protocol = json.loads((golden / "editing.json").read_text())["null_text_protocol"]
    assert protocol["optimizer"] == "Adam, lr = 1e-2 * (1 - i / 100) for step i"
    assert (
        protocol["early_stop_rule"] == "loss < epsilon + i * 2e-5" and protocol["early_stop_epsilon"] == 1e-5
    )
    default = METHODS["null_text"]()
    assert (default.iterations, default.learning_rate, default.early_stop) == (10, 1e-2, 1e-5)
    network, steps, scale = Network(LinearGaussian()), 5, 3.0
    first = MEANS - torch.tensor([0.01, 0.1])  # near enough for a row to arrive early
    early = 0.02
    both = invert("null_text", network, Z, Context(MEANS, first, scale), steps=steps, early_stop=early)
    counts = []
    source = Context(MEANS[:1])
    up = invert("ddim", network, Z[:1], source, steps=steps, measure=False)
    x, uncond = up[-1], first[:1]
    for i, (here, to) in enumerate(pairwise(up.levels)):
        uncond = uncond.clone().requires_grad_()
        adam = torch.optim.Adam([uncond], lr=1e-2 * (1 - i / 100))
        count = 0
        for _ in range(protocol["num_inner_steps"]):
            empty, cond = network(x, here, Context(uncond)), network(x, here, source)
            arrived = fall(x, empty + scale * (cond - empty), here, to)
            loss = torch.nn.functional.mse_loss(arrived, up.states[to.left])
            adam.zero_grad()
            loss.backward()
            adam.step()
            count += 1
            if loss.item() < early + i * 2 * early:
                break
        counts.append(count)
        uncond = uncond.detach()
        torch.testing.assert_close(both.memory[to.left][:1], uncond, rtol=0, atol=1e-6)
        empty = network(x, here, Context(uncond))
        x = fall(x, empty + scale * (network(x, here, source) - empty), here, to)
    torch.testing.assert_close(both.reconstruction[:1], x, rtol=0, atol=1e-5)
    assert min(counts) < max(counts) == 10
    assert (
        both.error.sum() < invert("ddim", network, Z, Context(MEANS, first, scale), steps=steps).error.sum()
    )
    unguided = invert("null_text", network, Z, Context(MEANS), steps=steps)
    assert unguided.memory == [None] * steps


# --- samplers the other way ---


@pytest.mark.parametrize("name", ["dpmpp_2m", "DPM++ 2M Karras", "heun", "lms", "dpm_solver"])
def test_a_sampler_is_run_the_other_way(name):
    guidance = {"guidance_scale": 2.0, "unconditional_conditioning": UNCOND}
    inversion = invert(name, Network(LinearGaussian()), Z, guided(2.0), steps=9)
    up = list(sample_steps(name, LinearGaussian(), Z, MEANS, steps=9, invert=True, **guidance))
    for step, latents in zip(up, inversion.latents, strict=True):
        torch.testing.assert_close(latents, step.x_t, rtol=0, atol=1e-12)
    part = list(sample_steps(name, LinearGaussian(), inversion[-4], MEANS, steps=9, run_last=6, **guidance))
    torch.testing.assert_close(inversion.sample(start_step=3), part[-1].x_t, rtol=0, atol=1e-12)
    assert inversion.method.name in SAMPLERS
    assert (inversion.levels[-1].alpha_bar == 1) == (name != "dpm_solver")  # which ends at the level 0


def test_compvis_solver_encodes_what_it_samples_back():
    """All steps, and a part of them, are those of the inversion by its name."""
    sampler, errors = DPMSolverSampler(LinearGaussian()), []
    guidance = {"unconditional_guidance_scale": 2.0, "unconditional_conditioning": UNCOND}
    for steps in (10, 40):
        x_T, kept = sampler.encode(steps, Z, MEANS, log_every_t=1, **guidance)
        back, _ = sampler.sample(steps, 2, SHAPE[1:], MEANS, x_T=x_T, verbose=False, **guidance)
        errors.append((back - Z).abs().max())
        assert len(kept["x_inter"]) == steps + 1
    assert errors[1] < 0.3 * errors[0]
    inversion = invert("dpm_solver", Network(LinearGaussian()), Z, guided(2.0), steps=40, measure=False)
    torch.testing.assert_close(x_T, inversion[-1], rtol=0, atol=1e-12)
    part, _ = sampler.encode(40, Z, MEANS, 15, **guidance)
    torch.testing.assert_close(part, inversion[14], rtol=0, atol=1e-12)
    with pytest.raises(UsageError, match="run_last must be from 0 to 40"):
        sampler.encode(40, Z, MEANS, 41)


# --- what is refused ---


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        *[(name, {"eta": 0.5}, f"eta of the inversion {name} must be 0: .*; got 0.5")
          for name in ("fixed_point", "edict", "bdia", "belm", "negative_prompt", "null_text", "dpmpp_2m")],
        ("edit_friendly", {"eta": 0.0}, "eta of the inversion edit_friendly must be above 0 .*; got 0.0"),
        ("edit_friendly", {"eta": 1.5}, "must be above 0 and at most 1.*; got 1.5"),
        ("edit_friendly", {"seed": -1}, "seed of edit_friendly must be a whole number"),
        ("edict", {"mix_weight": 0.2}, "mix_weight of edict must be a number from 0.5 to 1, got 0.2"),
        ("edict", {"gamma": 1.0}, "the inversion edict has no option gamma; it has eta, mix_weight"),
        ("edict", {"num_inference_steps": 5}, r"no option num_inference_steps \(here it is steps\); it has eta"),
        ("edict", {"mixweight": 0.9}, r"no option mixweight \(did you mean mix_weight\?\)"),
        ("bdia", {"gamma": 0}, "gamma of bdia must be a number from 0.01 to 1, got 0"),
        ("anderson", {"history": 1.5}, "history of anderson must be a whole number from 0 to 10, got 1.5"),
        ("anderson", {"tolerance": float("nan")}, "tolerance of anderson must be a number from 0 to 1, got nan"),
        ("fixed_point", {"iterations": 0}, "iterations of fixed_point must be a whole number from 1 to 1000, got 0"),
        ("proximal", {"quantile": 2}, "quantile of proximal must be a number from 0 to 1, got 2"),
        ("proximal", {"prox": "l2"}, "prox of proximal must be one of l0, l1; got 'l2'"),
        ("null_text", {"iterations": 0}, "iterations of null_text must be"),
        ("euler_a", {}, "euler_a does not invert at all; these do"),
        ("heun", {"s_churn": 1.0}, "heun does not invert with fresh noise"),
        ("heun", {"depth": 1.0}, "heun has no option depth"),
        ("bell", {}, "did you mean belm"),
    ],
)  # fmt: skip
def test_values_that_a_method_does_not_take_are_said_with_their_numbers(name, options, words):
    with pytest.raises(UsageError, match=words) as caught:
        invert(name, Network(LinearGaussian()), Z, guided(3.0), **options)
    assert len(str(caught.value)) <= 400 and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["null_text", "proximal"])
def test_methods_that_guide_by_themselves_want_nothing_but_a_scale(name):
    """Both would pass over it without a word; the others ask the network, which does it."""
    rescaled = Network(LinearGaussian(), guidance_rescale=0.7, guidance_interval=(0.0, 0.5))
    with pytest.raises(
        UsageError, match=f"{name} guides by itself.*leave guidance_interval, guidance_rescale out"
    ):
        invert(name, rescaled, Z, guided(3.0), steps=2)
    added = LinearGaussian()
    added.guidance_terms = lambda: [Z]
    with pytest.raises(UsageError, match="leave Tensor out"):
        invert(name, Network(added), Z, guided(3.0), steps=2)
    unguided = invert(name, rescaled, Z, guided(1.0), steps=2)
    if name == "proximal":
        with pytest.raises(UsageError, match="proximal guides by itself"):
            unguided.sample(guided(3.0))
    else:
        assert unguided.sample(guided(3.0)).shape == SHAPE


def test_null_text_wants_features_and_samplers_want_a_model():
    listed = Context([MEANS], [UNCOND], 2.0)
    with pytest.raises(UsageError, match=r"null_text optimises features \(b, n, d\), got 'list'"):
        invert("null_text", Network(LinearGaussian()), Z, listed, steps=2)
    with pytest.raises(
        UsageError, match="inverting by the sampler heun needs a Network, got a plain function"
    ):
        invert("heun", bimodal, Z, Context(SCALES), steps=2, model=LinearGaussian())
