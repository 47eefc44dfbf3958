"""Converting: every layout there and back with equal bits, what diffusers reads, what is refused."""

import copy
import importlib.util
import json
import re
import resource
from pathlib import Path

import pytest
import torch
from keyed import keyed_input
from lora_files import LAYOUTS, TEXT_LAYOUTS, spell, v1_shapes, write_lora
from tiny_networks import control_shapes

from ldm.adapters.controlnet import ControlNetFile
from ldm.adapters.converting import with_dots
from ldm.adapters.embedding import Embedding
from ldm.adapters.lora import LoraFile
from ldm.checkpoints import key_mapping as names
from ldm.checkpoints import read_object, read_tensors, save_object, save_safetensors
from ldm.checkpoints.compvis import sha256_of
from ldm.checkpoints.key_mapping import CONTROL, TEXT, UNET, VAE
from ldm.cli import run
from ldm.converting import convert
from ldm.errors import AbsentError, FormatError, MismatchError, OutputError, UsageError

ROOT = Path(__file__).resolve().parents[2]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def same(one, other):
    """Equal names, shapes, dtypes and bits."""
    assert one.keys() == other.keys()
    for name, values in one.items():
        assert values.dtype == other[name].dtype and values.shape == other[name].shape, name
        assert torch.equal(values, other[name]), name


# --- names ----------------------------------------------------------------------------------------------------------


def test_names_from_diffusers_are_the_inverse_of_names_to_diffusers():
    recorded = json.loads((ROOT / "tests" / "golden" / "v1_keys_without_text_encoder.json").read_text())
    keys = [name for name, _ in (recorded.items() if isinstance(recorded, dict) else recorded)]
    unet = [name.removeprefix(UNET) for name in keys if name.startswith(UNET)]
    vae = [name.removeprefix(VAE) for name in keys if name.startswith(VAE)]
    for kind, ours, count in (
        ("unet", unet, 686),
        ("vae", vae, 248),
        ("control", list(control_shapes(320, channel_mult=[1, 2, 4, 4])), None),
        ("control", list(control_shapes()), None),
    ):
        theirs = getattr(names, f"{kind}_to_diffusers")(ours)
        assert len(theirs) == (count or len(ours)) == len(set(theirs.values())), kind
        assert getattr(names, f"{kind}_from_diffusers")(theirs.values()) == {
            b: a for a, b in theirs.items()
        }, kind


def test_modules_get_their_dots_back():
    """All modules of Stable Diffusion v1, by CompVis's and diffusers' names."""
    keys = list(v1_shapes())
    unet = [name.removeprefix(UNET) for name in keys if name.startswith(UNET)]
    theirs = [*names.unet_to_diffusers(unet).values()]
    text = [name.partition("text_model.")[2] for name in keys if name.startswith(TEXT)]
    modules = {name.rpartition(".")[0] for name in (*unet, *theirs, *text)}
    assert len(modules) > 700 and [m for m in modules if with_dots(m.replace(".", "_")) != m] == []
    assert with_dots("down_blocks_0_other_part") is None and with_dots("") == ""


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_becomes_a_folder_that_diffusers_reads_and_a_file_again(tiny, tmp_path):
    from diffusers import StableDiffusionPipeline
    from omegaconf import OmegaConf

    weights = tiny.save(
        tmp_path, {**tiny.tensors, "betas": torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2}
    )
    OmegaConf.save(OmegaConf.create(tiny.config), weights.with_suffix(".yaml"))
    report = convert(tmp_path / "folder", weights)
    own = read_tensors(weights)[0]
    assert report.assigned.keys() | report.ignored.keys() == own.keys()
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "folder", local_files_only=True)
    theirs = names.unet_to_diffusers([n.removeprefix(UNET) for n in own if n.startswith(UNET)])
    for ours, name in theirs.items():
        assert torch.equal(pipe.unet.state_dict()[name], own[UNET + ours]), name
    # The folder as diffusers writes it itself, and ours: to the same file.
    pipe.save_pretrained(tmp_path / "theirs")
    for n, folder in enumerate(("folder", "theirs")):
        convert(tmp_path / f"{n}.safetensors", tmp_path / folder)
        got = read_tensors(tmp_path / f"{n}.safetensors")[0]
        same(got, {name: one for name, one in own.items() if name in got})
        assert own.keys() - got.keys() == {name for name in own if "." not in name}  # tables
    convert(tmp_path / "again", tmp_path / "0.safetensors")
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        one, other = (
            read_tensors(tmp_path / where / f"{part}.safetensors")[0] for where in ("folder", "again")
        )
        same(one, other)
    made = json.loads(
        read_tensors(tmp_path / "folder/unet/diffusion_pytorch_model.safetensors")[1]["ldm_recipe"]
    )
    assert made["from"] == [{"name": weights.name, "sha256": sha256_of(weights)}]
    convert(tmp_path / "half", weights, dtype=torch.float16)
    half = read_tensors(tmp_path / "half/vae/diffusion_pytorch_model.safetensors")[0]
    assert torch.equal(half["encoder.conv_in.weight"], own[f"{VAE}encoder.conv_in.weight"].half())

    # A file that holds its UNet as a moving average only gets its parts' names from the model.
    average = {
        names.ema_name(name) if name.startswith(UNET) else name: one
        for name, one in own.items()
        if "." in name
    }
    tiny.save(tmp_path, average, "average.safetensors")
    OmegaConf.save(OmegaConf.create(tiny.config), tmp_path / "average.yaml")
    convert(tmp_path / "plain.safetensors", tmp_path / "average.safetensors")
    same(
        read_tensors(tmp_path / "plain.safetensors")[0],
        {name: one for name, one in own.items() if "." in name},
    )

    less = {name: one for name, one in own.items() if name != f"{VAE}decoder.mid.block_1.conv1.bias"}
    tiny.save(tmp_path, less, "less.safetensors")
    OmegaConf.save(OmegaConf.create(tiny.config), tmp_path / "less.yaml")

    before = contents(tmp_path)
    for output, source, options, kind, words in (
        (
            "new.safetensors",
            tmp_path / "less.safetensors",
            {},
            MismatchError,
            "1 of its tensors .*mid.block_1.conv1",
        ),
        ("new", tmp_path / "less.safetensors", {}, MismatchError, "tensors missing .*mid.block_1.conv1.bias"),
        ("folder", weights, {}, OutputError, "holds something already"),
        ("new", tmp_path / "folder" / "unet", {}, MismatchError, "a Stable Diffusion v1 model, a ControlNet"),
        ("folder/unet/config.json", tmp_path / "folder", {}, UsageError, "is, or lies in, the input"),
        ("0.safetensors", tmp_path / "folder", {}, OutputError, "there already"),
        ("new.safetensors", weights, {"to": "diffusers"}, UsageError, "is a folder, got the name of a file"),
        ("new", weights, {"to": "compvis"}, UsageError, "should be name.safetensors"),
        ("new", weights, {"to": "kohya"}, UsageError, "one of compvis, diffusers for a model"),
        ("new", weights, {"dtype": torch.int8}, UsageError, "dtype is for models"),
        ("new", weights, {"token": "x"}, UsageError, "token .* is for embeddings"),
    ):
        with pytest.raises(kind, match=words):
            convert(tmp_path / output, source, **options)
        assert contents(tmp_path) == before, output
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # in the middle of the UNet
    try:
        with pytest.raises(OutputError, match="File too large"):
            convert(tmp_path / "new", weights)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == before and not [p for p in tmp_path.iterdir() if "new" in p.name]


# --- ControlNets ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def control():
    return {name: keyed_input(f"c.{name}", shape) for name, shape in control_shapes().items()}


def test_a_controlnet_goes_there_and_back(tmp_path, control):
    full = {CONTROL + name: one for name, one in control.items()}
    save_safetensors(tmp_path / "full.safetensors", {**full, f"{UNET}out.2.bias": torch.ones(4)})
    save_safetensors(tmp_path / "bare.safetensors", control)
    for source in ("full", "bare"):
        report = convert(tmp_path / source, tmp_path / f"{source}.safetensors")
        assert len(report.assigned) == len(control) and len(report.ignored) == (source == "full")
        convert(tmp_path / f"{source}2.safetensors", tmp_path / source)
        got, metadata = read_tensors(tmp_path / f"{source}2.safetensors")
        same(got, full)
        assert json.loads(metadata["ldm_recipe"])["to"] == "compvis"
    convert(tmp_path / "3.safetensors", tmp_path / "bare.safetensors", "compvis")
    same(read_tensors(tmp_path / "3.safetensors")[0], full)
    assert len(ControlNetFile(tmp_path / "full").tensors) == len(control)
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    assert config["block_out_channels"] == [32, 64] and config["cross_attention_dim"] == 24
    assert (
        config["conditioning_embedding_out_channels"] == [16, 32, 96, 256] and config["layers_per_block"] == 1
    )
    assert config["down_block_types"] == ["CrossAttnDownBlock2D", "DownBlock2D"]


@pytest.mark.slow
def test_diffusers_reads_the_controlnet(tmp_path, control):
    from diffusers import ControlNetModel as Theirs

    save_safetensors(tmp_path / "bare.safetensors", control)
    convert(tmp_path / "folder", tmp_path / "bare.safetensors")
    theirs = Theirs.from_pretrained(tmp_path / "folder", local_files_only=True)
    table = names.control_to_diffusers(control)
    same({table[name]: one for name, one in control.items()}, dict(theirs.state_dict()))


# --- LoRAs ----------------------------------------------------------------------------------------------------------

BODY = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_out_0"
TEXT_BODY = "lora_te_text_model_encoder_layers_3_self_attn_q_proj"
KOHYA = {
    f"{BODY}.lora_up.weight": (640, 3),
    f"{BODY}.lora_down.weight": (3, 640),
    f"{BODY}.alpha": 1.5,
    "lora_unet_up_blocks_1_resnets_0_conv1.lora_up.weight": (11, 5, 1, 1),
    "lora_unet_up_blocks_1_resnets_0_conv1.lora_down.weight": (5, 13, 3, 3),
    "lora_unet_up_blocks_1_resnets_0_conv1.alpha": 5.0,
    f"{TEXT_BODY}.lora_up.weight": (768, 2),
    f"{TEXT_BODY}.lora_down.weight": (2, 768),
    f"{TEXT_BODY}.alpha": 0.25,
    f"{TEXT_BODY}.dora_scale": (768, 1),
}


def test_a_lora_goes_to_diffusers_and_back(tmp_path):
    rows = {
        "all": KOHYA,
        "no alpha": {name: one for name, one in KOHYA.items() if not name.endswith("alpha")},
        "same alpha": {name: 2.0 if name.endswith("alpha") else one for name, one in KOHYA.items()},
    }
    for label, tensors in rows.items():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            own = read_tensors(write_lora(tmp_path / "one.safetensors", tensors))[0]
            own = {name: one.to(dtype) for name, one in own.items()}
            save_safetensors(tmp_path / "own.safetensors", own, {"ss_output_name": "x"})
            report = convert(
                tmp_path / "peft.safetensors", tmp_path / "own.safetensors", "diffusers", overwrite=True
            )
            assert report.assigned.keys() == own.keys(), label
            there, metadata = read_tensors(tmp_path / "peft.safetensors")
            stem = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
            assert torch.equal(there[f"{stem}.lora_A.weight"], own[f"{BODY}.lora_down.weight"])
            assert metadata["ss_output_name"] == "x" and ("lora_adapter_metadata" in metadata) == (
                label != "no alpha"
            )
            before, after = (LoraFile(tmp_path / f"{one}.safetensors") for one in ("own", "peft"))
            scales = [
                {m.body: (float(m.parts["alpha"]) if "alpha" in m.parts else None) for m in file.modules}
                for file in (before, after)
            ]
            assert scales[0] == scales[1], label
            convert(tmp_path / "back.safetensors", tmp_path / "peft.safetensors", "kohya", overwrite=True)
            same(read_tensors(tmp_path / "back.safetensors")[0], own)
            convert(
                tmp_path / "peft2.safetensors", tmp_path / "back.safetensors", "diffusers", overwrite=True
            )
            same(read_tensors(tmp_path / "peft2.safetensors")[0], there)


def test_a_lora_goes_to_peft_and_back(tmp_path):
    for n, start in enumerate(("lora_unet_", "lora_te_")):
        tensors = {name: one for name, one in KOHYA.items() if name.startswith(start)}
        source, folder = write_lora(tmp_path / f"{n}.safetensors", tensors), tmp_path / f"peft{n}"
        report = convert(folder, source, "peft")
        assert report.assigned.keys() == tensors.keys()
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA" and len(config["target_modules"]) == (2, 1)[n]
        there = read_tensors(folder / "adapter_model.safetensors")[0]
        stem = (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
            "encoder.layers.3.self_attn.q_proj",
        )[n]
        assert f"base_model.model.{stem}.lora_A.weight" in there
        convert(tmp_path / f"back{n}.safetensors", folder, "kohya")
        same(read_tensors(tmp_path / f"back{n}.safetensors")[0], read_tensors(source)[0])
    both = write_lora(tmp_path / "both.safetensors", KOHYA)
    with pytest.raises(MismatchError, match="PEFT's layout for one network"):
        convert(tmp_path / "new", both, "peft")
    with pytest.raises(UsageError, match="is a folder, got the name of a file"):
        convert(tmp_path / "new.safetensors", both, "peft")
    assert not [path for path in tmp_path.iterdir() if "new" in path.name]


def test_every_programs_lora_becomes_kohyas_and_diffusers(tmp_path):
    """The twelve spellings of one module of the UNet, and the seven of one of the text encoder."""
    peft = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0.lora_{AB}.weight"
    text = "text_encoder.text_model.encoder.layers.3.self_attn.q_proj.lora_{AB}.weight"
    for layouts, size, body, theirs in ((LAYOUTS, 640, BODY, peft), (TEXT_LAYOUTS, 768, TEXT_BODY, text)):
        for label, layout in layouts.items():
            shapes = {spell(layout, "up"): (size, 2), spell(layout, "down"): (2, size)}
            source = write_lora(tmp_path / "one.safetensors", shapes)
            own = read_tensors(source)[0]
            for to, name in (("kohya", f"{body}.lora_{{}}.weight"), ("diffusers", theirs)):
                convert(tmp_path / "out.safetensors", source, to, overwrite=True)
                wanted = {spell(name, which): own[spell(layout, which)] for which in ("up", "down")}
                same(read_tensors(tmp_path / "out.safetensors")[0], wanted), label


def test_kohyas_layout_holds_every_family_and_diffusers_says_what_it_does_not(tmp_path):
    families = {
        "LoHa with": {"hada_w1_a": (64, 3), "hada_w1_b": (3, 64), "hada_w2_a": (64, 3), "hada_w2_b": (3, 64)},
        "LoKr with": {"lokr_w1": (4, 4), "lokr_w2": (16, 16), "alpha": 1.0},
        "GLoRA with": {
            f"{x}.weight": (64, 3) if x in ("a1", "b1") else (3, 64) for x in ("a1", "a2", "b1", "b2")
        },
        "IA3 with": {"weight": (64,), "on_input": torch.tensor(True)},
        "OFT with": {"oft_blocks": (4, 16, 16), "alpha": 1e-3},
        "full with": {"diff": (64, 64), "diff_b": (64,)},
        "norm with": {"w_norm": (64,), "b_norm": (64,)},
        "LoRA with lora_mid": {
            "lora_up.weight": (64, 3, 1, 1),
            "lora_down.weight": (3, 64, 1, 1),
            "lora_mid.weight": (3, 3, 3, 3),
        },
        "LoRA with scale": {"lora_up.weight": (64, 3), "lora_down.weight": (3, 64), "scale": 0.5},
        "lengths of columns": {"lora_up.weight": (64, 3), "lora_down.weight": (3, 65), "dora_scale": (1, 65)},
    }
    for words, roles in families.items():
        tensors = {f"lora_unet_mid_block_attentions_0_proj_in.{role}": one for role, one in roles.items()}
        source = write_lora(tmp_path / "one.safetensors", tensors)
        convert(tmp_path / "out.safetensors", source, "kohya", overwrite=True)
        same(read_tensors(tmp_path / "out.safetensors")[0], read_tensors(source)[0])
        with pytest.raises(MismatchError, match=f"{words}.*diffusers' layout has no place"):
            convert(tmp_path / "new.safetensors", source, "diffusers")
        assert not (tmp_path / "new.safetensors").exists()


@pytest.mark.slow
def test_diffusers_makes_the_same_change_of_the_converted_lora(tmp_path):
    from diffusers import UNet2DConditionModel
    from safetensors import safe_open

    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
    )
    sizes = {
        "down_blocks.0.attentions.0.proj_in": 3,
        "up_blocks.1.resnets.0.conv1": 2,
        "mid_block.resnets.0.time_emb_proj": 5,
    }
    own, wanted = {}, {}
    for n, (module, rank) in enumerate(sizes.items()):
        weight = unet.get_submodule(module).weight.detach().clone()
        ones = (1,) * (weight.dim() - 2)
        body = f"lora_unet_{module.replace('.', '_')}"
        up, down = (
            keyed_input(f"{n}u", (len(weight), rank, *ones)),
            keyed_input(f"{n}d", (rank, *weight.shape[1:])),
        )
        own |= {f"{body}.lora_up.weight": up, f"{body}.lora_down.weight": down}
        own[f"{body}.alpha"] = torch.tensor(1.0 + n)
        wanted[module] = weight + (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * (1.0 + n) / rank
    save_safetensors(tmp_path / "own.safetensors", own)
    convert(tmp_path / "peft.safetensors", tmp_path / "own.safetensors", "diffusers")
    with safe_open(tmp_path / "peft.safetensors", "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    from peft import PeftModel

    convert(tmp_path / "folder", tmp_path / "own.safetensors", "peft")
    peft = PeftModel.from_pretrained(copy.deepcopy(unet), tmp_path / "folder").merge_and_unload()
    for module, weight in wanted.items():
        assert (peft.get_submodule(module).weight - weight).abs().max() < 1e-5, module
    unet.load_lora_adapter(read_tensors(tmp_path / "peft.safetensors")[0], metadata=config, prefix="unet")
    unet.fuse_lora()
    for module, weight in wanted.items():
        assert (unet.get_submodule(module).base_layer.weight - weight).abs().max() < 1e-5, module


# --- embeddings -----------------------------------------------------------------------------------------------------


def test_an_embedding_goes_from_every_form_to_every_form(tmp_path):
    forms = {"a1111": ("pt",), "diffusers": ("bin", "safetensors"), "kohya": ("safetensors",)}
    for count, dtype in ((1, torch.float32), (3, torch.float16), (2, torch.bfloat16)):
        vectors = keyed_input(f"e{count}", (count, 768)).to(dtype)
        state = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "birb", "step": 3}
        save_object(tmp_path / "birb.pt", state)
        for first, suffixes in forms.items():
            for suffix in suffixes:
                one = tmp_path / f"{first}.{suffix}"
                convert(one, tmp_path / "birb.pt", first, token="<birb>", overwrite=True)
                held = read_object(one) if suffix != "safetensors" else read_tensors(one)[0]
                held = held["string_to_param"]["*"] if first == "a1111" else next(iter(held.values()))
                shape = (768,) if first == "diffusers" and count == 1 else (count, 768)
                assert (
                    held.dtype == dtype
                    and held.shape == shape
                    and torch.equal(held.reshape(-1, 768), vectors)
                )
                if first == "diffusers":
                    assert Embedding(one).token == "<birb>"
                for second, ends in forms.items():
                    other = tmp_path / f"again.{ends[0]}"
                    convert(other, one, second, overwrite=True)
                    again = Embedding(other)
                    assert again.dtype == dtype and torch.equal(again.vectors, vectors.float()), (
                        first,
                        second,
                    )
    wide = {"emb_params": keyed_input("w", (2, 1024))}  # of another base model: its values are moved as well
    save_safetensors(tmp_path / "wide.safetensors", wide)
    convert(tmp_path / "wide.bin", tmp_path / "wide.safetensors", "diffusers", token="w")
    assert torch.equal(read_object(tmp_path / "wide.bin")["w"], wide["emb_params"])


# --- bad input, and the script --------------------------------------------------------------------------------------


def load_script():
    spec = importlib.util.spec_from_file_location("convert_script", ROOT / "scripts" / "convert.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = load_script()


def test_bad_input_is_one_line_and_leaves_everything_as_it_was(tmp_path, control, capsys):
    lora = write_lora(tmp_path / "lora.safetensors", KOHYA)
    odd = {
        f"lora_unet_own_part.{role}": one
        for role, one in (("lora_up.weight", (4, 2)), ("lora_down.weight", (2, 4)))
    }
    write_lora(tmp_path / "odd.safetensors", odd)
    deep = "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_k"  # of three ResBlocks a level
    write_lora(
        tmp_path / "deep.safetensors",
        {f"{deep}.lora_up.weight": torch.ones(6, 2), f"{deep}.lora_down.weight": torch.ones(2, 5)},
    )
    save_safetensors(tmp_path / "e.safetensors", {"emb_params": torch.ones(2, 768)})
    save_safetensors(tmp_path / "control.safetensors", control)
    half = {name: one for name, one in control.items() if "middle_block_out" not in name}
    save_safetensors(tmp_path / "half.safetensors", half)
    one = "input_blocks.3.0.out_layers.3.weight"
    save_safetensors(tmp_path / "less.safetensors", {name: x for name, x in control.items() if name != one})
    (tmp_path / "shards").mkdir()
    index = {"weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"}}
    (tmp_path / "shards" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    save_safetensors(tmp_path / "more.safetensors", {**control, "input_blocks.0.0.other": torch.ones(3)})
    low = {
        "lora_controlnet": torch.ones(1),
        "input_blocks.0.0.up": torch.ones(2, 3),
        "input_blocks.0.0.down": torch.ones(3, 2),
    }
    save_safetensors(tmp_path / "low.safetensors", low)
    save_safetensors(tmp_path / "what.safetensors", {"a.b": torch.ones(3)})
    save_safetensors(tmp_path / "vae.safetensors", {"decoder.conv_in.weight": torch.ones(3, 4, 3, 3)})
    (tmp_path / "cut.safetensors").write_bytes(lora.read_bytes()[:-3])
    (tmp_path / "empty").mkdir()
    before = contents(tmp_path)
    for source, words, kind, line in (
        ("none.safetensors", ["-o", "x.safetensors"], AbsentError, "is not there"),
        ("empty", ["-o", "x.safetensors"], AbsentError, "holds no model_index.json"),
        ("cut.safetensors", ["-o", "x.safetensors", "--to", "kohya"], FormatError, "incomplete"),
        (
            "lora.safetensors",
            ["-o", "x.safetensors"],
            UsageError,
            "one of kohya, diffusers, peft for a LoRA, got None",
        ),
        ("lora.safetensors", ["-o", "x.bin", "--to", "kohya"], UsageError, "should be name.safetensors"),
        (
            "lora.safetensors",
            ["-o", "x.safetensors", "--to", "kohya", "--dtype", "float16"],
            UsageError,
            "dtype is for",
        ),
        (
            "lora.safetensors",
            ["-o", "lora.safetensors", "--to", "kohya", "--overwrite"],
            UsageError,
            "is, or lies in",
        ),
        ("lora.safetensors", ["-o", "e.safetensors", "--to", "kohya"], OutputError, "is there already"),
        ("lora.safetensors", ["-o", "x.safetensors", "--to", "other"], UsageError, "--to"),
        (
            "odd.safetensors",
            ["-o", "x.safetensors", "--to", "kohya"],
            MismatchError,
            "is no module of Stable",
        ),
        (
            "deep.safetensors",
            ["-o", "x.safetensors", "--to", "diffusers"],
            MismatchError,
            "'lora_unet_input_blocks_3_1_.*' is no module of Stable",
        ),
        ("what.safetensors", ["-o", "x.safetensors", "--to", "kohya"], MismatchError, "nothing that a LoRA"),
        ("vae.safetensors", ["-o", "x.safetensors"], MismatchError, "is of the kind 'VAE'"),
        ("half.safetensors", ["-o", "x"], MismatchError, "no whole ControlNet: 2 of its tensors are missing"),
        ("less.safetensors", ["-o", "x"], MismatchError, "1 of its .*'input_blocks.3.0.out_layers.3.weight'"),
        ("shards", ["-o", "x"], MismatchError, "holds its weights in 2 files"),
        ("more.safetensors", ["-o", "x"], MismatchError, "1 of its .* tensors are none of a ControlNet"),
        ("low.safetensors", ["-o", "x"], MismatchError, "is a Control-LoRA or a difference"),
        ("control.safetensors", ["-o", "x" * 300], OutputError, "File name too long"),
        ("control.safetensors", ["-o", "a\0b"], UsageError, "is no name of a file"),
        ("control.safetensors", ["-o", "low.safetensors/x"], OutputError, "cannot write"),
        ("control.safetensors", ["-o", "x.pt"], UsageError, "is a folder, got the name of a file"),
        (
            "control.safetensors",
            ["-o", "x.safetensors", "--to", "kohya"],
            UsageError,
            "for a ControlNet, got 'kohya'",
        ),
        ("control.safetensors", ["-o", "empty/../lora.safetensors"], OutputError, "is there already"),
        (
            "e.safetensors",
            ["-o", "x.pt", "--to", "kohya"],
            UsageError,
            "in the layout kohya is name.safetensors",
        ),
        (
            "e.safetensors",
            ["-o", "x.safetensors", "--to", "a1111"],
            UsageError,
            "in the layout a1111 is name.pt",
        ),
        ("e.safetensors", ["-o", "x.bin", "--to", "diffusers", "--token", ""], UsageError, "token should be"),
    ):
        words = [words[0], str(tmp_path / words[1]), *words[2:]]
        with pytest.raises(SystemExit) as stop:
            run(script.main, [str(tmp_path / source), *words])
        error = capsys.readouterr().err
        assert stop.value.code == kind.exit_code and error.count("\n") == 1 and len(error) <= 420, (
            source,
            error,
        )
        assert re.search(line, error), (source, error)
        assert contents(tmp_path) == before, source
    assert script.main([str(lora), "-o", str(tmp_path / "x.safetensors"), "--to", "diffusers"]) == 0
    assert "10 of 10 tensors assigned" in capsys.readouterr().out
