"""--control, --t2i-adapter and what is said of them: how it is read, painted with, told by --like, refused."""

import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from keyed import keyed_input
from lora_files import write_lora_for
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_model, write_tiny
from tiny_adapters import write_control, write_look, write_sketch

import ldm
from ldm.adapters import IPAdapter
from ldm.adapters.controls import Hint
from ldm.adapters.ip_adapter_images import RegionMask
from ldm.adapters.preprocessors import preprocess
from ldm.cli import painting_parser, read_prompts, run
from ldm.cli.adapters import lacking
from ldm.cli.controls import as_painted, check_controls, gather
from ldm.errors import LdmError

ROOT = Path(__file__).parents[2]


def said(*words):
    return (
        painting_parser("txt2img.py", "x", outdir="o", scale=7.5)
        .parse_args([str(word) for word in words])
        .controls
    )


def records(parts):
    return [(one.kind, one.file, one.hints, one.options) for one in gather(parts)]


# --- how they are read ---

WORDS = (
    "--control a.pth --hint e.png --control-scale 0.8 --control_end=0.5 --t2i-adapter t.pth --hint f.png --hint g.png "
    "--control-fit pad --control a.pth --control-mode control --hint h.png --preprocess canny:80"
)
WANTED = [
    ("control", "a.pth", ["e.png"], {"control_scale": 0.8, "control_end": 0.5}),
    ("t2i_adapter", "t.pth", ["f.png", "g.png"], {"control_fit": "pad"}),
    ("control", "a.pth", ["h.png"], {"control_mode": "control", "preprocess": "canny:80"}),
]


def test_each_flag_belongs_to_the_file_before_it_on_the_command_line_and_in_prompt_files(tmp_path):
    assert records(said(*WORDS.split())) == WANTED
    (tmp_path / "p.txt").write_text(f"--prompt a cat {WORDS}\n")
    lists = {
        "control": ["a.pth", "a.pth"],
        "hint": ["e.png", "h.png"],
        "control-scale": [0.8, None],
        "control_mode": [None, "ControlNet is more important"],
    }
    one = {"control": "a.pth", "hint": ["e.png", "f.png"], "control_start": 0.25}
    (tmp_path / "p.jsonl").write_text(
        "\n".join(json.dumps({"prompt": "a cat", **more}) for more in (lists, one))
    )
    assert records(read_prompts(str(tmp_path / "p.txt"))[0].options["controls"]) == WANTED
    both, single = (records(line.options["controls"]) for line in read_prompts(str(tmp_path / "p.jsonl")))
    assert both == [
        ("control", "a.pth", ["e.png"], {"control_scale": 0.8}),
        ("control", "a.pth", ["h.png"], {"control_mode": "control"}),
    ]
    assert single == [("control", "a.pth", ["e.png", "f.png"], {"control_start": 0.25})]
    assert records(said()) == [] and records(said("--controlnet", "a")) == [("control", "a", [], {})]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"control": ["a", "b"], "hint": "e.png"}, "hint: wanted 2 values, one for each of 2 adapters"),
        ({"control": ["a", "b"], "hint": ["e", "f", "g"]}, "hint: wanted 2 values, .* got 3"),
        (
            {"control": "a", "control_scale": True},
            "control_scale: wanted a text, a number or a list of these, got True",
        ),
        ({"control": {"file": "a"}}, "control: wanted a text, a number or a list"),
        ({"control": "a", "control_scale": "x"}, "control_scale: wanted a number from -100 to 100, got 'x'"),
        ({"control": "a", "control_fit": "fill"}, "control_fit: wanted one of crop, pad, stretch"),
    ],
)
def test_wrong_lines_are_refused(line, words, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "a", **line}))
    with pytest.raises(LdmError, match=words):
        read_prompts(str(path))


def test_what_needs_no_model_to_be_wrong_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("c.pth", "e.png"):
        (tmp_path / name).touch()
    ready = ("--control", "c.pth", "--hint", "e.png")
    for words, message in (
        (
            ("--hint", "e.png"),
            "--hint 'e.png' is said of the --control or --t2i-adapter before it, and there is none",
        ),
        (("--control-end", "0.5", *ready), "--control-end 0.5 is said of the --control"),
        (
            (*ready, "--control-end", "0.5", "--control-end", "0.6"),
            "--control-end was given twice for --control 'c.pth'",
        ),
        (
            ("--t2i-adapter", "c.pth", "--hint", "e.png", "--control-mode", "prompt"),
            "--control-mode is for ControlNets",
        ),
        (("--control", "c.pth"), "--control 'c.pth' has no hint; say what to paint along: --hint PICTURE"),
        (("--control", ""), "wanted a file after --control, got none"),
        (("--control", "cc.pth", "--hint", "e.png"), "--control 'cc.pth' is not there; did you mean 'c.pth'"),
        (("--control", "c.pth", "--hint", "x/absent.png"), "--hint 'x/absent.png' is not there"),
        (("--control", "https://host/c.pth"), "https://host/c.pth"),
        ((*ready, "--preprocess", "depth"), "'depth' is drawn by a network of its own"),
        ((*ready, "--preprocess", "cany"), "did you mean 'canny'"),
        (
            (*ready, "--preprocess", "canny:1:2:3"),
            "--preprocess canny takes low and high behind it, got '1:2:3'",
        ),
        ((*ready, "--preprocess", "invert:1"), "--preprocess invert takes no numbers, got '1'"),
        ((*ready, "--preprocess", "tile:big"), "--preprocess tile: rate should be a number, got 'big'"),
        ((*ready, "--preprocess", "inpaint"), "--preprocess inpaint wants a mask: --mask of inpaint.py"),
        (
            ("--ip-image", "e.png"),
            "--ip-image 'e.png' is said of the --ip-adapter before it, and there is none",
        ),
        (
            (*ready, "--ip-scale", "0.5"),
            "--ip-scale is said of a --ip-adapter, and stands behind --control 'c.pth'",
        ),
        (
            ("--ip-adapter", "c.pth", "--hint", "e.png"),
            "--hint is said of a --control or --t2i-adapter, and stands",
        ),
        (
            ("--ip-adapter", "c.pth"),
            "--ip-adapter 'c.pth' has no picture; say which to paint after: --ip-image",
        ),
        (("--ip-adapter", "c.pth", "--ip-image", "e.png"), "name CLIP's vision model: --image-encoder PATH"),
        (
            ("--ip-adapter", "c.pth", "--ip-image", "f.png"),
            "--ip-image 'f.png' is not there; did you mean 'e.png'",
        ),
        (("--ip-adapter", "d.bin", "--ip-image", "e.png"), "--ip-adapter 'd.bin' is not there"),
        (("--ip-adapter", "c.pth", "--image-encoder", "clip"), "--image-encoder 'clip' is not there"),
        (("--ip-adapter", "c.pth", "--ip-image", "https://h/e.png"), "https://h/e.png"),
        (("--ip-adapter", "c.pth", "--ip-mask", "absent.png"), "--ip-mask 'absent.png' is not there"),
        (
            (*ready, "--ip-mask", "e.png"),
            "--ip-mask is said of a --ip-adapter, and stands behind --control",
        ),
        (ready * 101, "at most 100 adapters work together, got 101"),
    ):
        with pytest.raises(LdmError, match=message) as error:
            check_controls(said(*words), {})
        assert len(str(error.value)) <= 400
    for words, message in (
        (
            ("--control-scale", "nan"),
            "argument --control-scale.*: wanted a number from -100 to 100, got 'nan'",
        ),
        (("--control-start", "1.5"), "wanted a number from 0 to 1, got '1.5'"),
        (("--ip-end", "1.5"), "wanted a number from 0 to 1, got '1.5'"),
        (("--ip-scale", "nan"), "argument --ip-scale.*: wanted a number from -100 to 100, got 'nan'"),
        (("--control-mode", "both"), "wanted one of balanced, prompt, control, middle; got 'both'"),
    ):
        with pytest.raises(LdmError, match=message):
            said("--control", "c.pth", *words)
    check_controls(said(*ready), {})
    check_controls(said("--control", "c.pth"), {"image": "e.png"})


# --- what is painted ---


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A model, a ControlNet and a T2I-Adapter for it, and pictures."""
    folder = tmp_path_factory.mktemp("shelf")
    write_tiny(folder)
    write_control(folder / "edges.safetensors")
    write_sketch(folder / "sketch.safetensors")
    pixels = (255 * keyed_input("hint", (64, 72, 3)).clamp(0, 1)).byte().numpy()
    Image.fromarray(pixels).save(folder / "hint.png")
    Image.fromarray(pixels[:, :64]).save(folder / "init.png")
    mask = torch.zeros(64, 64, dtype=torch.uint8)
    mask[16:40, 8:48] = 255
    Image.fromarray(mask.numpy()).save(folder / "mask.png")
    return folder


@pytest.fixture
def end(shelf, tmp_path, monkeypatch, capsys):
    """Run a script on the tiny model to its exit: (code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    for one in shelf.iterdir():
        (tmp_path / one.name).symlink_to(one)

    def ending(name, *argv):
        spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        common = [] if "--ckpt" in argv else ["--ckpt", "tiny.safetensors"]
        common += ["--device", "cpu", "--steps", 2, "--skip_grid", "--seed", 4]
        with pytest.raises(SystemExit) as stop:
            run(module.main, [str(word) for word in (*common, *argv)])
        return (stop.value.code, *capsys.readouterr())

    return ending


def adapters(path):
    return ldm.read_metadata(path)["adapters"]


def test_a_script_paints_along_hints_says_so_and_repeats_what_it_is_told(end):
    flags = [
        "--control",
        "edges.safetensors",
        "--hint",
        "hint.png",
        "--control-scale",
        0.5,
        "--control-mode",
        "prompt",
    ]
    flags += [
        "--t2i-adapter",
        "sketch.safetensors",
        "--hint",
        "hint.png",
        "--preprocess",
        "invert",
        "--control-fit",
        "stretch",
    ]
    size = ["--H", 64, "--W", 64, "--prompt", "a circle"]
    assert end("txt2img", *size, *flags, "--outdir", "o")[0] == 0
    one, other = adapters("o/samples/00000.png")
    hint = Hint(["hint.png"])
    assert {k: one[k] for k in ("kind", "name", "scale", "weights", "hint")} == {
        "kind": "ControlNet", "name": "edges", "scale": 0.5, "weights": "soft", "hint": hint.hash
    }  # fmt: skip
    assert {k: other[k] for k in ("kind", "name", "scale", "fit", "hint")} == {
        "kind": "T2IAdapter", "name": "sketch", "scale": 1, "fit": "stretch",
        "hint": Hint([preprocess("hint.png", "invert")]).hash,
    }  # fmt: skip
    like = ["--like", "o/samples/00000.png"]
    code, out, _ = end("txt2img", *like, *flags, "--outdir", "again")
    assert code == 0 and "was painted with" not in out
    assert Path("again/samples/00000.png").read_bytes() == Path("o/samples/00000.png").read_bytes()
    code, out, _ = end("txt2img", *like, *flags[:8], "--control-end", 0.5, "--outdir", "less")
    assert code == 0
    assert "ControlNet 'edges' (hash " in out and "which is given with another end" in out
    assert (
        "T2IAdapter 'sketch' (hash " in out and "which is not given (--t2i-adapter FILE --hint PICTURE" in out
    )


def test_a_script_paints_after_a_picture_and_repeats_it(end, tmp_path):
    write_look()
    flags = "--ip-adapter look.safetensors --ip-image hint.png --ip-scale 0.5 --image-encoder clip".split()
    flags += "--ip-adapter look.safetensors --ip-image init.png --ip-image hint.png".split()
    flags += "--ip-start 0.25 --ip-end 0.75 --ip-mask mask.png".split()
    assert records(said(*flags)) == [
        ("ip_adapter", "look.safetensors", ["hint.png"], {"ip_scale": 0.5, "image_encoder": "clip"}),
        ("ip_adapter", "look.safetensors", ["init.png", "hint.png"], {"ip_start": 0.25, "ip_end": 0.75}),
    ]
    (tmp_path / "p.txt").write_text(f"--prompt a circle --seed 4 {' '.join(flags)}\n")
    assert end("txt2img", "--H", 64, "--W", 64, "--from-file", "p.txt", "--outdir", "o")[0] == 0
    one, other = adapters("o/samples/00000.png")
    assert (one["kind"], one["name"], one["scale"], other["scale"]) == ("IPAdapter", "look", 0.5, 1.0)
    assert (other["start"], other["end"], other["mask"]) == (0.25, 0.75, [RegionMask("mask.png").hash])
    assert one["image"] != other["image"]
    code, out, _ = end("txt2img", "--like", "o/samples/00000.png", *flags, "--outdir", "again")
    assert code == 0 and "was painted with" not in out
    assert Path("again/samples/00000.png").read_bytes() == Path("o/samples/00000.png").read_bytes()
    line = lacking([one], [IPAdapter("look.safetensors", scale=0.7, embeds=torch.ones(1, 20))])
    assert line == (
        f"was painted with IPAdapter 'look' (hash {one['hash']}), which is given with another scale, image "
        "(--ip-adapter FILE --ip-image PICTURE --ip-scale 0.5 --image-encoder PATH)"
    )
    assert lacking([one | {"end": 0.5, "mask": ["ab12"]}], []).endswith(
        "--ip-scale 0.5 --ip-end 0.5 --ip-mask PICTURE with hash ab12 --image-encoder PATH)"
    )
    assert lacking([one | {"combine": "average"}], []).endswith("(no option gives it in this way)")


@pytest.mark.slow
def test_the_picture_to_begin_with_is_the_hint_and_its_mask_the_holes(end):
    where = ["--init-img", "init.png", "--prompt", "a circle", "--control", "edges.safetensors"]
    assert end("img2img", *where, "--preprocess", "tile:2", "--outdir", "o")[0] == 0
    assert adapters("o/samples/00000.png")[0]["hint"] == Hint([preprocess("init.png", "tile", rate=2)]).hash
    masked = ["--mask", "mask.png", "--preprocess", "inpaint", "--outdir", "p"]
    assert end("inpaint", *where, *masked)[0] == 0
    holes = preprocess("init.png", "inpaint", mask="mask.png")
    assert (holes == -1).sum() == 3 * 24 * 40
    assert adapters("p/samples/00000.png")[0]["hint"] == Hint([holes]).hash
    grown = ["--outpaint", "16,0,0,8", "--preprocess", "inpaint", "--outdir", "q"]
    assert end("img2img", *where, *grown)[0] == 0
    found = as_painted({"image": Image.open("init.png").convert("RGB")}, {"outpaint": (16, 0, 0, 8)})
    holes = preprocess(found["image"], "inpaint", mask=found["mask"])
    assert adapters("q/samples/00000.png")[0]["hint"] == Hint([holes]).hash


PICTURE = Image.effect_noise((72, 64), 90).convert("RGB")
LEFT_HALF = Image.new("L", (72, 64))
LEFT_HALF.paste(255, (0, 0, 36, 64))
LAID_OUT = [  # options, and the size of the hint
    ({}, (72, 64)),
    ({"outpaint": (32, 0, 0, 16)}, (104, 80)),
    ({"outpaint": (30, 0, 0, 0), "mask_blur": 4}, (104, 64)),
    ({"width": 64, "height": 96}, (64, 96)),
    ({"width": 64, "height": 96, "resize_mode": "crop and resize"}, (64, 96)),
    ({"width": 64, "height": 96, "resize_mode": "resize and fill"}, (64, 96)),
    ({"width": 128, "height": 64, "resize_mode": "latent upscale"}, (128, 64)),
    ({"upscale_by": 1.9, "upscale_overlap": 16, "width": 64, "height": 64}, (136, 120)),
    ({"inpaint_full_res": True, "width": 64, "height": 64, "mask_invert": True}, (72, 64)),
]


@pytest.mark.parametrize(("options", "size"), LAID_OUT)
def test_the_picture_to_begin_with_is_a_hint_as_it_is_painted(painter, options, size):
    """What plan() begins with: the same pixels, and the same mask, where one is painted whole."""
    is_masked = "inpaint_full_res" in options
    found = as_painted({"image": PICTURE} | ({"mask": LEFT_HALF} if is_masked else {}), options)
    assert tuple(found["image"].shape) == (3, *size[::-1])
    assert ("mask" in found) == (is_masked or "outpaint" in options)
    mask = LEFT_HALF if is_masked else None
    request = painter.plan("x", image=PICTURE, mask=mask, steps=2, **options)
    start = request.passes[0].start
    if is_masked or "upscale_by" in options:
        whole = start.frame.original if is_masked else None
        assert whole is None or torch.equal(found["image"], whole[0])
        assert not is_masked or found["mask"].getpixel((3, 3)) == (
            0,
            0,
            0,
        )  # of which the other half is painted
        boxes = zip(request.tiles.boxes, request.passes, strict=True) if whole is None else ()
        for (left, top, right, bottom), one in boxes:
            part = found["image"][None, :, top:bottom, left:right]
            assert torch.equal(part, one.start.frame.original)
        return
    painted = start.image if start.image.shape[2:] == found["image"].shape[1:] else None
    if painted is None:  # enlarged as latents
        assert "latent" in options["resize_mode"]
        painted = 2 * start.original - 1
    torch.testing.assert_close(2 * found["image"] - 1, painted[0], rtol=0, atol=1e-6)
    if start.mask is not None:
        marks = torch.tensor(list(found["mask"].convert("L").tobytes())).reshape(size[::-1]) > 127
        assert torch.equal(marks, start.mask[0, 0] > 0)


def test_one_kind_for_the_other_is_refused_in_one_line(end):
    code, _, err = end("txt2img", "--control", "sketch.safetensors", "--hint", "hint.png")
    assert code == 5 and "a ControlNet was wanted, and this is a T2I-Adapter" in err
    code, _, err = end("txt2img", "--t2i-adapter", "edges.safetensors", "--hint", "hint.png")
    assert code == 5 and "a T2I-Adapter was wanted, and this is a ControlNet" in err
    Path("p.txt").write_text("a cat\n--prompt a dog --control edges.safetensors --hint tiny.safetensors\n")
    code, _, err = end("txt2img", "--from-file", "p.txt")
    assert code == 3 and "line 2 of 'p.txt'" in err and err.count("\n") == 1


@pytest.mark.slow
def test_blocks_of_the_page_run(end, tmp_path):
    """docs/controls.md, with files of its names for the tiny model."""
    page = (ROOT / "docs" / "controls.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert [language for language, _ in blocks] == ["python", "bash", "python"]
    write_look()
    write_lora_for("style.safetensors", tiny_model())
    (tmp_path / "models").mkdir()
    Path("clip").rename("models/image_encoder")
    for theirs, name in (
        ("tiny.safetensors", "v1-5-pruned.safetensors"),
        ("edges.safetensors", "control_v11p_sd15_canny.pth"),
        ("sketch.safetensors", "t2iadapter_sketch_sd15v2.pth"),
        ("look.safetensors", "ip-adapter_sd15.safetensors"),
        ("look.safetensors", "ip-adapter-plus-face_sd15.bin"),
    ):
        if name.endswith("safetensors"):
            shutil.copy(theirs, name)
        else:
            torch.save(load_file(theirs), name)
    settings = yaml.safe_load(Path("tiny.yaml").read_text()) | {"sampling": {"steps": 2, "size": 64}}
    Path("v1-5-pruned.yaml").write_text(yaml.safe_dump(settings))
    for name in ("edges", "portrait", "anna", "berta", "left", "right", "house", "sketch"):
        shutil.copy("hint.png", f"{name}.png")
    names = {}
    for code in (blocks[0][1], blocks[2][1]):
        exec(compile(code, "docs/controls.md", "exec"), names)
    kinds = [one["kind"] for one in adapters("out/00000.png")]
    assert kinds == ["ControlNet", "IPAdapter", "LoRA"]
    command = blocks[1][1]
    if importlib.util.find_spec("cv2") is None:  # of the extra "hints"
        command = command.replace("canny:100:200", "threshold:100")
    _, script, *flags = shlex.split(command.replace("\\\n", " "))
    assert script == "scripts/txt2img.py"
    assert end("txt2img", *flags, "--outdir", "o")[0] == 0
    assert [one["kind"] for one in adapters("o/samples/00000.png")] == ["ControlNet", "T2IAdapter"]
