"""What a file is, by the whole of it: a few foreign tensors change nothing, and what people mix up is named."""

import contextlib
import json
from pathlib import Path

import pytest
import torch

from ldm.checkpoints import inspect, load_latent_diffusion, load_vae, open_weights
from ldm.checkpoints.build import build_empty
from ldm.checkpoints.families import ADVICE, REFUSED, family_of
from ldm.checkpoints.key_mapping import EMA, TEXT, UNET, VAE, canonical
from ldm.checkpoints.matching import check_patterns, match_model
from ldm.checkpoints.report import TensorInfo
from ldm.errors import MismatchError, UsageError

GOLDEN = Path(__file__).parents[1] / "golden"
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def infos(shapes):
    return {name: TensorInfo(tuple(shape), torch.float16) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def v1():
    """Names and shapes of Stable Diffusion v1, the recorded ones and CLIP's."""
    recorded = json.loads((GOLDEN / "v1_keys_without_text_encoder.json").read_text())
    clip = {
        f"{TEXT}transformer.text_model.encoder.layers.{i}.{part}": (768,)
        for i in range(12)
        for part in ("layer_norm1.weight", "mlp.fc1.bias", "self_attn.q_proj.weight")
    }
    return infos({**recorded, **clip})


# --- attachments and other programs' files: by names that their writers give ------------------------------------------

ATTACHED = {
    "kohya's LoRA": ("LoRA", {f"lora_unet_{BLOCK.replace('.', '_')}_to_q.lora_down.weight": (4, 320)}),
    "kohya's LoRA of the text encoder": ("LoRA", {"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": ()}),
    "kohya's with doubled prefix": ("LoRA", {"lora_unet_unet_down_blocks_0_to_k_lora_down.weight": (4, 320)}),
    "sgm names": ("LoRA", {"lora_unet_input_blocks_1_1_proj_in.lora_up.weight": (320, 4)}),
    "diffusers, processors": ("LoRA", {f"{BLOCK}.processor.to_q_lora.down.weight": (4, 320)}),
    "diffusers, unet prefix, processors": ("LoRA", {f"unet.{BLOCK}.processor.to_q_lora.up.weight": (320, 4)}),
    "diffusers, unet.….lora.down": ("LoRA", {f"unet.{BLOCK}.to_k.lora.down.weight": (4, 320)}),
    "diffusers, text encoder": (
        "LoRA",
        {"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.up.weight": (768, 4)},
    ),
    "PEFT in diffusers": ("LoRA", {f"unet.{BLOCK}.to_q.lora_A.weight": (4, 320)}),
    "PEFT, adapter named": ("LoRA", {f"unet.{BLOCK}.to_q.lora_A.default.weight": (4, 320)}),
    "PEFT itself": ("LoRA", {f"base_model.model.{BLOCK}.to_q.lora_B.weight": (320, 4)}),
    "PEFT, DoRA": ("LoRA", {f"base_model.model.{BLOCK}.to_q.lora_magnitude_vector": (320,)}),
    "PEFT, embedding": ("LoRA", {"base_model.model.embeddings.lora_embedding_A": (4, 100)}),
    "LyCORIS, LoHa": ("LoRA", {"lora_unet_mid_block_proj_in.hada_w1_a": (4, 2)}),
    "LyCORIS, LoKr": ("LoRA", {"lycoris_unet_mid_block_proj_in.lokr_w1": (4, 2)}),
    "LyCORIS, DoRA": ("LoRA", {"lora_unet_mid_block_proj_in.dora_scale": (4, 1)}),
    "LyCORIS, OFT": ("LoRA", {"lora_unet_mid_block_proj_in.oft_blocks": (4, 2, 2)}),
    "LyCORIS, IA3": ("LoRA", {"lora_unet_mid_block_proj_in.on_input": (1,)}),
    "LyCORIS, full": ("LoRA", {"lora_unet_mid_block_proj_in.diff": (4, 2)}),
    "A1111's embedding": ("textual inversion", {"string_to_param.*": (2, 768)}),
    "embedding as safetensors": ("textual inversion", {"emb_params": (8, 768)}),
    "diffusers' embedding": ("textual inversion", {"<birb-style>": (768,)}),
    "diffusers' embedding, a plain word": ("textual inversion", {"sks": (3, 768)}),
    "embedding of SDXL": ("textual inversion", {"clip_l": (2, 768), "clip_g": (2, 1280)}),
    "IP-Adapter": ("IP-Adapter", {"image_proj.proj.weight": (4, 2), "ip_adapter.1.to_k_ip.weight": (4, 2)}),
    "IP-Adapter with a LoRA": (
        "IP-Adapter",
        {"image_proj.norm.weight": (2,), "ip_adapter.0.to_q_lora.down.weight": (4, 2)},
    ),
    "ControlNet's own file": ("ControlNet", {"control_model.input_hint_block.0.weight": (16, 3, 3, 3)}),
    "ControlNet, pruned": (
        "ControlNet",
        {"input_hint_block.0.weight": (16, 3, 3, 3), "input_blocks.1.0.in_layers.0.weight": (320,)},
    ),
    "ControlNet, diffusers": (
        "ControlNet",
        {
            "controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3),
            "down_blocks.0.resnets.0.norm1.weight": (2,),
        },
    ),
    "ControlLoRA": ("ControlNet", {"lora_controlnet": (0,), "input_blocks.1.0.in_layers.2.up": (4, 2)}),
    "T2I-Adapter": ("T2I-Adapter", {"body.0.block1.weight": (3, 3), "conv_in.weight": (320, 192, 3, 3)}),
    "T2I-Adapter, light": (
        "T2I-Adapter",
        {"body.0.in_conv.weight": (3, 3), "body.0.body.0.block1.weight": (3, 3)},
    ),
    "T2I-Adapter, diffusers": (
        "T2I-Adapter",
        {"adapter.conv_in.weight": (320, 192, 3, 3), "adapter.body.0.resnets.0.block1.weight": (3, 3)},
    ),
    "T2I style adapter": (
        "T2I-Adapter",
        {"style_embedding": (1, 8, 4), "transformer_layes.0.ln_1.weight": (4,)},
    ),
    "AnimateDiff": (
        "motion module",
        {"down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": (320,)},
    ),
    "AnimateDiff, all in a wrapper": (
        "motion module",
        {"module.mid_block.motion_modules.0.temporal_transformer.proj_in.weight": (3, 2)},
    ),
    "hypernetwork": (
        "hypernetwork",
        {"768.0.linear.0.weight": (1536, 768), "320.0.linear.0.weight": (640, 320)},
    ),
    "ESRGAN, old": (
        "upscaler",
        {"model.0.weight": (64, 3, 3, 3), "model.1.sub.0.RDB1.conv1.0.weight": (3, 2)},
    ),
    "ESRGAN, new": ("upscaler", {"conv_first.weight": (64, 3, 3, 3), "body.0.rdb1.conv1.weight": (3, 2)}),
    "ESRGAN, RRDB": ("upscaler", {"RRDB_trunk.0.RDB1.conv1.weight": (3, 2), "trunk_conv.weight": (3, 2)}),
    "Real-ESRGAN": ("upscaler", {"params_ema.conv_first.weight": (64, 3, 3, 3)}),
    "SwinIR": ("upscaler", {"params.layers.0.residual_group.blocks.0.norm1.weight": (3,)}),
    "CLIP vision": ("CLIP vision", {"vision_model.encoder.layers.0.mlp.fc1.weight": (3, 2)}),
    "CLIP vision, OpenCLIP": ("CLIP vision", {"visual.transformer.resblocks.0.ln_1.weight": (3,)}),
    "an optimizer": (
        "optimizer",
        {"state.0.exp_avg": (3, 2), "state.0.exp_avg_sq": (3, 2), "state.0.step": ()},
    ),
    "safety checker": (
        "safety checker",
        {"concept_embeds": (17, 768), "vision_model.vision_model.post_layernorm.weight": (1024,)},
    ),
    "T5": ("T5", {"encoder.block.0.layer.0.SelfAttention.q.weight": (3, 2)}),
    "YOLO": ("detector", {"model.22.cv2.0.conv.weight": (3, 2), "model.0.conv.weight": (3, 2)}),
    "TAESD": ("TAESD", {"1.conv.0.weight": (64, 64, 3, 3), "0.weight": (64, 3, 3, 3)}),
    "TAESD, diffusers": ("TAESD", {"decoder.layers.1.conv.0.weight": (64, 64, 3, 3)}),
    "TAESD, both halves": ("TAESD", {"taesd_encoder.1.conv.0.weight": (64, 64, 3, 3)}),
    "a VAE's average": ("VAE", {"model_ema.encoderconv_inweight": (3, 2)}),
    "a VAE with its loss": ("VAE", {"encoder.down.0.block.0.norm1.weight": (3,), "quant_conv.bias": (8,)}),
    "VAE and text encoder": (
        "no UNet",
        {f"{VAE}quant_conv.bias": (8,), f"{TEXT}transformer.text_model.final_layer_norm.bias": (768,)},
    ),
    "Flux beside its encoders": (
        "Flux",
        {
            **{f"{UNET}double_blocks.{i}.img_attn.qkv.weight": (6, 2) for i in range(4)},
            **{f"vae.encoder.down.{i}.block.0.norm1.weight": (3,) for i in range(5)},
            **{
                f"text_encoders.clip_l.transformer.text_model.encoder.layers.{i}.mlp.fc1.bias": (3,)
                for i in range(5)
            },
        },
    ),
    "nothing known": ("unknown", {"layer1.0.conv1.weight": (3, 2), "fc.bias": (3,)}),
    "vectors of no encoder": ("unknown", {"sks": (3, 5)}),
}


@pytest.mark.parametrize("case", ATTACHED)
def test_what_people_take_for_a_model_is_named_with_advice(tiny, tmp_path, case):
    family, shapes = ATTACHED[case]
    assert family_of(infos(shapes)) == family
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    torch.save(tensors, tmp_path / "pickled.pt")
    for path in (tiny.save(tmp_path, tensors), tmp_path / "pickled.pt"):
        is_named(path, family)


def is_named(path, family):
    with pytest.raises(MismatchError) as caught:
        load_latent_diffusion(path)
    said = str(caught.value)
    assert f"is {REFUSED[family]}; {ADVICE[family]}" in said
    assert len(said.replace(str(path.parent), "")) <= 360
    assert inspect(path).family == family


def adam():
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def layers(width):
    return [{"linear.0.weight": torch.zeros(2 * width, width), "linear.0.bias": torch.zeros(2 * width)}] * 2


VECTOR = torch.zeros(2, 768)
CONVOLUTION = torch.zeros(4, 3, 3, 3)
PICKLED = {
    "A1111's hypernetwork": ("hypernetwork", lambda: {
        320: layers(32), 768: layers(76), "step": 9, "name": "x", "layer_structure": [1, 2, 1], "use_dropout": False}),
    "A1111's hypernetwork, one width": ("hypernetwork", lambda: {768: tuple(layers(76)), "sd_checkpoint": None}),
    "A1111's embedding": ("textual inversion", lambda: {
        "string_to_token": {"*": 265}, "string_to_param": {"*": VECTOR}, "name": "x", "step": 9}),
    "diffusers' embedding": ("textual inversion", lambda: {"<x>": VECTOR[0]}),
    "a LoRA": ("LoRA", lambda: {"lora_unet_mid_block_proj_in.lora_up.weight": torch.zeros(3, 2)}),
    "a LoRA, wrapped": ("LoRA", lambda: {"state_dict": {f"unet.{BLOCK}.to_q.lora_A.weight": torch.zeros(3, 2)}}),
    "an optimizer": ("optimizer", adam),
    "A1111's optimizer": ("optimizer", lambda: {"hash": "x", "optimizer_state_dict": adam()}),
    "a VAE": ("VAE", lambda: {"state_dict": {"encoder.conv_in.weight": CONVOLUTION, "quant_conv.bias": VECTOR}}),
    "aesthetic gradients": ("aesthetic gradients", lambda: VECTOR[:1]),
    "ESRGAN": ("upscaler", lambda: {"model.0.weight": CONVOLUTION}),
    "Real-ESRGAN": ("upscaler", lambda: {"params_ema": {"conv_first.weight": CONVOLUTION, "conv_hr.bias": VECTOR}}),
    "Real-ESRGAN, both": ("upscaler", lambda: {
        "params": {"body.0.rdb1.conv1.weight": CONVOLUTION}, "params_ema": {"body.0.rdb1.conv1.weight": CONVOLUTION}}),
    "TAESD": ("TAESD", lambda: {"1.conv.0.weight": CONVOLUTION}),
    "a tensor of another kind": ("unknown", lambda: CONVOLUTION),
    "tensors in a list": ("unknown", lambda: [CONVOLUTION, {"a": [VECTOR]}]),
}  # fmt: skip


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("case", PICKLED)
def test_pickles_of_other_programs_are_named_too(tmp_path, case, legacy):
    family, make = PICKLED[case]
    torch.save(make(), tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    is_named(tmp_path / "x.pt", family)


def test_an_embedding_in_a_class_of_torchs_is_named(tmp_path):
    """As the program that textual inversion came with saves it; of the object, its entries are kept."""
    held = torch.nn.ParameterDict({"*": torch.nn.Parameter(VECTOR)})
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": held}, tmp_path / "x.pt")
    with pytest.raises(
        MismatchError, match=f"is {REFUSED['textual inversion']}; {ADVICE['textual inversion']}"
    ):
        load_latent_diffusion(tmp_path / "x.pt")


def test_every_refusal_has_its_advice():
    assert REFUSED.keys() == ADVICE.keys()


# --- left-overs -------------------------------------------------------------------------------------------------------

FOREIGN = {
    "conditioner.embedders.1.model.ln_final.weight": (1280,),
    "conditioner.embedders.0.transformer.text_model.final_layer_norm.x": (768,),
    f"{UNET}label_emb.0.0.weight": (1280, 2816),
    f"{UNET}joint_blocks.0.x_block.attn.qkv.weight": (6, 2),
    "double_blocks.0.img_attn.qkv.weight": (6, 2),
    f"{TEXT}model.ln_final.weight": (1024,),
    "lora_unet_mid_block_proj_in.alpha": (),
    "control_model.time_embed.0.weight": (4, 2),
    "emb_params": (8, 768),
    "ip_adapter.1.to_k_ip.weight": (4, 2),
    "image_proj.norm.weight": (2,),
    "clip_g": (2, 1280),
    "body.0.block1.weight": (3, 3),
    "conv_first.weight": (64, 3, 3, 3),
    "anything.at.all": (3,),
}


def test_one_foreign_key_leaves_a_v1_file_a_v1_file(v1):
    assert family_of(v1) == "v1"
    for key, shape in FOREIGN.items():
        assert family_of({**v1, **infos({key: shape})}) == "v1", key


@pytest.fixture(scope="module")
def empty(tiny):
    return build_empty(tiny.config)


def account(model, path, ignore=()):
    """What a load says of a file, without its values."""
    with contextlib.closing(open_weights(path)) as source:
        return match_model(model, source, "v1", ignore=check_patterns(ignore))


@pytest.mark.parametrize("key", FOREIGN)
@pytest.mark.thinned(4)
def test_a_foreign_key_is_named_and_can_be_left_out(tiny, tmp_path, empty, key):
    path = tiny.save(tmp_path, {**tiny.tensors, key: torch.zeros(FOREIGN[key])})
    with pytest.raises(
        MismatchError, match=f"1 of the file's .* not expected .'{key}'.*--ignore-keys PATTERN"
    ):
        account(empty, path)
    report = account(empty, path, key)
    assert report.ignored == {key: "left out by ignore"} and report.total == len(tiny.tensors) + 1


def test_what_is_left_out_is_neither_judged_nor_looked_at(tiny, tmp_path):
    """Three LoRAs' worth of tensors, one of them NaN, beside a model: by its rest it is the model."""
    lora = {
        f"lora_unet_{i}.lora_up.weight": torch.full((2, 1), torch.nan) for i in range(3 * len(tiny.tensors))
    }
    path = tiny.save(tmp_path, {**tiny.tensors, **lora})
    with pytest.raises(MismatchError, match="is a LoRA"):
        load_latent_diffusion(path, config=tiny.config)
    model, report = load_latent_diffusion(path, config=tiny.config, ignore="lora_*")
    assert len(report.ignored) == len(lora)
    assert inspect(path, config=tiny.config, ignore="lora_*").problem is None


REMAINS = {
    "embedding_manager.string_to_param_dict.*": "training state of textual inversion",
    "embedding_manager.initial_embeddings.*": "training state of textual inversion",
    "loss.discriminator.main.0.weight": "the VAE's training loss",
    f"{VAE}loss.perceptual_loss.lin0.model.1.weight": "the VAE's training loss",
    "discriminator.main.0.weight": "the VAE's training loss",
    f"{VAE}discriminator.main.0.weight": "the VAE's training loss",
    "optimizer.state.0.exp_avg": "training state",
    "optimizer_states.0": "training state",
    "lr_scheduler.last": "training state",
    "global_step": "training state",
    "epoch": "training state",
    "denoiser.sigmas": "computed from the configuration",
    "lvlb_weights": "computed from the configuration",
    "betas": "computed from the configuration, and equal",
    f"{TEXT}transformer.vision_model.post_layernorm.weight": "CLIP's vision half, not used by the text encoder of v1",
    f"{TEXT}vision_model.post_layernorm.weight": "CLIP's vision half, not used by the text encoder of v1",
    "vision_model.post_layernorm.weight": "CLIP's vision half, not used by the text encoder of v1",
    f"{TEXT}transformer.visual_projection.weight": "CLIP's vision half, not used by the text encoder of v1",
    f"{TEXT}transformer.text_projection.weight": "not used by the text encoder of v1",
    f"{TEXT}transformer.text_projection": "not used by the text encoder of v1",
    f"{TEXT}logit_scale": "not used by the text encoder of v1",
    "te.logit_scale": "not used by the text encoder of v1",
    f"{VAE}model_ema.decay": "a moving average of the VAE",
    f"{VAE}model_ema.encoderconv_inweight": "a moving average of the VAE",
    f"{EMA}num_updates": "bookkeeping of a moving average that this model does not keep",
    "safety_checker.concept_embeds": "a safety checker, which is not run",
    f"{UNET}out.2.total_ops": "a profiler's count of operations",
    f"{TEXT}transformer.text_model.embeddings.position_ids": "a constant, made anew",
    "te.text_model.embeddings.position_ids": "a constant, made anew",
    "logvar": None,
    "scale_factor": "fixed by the configuration",
}


def test_what_trainings_leave_behind_is_ignored_with_its_reason(tiny, tmp_path):
    """All at once, as files have them; one look is enough, for each has its reason."""
    from ldm.process.schedule import named_betas

    values = {name: torch.zeros(3) for name in REMAINS}
    betas = named_betas("linear", 1000, linear_start=0.00085, linear_end=0.0120)
    values |= {"betas": torch.from_numpy(betas), "scale_factor": torch.tensor(0.18215)}
    values["logvar"] = torch.zeros(1000)
    _, report = load_latent_diffusion(tiny.save(tmp_path, {**tiny.tensors, **values}), config=tiny.config)
    reasons = {name: reason for name, reason in REMAINS.items() if reason is not None}
    assert report.ignored == reasons
    assert report.assigned == {name: name for name in [*tiny.tensors, "logvar"]}


@pytest.mark.parametrize(
    "ignore",
    [
        "extra.",  # the beginning of a name, as CompVis's ignore_keys
        "extra.*",
        ["extra.a.*", "*d.c"],
        ["extra.?.b", "extra.[ad].c"],
        ("extra", "extra.a"),
    ],
)
def test_ignore_takes_names_beginnings_and_shell_patterns(tiny, tmp_path, empty, ignore):
    extra = dict.fromkeys(("extra.a.b", "extra.a.c", "extra.d.c"), torch.zeros(2))
    report = account(empty, tiny.save(tmp_path, {**tiny.tensors, **extra}), ignore)
    assert report.ignored.keys() == extra.keys()


def test_a_pattern_that_fits_nothing_is_said(tiny, caplog):
    _, report = load_latent_diffusion(tiny.path, config=tiny.config, ignore=["los.*"])
    assert "ignore 'los.*' fits no tensor of the file" in report.notes
    assert "ignore 'los.*' fits no tensor" in caplog.text
    model, _ = load_latent_diffusion(tiny.path, config=tiny.config)
    assert "ignore 'x.' fits no tensor of the file" in load_vae(model, tiny.path, ignore="x.").notes


@pytest.mark.parametrize("ignore", ["", [""], [None], [3], ["loss.", ""]])
def test_a_pattern_that_would_fit_everything_or_is_no_text_is_refused(tiny, ignore):
    with pytest.raises(UsageError, match="ignore takes names"):
        load_latent_diffusion(tiny.path, config=tiny.config, ignore=ignore)


def test_what_the_model_needs_cannot_be_left_out(tiny):
    with pytest.raises(
        MismatchError, match="1 of the model's .* missing .'model.diffusion_model.out.2.bias'"
    ):
        load_latent_diffusion(tiny.path, config=tiny.config, ignore=f"{UNET}out.2.bias")


def test_a_full_controlnet_is_one_unless_its_control_is_left_out(v1):
    control = infos({f"control_model.zero_convs.{i}.0.weight": (320, 320, 1, 1) for i in range(340)})
    assert family_of({**v1, **control}) == "ControlNet"


def test_canonical_names_stay_as_they_are(v1):
    assert all(name == known for name, known in canonical(v1).items())
