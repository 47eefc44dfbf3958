"""A tutorial's predict script, its import lines changed: create_model, load_state_dict, DDIMSampler, .jpg files."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_config, tiny_model, write_tiny

from ldm.errors import AbsentError, FormatError, LdmError, MismatchError, UnsafeFileError, UsageError

# What the script's own import lines become.
from ldm.generate import seed_everything
from ldm.models.diffusion.ddim import DDIMSampler
from ldm.paths import shipped
from ldm.util import create_model, load_state_dict

BOX = shipped("model_data/shapes/config.yaml"), shipped("model_data/shapes/shapes.safetensors")


def predict(
    config_path,
    model_path,
    save_path,
    *,
    prompt,
    a_prompt="",
    n_prompt="",
    input_shape=(128, 128),
    num_samples=1,
    ddim_steps=5,
    scale=5.0,
    eta=0.0,
    seed=-1,
    denoise_strength=1.0,
    image=None,
    mask=None,
):
    """Paint as the published script does, call by call, and save .jpg files; returns (pixels, seed)."""
    model = create_model(config_path).cpu()
    model.load_state_dict(load_state_dict(model_path, location="cpu"), strict=False)
    model = model.eval()
    ddim_sampler = DDIMSampler(model)
    with torch.no_grad():
        if seed == -1:
            seed = random.randint(0, 65535)
        seed_everything(seed)
        if image is not None:
            pixels = np.array(image.convert("RGB").resize(input_shape[::-1]), np.uint8)
            img = torch.from_numpy(pixels.copy()).float() / 127.0 - 1.0
            img = torch.stack([img] * num_samples).permute(0, 3, 1, 2).clone()
            ddim_sampler.make_schedule(ddim_steps, ddim_eta=eta, verbose=True)
            t_enc = min(int(denoise_strength * ddim_steps), ddim_steps - 1)
            z = model.get_first_stage_encoding(model.encode_first_stage(img))
            z_enc = ddim_sampler.stochastic_encode(z, torch.tensor([t_enc] * num_samples).to(model.device))

        cond = {"c_crossattn": [model.get_learned_conditioning([prompt + ", " + a_prompt] * num_samples)]}
        un_cond = {"c_crossattn": [model.get_learned_conditioning([n_prompt] * num_samples)]}
        H, W = input_shape
        shape = (4, H // 8, W // 8)
        guidance = {"unconditional_guidance_scale": scale, "unconditional_conditioning": un_cond}
        if image is None:
            samples, intermediates = ddim_sampler.sample(
                ddim_steps, num_samples, shape, cond, verbose=False, eta=eta, **guidance
            )
            assert set(intermediates) == {"x_inter", "pred_x0"}
        elif mask is None:
            samples = ddim_sampler.decode(z_enc, cond, t_enc, **guidance)
        else:
            small = np.array(mask.convert("L").resize((W // 8, H // 8))) >= 128
            keep = 1 - torch.from_numpy(small.astype(np.float32))[None, None]  # white is repainted
            samples, _ = ddim_sampler.sample(
                ddim_steps, num_samples, shape, cond, verbose=False, eta=eta, mask=keep, x0=z, **guidance
            )
        x_samples = model.decode_first_stage(samples)
        x_samples = x_samples.permute(0, 2, 3, 1) * 127.5 + 127.5
        x_samples = x_samples.cpu().numpy().clip(0, 255).astype(np.uint8)
    for index, one in enumerate(x_samples):
        Image.fromarray(one).save(save_path / f"{index}.jpg", quality=95)
    return x_samples, seed


def test_the_script_paints_what_was_asked_for(tmp_path):
    """On the model in the box: a red circle in the middle of white, twice, as .jpg files."""
    pixels, seed = predict(
        *BOX, tmp_path, prompt="a large red circle in the center", a_prompt="on a white background",
        seed=11, ddim_steps=8, num_samples=2,
    )  # fmt: skip
    assert pixels.shape == (2, 128, 128, 3) and seed == 11
    for i in range(2):
        saved = np.asarray(Image.open(tmp_path / f"{i}.jpg"), dtype=int)
        red, green, blue = saved[56:72, 56:72].mean(axis=(0, 1))
        assert red > 150 and green < 110 and blue < 110, (red, green, blue)
        assert saved[2:10, 2:10].min() > 180


@pytest.mark.slow
def test_what_the_script_gives_is_the_samplers_own(tmp_path):
    """Seeded after loading, so that no weight that is drawn moves the noise; -1 draws 0 to 65535."""
    checkpoint, config = write_tiny(tmp_path)
    options = {
        "prompt": "a star",
        "a_prompt": "red",
        "n_prompt": "blue",
        "input_shape": (48, 64),
        "ddim_steps": 3,
    }
    random.seed(5)
    wanted = random.randint(0, 65535)
    random.seed(5)
    pixels, seed = predict(config, checkpoint, tmp_path, **options)
    assert seed == wanted
    model = tiny_model().eval()
    with torch.no_grad():
        torch.manual_seed(wanted)
        samples, _ = DDIMSampler(model).sample(
            3, 1, (4, 6, 8), model.get_learned_conditioning(["a star, red"]), verbose=False,
            unconditional_guidance_scale=5.0, unconditional_conditioning=model.get_learned_conditioning(["blue"]),
        )  # fmt: skip
        want = model.decode_first_stage(samples).permute(0, 2, 3, 1) * 127.5 + 127.5
    np.testing.assert_array_equal(pixels, want.numpy().clip(0, 255).astype(np.uint8))


@pytest.mark.slow
def test_the_script_starts_from_a_picture_and_keeps_what_a_mask_leaves(tmp_path):
    checkpoint, config = write_tiny(tmp_path)
    picture = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    options = {"prompt": "a star", "input_shape": (48, 64), "ddim_steps": 4, "seed": 3, "image": picture}
    near, _ = predict(config, checkpoint, tmp_path, denoise_strength=0.25, **options)
    far, _ = predict(config, checkpoint, tmp_path, denoise_strength=1.0, **options)
    assert near.shape == far.shape == (1, 48, 64, 3) and (near != far).any()
    mask = Image.new("L", picture.size, 0)
    mask.paste(255, (32, 0, 64, 48))
    part, _ = predict(config, checkpoint, tmp_path, mask=mask, **options)
    whole, _ = predict(config, checkpoint, tmp_path, mask=Image.new("L", picture.size, 255), **options)
    assert (part != whole).any()


# --- create_model and load_state_dict ---


@pytest.mark.slow
def test_a_model_is_built_on_the_cpu_with_every_tensor_of_its_file(tmp_path):
    checkpoint, config = write_tiny(tmp_path)
    model = create_model(config)
    assert {p.device.type for p in model.parameters()} == {"cpu"} and model.device.type == "cpu"
    missing, unexpected = model.load_state_dict(load_state_dict(str(checkpoint)), strict=True)
    assert missing == unexpected == []
    read = model.state_dict()
    for name, value in tiny_model().state_dict().items():
        torch.testing.assert_close(read[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("bare.ckpt", lambda w: w),
        ("wrapped.ckpt", lambda w: {"state_dict": w, "global_step": 470000, "epoch": 7}),
        ("twice.pth", lambda w: {"state_dict": {"state_dict": w}}),
        ("named.pt", lambda w: {"state_dict": w, "optimizer_states": [{"state": {}}]}),
        ("odd.bin", lambda w: w),
        ("misnamed.txt", lambda w: w),
    ],
)
def test_files_are_read_whatever_they_wrap_their_tensors_in(tmp_path, name, wrap):
    weights = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.bias": torch.tensor([1, 2]).half()}
    torch.save(wrap(weights), tmp_path / name)
    found = load_state_dict(tmp_path / name, location="cpu")
    assert list(found) == list(weights) and all(isinstance(one, torch.Tensor) for one in found.values())
    for key, value in weights.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0)


def test_tensors_go_to_the_location(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pth")
    assert load_state_dict(tmp_path / "a.pth", location=torch.device("meta"))["a"].is_meta


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("make", "location", "kind", "words"),
    [
        (None, "cpu", AbsentError, "is not there"),
        (lambda p: p.write_bytes(b""), "cpu", FormatError, "is empty"),
        (lambda p: p.write_bytes(b"<html>no</html>"), "cpu", FormatError, "web page"),
        (lambda p: torch.save({"a": Evil()}, p), "cpu", UnsafeFileError, "refused"),
        (lambda p: torch.save({"a": 3}, p), "cpu", MismatchError, "holds no weights"),
        (lambda p: p.mkdir(), "cpu", FormatError, "folder"),
        (lambda p: torch.save({"a": torch.ones(1)}, p), "gpu", UsageError, "device 'gpu' is not available"),
    ],
)
def test_files_that_hold_no_weights_are_refused_in_one_line(tmp_path, make, location, kind, words):
    path = tmp_path / "weights.ckpt"
    if make is not None:
        make(path)
    with pytest.raises(kind, match=words) as caught:
        load_state_dict(path, location=location)
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 400


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        (None, AbsentError, "is not a file"),
        ("data: {}", MismatchError, "needs a 'model:' with 'target' and 'params'; it has data"),
        ("model: 3", MismatchError, "'target'"),
        ("model: {target: os.system, params: {command: ls}}", UnsafeFileError, "not allowed"),
    ],
)
def test_configurations_without_a_model_are_refused(tmp_path, text, kind, words):
    path = tmp_path / "model.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(kind, match=words):
        create_model(path)


def test_averages_that_a_file_has_not_begin_at_its_weights(tmp_path):
    """Left at the initial weights they would paint noise in every ema_scope (v1-5-pruned-emaonly with use_ema)."""
    from omegaconf import OmegaConf

    settings = tiny_config()
    settings["model"]["params"]["use_ema"] = True
    config = tmp_path / "averaging.yaml"
    OmegaConf.save(OmegaConf.create(settings), config)
    weights = {name: value for name, value in tiny_model().state_dict().items()}
    model = create_model(config)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert unexpected == [] and missing and all(name.startswith("model_ema.") for name in missing)
    own = dict(model.model.named_parameters())
    with model.ema_scope():
        for name, value in model.model.named_parameters():
            torch.testing.assert_close(value, weights[f"model.{name}"], rtol=0, atol=0)
    # A file that has no network leaves trained averages alone.
    with torch.no_grad():
        for name in own:
            getattr(model.model_ema, model.model_ema.m_name2s_name[name]).fill_(7.0)
    vae = {name: value for name, value in weights.items() if name.startswith("first_stage_model.")}
    model.load_state_dict(vae, strict=False)
    shadow = getattr(model.model_ema, next(iter(model.model_ema.m_name2s_name.values())))
    assert (shadow == 7.0).all()
    with pytest.raises((RuntimeError, LdmError)):
        model.load_state_dict(weights, strict=True)
