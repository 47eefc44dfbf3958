"""What people do, on a device that is pretended: the numbers are those of the CPU, and nothing is left behind there."""

import gc
import logging

import numpy as np
import pytest
import tiny_training
import torch
from keyed import keyed_input
from lora_files import write_lora_for
from PIL import Image
from pretended_device import GPU, OnDevice, pretended
from tiny import tiny_model
from tiny_pixels import SMALL

from ldm import helpers
from ldm.adapters import Embedding, LoRA
from ldm.adapters.use import token_width
from ldm.checkpoints import save_safetensors
from ldm.config import instantiate_from_config
from ldm.errors import UsageError
from ldm.generate import decode
from ldm.guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
from ldm.kernels import cuda_graphs
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.models.diffusion.dpm_solver import DPMSolverSampler
from ldm.models.diffusion.plms import PLMSSampler
from ldm.models.diffusion.resample import create_named_schedule_sampler
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.pipeline import StableDiffusion

PICTURE = Image.fromarray((np.random.RandomState(0).rand(64, 64, 3) * 255).astype(np.uint8))
MASK = Image.fromarray((np.arange(64)[None] > 20).repeat(64, 0).astype(np.uint8) * 255)
SAMPLERS = ("ddim", "plms", "ddpm", "dpm_solver", "dpmpp_2m")
TO_DEVICE = "host to device"


@pytest.fixture(scope="module", autouse=True)
def device():
    with pretended() as device:
        yield device


@pytest.fixture(autouse=True)
def no_waits(device):
    device.waits.clear()


@pytest.fixture(scope="module")
def on_cpu():
    return {channels: StableDiffusion(tiny_model(channels)) for channels in (4, 9)}


@pytest.fixture(scope="module")
def on_gpu(device):
    return {c: StableDiffusion(tiny_model(c)).to("cuda", torch.float32) for c in (4, 9)}


def paint(sd, how, **options):
    options = {"seed": 3, "steps": 2, **options}
    if how == "txt2img":
        return sd.txt2img("a red star", negative_prompt="bad", height=64, width=64, **options)
    if how == "img2img":
        return sd.img2img("a red star", PICTURE, strength=0.7, **options)
    return sd.inpaint("a red star", PICTURE, MASK, **options)


def assert_same(got, want):
    for x in (got.latents, want.latents):
        assert type(x) is torch.Tensor and x.device.type == "cpu"
    torch.testing.assert_close(got.latents, want.latents, rtol=1e-3, atol=1e-4)


# --- painting -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "sampler"),
    [
        *(("txt2img", sampler) for sampler in SAMPLERS),
        ("img2img", "dpmpp_2m"),
        ("inpaint", "ddim"),
        ("inpaint", "plms"),
    ],
)
@pytest.mark.thinned(8)
def test_every_sampler_paints_what_it_paints_on_a_cpu(on_gpu, on_cpu, how, sampler):
    channels = 9 if (how, sampler) == ("inpaint", "ddim") else 4
    got, want = (paint(where[channels], how, sampler=sampler) for where in (on_gpu, on_cpu))
    assert_same(got, want)


@pytest.mark.parametrize(
    "knobs",
    [
        {"guidance_interval": (0.2, 0.8)},
        {"guidance_rescale": 0.7},
        {"guidance_scale": 1.0},
        {"cache_interval": 2},
        {"merge_ratio": 0.5},
        {"merge_ratio": 0.5, "merge_seed": 7},
        {"eta": 0.5, "num_images": 2, "batch_size": 2},
        {"fixed_code": True, "num_images": 2},
        {"rng": "compvis"},
        {"output_type": "pt"},
        {"output_type": "latent"},
    ],
    ids=str,
)
@pytest.mark.thinned(6)
def test_every_knob_turns(device, on_gpu, on_cpu, knobs):
    got = paint(on_gpu[4], "txt2img", **knobs)
    waited = [what for what in device.waits if what[1].startswith("kernels/")]
    assert not waited, "the loop waits for places of tokens"
    assert_same(got, paint(on_cpu[4], "txt2img", **knobs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.thinned(2)
@pytest.mark.slow
def test_half_precision_paints(device, dtype):
    sd = StableDiffusion(tiny_model()).to("cuda", dtype)
    assert paint(sd, "inpaint").latents.isfinite().all()


@pytest.mark.slow
def test_a_painting_is_watched_and_its_latents_decoded_again(on_gpu):
    sd = on_gpu[4]
    for progress in sd.stream("a red star", steps=2, seed=1):
        progress.preview()
    latents = paint(sd, "txt2img", output_type="latent").latents
    assert isinstance(decode(sd.model, latents), OnDevice)
    torch.testing.assert_close(decode(sd.model, latents).cpu(), decode(sd.model, latents.to("cuda")).cpu())


@pytest.mark.slow
def test_a_model_that_goes_to_and_fro_paints(on_cpu):
    sd = StableDiffusion(tiny_model()).to("cuda", torch.float32)
    assert_same(paint(sd, "txt2img"), paint(on_cpu[4], "txt2img"))
    assert_same(paint(sd.to("cpu"), "txt2img"), paint(on_cpu[4], "txt2img"))


# --- other doors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DDIMSampler, PLMSSampler, DPMSolverSampler])
@pytest.mark.slow
def test_samplers_of_the_scripts_stay_on_the_device(on_gpu, kind):
    model = on_gpu[4].model
    with torch.no_grad(), model.ema_scope():
        c, uc = (model.get_learned_conditioning(words) for words in (["a", "b"], ["", ""]))
        told = {"unconditional_guidance_scale": 5.0, "unconditional_conditioning": uc}
        shape = (4, 8, 8)
        x, _ = kind(model).sample(S=3, batch_size=2, shape=shape, conditioning=c, verbose=False, **told)
        assert isinstance(x, OnDevice) and isinstance(model.decode_first_stage(x), OnDevice)


def test_levels_on_the_cpu_are_looked_up_where_the_tables_are(on_gpu, on_cpu):
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([900, 20])
    want = on_cpu[4].model.q_sample(x, t, noise=x)
    torch.testing.assert_close(on_gpu[4].model.q_sample(x.to("cuda"), t, noise=x.to("cuda")).cpu(), want)
    sampler = DDIMSampler(on_gpu[4].model)
    sampler.make_schedule(10, verbose=False)
    assert isinstance(sampler.stochastic_encode(x.to("cuda"), torch.tensor([6, 6])), OnDevice)


def pixels(**flags):
    defaults = {**model_and_diffusion_defaults(), **SMALL, "image_size": 16, "attention_resolutions": "8"}
    return create_model_and_diffusion(
        **{**defaults, "diffusion_steps": 6, "noise_schedule": "cosine", **flags}
    )


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"learn_sigma": True, "timestep_respacing": "3", "rescale_timesteps": True},
        {"timestep_respacing": "ddim3", "predict_xstart": True},
        {"class_cond": True, "learn_sigma": True, "use_kl": True},
    ],
    ids=str,
)
@pytest.mark.thinned(4)
@pytest.mark.slow
def test_pixels_are_diffused_without_waits_for_tables(device, flags):
    model, chain = pixels(**flags)
    model.to("cuda")
    told = {"y": torch.tensor([1, 0], device="cuda")} if flags.get("class_cond") else {}
    shape = (2, 3, 16, 16)
    with torch.no_grad():
        x = torch.rand(shape, device="cuda") * 2 - 1
        device.waits.clear()
        chain.p_sample_loop(model, shape, noise=x, model_kwargs=told)
        assert isinstance(chain.ddim_sample_loop(model, shape, model_kwargs=told, eta=0.5), OnDevice)
        chain.calc_bpd_loop(model, x, model_kwargs=told)
    levels, weights = create_named_schedule_sampler("uniform", chain).sample(2, "cuda")
    (chain.training_losses(model, x, levels, model_kwargs=told)["loss"] * weights).mean().backward()
    assert [what for what in device.waits if what[0] == TO_DEVICE] == []
    # Labels are looked at once, for they stay the same.
    assert len([what for what in device.waits if "diffusionmodules" in what[1]]) == len(told)


def test_levels_and_pixels_in_two_places_are_refused(device):
    _, chain = pixels()
    x = torch.zeros(2, 3, 16, 16)
    for given, t in ((x.to("cuda"), torch.tensor([0, 2])), (x, torch.tensor([0, 2]).to("cuda"))):
        with pytest.raises(UsageError, match=rf"on {given.device}; got t on {t.device}, give t\.to"):
            chain.q_sample(given, t)


def test_labels_that_stay_are_waited_for_once(device):
    options = {**tiny_training.diffusion()["model"]["params"]["unet_config"]["params"], "num_classes": 5}
    unet = UNetModel(**{**options, "use_spatial_transformer": False, "context_dim": None}).to("cuda")
    x, t, y = (torch.tensor(v, device="cuda") for v in ([[[[0.5] * 8] * 8] * 3] * 2, [3, 9], [4, 0]))
    device.waits.clear()
    with torch.no_grad():
        for waits in (1, 1, 1):
            unet(x, t, y=y)
            assert len(device.waits) == waits
        y.add_(1)
        with pytest.raises(UsageError, match=r"from 0 to 4, got \[5, 1\]"):
            unet(x, t, y=y)
        y.sub_(1)
        unet(x, t, y=y)
    assert len(device.waits) == 3


# --- training -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["first stage", "diffusion"])
@pytest.mark.thinned(2)
def test_a_training_step_through_the_trainer(device, tmp_path, what):
    """As both configurations of the model in the box begin: by draws into weights that are on the device."""
    if what == "first stage":
        config = tiny_training.first_stage(disc_factor=1.0, disc_num_layers=1)
        config["training"] |= {"identity_start": True, "posterior_logvar_start": -4.0}
    else:
        config = tiny_training.diffusion(use_ema=True)
        config["training"] |= {"identity_start": True, "image_steps": 2}
    config["lightning"]["trainer"] |= {"max_steps": 1, "accelerator": "cuda"}
    run = tiny_training.run(config, tmp_path)
    assert run.code == 0 and np.isfinite(list(tiny_training.figures(tmp_path).values())).all()


def test_an_autoencoder_takes_a_batch_from_where_it_lies(device):
    config = tiny_training.first_stage(disc_factor=1.0, disc_num_layers=1)
    model = instantiate_from_config(config["model"]).to("cuda")
    batch = {"image": torch.rand(2, 16, 16, 3) * 2 - 1}
    for index in (0, 1):
        assert isinstance(model.training_step(batch, 0, index)[0], OnDevice)
    model.validation_step(batch, 0)
    assert set(model.log_images(batch)) == {"inputs", "samples", "reconstructions"}


# --- graphs ---------------------------------------------------------------------------------------------


@pytest.fixture
def cleared(monkeypatch):
    """How often cuBLAS was told to forget its workspaces."""
    found = []
    monkeypatch.setattr(cuda_graphs, "_devices", {})
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: found.append(1), raising=False)
    return found


def network(factor):
    layer = torch.nn.Conv2d(3, 5, 3, padding=1).to("cuda")

    def run(tensors):
        with torch.no_grad():
            return layer(tensors[0]).relu() * factor + tensors[1]

    return run


def questions(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*size, generator=generator).to("cuda") for size in ((2, 3, 4, 6), (2, 5, 1, 1))]


def test_a_graph_replays_on_other_inputs_each_time_into_a_new_tensor(cleared):
    run = network(2.0)
    play = cuda_graphs.capture_cuda(run, questions(0))
    first = play(questions(1))
    torch.testing.assert_close(play(questions(2)).cpu(), run(questions(2)).cpu())
    torch.testing.assert_close(first.cpu(), run(questions(1)).cpu())
    assert len(cleared) == 1


def test_workspaces_are_those_of_graphs_that_live(cleared):
    """Those of others lie in memory that may be gone."""
    one = cuda_graphs.capture_cuda(network(1.0), questions(0))
    two = cuda_graphs.capture_cuda(network(2.0), questions(0))
    assert len(cleared) == 1 and len(cuda_graphs._devices[GPU].graphs) == 2
    del one
    three = cuda_graphs.capture_cuda(network(3.0), questions(0))
    assert len(cleared) == 1
    del two, three
    gc.collect()
    four = cuda_graphs.capture_cuda(network(4.0), questions(0))
    assert len(cleared) == 2 and len(cuda_graphs._devices[GPU].graphs) == 1
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        cuda_graphs.capture_cuda(lambda tensors: tensors[0] * float(tensors[1].sum()), questions(0))
    five = cuda_graphs.capture_cuda(network(5.0), questions(0))
    assert len(cleared) == 3 and len(cuda_graphs._devices[GPU].graphs) == 1
    assert torch.isfinite(four(questions(1)).cpu()).all() and torch.isfinite(five(questions(1)).cpu()).all()


# --- sequential CPU offload ------------------------------------------------------------------------------


@pytest.mark.slow
def test_offloaded_weights_paint_the_same(on_cpu):
    sd = StableDiffusion(tiny_model()).optimize(low_vram="cuda", tiled_vae=True)
    for how in ("txt2img", "inpaint"):
        assert_same(paint(sd, how), paint(on_cpu[4], how))


@pytest.mark.slow
def test_offloaded_weights_take_a_lora_and_an_embedding(on_cpu, tmp_path):
    """What is folded for a few steps lies in CPU memory as well, and is copied part by part."""
    lora = write_lora_for(tmp_path / "style.safetensors", on_cpu[4].model)
    width = token_width(on_cpu[4].model)
    save_safetensors(tmp_path / "star.safetensors", {"emb_params": keyed_input("star", (2, width))}, {})
    adapters = [LoRA(lora, 0.7, end=0.5), Embedding(tmp_path / "star.safetensors", width=width)]
    sd = StableDiffusion(tiny_model()).optimize(low_vram="cuda")
    want = paint(on_cpu[4], "txt2img", adapters=adapters)
    assert_same(paint(sd, "txt2img", adapters=adapters), want)
    plain = paint(on_cpu[4], "txt2img")
    assert (want.latents - plain.latents).abs().max() > 1e-2
    assert_same(paint(sd, "txt2img"), plain)


@pytest.mark.slow
def test_where_no_memory_can_be_page_locked_it_is_said_once_and_done_without(on_cpu, monkeypatch, caplog):
    def refuse(x):
        raise RuntimeError("CUDA error: out of memory\nCompile with more")

    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    monkeypatch.setattr(helpers, "_can_pin", True)
    with caplog.at_level(logging.WARNING, "ldm.helpers"):
        sd = StableDiffusion(tiny_model()).optimize(low_vram="cuda")
        assert_same(paint(sd, "txt2img"), paint(on_cpu[4], "txt2img"))
        sd = StableDiffusion(tiny_model()).to("cuda", torch.float32)
        assert_same(paint(sd, "img2img"), paint(on_cpu[4], "img2img"))
    assert caplog.messages == [
        "copies to the GPU are waited for, no memory can be page-locked: CUDA error: out of memory"
    ]
