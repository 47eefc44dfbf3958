"""The parts of training: losses, draws, attention, merged configurations and the script's command line."""

import math
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tiny_training import figures, first_stage
from torch import nn

from ldm.errors import AbsentError, MismatchError, UsageError
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.losses import DummyLoss, LPIPSWithDiscriminator
from ldm.modules.losses.discriminator import NLayerDiscriminator, hinge_d_loss, vanilla_d_loss
from ldm.modules.losses.lpips import LPIPS
from ldm.training.attention import MatmulAttention, matmul_attend
from ldm.training.draws import Draws
from ldm.training.merging import merge_configs
from ldm.training.optimizers import learning_rate

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"


def pictures(seed, b=2):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(b, 3, 20, 12, generator=g) * 2 - 1


def posterior(b=2):
    g = torch.Generator().manual_seed(9)
    return DiagonalGaussianDistribution(torch.randn(b, 8, 5, 3, generator=g))


def loss_of(**options):
    return LPIPSWithDiscriminator(**{"disc_start": 3, "perceptual_weight": 0.0, "disc_ndf": 8, **options})


# -- losses ------------------------------------------------------------------------------------------------


def test_without_adversary_the_loss_is_pixels_plus_kl():
    """Summed over pixels, averaged over the batch: |x - y| / exp(v) + v, plus the weighted KL."""
    x, y, p = pictures(0), pictures(1), posterior()
    loss, values = loss_of(disc_factor=0.0, kl_weight=0.01, logvar_init=0.5)(x, y, p, 0, 0)
    pixels = ((x - y).abs() / math.exp(0.5) + 0.5).sum() / 2
    torch.testing.assert_close(loss, pixels + 0.01 * p.kl().mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(values["train/rec_loss"], (x - y).abs().mean())
    squared, _ = loss_of(disc_factor=0.0, kl_weight=0.0, pixel_loss="l2")(x, y, p, 0, 0, split="val")
    torch.testing.assert_close(squared, (x - y).square().sum() / 2, rtol=1e-6, atol=0)
    weighted, _ = loss_of(disc_factor=0.0, kl_weight=0.0)(x, y, p, 0, 0, weights=torch.tensor(3.0))
    torch.testing.assert_close(weighted, 3 * (x - y).abs().sum() / 2, rtol=1e-6, atol=0)


def test_the_adversarial_part_pulls_the_last_layer_as_hard_as_the_pixels():
    """The gradient norms of both parts on the last layer agree, up to disc_weight and the 1e-4 in the ratio."""
    torch.manual_seed(0)
    last = nn.Parameter(torch.randn(3, 3, 1, 1))
    lossy = loss_of(disc_start=0, disc_weight=0.5, kl_weight=0.0, disc_num_layers=1)
    with torch.no_grad():
        lossy.discriminator.main[-1].weight *= 10  # the weight is to be below its bound
    x, h = pictures(0), pictures(1)
    y = nn.functional.conv2d(h, last)
    loss, values = lossy(x, y, posterior(), 0, 0, last_layer=last)
    pixels = (x - y).abs().sum() / 2
    g_pixels = torch.autograd.grad(pixels, last, retain_graph=True)[0]
    g_loss = -lossy.discriminator(y).mean()
    g_adversary = torch.autograd.grad(g_loss, last, retain_graph=True)[0]
    weight = 0.5 * g_pixels.norm() / (g_adversary.norm() + 1e-4)
    torch.testing.assert_close(values["train/d_weight"], weight, rtol=1e-4, atol=0)
    torch.testing.assert_close(loss, pixels + weight * g_loss, rtol=1e-4, atol=0)


def test_the_adversarial_parts_begin_at_disc_start():
    lossy = loss_of(disc_num_layers=1)
    x, y = pictures(0), pictures(1)
    for step, starts in ((2, False), (3, True)):
        value, _ = lossy(x, y, posterior(), 1, step)
        assert bool(value > 0) == starts
        _, values = lossy(x, y, posterior(), 0, step)
        assert ("train/g_loss" in values) == starts


def test_the_discriminator_sends_nothing_back_into_the_first_stage():
    y = pictures(1).requires_grad_()
    lossy = loss_of(disc_start=0, disc_num_layers=1)
    lossy(pictures(0), y, posterior(), 1, 0)[0].backward()
    assert y.grad is None
    weights = [p.grad for p in lossy.discriminator.parameters() if p.dim() == 4]
    assert len(weights) == 3 and all(gradient.abs().sum() > 0 for gradient in weights)


def test_discriminator_losses_are_those_of_their_papers():
    real, fake = torch.tensor([2.0, -0.5]), torch.tensor([-3.0, 0.25])
    assert float(hinge_d_loss(real, fake)) == pytest.approx(0.5 * (0.75 + 0.625))
    cross_entropy = nn.functional.binary_cross_entropy_with_logits
    wanted = cross_entropy(real, torch.ones(2)) + cross_entropy(fake, torch.zeros(2))
    torch.testing.assert_close(vanilla_d_loss(real, fake), 0.5 * wanted)


def test_the_discriminator_has_the_originals_keys_and_patch():
    net = NLayerDiscriminator(input_nc=3, ndf=64, n_layers=3)
    shapes = {key: tuple(value.shape) for key, value in net.state_dict().items() if key.endswith("weight")}
    assert shapes == {
        "main.0.weight": (64, 3, 4, 4),
        "main.2.weight": (128, 64, 4, 4),
        "main.3.weight": (128,),
        "main.5.weight": (256, 128, 4, 4),
        "main.6.weight": (256,),
        "main.8.weight": (512, 256, 4, 4),
        "main.9.weight": (512,),
        "main.11.weight": (1, 512, 4, 4),
    }
    assert net(torch.zeros(2, 3, 70, 70)).shape == (2, 1, 6, 6)
    assert "discriminator.main.0.weight" in loss_of().state_dict()
    assert loss_of(disc_factor=0.0).state_dict().keys() == {"logvar"}


def test_conditions_join_the_discriminators_input():
    lossy = loss_of(disc_start=0, disc_conditional=True, disc_in_channels=5, disc_num_layers=1)
    cond = torch.zeros(2, 2, 20, 12)
    assert lossy(pictures(0), pictures(1), posterior(), 1, 0, cond=cond)[0] > 0
    with pytest.raises(UsageError, match="disc_conditional=True needs cond, got None"):
        lossy(pictures(0), pictures(1), posterior(), 1, 0)


def test_wrong_options_of_the_loss_are_named():
    with pytest.raises(UsageError, match="disc_loss should be 'hinge' or 'vanilla', got 'wgan'"):
        loss_of(disc_loss="wgan")
    with pytest.raises(UsageError, match="pixel_loss should be 'l1' or 'l2', got 'huber'"):
        loss_of(pixel_loss="huber")
    with pytest.raises(UsageError, match="use_actnorm=True is not offered"):
        loss_of(use_actnorm=True)
    with pytest.raises(UsageError, match="disc_factor=0 built none"):
        loss_of(disc_factor=0.0)(pictures(0), pictures(1), posterior(), 1, 0)


def test_dummy_loss_is_nothing():
    assert float(DummyLoss()(1, 2, anything=3)) == 0.0


# -- LPIPS -------------------------------------------------------------------------------------------------


def test_without_weights_the_perceptual_loss_says_where_to_put_them():
    with pytest.raises(
        AbsentError, match=r"no file .*model_data/lpips/lpips_vgg16\.safetensors; put them there"
    ):
        LPIPSWithDiscriminator(disc_start=0, perceptual_weight=1.0)


def test_lpips_reads_the_originals_names_and_measures_a_distance(tmp_path):
    from safetensors.torch import save_file

    # A tensor of the right shape under each name that the original has: 13 convolutions and 5 weighings.
    with torch.device("meta"):
        from ldm.modules.losses.lpips import WIDTHS, NetLinLayer, Vgg16

        names = {f"net.{key}": value for key, value in Vgg16().state_dict().items()}
        for i, width in enumerate(WIDTHS):
            names |= {f"lin{i}.{key}": value for key, value in NetLinLayer(width).state_dict().items()}
    assert (
        len(names) == 31
        and {"net.slice1.0.weight", "net.slice5.28.bias", "lin4.model.1.weight"} <= names.keys()
    )
    g = torch.Generator().manual_seed(0)
    tensors = {key: torch.randn(value.shape, generator=g) * 0.05 for key, value in names.items()}
    tensors |= {key: value.abs() for key, value in tensors.items() if key.startswith("lin")}
    save_file(tensors, tmp_path / "a.safetensors")
    lpips = LPIPS(tmp_path / "a.safetensors").eval()
    x, y = (torch.rand(2, 3, 20, 17, generator=g) * 2 - 1 for _ in range(2))
    assert lpips(x, x).abs().max() == 0
    assert lpips(x, y).shape == (2, 1, 1, 1) and (lpips(x, y) > 0).all()
    torch.testing.assert_close(lpips(x, y), lpips(y, x))
    assert not any(p.requires_grad for p in lpips.parameters())
    del tensors["lin2.model.1.weight"]
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(MismatchError, match=r"1 tensors differ, first 'lin2\.model\.1\.weight'"):
        LPIPS(tmp_path / "b.safetensors")


# -- draws and attention -----------------------------------------------------------------------------------


def test_processes_draw_the_rows_of_one_batch():
    whole, like = Draws(7, 3), torch.zeros(6, 2, 5)
    halves = [Draws(7, 3, rank=rank, world=3) for rank in range(3)]
    part = torch.zeros(2, 2, 5)
    for name, arguments in (("normal", ()), ("uniform", ()), ("levels", (50,))):
        joined = torch.cat([getattr(d, name)(*arguments, part) for d in halves])
        assert torch.equal(joined, getattr(whole, name)(*arguments, like)), name
    assert not torch.equal(Draws(7, 4).normal(like), Draws(7, 3).normal(like))
    assert not torch.equal(Draws(8, 3).normal(like), Draws(7, 3).normal(like))


def test_draws_seed_every_global_generator():
    import random

    def taken(rank=0):
        Draws(7, 3, rank=rank, world=2)
        return torch.rand(2).tolist(), np.random.rand(), random.random()

    assert taken() == taken()
    assert all(a != b for a, b in zip(taken(0), taken(1), strict=True))


@pytest.mark.parametrize(
    "options", [{}, {"is_causal": True}, {"scale": 0.7}, {"mask": "bool"}, {"mask": "float"}]
)
def test_attention_step_by_step_is_the_fused_one(options):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 5, generator=g).bfloat16() for n in (6, 4, 4))
    options = dict(options)
    kind = options.pop("mask", None)
    if kind:
        mask = torch.rand(2, 1, 6, 4, generator=g) > 0.4
        mask[..., 0] = True
        options["attn_mask"] = mask if kind == "bool" else torch.randn(2, 1, 6, 4, generator=g).bfloat16()
    wide = {
        n: o.float() if isinstance(o, torch.Tensor) and kind == "float" else o for n, o in options.items()
    }
    exact = nn.functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), **wide)
    with MatmulAttention():
        got = nn.functional.scaled_dot_product_attention(q, k, v, **options)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), exact, rtol=0, atol=0.03)  # values of about 1 in 8 bits
    assert torch.equal(got, matmul_attend(q, k, v, **options))


def test_attention_of_other_kinds_is_left_alone():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 5, generator=g) for n in (6, 4, 4))
    plain = nn.functional.scaled_dot_product_attention(q, k, v)
    with MatmulAttention():
        assert torch.equal(nn.functional.scaled_dot_product_attention(q, k, v), plain)


# -- configurations and the command line -------------------------------------------------------------------


def test_files_merge_from_left_to_right_then_words(tmp_path):
    (tmp_path / "a.yaml").write_text("model: {target: x, params: {a: 1, b: 2}}\nlist: [1, 2]\n")
    (tmp_path / "b.yaml").write_text("model: {params: {b: 3, c: '${model.params.a}'}}\n")
    merged = merge_configs(
        [tmp_path / "a.yaml", tmp_path / "b.yaml"], ["model.params.a=7", "list=[4]", "new.key=x y"]
    )
    assert OmegaConf.to_container(merged) == {
        "model": {"target": "x", "params": {"a": 7, "b": 3, "c": 7}},
        "list": [4],
        "new": {"key": "x y"},
    }
    for word in ("model.params.a", "=3", "a..b=3", "~", "~a..b", "~a.b=3"):
        with pytest.raises(UsageError, match=r"wanted a\.b=c .* or ~a\.b"):
            merge_configs([tmp_path / "a.yaml"], [word])


@pytest.mark.parametrize(
    ("later", "words", "wanted"),
    [
        ("x: {target: B}", [], {"target": "B", "keep": 0}),
        ("x: {target: B, params: {q: 5}}", [], {"target": "B", "params": {"q": 5}, "keep": 0}),
        (
            "x: {target: A, params: {q: 5}}",
            [],
            {"params": {"p": 1, "in": {"target": "I", "params": {"r": 2}}, "q": 5}},
        ),
        ("x: {params: {in: {target: J}}}", [], {"params": {"p": 1, "in": {"target": "J"}}}),
        (
            "x: {params: {in: {params: {s: 3}}}}",
            [],
            {"params": {"p": 1, "in": {"target": "I", "params": {"r": 2, "s": 3}}}},
        ),
        ("y: 1", ["x.target=B"], {"target": "B"}),
        ("y: 1", ["~x.params.in"], {"params": {"p": 1}}),
        ("y: 1", ["x.params.in=null"], {"params": {"p": 1}}),
        ("y: 1", ["~x.params", "x.params.q=1"], {"params": {"q": 1}}),
        ("y: 1", ["x.new=null"], {"new": None}),
        ("x: {keep: '${x.params.p}'}", [], {"keep": 1}),
    ],
)
def test_another_target_drops_params_and_words_take_out(tmp_path, later, words, wanted):
    (tmp_path / "a.yaml").write_text(
        "x: {target: A, params: {p: 1, in: {target: I, params: {r: 2}}}, keep: 0}"
    )
    (tmp_path / "b.yaml").write_text(later)
    merged = OmegaConf.to_container(merge_configs([tmp_path / "a.yaml", tmp_path / "b.yaml"], words))["x"]
    first = {"target": "A", "params": {"p": 1, "in": {"target": "I", "params": {"r": 2}}}, "keep": 0}
    assert merged == (wanted if wanted.get("target") == "B" and not words else {**first, **wanted})


@pytest.mark.parametrize("word", ["~x.nothing", "~y", "~x.params.p.q", "~x.params.in.target.r"])
def test_what_is_not_there_cannot_be_taken_out(tmp_path, word):
    (tmp_path / "a.yaml").write_text("x: {target: A, params: {p: 1, in: {target: I}}}")
    with pytest.raises(UsageError, match="takes out what is not there"):
        merge_configs([tmp_path / "a.yaml"], [word])


def test_the_rate_is_scaled_as_compvis_does():
    rate, line = learning_rate(2.0e-6, scale=True, accumulate=2, devices=8, batch_size=4)
    assert rate == pytest.approx(1.28e-4) and line.startswith(
        "learning rate 1.28e-04 = 2 (accumulate) x 8 (devices)"
    )
    assert learning_rate(2.0e-6, scale=False, accumulate=2, devices=8, batch_size=4)[0] == 2.0e-6
    with pytest.raises(UsageError, match="at most 10, got inf"):
        learning_rate(float("inf"), scale=False, accumulate=1, devices=1, batch_size=1)


@pytest.mark.parametrize("name", ["shapes-first-stage", "shapes-diffusion"])
def test_the_shipped_configurations_build_all_that_they_name(name):
    from ldm.config import instantiate_from_config
    from ldm.training.data import DataModuleFromConfig

    config = merge_configs([SCRIPT.parents[1] / "configs" / f"{name}.yaml"], [])
    if "first_stage_config" in config.model.params:
        del config.model.params.first_stage_config.params.ckpt_path
    with torch.device("meta"):
        model = instantiate_from_config(config.model)
    stages = [model] if name == "shapes-first-stage" else [model.model, model.cond_stage_model]
    assert 1e6 < sum(p.numel() for stage in stages for p in stage.parameters()) < 12e6
    data = instantiate_from_config(config.data)
    assert isinstance(data, DataModuleFromConfig) and data.validation_source[0]["image"].shape == (
        128,
        128,
        3,
    )


def script(tmp_path, *words):
    return subprocess.run(
        [sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )


def test_the_script_says_what_is_missing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--logdir", "x"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    wanted = "ldm: error: --base is needed: name a configuration such as configs/shapes-first-stage.yaml\n"
    assert (stop.value.code, *capfd.readouterr()) == (2, "", wanted)


def train_script():
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import train
    finally:
        sys.path.pop(0)
    return train


def test_the_script_knows_its_options():
    train = train_script()
    parse = train.make_parser().parse_args
    options = parse(["--base", "a.yaml", "b.yaml", "--logdir", "x", "--resume", "--seed", "7"])
    assert (options.base, options.resume, options.seed, options.scale_lr) == (
        ["a.yaml", "b.yaml"],
        "",
        7,
        True,
    )
    words = ["a.b=1", "--logdir", "x", "c.d=2", "--seed", "7", "e.f=3"]
    assert parse(words).words == ["a.b=1", "c.d=2", "e.f=3"] and parse(words).seed == 7
    assert parse(["--scale_lr", "False"]).scale_lr is False and parse([]).seed == 23
    with pytest.raises(UsageError, match="wanted true or false, got 'maybe'"):
        parse(["--scale_lr", "maybe"])
    with pytest.raises(AbsentError, match=r"there is no checkpoint in 'nowhere' to export"):
        train.main(["--logdir", "nowhere", "--export", "a.safetensors"])


@pytest.mark.parametrize(
    ("resume", "message"),
    [
        ("lgos/mine", "--resume 'lgos/mine' is not there"),
        ("last.ckpt", "--resume 'last.ckpt' is not there"),
        ("logs", "'logs' holds no run, there is no configs/project.yaml in it"),
        ("logs/stray.ckpt", "--base is needed"),
    ],
)
def test_what_cannot_be_resumed_is_named(tmp_path, monkeypatch, resume, message):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "stray.ckpt").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    with pytest.raises((AbsentError, UsageError), match=message):
        train_script().main(["--resume", resume])


@pytest.mark.parametrize("missing", ["lightning", "matplotlib"])
def test_a_missing_package_is_said_with_what_installs_it(monkeypatch, capfd, missing):
    """Where an import does not find it, as where only the core was installed."""
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--base", "a.yaml"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stop.value.code == 2 and capfd.readouterr().err == (
        f'ldm: error: training needs {missing}: pip install "faithful-ldm[train]", or pip install -e ".[train]" '
        "in a checkout\n"
    )


@pytest.mark.slow
def test_the_script_trains_resumes_and_exports(tmp_path, monkeypatch, capfd):
    from PIL import Image

    def here(*words):  # what trains nothing needs no process of its own
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return (stop.value.code or 0, *capfd.readouterr())

    (tmp_path / "in").mkdir()
    for i in range(5):
        Image.new("RGB", (20, 18), (40 * i, 90, 255 - 40 * i)).save(tmp_path / "in" / f"{i}.png")
        (tmp_path / "in" / f"{i}.txt").write_text(f"picture {i}")
    config = first_stage()
    config["data"]["params"]["train"] = {
        "target": "ldm.training.folder.ImageFolder",
        "params": {"folder": "in", "image_size": 16, "random_crop": True},
    }
    OmegaConf.save(OmegaConf.create(config), tmp_path / "a.yaml")
    words = ["--base", "a.yaml", "data.params.batch_size=3", "--logdir", "run", "--seed", "4"]
    first = script(tmp_path, *words, "lightning.trainer.max_steps=2")
    assert first.returncode == 0, first.stderr
    assert "learning rate 3.00e-03 = 1 (accumulate) x 1 (devices) x 3 (batch)" in first.stdout
    code, _, said = here(*words)
    assert code == 2 and "already holds a run; add --resume" in said
    resumed = script(tmp_path, *words, "--resume")
    assert resumed.returncode == 0 and "resuming at step 2 from run/checkpoints/last.ckpt" in resumed.stdout
    assert sorted(figures(tmp_path / "run")) == list(range(6))
    code, said, _ = here("--logdir", "run", "--export", "out.safetensors")
    assert code == 0 and said == "out.safetensors: weights of step 6 of run\n"
    assert (tmp_path / "out.safetensors").stat().st_size < 2**23
