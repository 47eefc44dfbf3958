"""OpenAI's GaussianDiffusion: all that was recorded of the original, laws, and what is refused."""

import math

import numpy as np
import pytest
import torch
from keyed import keyed_input
from linear_gaussian import LinearGaussian, normals
from safetensors.torch import load_file
from torch import nn

from ldm.errors import MismatchError, UsageError
from ldm.models.diffusion import gaussian_diffusion as gd
from ldm.models.diffusion import respace
from ldm.models.diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)
from ldm.process.gaussian import posterior, range_log_variance

SHAPE = (2, 3, 4, 4)
X0, X_T, NOISE = (keyed_input(f"gd.{name}", SHAPE) for name in ("x0", "xt", "noise"))
X0 = X0.clamp(-1, 1)
T = torch.tensor([0, 37])
MEANS = ("PREVIOUS_X", "START_X", "EPSILON")
VARIANCES = tuple(ModelVarType.__members__)
LOSSES = tuple(LossType.__members__)


def make(
    betas="linear",
    mean="EPSILON",
    variance="FIXED_SMALL",
    loss="MSE",
    num_steps=50,
    cls=GaussianDiffusion,
    **options,
):
    if isinstance(betas, str):
        betas = get_named_beta_schedule(betas, num_steps)
    return cls(
        betas=betas,
        model_mean_type=ModelMeanType[mean],
        model_var_type=ModelVarType[variance],
        loss_type=LossType[loss],
        **options,
    )


# -- recorded ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(request):
    return load_file(request.path.parents[1] / "golden" / "gaussian.safetensors")


def toy(learned):
    """The recorded network: a formula, with another one for the variance."""

    def model(x, t, **kwargs):
        eps = 0.6 * x + 0.2 * torch.sin(3 * x) + 0.001 * t.float().reshape(-1, 1, 1, 1)
        return torch.cat([eps, torch.cos(2 * x)], dim=1) if learned else eps

    return model


def pull(x, t, **kwargs):
    return -0.1 * x


def single_steps(schedule, mean, variance):
    """What was recorded of one step and of the losses."""
    model = toy("LEARNED" in variance)
    diffusion = make(schedule, mean, variance)
    out = diffusion.p_mean_variance(model, X_T, T, clip_denoised=True)
    got = {f"pmv.{name}": value for name, value in out.items()}
    torch.manual_seed(0)
    got["p_sample"] = diffusion.p_sample(model, X_T, T)["sample"]
    torch.manual_seed(0)
    got["ddim"] = diffusion.ddim_sample(model, X_T, T, eta=0.3)["sample"]
    got["ddim_rev"] = diffusion.ddim_reverse_sample(model, X_T, T)["sample"]
    for loss in LOSSES if schedule == "linear" else ():
        diffusion = make(schedule, mean, variance, loss, rescale_timesteps=loss == "KL")
        terms = diffusion.training_losses(model, X0, T, noise=NOISE)
        got |= {f"{loss}.{name}": value for name, value in terms.items()}
    return {f"gd.{schedule}.{mean}.{variance}.{name}": value for name, value in got.items()}


def chains():
    """What was recorded of whole chains: by name, and by whether they add up 50 steps."""
    diffusion, model = make(variance="LEARNED_RANGE", loss="RESCALED_MSE"), toy(True)
    runs = {
        "p": (diffusion.p_sample_loop, {}),
        "ddim": (diffusion.ddim_sample_loop, {"eta": 0.5}),
        "p_cond": (diffusion.p_sample_loop, {"cond_fn": pull}),
        "ddim_cond": (diffusion.ddim_sample_loop, {"cond_fn": pull}),
    }
    got = {}
    for name, (loop, options) in runs.items():
        torch.manual_seed(1)
        got[f"gd.loop.{name}"] = loop(model, SHAPE, noise=X_T, **options)
    spaced = make(
        variance="FIXED_LARGE",
        cls=respace.SpacedDiffusion,
        use_timesteps=respace.space_timesteps(50, "ddim10"),
        rescale_timesteps=True,
    )
    torch.manual_seed(2)
    got["gd.spaced.p"] = spaced.p_sample_loop(toy(False), SHAPE, noise=X_T)
    got["gd.spaced.ddim"] = spaced.ddim_sample_loop(toy(False), SHAPE, noise=X_T)
    got["gd.spaced.betas"] = torch.from_numpy(spaced.betas)
    return got


def bounds():
    torch.manual_seed(1)
    out = make(variance="LEARNED_RANGE").calc_bpd_loop(toy(True), X0)
    return {f"gd.bpd.{name}": value for name, value in out.items()}


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_single_steps_and_losses_are_the_recorded_ones(recorded, schedule, mean, variance):
    hold(single_steps(schedule, mean, variance), recorded, f"gd.{schedule}.{mean}.{variance}.")


def test_chains_are_the_recorded_ones(recorded):
    got = chains()
    torch.testing.assert_close(got.pop("gd.spaced.betas"), recorded["gd.spaced.betas"], rtol=0, atol=1e-15)
    assert got.keys() == {n for n in recorded if n.startswith(("gd.loop.", "gd.spaced."))} - {
        "gd.spaced.betas"
    }
    for name, value in got.items():
        atol = 1e-4 * recorded[name].abs().max().item()
        torch.testing.assert_close(value, recorded[name], rtol=0, atol=atol)


def test_bounds_are_the_recorded_ones(recorded):
    hold(bounds(), recorded, "gd.bpd.")


def test_every_recorded_tensor_has_its_test(recorded):
    """267 of them begin as one of the tests above or those of schedules and likelihoods look for; no more."""
    steps = tuple(f"gd.{s}.{m}.{v}." for s in ("linear", "cosine") for m in MEANS for v in VARIANCES)
    elsewhere = ("gd.betas.linear", "gd.betas.cosine", "gd.normal_kl", "gd.dgll")
    known = [n for n in recorded if n.startswith((*steps, "gd.loop.", "gd.spaced.", "gd.bpd."))]
    assert sorted([*known, *elsewhere]) == sorted(recorded)
    assert len(recorded) == 268


def hold(got, recorded, prefix):
    assert got.keys() == {name for name in recorded if name.startswith(prefix)}
    for name, value in got.items():
        assert value.shape == recorded[name].shape, name
        torch.testing.assert_close(
            value, recorded[name], rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_named_betas_are_the_recorded_ones(recorded, name):
    np.testing.assert_allclose(get_named_beta_schedule(name, 50), recorded[f"gd.betas.{name}"], atol=1e-16)


# -- laws --------------------------------------------------------------------------------------------------

SIZES = (2, 3, 5, 4)
LEVELS = torch.tensor([1, 9])


def short(num_steps=13, **options):
    """A chain of few levels that ends in noise, for float64."""
    return make(np.linspace(0.01, 0.6, num_steps), **options)


def samples(count=3, shape=SIZES, seed=0):
    return normals(*shape, count=count, seed=seed)


def shaped(table, t):
    return torch.from_numpy(table)[t].reshape(-1, 1, 1, 1)


class Network:
    """One noise prediction, told in the words of any kind of mean, with values for the variance."""

    def __init__(self, diffusion, values=None):
        self.diffusion, self.values = diffusion, values

    def eps(self, x, t):
        return 0.6 * x + 0.2 * torch.sin(3 * x) + 0.01 * t.to(x.dtype).reshape(-1, 1, 1, 1)

    def __call__(self, x, t):
        d, eps = self.diffusion, self.eps(x, t)
        alpha_bar = shaped(d.alphas_cumprod, t)
        x0 = (x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
        answer = {
            ModelMeanType.EPSILON: eps,
            ModelMeanType.START_X: x0,
            ModelMeanType.VELOCITY: alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x0,
            ModelMeanType.PREVIOUS_X: shaped(d.posterior_mean_coef1, t) * x0
            + shaped(d.posterior_mean_coef2, t) * x,
        }[d.model_mean_type]
        return answer if self.values is None else torch.cat([answer, self.values.expand_as(x)], dim=1)


class Perfect:
    """A network that knows the clean samples, and so is never wrong, in the words of its kind of mean."""

    def __init__(self, diffusion, x0):
        self.diffusion, self.x0 = diffusion, x0

    def __call__(self, x, t):
        d = self.diffusion
        alpha_bar = shaped(d.alphas_cumprod, t)
        eps = (x - alpha_bar.sqrt() * self.x0) / (1 - alpha_bar).sqrt()
        if d.model_mean_type == ModelMeanType.PREVIOUS_X:
            return shaped(d.posterior_mean_coef1, t) * self.x0 + shaped(d.posterior_mean_coef2, t) * x
        return {
            ModelMeanType.EPSILON: eps,
            ModelMeanType.START_X: self.x0,
            ModelMeanType.VELOCITY: alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * self.x0,
        }[d.model_mean_type]


def same(got, want, atol=1e-12):
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


@pytest.mark.parametrize("mean", ["PREVIOUS_X", "START_X", "VELOCITY"])
def test_one_network_told_in_other_words_takes_the_same_steps(mean):
    x, x0, noise = samples()
    told, plain = short(mean=mean), short()
    for method in ("p_sample", "ddim_sample", "ddim_reverse_sample"):
        got, want = (one_step(d, method, x) for d in (told, plain))
        for name in want:
            same(got[name], want[name])
    bounds = [
        d._vb_terms_bpd(Network(d), x0, x, LEVELS, clip_denoised=False)["output"] for d in (told, plain)
    ]
    same(*bounds)


def one_step(diffusion, method, x):
    torch.manual_seed(0)
    return getattr(diffusion, method)(Network(diffusion), x, LEVELS, clip_denoised=False)


@pytest.mark.parametrize("mean", ModelMeanType.__members__)
def test_a_perfect_network_has_no_loss_and_finds_the_clean_samples(mean):
    x0, noise, _ = samples()
    for loss in ("MSE", "RESCALED_MSE"):
        diffusion = short(mean=mean, loss=loss)
        model = Perfect(diffusion, x0)
        terms = diffusion.training_losses(model, x0, LEVELS, noise=noise)
        same(terms["loss"], torch.zeros(2, dtype=torch.float64))
        assert terms.keys() == {"loss", "mse"}
    diffusion = short(mean=mean, loss="KL")
    same(
        diffusion.training_losses(model, x0, LEVELS, noise=noise)["loss"], torch.zeros(2, dtype=torch.float64)
    )
    # Its chain ends exactly there: the last mean is x0, and no noise is added to it.
    same(diffusion.p_sample_loop(model, SIZES, noise=noise, clip_denoised=False), x0)


def test_noising_has_its_stated_moments():
    x0, noise, _ = samples()
    diffusion = short()
    mean, variance, log_variance = diffusion.q_mean_variance(x0, LEVELS)
    same(diffusion.q_sample(x0, LEVELS, noise), mean + variance.sqrt() * noise)
    same(log_variance, variance.log())
    assert mean.shape == variance.shape == log_variance.shape == x0.shape


def test_the_posterior_of_noised_samples_has_the_marginal_one_level_cleaner():
    """E over q(x_t | x0) of the posterior is q(x_{t-1} | x0): means follow, variances add."""
    x0, _, _ = samples()
    diffusion = short()
    mean_t, variance_t, _ = diffusion.q_mean_variance(x0, LEVELS)
    mean, variance, log_variance = diffusion.q_posterior_mean_variance(x0, mean_t, LEVELS)
    coef = shaped(diffusion.posterior_mean_coef2, LEVELS)
    before = diffusion.q_mean_variance(x0, LEVELS - 1)
    same(mean, before[0])
    same(variance + coef**2 * variance_t, before[1])
    same(log_variance, variance.log())


def test_tables_are_float64_under_the_original_names():
    diffusion = short()
    names = """betas alphas_cumprod alphas_cumprod_prev alphas_cumprod_next sqrt_alphas_cumprod
        sqrt_one_minus_alphas_cumprod log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod
        sqrt_recipm1_alphas_cumprod posterior_variance posterior_log_variance_clipped posterior_mean_coef1
        posterior_mean_coef2""".split()
    for name in names:
        table = getattr(diffusion, name)
        assert isinstance(table, np.ndarray) and table.shape == (13,) and table.dtype == np.float64, name
    a = diffusion.alphas_cumprod
    for name, want in {
        "sqrt_alphas_cumprod": a**0.5,
        "sqrt_one_minus_alphas_cumprod": (1 - a) ** 0.5,
        "log_one_minus_alphas_cumprod": np.log(1 - a),
        "sqrt_recip_alphas_cumprod": a**-0.5,
        "sqrt_recipm1_alphas_cumprod": (1 / a - 1) ** 0.5,
        "alphas_cumprod_next": np.append(a[1:], 0),
    }.items():
        np.testing.assert_allclose(getattr(diffusion, name), want, rtol=0, atol=1e-14)
    assert diffusion.num_timesteps == 13


def test_fixed_and_learned_variances_lie_in_their_order():
    """The posterior's is the least that data of any kind have, beta the most; learned ranges span them."""
    t = torch.arange(13)
    x = torch.zeros(13, 1, 1, 1, dtype=torch.float64)
    ends = {}
    for name, variance, value in (
        ("small", "FIXED_SMALL", None),
        ("large", "FIXED_LARGE", None),
        ("low", "LEARNED_RANGE", -1.0),
        ("middle", "LEARNED_RANGE", 0.0),
        ("high", "LEARNED_RANGE", 1.0),
    ):
        diffusion = short(variance=variance)
        values = None if value is None else torch.tensor(value, dtype=torch.float64)
        out = diffusion.p_mean_variance(Network(diffusion, values), x, t)
        ends[name] = (out["variance"].flatten(), out["log_variance"].flatten())
    small, large, betas = ends["small"], ends["large"], torch.from_numpy(diffusion.betas)
    assert (small[0] <= large[0]).all() and (small[0][1:] < large[0][1:]).all()
    assert small[0][0] == 0 and large[0][0] == small[0][1] > 0
    same(small[1][1:], small[0][1:].log())
    same(small[1][0], small[0][1].log())  # the first level takes the second's
    same(large[1], large[0].log())
    same(large[0][1:], betas[1:])
    same(ends["low"][1], small[1])
    same(ends["high"][0], betas)
    same(ends["middle"][1], (small[1] + betas.log()) / 2)


def test_a_learned_variance_is_the_network_s_second_half():
    diffusion = short(variance="LEARNED")
    x, values, _ = samples()
    out = diffusion.p_mean_variance(Network(diffusion, values), x, LEVELS)
    same(out["log_variance"], values)
    same(out["variance"], values.exp())
    plain = short()
    same(out["mean"], plain.p_mean_variance(Network(plain), x, LEVELS)["mean"])


def test_ddim_with_eta_1_is_ddpm_with_the_posterior_s_variance():
    x, _, _ = samples()
    diffusion = short()
    drawn = {}
    for seed in (0, 1):
        for eta in (None, 1.0):
            torch.manual_seed(seed)
            step = diffusion.p_sample if eta is None else diffusion.ddim_sample
            options = {} if eta is None else {"eta": eta}
            drawn[seed, eta] = step(Network(diffusion), x, LEVELS, clip_denoised=False, **options)["sample"]
    same(drawn[0, 1.0], drawn[0, None])
    noises = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        noises.append(torch.randn_like(x))
    spread = shaped(diffusion.posterior_variance, LEVELS).sqrt()
    same(drawn[0, 1.0] - drawn[1, 1.0], spread * (noises[0] - noises[1]))


def test_ddim_draws_its_noise_even_where_it_is_not_used():
    """Later draws of the same generator depend on it."""
    x = samples()[0]
    diffusion = short()
    torch.manual_seed(3)
    a = diffusion.ddim_sample(Network(diffusion), x, LEVELS)["sample"]
    after = torch.randn(1)
    torch.manual_seed(3)
    torch.randn_like(x)
    assert torch.equal(torch.randn(1), after)
    same(diffusion.ddim_sample(Network(diffusion), x, LEVELS)["sample"], a)


def round_trip(diffusion, model, x):
    """Walk x up to the noisiest level and down to the first again."""
    last = diffusion.num_timesteps - 1
    there = x
    for level in range(last):
        t = torch.full((len(x),), level)
        there = diffusion.ddim_reverse_sample(model, there, t, clip_denoised=False)["sample"]
    back = there
    for level in range(last, 0, -1):
        back = diffusion.ddim_sample(model, back, torch.full((len(x),), level), clip_denoised=False)["sample"]
    return there, back


def test_ddim_reverse_and_ddim_undo_each_other_where_the_noise_is_known():
    """On the line from x0 to eps nothing is lost, however large the steps."""
    x0, eps, _ = samples()
    diffusion = short()
    start = diffusion.q_sample(x0, torch.zeros(2, dtype=torch.int64), eps)
    there, back = round_trip(diffusion, lambda x, t: eps, start)
    same(there, diffusion.q_sample(x0, torch.full((2,), 12), eps))
    same(back, start)


def test_ddim_reverse_and_ddim_return_to_the_start_for_a_linear_score():
    """To 1e-4 over 200 steps, and ten times as far off over 20: both are of first order."""
    angle = np.linspace(0.03, 0.1, 201)  # alpha_bar = cos(angle)^2: even steps along the flow
    alpha_bar = np.cos(angle) ** 2
    betas = 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])
    mean = torch.tensor([0.3, -0.7], dtype=torch.float64).reshape(-1, 1, 1, 1)
    start = mean + 0.5 * samples()[0].clamp(-2, 2)
    gaps = []
    for levels in (range(201), range(0, 201, 10)):
        diffusion = make(betas, cls=respace.SpacedDiffusion, use_timesteps=levels)

        def score(x, t):
            a = shaped(alpha_bar, t)
            return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * 0.25 + 1 - a)

        there, back = round_trip(diffusion, score, start)
        assert (there - start).abs().max() > 0.01
        gaps.append((back - start).abs().max().item())
    assert gaps[0] < 1e-4
    assert 8 < gaps[1] / gaps[0] < 12


class Exact:
    """The best network for data ~ N(mean, spread^2): exact mean and variance of p(x_{t-1} | x_t)."""

    mean, spread = 0.3, 0.5

    def __init__(self, diffusion):
        self.diffusion = diffusion

    def marginal(self, alpha_bar):
        return alpha_bar * self.spread**2 + 1 - alpha_bar

    def __call__(self, x, t):
        d = self.diffusion
        a, before = shaped(d.alphas_cumprod, t), shaped(d.alphas_cumprod_prev, t)
        alpha, variance = a / before, self.marginal(before)
        eps = (1 - a).sqrt() * (x - a.sqrt() * self.mean) / self.marginal(a)
        log_variance = (variance * (1 - alpha) / (alpha * variance + 1 - alpha)).log()
        return torch.cat([eps, log_variance.expand_as(x)], dim=1)


def test_the_bound_of_the_best_network_is_the_negative_log_likelihood():
    """With the exact reverse process no KL is left: the bound is -log p(x), image by image."""
    diffusion = make(variance="LEARNED", decoder_nll="gaussian", num_steps=30)
    unit = normals(2, 3, 128, 128, count=1, seed=3)[0]
    x = 0.3 + torch.tensor([0.4, 0.6], dtype=torch.float64).reshape(-1, 1, 1, 1) * unit
    torch.manual_seed(0)
    out = diffusion.calc_bpd_loop(Exact(diffusion), x)
    z2 = ((x - 0.3) / 0.5).square().mean(dim=(1, 2, 3))
    nll = (0.5 * math.log(2 * math.pi * 0.25) + 0.5 * z2) / math.log(2)
    # Mostly the last term varies, by a bit a value: 49,152 of them leave 0.005 bits to chance.
    torch.testing.assert_close(out["total_bpd"], nll, rtol=0, atol=0.015)
    # A fixed variance can only be worse.
    for variance in ("FIXED_SMALL", "FIXED_LARGE"):
        fixed = make(variance=variance, decoder_nll="gaussian", num_steps=30)
        torch.manual_seed(0)
        worse = fixed.calc_bpd_loop(lambda x, t, f=fixed: Exact(f)(x, t)[:, :3], x)["total_bpd"]
        assert (worse > nll + 0.02).all(), variance


def test_the_bound_is_its_prior_and_the_sum_of_its_terms():
    x = samples()[0].clamp(-1, 1)
    diffusion = short()
    model = Network(diffusion)
    torch.manual_seed(0)
    out = diffusion.calc_bpd_loop(model, x)
    assert {name: tuple(value.shape) for name, value in out.items()} == {
        "total_bpd": (2,),
        "prior_bpd": (2,),
        "vb": (2, 13),
        "xstart_mse": (2, 13),
        "mse": (2, 13),
    }
    same(out["total_bpd"], out["prior_bpd"] + out["vb"].sum(dim=1))
    # Each column is one term, the noisiest level first, with noise drawn in that order.
    torch.manual_seed(0)
    for column, level in enumerate(range(12, -1, -1)):
        t, noise = torch.full((2,), level), torch.randn_like(x)
        term = diffusion._vb_terms_bpd(model, x, diffusion.q_sample(x, t, noise), t)
        same(out["vb"][:, column], term["output"])
        same(out["xstart_mse"][:, column], (term["pred_xstart"] - x).square().mean(dim=(1, 2, 3)))
    # Against the unit normal's own formula.
    a = diffusion.alphas_cumprod[-1]
    kl = 0.5 * (a * x.square() + (1 - a) - 1 - math.log(1 - a))
    same(out["prior_bpd"], kl.mean(dim=(1, 2, 3)) / math.log(2))


def test_the_noise_error_of_the_bound_is_that_of_the_prediction():
    """Without clipping, predicted noise and predicted clean sample are one prediction."""
    x = samples()[0]
    diffusion = short()
    out = diffusion.calc_bpd_loop(Network(diffusion), x, clip_denoised=False)
    ratio = torch.from_numpy(1 / diffusion.alphas_cumprod - 1).flip(0)
    torch.testing.assert_close(out["xstart_mse"], out["mse"] * ratio, rtol=1e-10, atol=0)


def test_the_bound_trains_the_variance_and_the_error_the_mean():
    x0, noise, values = samples()
    answer = torch.cat([x0, values], dim=1).requires_grad_()
    terms = short(variance="LEARNED_RANGE").training_losses(lambda x, t: answer, x0, LEVELS, noise=noise)
    mean, variance = torch.autograd.grad(terms["vb"].sum(), answer, retain_graph=True)[0].chunk(2, dim=1)
    assert mean.abs().max() == 0 and variance.abs().min() > 0
    mean, variance = torch.autograd.grad(terms["mse"].sum(), answer, retain_graph=True)[0].chunk(2, dim=1)
    assert variance.abs().max() == 0 and mean.abs().min() > 0
    same(terms["loss"], terms["mse"] + terms["vb"])
    whole = short(variance="LEARNED_RANGE", loss="KL").training_losses(
        lambda x, t: answer, x0, LEVELS, noise=noise
    )
    same(whole["loss"], terms["vb"])


def test_rescaled_losses_are_multiples():
    x0, noise, values = samples()

    def loss(kind):
        diffusion = short(variance="LEARNED", loss=kind)
        return diffusion.training_losses(Network(diffusion, values), x0, LEVELS, noise=noise)

    same(loss("RESCALED_KL")["loss"], 13 * loss("KL")["loss"])
    same(loss("RESCALED_MSE")["vb"], 13 / 1000 * loss("MSE")["vb"])
    same(loss("RESCALED_MSE")["mse"], loss("MSE")["mse"])
    assert [LossType[name].is_vb() for name in LOSSES] == [False, False, True, True]


def test_losses_draw_their_noise_where_none_is_given():
    x0 = samples()[0]
    diffusion = short()
    torch.manual_seed(5)
    got = diffusion.training_losses(Network(diffusion), x0, LEVELS)["loss"]
    torch.manual_seed(5)
    noise = torch.randn_like(x0)
    same(got, diffusion.training_losses(Network(diffusion), x0, LEVELS, noise=noise)["loss"])


class Gaussian:
    """The exact noise prediction of data ~ N(mean, spread^2), and the gradient of its log density."""

    def __init__(self, diffusion, mean, spread=0.5):
        self.diffusion, self.mean, self.spread = diffusion, mean, spread

    def gradient(self, x, t):
        a = shaped(self.diffusion.alphas_cumprod, t)
        return -(x - a.sqrt() * self.mean) / (a * self.spread**2 + 1 - a)

    def __call__(self, x, t):
        return -(1 - shaped(self.diffusion.alphas_cumprod, t)).sqrt() * self.gradient(x, t)


def test_a_classifier_s_gradient_turns_one_density_into_the_other():
    """log p(class | x_t) = log p(x_t | class) - log p(x_t) + a constant: the score becomes the class's own."""
    x = samples()[0]
    diffusion = short()
    all_data, one_class = Gaussian(diffusion, 0.0, 0.9), Gaussian(diffusion, 0.7, 0.3)

    def classifier(x, t):
        return one_class.gradient(x, t) - all_data.gradient(x, t)

    plain = diffusion.p_mean_variance(all_data, x, LEVELS, clip_denoised=False)
    want = diffusion.p_mean_variance(one_class, x, LEVELS, clip_denoised=False)
    got = diffusion.condition_score(classifier, plain, x, LEVELS)
    same(got["pred_xstart"], want["pred_xstart"])
    same(got["mean"], want["mean"])
    same(got["variance"], plain["variance"])
    guided, direct = (
        diffusion.ddim_sample(model, x, LEVELS, clip_denoised=False, cond_fn=cond_fn)["sample"]
        for model, cond_fn in ((all_data, classifier), (one_class, None))
    )
    same(guided, direct)


def test_a_classifier_s_gradient_moves_the_mean_by_the_variance():
    x, slope, _ = samples()
    diffusion = short(variance="FIXED_LARGE")
    out = diffusion.p_mean_variance(Network(diffusion), x, LEVELS)
    got = diffusion.condition_mean(lambda x, t: slope, out, x, LEVELS)
    same(got - out["mean"], torch.from_numpy(diffusion.betas)[LEVELS].reshape(-1, 1, 1, 1) * slope)


def test_model_and_classifier_are_told_the_same_arguments():
    told = []

    def note(x, t, y):
        told.append((t.tolist(), y))
        return 0 * x

    x = samples()[0]
    kwargs = {"cond_fn": note, "model_kwargs": {"y": "label"}}
    short(rescale_timesteps=True).p_sample(note, x, LEVELS, **kwargs)
    short().ddim_sample(note, x, LEVELS, **kwargs)
    scaled = [float(np.float32(t * 1000.0 / 13)) for t in (1, 9)]
    assert told == [(pytest.approx(scaled), "label")] * 2 + [([1, 9], "label")] * 2


def test_clean_samples_are_changed_by_denoised_fn_and_then_clipped():
    x = samples()[0]
    pixels, latents = short(), short(decoder_nll="gaussian")
    asked = []

    def double(x0):
        asked.append(x0)
        return 2 * x0

    plain = pixels.p_mean_variance(Network(pixels), x, LEVELS, clip_denoised=False)["pred_xstart"]
    assert plain.abs().max() > 2
    got = pixels.p_mean_variance(Network(pixels), x, LEVELS, denoised_fn=double)["pred_xstart"]
    same(got, (2 * plain).clamp(-1, 1))
    same(asked[0], plain)
    # Pixels are clipped unless that is switched off, latents only where it is asked for.
    ask = latents.p_mean_variance
    same(ask(Network(latents), x, LEVELS)["pred_xstart"], plain)
    same(ask(Network(latents), x, LEVELS, clip_denoised=True)["pred_xstart"], plain.clamp(-1, 1))


def test_loops_yield_every_level_and_end_in_their_last_sample():
    diffusion = short()
    noise = samples()[0]
    for loop in ("p_sample_loop", "ddim_sample_loop"):
        torch.manual_seed(2)
        steps = list(getattr(diffusion, f"{loop}_progressive")(Network(diffusion), SIZES, noise=noise))
        torch.manual_seed(2)
        last = getattr(diffusion, loop)(Network(diffusion), SIZES, noise=noise)
        assert len(steps) == 13 and steps[0].keys() == {"sample", "pred_xstart"}
        assert torch.equal(steps[-1]["sample"], last)
        assert not torch.equal(steps[-2]["sample"], last)


def test_loops_draw_their_start_on_the_model_s_device(capsys):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.5))

        def forward(self, x, t):
            return self.weight * x

    diffusion = short()
    torch.manual_seed(4)
    got = diffusion.ddim_sample_loop(Model(), SIZES, progress=True)
    assert not got.requires_grad and "13/13" in capsys.readouterr().err
    torch.manual_seed(4)
    noise = torch.randn(*SIZES)
    same(diffusion.ddim_sample_loop(Model(), SIZES, noise=noise), got, atol=1e-6)


@pytest.mark.parametrize("cls", [GaussianDiffusion, respace.SpacedDiffusion])
def test_everything_stays_on_the_model_s_device(cls):
    """The meta device computes nothing, but lets no tensor of the CPU in."""
    options = {} if cls is GaussianDiffusion else {"use_timesteps": [1, 5, 12]}
    diffusion = make(np.linspace(0.01, 0.6, 13), variance="LEARNED_RANGE", cls=cls, **options)
    model = nn.Conv2d(3, 6, 1, device="meta")

    def ask(x, t):
        assert t.device.type == "meta"
        return model(x)

    got = diffusion.p_sample_loop(ask, SIZES, cond_fn=lambda x, t: x, device="meta")
    assert got.device.type == "meta"
    assert diffusion.ddim_sample_loop(ask, SIZES, noise=got, cond_fn=lambda x, t: x, eta=0.5).is_meta
    t = torch.zeros(2, dtype=torch.int64, device="meta")
    assert diffusion.ddim_reverse_sample(ask, got, t)["sample"].is_meta
    assert diffusion.calc_bpd_loop(ask, got)["total_bpd"].is_meta
    assert diffusion.training_losses(ask, got, t)["loss"].is_meta


def test_a_chain_may_end_without_signal():
    """A last beta of 1, as schedules with zero terminal signal have: pure noise is told apart by no one."""
    betas = np.append(np.linspace(0.01, 0.3, 12), 1.0)
    x0, noise, _ = samples()
    for mean in ("VELOCITY", "START_X", "PREVIOUS_X"):
        diffusion = make(betas, mean)
        assert diffusion.alphas_cumprod[-1] == 0
        got = diffusion.p_sample_loop(lambda x, t: 0.5 * x, SIZES, noise=noise)
        assert got.isfinite().all()
        ddim = diffusion.ddim_sample_loop(lambda x, t: 0.5 * x, SIZES, noise=noise, eta=0.5)
        assert ddim.isfinite().all()
        top = torch.full((2,), 12)
        same(diffusion.q_sample(x0, top, noise), noise)
        same(diffusion._prior_bpd(x0), torch.zeros(2, dtype=torch.float64))
    with pytest.raises(
        UsageError, match="EPSILON needs some signal .* none at level 12 of 13; take VELOCITY"
    ):
        make(betas, "EPSILON")


def test_signal_may_be_gone_for_several_levels():
    diffusion = make([0.1, 1.0, 1.0], "START_X")
    np.testing.assert_allclose(diffusion.posterior_mean_coef1, [1, 0.9**0.5, 0], rtol=0, atol=1e-15)
    np.testing.assert_allclose(diffusion.posterior_mean_coef2, [0, 0, 0], rtol=0, atol=1e-15)
    np.testing.assert_allclose(diffusion.posterior_variance, [0, 0.1, 1], rtol=0, atol=1e-15)


def test_a_chain_of_one_level_has_its_beta_for_a_variance():
    diffusion = make([0.4])
    assert diffusion.posterior_log_variance_clipped.tolist() == [math.log(0.4)]
    x0, noise, _ = samples()
    got = diffusion.p_sample_loop(Perfect(diffusion, x0), SIZES, noise=noise, clip_denoised=False)
    same(got, x0)


def test_the_learned_range_may_be_left():
    """A network is not held to [-1, 1]; the line simply goes on."""
    least, most = torch.tensor(-3.0), torch.tensor(-1.0)
    got = range_log_variance(torch.tensor([-2.0, 3.0]), least=least, most=most)
    torch.testing.assert_close(got, torch.tensor([-4.0, 1.0]), rtol=0, atol=0)


def test_a_given_beta_replaces_the_quotient():
    a, before, beta = (torch.tensor(v, dtype=torch.float64) for v in (0.3, 0.6, 0.5))
    for given, computed in zip(posterior(a, before, beta=beta), posterior(a, before), strict=True):
        same(given, computed, atol=1e-15)


def test_float32_samples_are_answered_in_float32():
    diffusion = short()
    x = samples()[0].float()
    out = diffusion.p_mean_variance(lambda x, t: 0.5 * x, x, LEVELS)
    assert {value.dtype for value in out.values()} == {torch.float32}
    assert diffusion.ddim_sample(lambda x, t: 0.5 * x, x, LEVELS)["sample"].dtype == torch.float32


def test_a_linear_gaussian_of_the_samplers_fits_as_it_is():
    """The tests' own model, asked through apply_model, agrees with the formula above."""
    model = LinearGaussian(num_timesteps=13)
    betas = model.betas.double().numpy()
    diffusion = make(betas)
    x = samples()[0]
    mean = torch.full((2,), 0.7, dtype=torch.float64)
    out = diffusion.p_mean_variance(
        lambda x, t: model.apply_model(x, t, mean), x, LEVELS, clip_denoised=False
    )
    want = diffusion.p_mean_variance(Gaussian(diffusion, 0.7), x, LEVELS, clip_denoised=False)
    same(out["pred_xstart"], want["pred_xstart"], atol=1e-5)


# -- refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["LEARNED", "LEARNED_RANGE"])
def test_a_learned_variance_without_its_channels_is_refused(variance):
    x = samples()[0]
    want = rf"{variance} variance takes 6 channels .*, 2 for each of x: \(2, 6, 5, 4\); got \(2, 3, 5, 4\)"
    with pytest.raises(MismatchError, match=want):
        short(variance=variance).p_mean_variance(lambda x, t: x, x, LEVELS)
    with pytest.raises(MismatchError, match=want):
        short(variance=variance).training_losses(lambda x, t: x, x, LEVELS)


def test_channels_for_a_variance_that_is_fixed_are_refused():
    x = samples()[0]
    want = r"FIXED_LARGE variance takes 3 channels .*: \(2, 3, 5, 4\); got \(2, 6, 5, 4\)"
    with pytest.raises(MismatchError, match=want):
        short(variance="FIXED_LARGE").p_sample(lambda x, t: torch.cat([x, x], dim=1), x, LEVELS)


def test_eta_is_refused_where_it_means_nothing():
    diffusion, x = short(), samples()[0]
    with pytest.raises(UsageError, match="so eta must be 0; got 0.5"):
        diffusion.ddim_reverse_sample(lambda x, t: x, x, LEVELS, eta=0.5)
    for eta in (-0.1, 1.5):
        with pytest.raises(UsageError, match=f"eta must be from 0 .* to 1 .*, got {eta}"):
            diffusion.ddim_sample(lambda x, t: x, x, LEVELS, eta=eta)


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([0.0, 0.1], r"betas must lie in \(0, 1\], got 0 to 0\.1"),
        ([0.1, 1.25], r"betas must lie in \(0, 1\], got 0\.1 to 1\.25"),
        ([0.1, math.nan], r"betas must lie in \(0, 1\], got nan to nan"),
        ([[0.1, 0.2]], r"one non-empty row of numbers, got shape \(1, 2\)"),
        ([], r"one non-empty row of numbers, got shape \(0,\)"),
    ],
)
def test_betas_out_of_range_are_refused(betas, message):
    with pytest.raises(UsageError, match=message):
        make(betas)


@pytest.mark.parametrize(
    ("t", "got"),
    [
        (torch.tensor([3, 13]), r"\[3, 13\]"),
        (torch.tensor([-1, 3]), r"\[-1, 3\]"),
        (torch.tensor([1]), r"torch.int64 of shape \(1,\)"),
        (torch.tensor([[1, 2]]), r"torch.int64 of shape \(1, 2\)"),
        (torch.tensor([1.0, 2.0]), r"torch.float32 of shape \(2,\)"),
    ],
)
def test_levels_out_of_range_are_refused(t, got):
    x = samples()[0]
    diffusion = short()
    want = rf"t should be 2 whole levels from 0 to 12, one for each sample; got {got}$"
    for ask in (
        lambda: diffusion.q_sample(x, t),
        lambda: diffusion.q_mean_variance(x, t),
        lambda: diffusion.q_posterior_mean_variance(x, x, t),
        lambda: diffusion.p_mean_variance(lambda x, t: x, x, t),
    ):
        with pytest.raises(UsageError, match=want):
            ask()


def test_labels_out_of_range_are_refused():
    class Model(nn.Module):
        num_classes = 7

        def forward(self, x, t, y):
            return x

    x = samples()[0]
    diffusion = short()
    spaced = make(diffusion.betas, cls=respace.SpacedDiffusion, use_timesteps=range(13))
    for d in (diffusion, spaced):
        for labels in ([3, 7], [-1, 3]):
            kwargs = {"y": torch.tensor(labels)}
            with pytest.raises(
                UsageError, match=rf"labels must be from 0 to 6, got \[{labels[0]}, {labels[1]}\]"
            ):
                d.p_mean_variance(Model(), x, LEVELS, model_kwargs=kwargs)
        assert (
            d.p_sample(Model(), x, LEVELS, model_kwargs={"y": torch.tensor([0, 6])})["sample"].shape == SIZES
        )


def test_shapes_that_do_not_fit_are_refused():
    x, other = samples()[0], samples(shape=(2, 3, 4, 5))[0]
    diffusion = short()
    for name, ask in {
        "noise": lambda: diffusion.q_sample(x, LEVELS, noise=other),
        "x_start": lambda: diffusion.q_posterior_mean_variance(other, x, LEVELS),
        "eps": lambda: diffusion._predict_xstart_from_eps(x, LEVELS, other),
        "xprev": lambda: diffusion._predict_xstart_from_xprev(x, LEVELS, other),
    }.items():
        with pytest.raises(
            MismatchError, match=rf"{name} should have .* shape \(2, 3, 5, 4\), got \(2, 3, 4, 5\)"
        ):
            ask()
    with pytest.raises(MismatchError, match=r"noise should have shape \(2, 3, 5, 4\), got \(2, 3, 4, 5\)"):
        diffusion.p_sample_loop(lambda x, t: x, SIZES, noise=other)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(UsageError, match="schedule 'sqrt' is unknown; choose one of linear, cosine"):
        get_named_beta_schedule("sqrt", 50)
    with pytest.raises(UsageError, match="decoder_nll must be one of discretized, gaussian; got 'pixel'"):
        short(decoder_nll="pixel")


def test_betas_are_cut_from_any_curve_by_the_original_s_keyword():
    got = gd.betas_for_alpha_bar(num_diffusion_timesteps=3, alpha_bar=lambda t: 1 - t, max_beta=0.6)
    np.testing.assert_allclose(got, [1 / 3, 0.5, 0.6], rtol=0, atol=1e-15)
