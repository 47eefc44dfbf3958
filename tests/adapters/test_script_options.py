"""--lora and --embedding: how they are read, what is painted with them, what --like says of them, what is refused."""

import argparse
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from keyed import keyed_input
from lora_files import write_lora_for
from PIL import Image
from tiny import tiny_model, write_tiny

import ldm
from ldm.adapters import PAG, FreeU, LoRA, SeamlessTiling
from ldm.adapters.lora import LoraFile
from ldm.adapters.use import described
from ldm.checkpoints import save_safetensors
from ldm.cli import Line, paint, painting_parser, read_prompts, run
from ldm.cli.adapters import (
    EmbeddingFlag,
    Embeddings,
    LoraFlag,
    embedding_flag,
    lacking,
    lora_flag,
    told_adapters,
)
from ldm.errors import UsageError
from ldm.modules import seams

ROOT = Path(__file__).parents[2]
WIDTH = 128  # of the tiny model's words


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """A model, LoRAs and embeddings for it, and files of other kinds."""
    folder = tmp_path_factory.mktemp("shelf")
    write_tiny(folder)
    model = tiny_model()
    write_lora_for(folder / "style.safetensors", model)
    write_lora_for(folder / "face.safetensors", model, -0.2, only="attn2")
    (folder / "words").mkdir()
    for name, count in (("birb", 3), ("moss", 2)):
        save_safetensors(
            folder / f"words/{name}.safetensors", {"emb_params": keyed_input(name, (count, WIDTH))}, {}
        )
    save_safetensors(folder / "words/wide.safetensors", {"emb_params": torch.ones(2, 768)}, {})
    (folder / "words/notes.txt").write_text("no embedding")
    save_safetensors(folder / "foreign.safetensors", {"lora_te2_x.lora_up.weight": torch.ones(3, 2)}, {})
    save_safetensors(
        folder / "unfit.safetensors",
        {"lora_unet_conv_in.lora_up.weight": torch.ones(5, 2), "lora_unet_conv_in.lora_down.weight": torch.ones(2, 9)},
        {},
    )  # fmt: skip
    return folder


@pytest.fixture
def home(shelf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for one in shelf.iterdir():
        (tmp_path / one.name).symlink_to(one)
    return tmp_path


@pytest.fixture
def end(home, capsys):
    """Run a script on the tiny model to its exit: (code, stdout, stderr)."""

    def ending(*argv, name="txt2img"):
        common = ["--ckpt", "tiny.safetensors", "--device", "cpu", "--steps", 2, "--skip_grid"]
        with pytest.raises(SystemExit) as stop:
            run(script(name), [str(word) for word in (*common, *argv)])
        return (stop.value.code, *capsys.readouterr())

    return ending


def told(path="o/samples/00000.png"):
    """What a picture says of its adapters: name -> weight, text weight, or the embedding's vectors."""
    return {
        one["name"]: (one["weight"], one.get("text_weight")) if one["kind"] == "LoRA" else one["vectors"]
        for one in ldm.read_metadata(path)["adapters"]
    }


# --- how they are read ---


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a.safetensors", ("a.safetensors",)),
        ("a.safetensors:0.8", ("a.safetensors", 0.8)),
        ("a.safetensors:-1:.5", ("a.safetensors", -1.0, 0.5)),
        ("a.safetensors:0.8:0", ("a.safetensors", 0.8, 0.0)),
        (r"C:\loras\a.safetensors", (r"C:\loras\a.safetensors",)),
        (r"C:\loras\a.safetensors:0.8:0.5", (r"C:\loras\a.safetensors", 0.8, 0.5)),
        ("D:/a.safetensors:2", ("D:/a.safetensors", 2.0)),
        ("https://host/a.safetensors:1", ("https://host/a.safetensors", 1.0)),  # refused by another line
        ("there", ("there",)),
        ("there:2", ("there:2",)),  # a file of this name is there
        ("there:2:0.5", ("there:2", 0.5)),
        ("there:3:0.5", ("there", 3.0, 0.5)),
        ("1.5", ("1.5",)),
        ("no:such:1:2:3", ("no:such:1", 2.0, 3.0)),
        ("there:", None), ("there:x", None), ("there:1:x", None), ("there:1:2:3:4", None), ("there:2:3:4:5", None),
        ("there:nan", None), ("there:1:inf", None), ("there::0.5", None), ("", None), ("x" * 5000, None),
        (":0.5", (":0.5",)),
    ],
)  # fmt: skip
def test_numbers_of_a_lora_are_read_from_the_end(tmp_path, monkeypatch, text, wanted):
    monkeypatch.chdir(tmp_path)
    Path("there").touch()
    Path("there:2").touch()
    if wanted is None:
        with pytest.raises(argparse.ArgumentTypeError, match="wanted FILE, FILE:weight or|at most 4096"):
            lora_flag(text)
    else:
        assert lora_flag(text) == LoraFlag(*wanted)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a.bin", ("a.bin",)),
        ("a.bin:<cat>", ("a.bin", "<cat>")),
        (r"C:\words\a.bin", (r"C:\words\a.bin",)),
        (r"C:\words\a.bin:<cat>", (r"C:\words\a.bin", "<cat>")),
        ("D:/a.bin", ("D:/a.bin",)),
        ("there", ("there",)),
        ("there:2", ("there:2",)),
        ("there:2:cat", ("there:2", "cat")),
        ("there:a:b", ("there", "a:b")),
        ("there:", None), ("", None), (":cat", (":cat",)),
    ],
)  # fmt: skip
def test_a_token_stands_behind_the_file(tmp_path, monkeypatch, text, wanted):
    monkeypatch.chdir(tmp_path)
    Path("there").touch()
    Path("there:2").touch()
    if wanted is None:
        with pytest.raises(argparse.ArgumentTypeError, match="wanted FILE or FILE:token"):
            embedding_flag(text)
    else:
        assert embedding_flag(text) == EmbeddingFlag(*wanted)


@pytest.mark.parametrize(
    ("line", "json_", "options"),
    [
        ("--lora a.safetensors:0.8", {"lora": "a.safetensors:0.8"}, {"lora": (LoraFlag("a.safetensors", 0.8),)}),
        ("--lora a --steps 5 --lora 'my b:2:1'", {"lora": ["a", "my b:2:1"], "steps": 5},
         {"lora": (LoraFlag("a"), LoraFlag("my b", 2.0, 1.0)), "steps": 5}),
        ("--embedding e.pt:cat", {"embeddings": ["e.pt:cat"]}, {"embedding": (EmbeddingFlag("e.pt", "cat"),)}),
        ("--textual-inversion e.pt", {"textual_inversion": "e.pt"}, {"embedding": (EmbeddingFlag("e.pt"),)}),
    ],
)  # fmt: skip
def test_a_line_may_have_several(tmp_path, monkeypatch, line, json_, options):
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text(f"--prompt a cat {line}\n{line} --prompt a cat\n")
    Path("p.jsonl").write_text(json.dumps({"prompt": "a cat", **json_}))
    wanted = Line("a cat", options)
    assert read_prompts("p.txt") == [wanted, wanted] and read_prompts("p.jsonl") == [wanted]


@pytest.mark.parametrize(
    ("name", "line", "words"),
    [
        ("p.txt", "--prompt a --lora", "wanted a value after --lora, got none"),
        ("p.txt", "--prompt a --lora b --lora", "wanted a value after --lora, got none"),
        ("p.txt", "--prompt a --lora there:x", "lora: wanted FILE, FILE:weight or"),
        ("p.txt", "--prompt a --lora b --loras c", "loras: lora was given twice, by two names"),
        ("p.txt", "--prompt a" + " --lora b" * 101, "lora: at most 100 adapters work together, got 101"),
        ("p.jsonl", '{"prompt": "a", "lora": 5}', "lora: wanted a text or a list of texts, got 5"),
        ("p.jsonl", '{"prompt": "a", "lora": ["b", 5]}', "lora: wanted a text or a list of texts, got"),
        ("p.jsonl", '{"prompt": "a", "embedding": {"b": 1}}', "embedding: wanted a text or a list"),
    ],
)
def test_a_line_with_wrong_adapters_is_named(tmp_path, monkeypatch, name, line, words):
    monkeypatch.chdir(tmp_path)
    Path("there").touch()
    Path(name).write_text(line)
    with pytest.raises(UsageError, match=f"line 1 of '{name}': {words}"):
        read_prompts(name)


# --- what is painted ---


def test_a_picture_is_the_one_that_python_paints_and_each_file_is_read_once(end, monkeypatch):
    read = []
    init = LoraFile.__init__
    monkeypatch.setattr(
        LoraFile, "__init__", lambda self, path, *a: (read.append(path), init(self, path, *a))[1]
    )
    words = [
        "--lora",
        "style.safetensors:0.8:0.5",
        "--lora",
        "face.safetensors",
        "--lora",
        "./style.safetensors:-0.3",
    ]
    code, out, err = end("--prompt", "a embedding:birb", "--embedding", "words", *words, "--outdir", "o")
    assert (code, err) == (0, "") and read == ["style.safetensors", "face.safetensors"]
    assert [line for line in out.splitlines() if "left out" in line] == [
        "--embedding words: left out: 'words/wide.safetensors' has vectors of width 768, for Stable Diffusion v1; the "
        "text encoder's have width 128"
    ]
    assert [one["name"] for one in ldm.read_metadata("o/samples/00000.png")["adapters"]] == [
        "style", "face", "style", "birb",
    ]  # fmt: skip
    sd = ldm.StableDiffusion.from_single_file("tiny.safetensors", device="cpu")
    from ldm.adapters import Embedding

    adapters = [
        LoRA("style.safetensors", 0.8, 0.5),
        LoRA("face.safetensors"),
        LoRA("style.safetensors", -0.3),
        Embedding("words/birb.safetensors", width=WIDTH),
    ]
    same = sd.txt2img("a embedding:birb", seed=42, steps=2, adapters=adapters)
    plain = sd.txt2img("a embedding:birb", seed=42, steps=2)
    painted = np.asarray(Image.open("o/samples/00000.png"))
    assert np.array_equal(painted, same[0]) and not np.array_equal(painted, plain[0])


@pytest.mark.slow
def test_lines_with_other_adapters_share_no_batch(end):
    Path("p.txt").write_text(
        "a circle\n--prompt a circle --lora style.safetensors:0.5 --seed 42\n"
        "--prompt a moss --embedding words/moss.safetensors\n--prompt a circle --lora style.safetensors --seed 42\n"
    )
    argv = ["--from-file", "p.txt", "--lora", "face.safetensors:0.25", "--batch_size", 4, "--outdir", "o"]
    code, _, err = end(*argv)
    assert (code, err) == (0, "")
    assert [told(f"o/samples/0000{i}.png") for i in range(4)] == [
        {"face": (0.25, None)},
        {"style": (0.5, None)},
        {"face": (0.25, None), "moss": 2},
        {"style": (1.0, None)},
    ]
    pixels = [np.asarray(Image.open(f"o/samples/0000{i}.png")) for i in (0, 1, 3)]
    assert not any(np.array_equal(a, b) for i, a in enumerate(pixels) for b in pixels[:i])


@pytest.mark.slow
def test_the_other_scripts_have_them_too(end):
    Image.new("RGB", (72, 64), "red").save("in.png")
    mask = Image.new("L", (72, 64))
    mask.paste(255, (40, 0, 72, 64))
    mask.save("m.png")
    common = ["--lora", "style.safetensors:0.4", "--prompt", "x", "--init-img", "in.png", "--strength", 0.5]
    assert end(*common, "--outdir", "a", name="img2img")[0] == 0
    assert end(*common, "--mask", "m.png", "--outdir", "b", name="inpaint")[0] == 0
    assert told("a/samples/00000.png") == told("b/samples/00000.png") == {"style": (0.4, None)}


def test_an_embedding_that_no_prompt_names_is_said_once_and_one_of_a_folder_is_not(end):
    Path("p.txt").write_text("a circle\n--prompt a ring --seed 5 --steps 1\n")
    argv = ["--from-file", "p.txt", "--embedding", "words/birb.safetensors:<b>", "--embedding", "words"]
    code, _, err = end(*argv, "--outdir", "o")
    assert code == 0 and err.splitlines() == [
        "ldm: warning: no prompt names the embedding words/birb.safetensors; write <b> or birb or embedding:birb"
    ]


@pytest.mark.slow
def test_loras_of_lines_that_are_painted_are_let_go(home):
    """Weights that a LoRA was folded into are as large as the model's: those of a long list would fill the memory."""
    lines = [f"--prompt a --lora style.safetensors:{weight}" for weight in (1, 2, 1, 3)]
    Path("p.txt").write_text("\n".join(lines))
    parser = painting_parser("txt2img.py", "x", outdir="o", scale=7.5)
    args = [
        "--ckpt",
        "tiny.safetensors",
        "--device",
        "cpu",
        "--steps",
        "1",
        "--skip_grid",
        "--from-file",
        "p.txt",
    ]
    alive = []
    paint(parser.parse_args(args), save=lambda result, source: alive.append(len(seams._folded)) or [Path()])
    assert len(alive) == 4 and alive[0] > 0 and len(set(alive)) == 1


def test_files_of_one_name_in_a_folder_go_by_their_tokens(home, capsys):
    for name in ("cat", "dog"):
        Path(f"learned/{name}").mkdir(parents=True)
        save_safetensors(
            f"learned/{name}/learned_embeds.safetensors", {f"<{name}>": keyed_input(name, (1, WIDTH))}, {}
        )
    flags, embeddings = [embedding_flag("learned")], Embeddings(tiny_model())
    assert [one.token for one in embeddings.named(flags, ["a <dog> and a <CAT>"])] == ["<cat>", "<dog>"]
    assert capsys.readouterr().out == (
        "--embedding learned: learned/dog/learned_embeds.safetensors goes by '<dog>' alone: "
        "'embedding:learned_embeds' is a name of 'learned/cat/learned_embeds.safetensors' already\n"
    )
    assert [one.token for one in embeddings.named(flags, ["a learned_embeds"])] == ["<cat>"]
    with_own = [*flags, embedding_flag("learned/dog/learned_embeds.safetensors:pup")]
    assert [one.token for one in embeddings.named(with_own, ["a pup, a <cat>, a <dog>"])] == ["pup", "<cat>"]


# --- --like ---


@pytest.mark.slow
def test_like_names_what_is_not_given_and_repeats_the_picture_with_it(end):
    given = ["--lora", "style.safetensors:0.8:0.5", "--embedding", "words/birb.safetensors"]
    assert end("--prompt", "a embedding:birb", *given, "--seed", 5, "--outdir", "first")[0] == 0
    first = "first/samples/00000.png"
    code, out, err = end("--like", first, "--outdir", "o")
    style, birb = (one["hash"] for one in ldm.read_metadata(first)["adapters"])
    assert code == 0 and [line for line in out.splitlines() if line.startswith("first")] == [
        f"{first}: was painted with LoRA 'style' at 0.8:0.5 (hash {style}), which is not given (--lora FILE:0.8:0.5); "
        f"Embedding 'birb' (hash {birb}), which is not given (--embedding FILE)"
    ]
    code, out, err = end("--like", first, *given, "--outdir", "again")
    assert (code, err) == (0, "") and "was painted with" not in out
    assert Path("again/samples/00000.png").read_bytes() == Path(first).read_bytes()


def test_like_says_which_adapters_without_a_file_no_option_gives():
    given = [PAG(3, ["up", "mid"], end=0.5), FreeU(1, 2, 1, 0.5), SeamlessTiling(True, False)]
    told = json.loads(json.dumps(described(given)))
    assert lacking(told, given) is None
    assert lacking(told, given[1:]) == (
        "was painted with PAG (scale 3.0, layers ['up', 'mid'], end 0.5), which no option gives in this way"
    )
    strange = [{"kind": "SAG", "scale": "x" * 999, "else": []}, {"kind": ["PAG"]}]
    assert len(lacking(strange, given)) < 400


def test_like_knows_a_lora_by_its_content_and_says_at_which_strength_it_is_given(home):
    Path("renamed.safetensors").symlink_to("style.safetensors")
    told = {"kind": "LoRA", **LoRA("style.safetensors", 0.8, 0.5).describe()}
    assert lacking([told], [LoRA("face.safetensors"), LoRA("renamed.safetensors", 0.8, 0.5)]) is None
    begin = f"was painted with LoRA 'style' at 0.8:0.5 (hash {told['hash']}), which is "
    for given, end in (("style", "given at 0.8"), ("face", "not given")):
        line = lacking([told], [LoRA(f"{given}.safetensors", 0.8)])
        assert line == f"{begin}{end} (--lora FILE:0.8:0.5)"
    told = {"kind": "LoRA", **LoRA("style.safetensors", 0.8, end=0.5).describe()}
    line = lacking([told], [LoRA("style.safetensors", 0.8)])
    assert line.endswith("at 0.8, end 0.5 (hash " + told["hash"] + "), which no option gives in this way")


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({}, None),
        ({"adapters": []}, None),
        ({"adapters": "LoRA"}, None),
        ({"adapters": [5, None, []]}, None),
        ({"extra": {"Lora hashes": "a: b: 0123456789ab", "TI hashes": "<x>: 0123456789"}},
         "was painted with LoRA 'a: b' (hash 0123456789ab), which is not given (--lora FILE); "
         "Embedding '<x>' (hash 0123456789), which is not given (--embedding FILE)"),
        ({"extra": {"Lora hashes": "no hash"}}, None),
        ({"adapters": [{"kind": "Mine", "is": "a thing"}]}, "was painted with Mine '?' (hash ?), which is not given"),
        ({"adapters": [{"kind": "LoRA", "name": "a\nb", "weight": 2, "end": 0.5, "hash": [1], "sha256": {}}]},
         r"was painted with LoRA 'a\nb' at 2, end 0.5 (hash [1]), which is not given (--lora FILE:2)"),
    ],
)  # fmt: skip
def test_whatever_a_picture_says_of_adapters_is_one_line(parameters, words):
    assert lacking(told_adapters(parameters), []) == words


# --- what is refused ---


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--lora", "q/x/y:1"], 9, "--lora 'q/x/y' is not there; check the path"),
        (["--lora", "styel.safetensors"], 9, "did you mean 'style.safetensors'?"),
        (["--lora", "style"], 9, "did you mean 'style.safetensors'?"),
        (["--lora", "style.safetensors:strong"], 2, "wanted FILE, FILE:weight or FILE:weight:text weight"),
        (["--lora", "https://host/a.safetensors:0.5"], 2, "is an address: nothing is downloaded here"),
        (["--lora", "words"], 3, "--lora 'words' is a folder; name a file in it, 'birb.safetensors'"),
        (["--lora", "words/birb.safetensors"], 5, "a LoRA was wanted, and this is a textual-inversion embedding"),
        (["--lora", "tiny.safetensors"], 5, "a LoRA was wanted, and this is a full"),
        (["--lora", "foreign.safetensors"], 5, "this is one for Stable Diffusion XL"),
        (["--embedding", "nowhere.pt"], 9, "--embedding 'nowhere.pt' is not there"),
        (["--embedding", "words:cat"], 2, "is a folder, whose files have names of their own; leave 'cat' out"),
        (["--from-file", "p.txt"], 9, "line 2 of 'p.txt': --lora 'nowhere' is not there"),
        (["--from-file", "q.txt"], 5, "line 1 of 'q.txt': 'foreign.safetensors': a LoRA for Stable Diffusion v1 was"),
    ],
)  # fmt: skip
@pytest.mark.thinned(3)
def test_a_wrong_adapter_is_said_before_a_model_is_loaded(end, argv, code, words):
    Path("p.txt").write_text("a\n--prompt a --lora nowhere\n")
    Path("q.txt").write_text("--prompt a --lora foreign.safetensors\n")
    got, out, err = end(*argv, "--outdir", "o")
    assert got == code and words in err and err.count("\n") == 1 and len(err) <= 420, err
    assert "loading" not in out and not Path("o").exists()


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--lora", "unfit.safetensors"], 5, "'lora_unet_conv_in' does not fit model.diffusion_model.input_blocks.0.0"),
        (["--embedding", "words/wide.safetensors"], 5, "has vectors of width 768"),
        (["--embedding", "style.safetensors"], 5, "an embedding was wanted, and this is a LoRA"),
        (["--embedding", "empty"], 9, "--embedding 'empty' holds no embedding for this model"),
        (["--from-file", "p.txt"], 5, "line 2 of 'p.txt': 'unfit.safetensors': 'lora_unet_conv_in' does not fit"),
        (["--from-file", "q.txt"], 5, "line 1 of 'q.txt': 'words/wide.safetensors' has vectors of width 768"),
    ],
)  # fmt: skip
@pytest.mark.thinned(6)
def test_one_that_does_not_fit_is_said_before_the_first_picture(end, argv, code, words):
    Path("empty").mkdir()
    Path("p.txt").write_text("a\n--prompt a --lora unfit.safetensors\n")
    Path("q.txt").write_text("--prompt a --embedding words/wide.safetensors\n")
    got, _, err = end(*argv, "--outdir", "o")
    assert got == code and words in err and err.count("\n") == 1 and len(err) <= 420, err
    assert not list(Path("o").rglob("*.png"))
