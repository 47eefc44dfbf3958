"""What only a GPU can show: compiled kernels, CUDA graphs and offloaded weights give the plain numbers."""

import pytest
import torch
import torch.nn.functional as F
from keyed import fill, keyed_input
from tiny import tiny_config

from ldm.checkpoints import load_latent_diffusion, save_safetensors
from ldm.config import instantiate_from_config
from ldm.errors import UsageError
from ldm.kernels import cuda, cuda_graphs, offload, optimize, restore
from ldm.modules.diffusionmodules.openaimodel import UNetModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def model():
    with torch.no_grad():
        yield fill(instantiate_from_config(tiny_config()["model"])).eval()


def ask(model, scale=1.0):
    c = model.get_learned_conditioning(["a red star", "a ring"])
    x = (keyed_input("gpu.x", (2, 4, 8, 8)) * scale).to(model.device)
    t = torch.tensor([10, 900], device=model.device)
    return [c, model.apply_model(x, t, c), model.decode_first_stage(x[:1])]


def graphs(unet):
    return unet.forward.captured


def near(got, want, much=2e-5):
    for ours, theirs in zip(got, want, strict=True):
        assert (ours.float() - theirs.float()).norm() < much * theirs.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_group_norm_is_the_formula(dtype):
    assert cuda.kernels() is not None
    x = (keyed_input("gpu.norm", (3, 320, 37, 29)) + 1).to("cuda", dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    one, zero = torch.ones(320, device="cuda"), torch.zeros(320, device="cuda")
    got = cuda.group_norm(x, 32, one, zero, 1e-6, silu=True)
    want = F.silu(F.group_norm(x.double(), 32, eps=1e-6))
    assert (got - want).norm() < {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}[
        dtype
    ] * want.norm()


# Of Stable Diffusion's UNet and VAE: channels and cells of their maps at 512 x 512.
MAPS = [(320, 4096), (960, 4096), (640, 1024), (1920, 256), (2560, 64), (128, 1 << 18), (512, 4096)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_no_kernel_is_left_out_for_stable_diffusion(dtype, caplog):
    for channels, cells in MAPS:
        x = torch.empty((1, channels, cells // 8, 8), device="cuda", dtype=dtype)
        assert cuda.supports_norm(x.contiguous(memory_format=torch.channels_last), 32)
    for width in (320, 640, 1280):
        assert cuda.supports_geglu(x, 8 * width)
    assert not caplog.messages


@pytest.mark.parametrize("vae", [False, True])
def test_an_optimized_model_gives_the_plain_numbers(model, vae):
    model.cuda()
    want = [ask(model, scale) for scale in (1.0, 0.5)]
    optimize(model, vae_graphs=vae)
    unet, decoder = model.model.diffusion_model, model.first_stage_model.decoder
    assert (
        isinstance(unet.forward, cuda_graphs.GraphedModule)
        and isinstance(decoder.forward, cuda_graphs.GraphedModule) is vae
    )
    for _ in range(cuda_graphs.CALLS_TO_CAPTURE):
        for scale, expected in zip((1.0, 0.5), want, strict=True):
            near(ask(model, scale), expected)
    assert graphs(unet) == [True] and (not vae or graphs(decoder) == [True])
    near(ask(restore(model)), want[0], 1e-6)


def test_inference_mode_and_no_grad_share_graphs(model):
    want = ask(model.cuda())
    optimize(model)
    with torch.inference_mode():
        for _ in range(cuda_graphs.CALLS_TO_CAPTURE + 1):
            near(ask(model), want)
    assert graphs(model.model.diffusion_model) == [True]
    for _ in range(2):
        near(ask(model), want)
    assert graphs(model.model.diffusion_model) == [True]


def test_a_capture_that_fails_leaves_no_trace(model, caplog):
    class Waiting(torch.nn.SiLU):
        def forward(self, x):
            return super().forward(x) * (
                1.0 if float(x[0, 0, 0, 0]) < 1e9 else 0.0
            )  # not while it is captured

    unet = model.cuda().model.diffusion_model
    want = ask(model)
    unet.out[1] = Waiting()
    for replays in (False, True):
        optimize(model)
        for _ in range(cuda_graphs.CALLS_TO_CAPTURE + 1):
            near(ask(model), want)
        assert graphs(unet) == [replays]
        assert ("no CUDA graph of UNetModel is used" in caplog.text) is not replays
        assert torch.randn(5, device="cuda").isfinite().all()
        restore(model)
        unet.out[1] = torch.nn.SiLU()
        caplog.clear()


def test_weights_are_loaded_straight_to_the_gpu(model, tmp_path):
    path = tmp_path / "tiny.safetensors"
    own = dict(model.named_parameters())
    save_safetensors(path, own)
    loaded, _ = load_latent_diffusion(path, config=tiny_config(), device="cuda", dtype=torch.float16)
    for name, weight in loaded.named_parameters():
        assert weight.device.type == "cuda" and torch.equal(weight.cpu(), own[name].half()), name


def test_the_loop_waits_for_nothing(model):
    """CUDA's own alarm: an operation that makes the processor wait raises."""
    model.cuda()
    optimize(model)
    c = model.get_learned_conditioning(["a red star", "a ring"])
    x, t = torch.zeros(2, 4, 8, 8, device="cuda"), torch.tensor([10, 900], device="cuda")
    for _ in range(cuda_graphs.CALLS_TO_CAPTURE):
        model.apply_model(x, t, c)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            x = x - 0.1 * model.apply_model(x, t, c)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert x.isfinite().all()


def test_labels_that_stay_are_waited_for_once():
    options = {"use_spatial_transformer": False, "context_dim": None, "num_classes": 5}
    unet = fill(UNetModel(**{**tiny_config()["model"]["params"]["unet_config"]["params"], **options}))
    optimize(unet.eval().cuda())
    x, t = keyed_input("gpu.y", (2, 4, 8, 8)).cuda(), torch.tensor([10, 900], device="cuda")
    y = torch.tensor([4, 0], device="cuda")
    with torch.no_grad():
        for _ in range(cuda_graphs.CALLS_TO_CAPTURE):
            want = unet(x, t, y=y)
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = unet(x, t, y=y)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        near([got], [want])
        with pytest.raises(UsageError, match=r"got \[5, 1\]"):
            unet(x, t, y=y + 1)


def test_graphs_after_others_are_gone_have_workspaces_of_their_own(model):
    """cuBLAS keeps one for the stream; it came from the pool of graphs that are gone."""
    want = ask(model.cuda())
    for _ in range(3):
        optimize(model)
        for _ in range(cuda_graphs.CALLS_TO_CAPTURE + 1):
            near(ask(model), want)
        assert graphs(model.model.diffusion_model) == [True]
        restore(model)
        torch.cuda.empty_cache()
        torch.empty(1 << 28, device="cuda").fill_(float("nan"))


def test_offloaded_weights_give_the_plain_numbers_in_less_memory(model):
    model.cuda()
    want = ask(model)
    model.cpu()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    sequential = offload.attach(model, torch.device("cuda", torch.cuda.current_device()))
    for _ in range(2):
        near(ask(model), want, 1e-5)
    weights = sum(p.nbytes for p in model.parameters())
    assert all(p.device.type == "cpu" for p in model.parameters())
    assert torch.cuda.memory_allocated() - before < weights / 2
    sequential.end()
