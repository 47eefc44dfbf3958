"""Embeddings of every form are read, under the names that people type, and the wrong ones refused in a line."""

import hashlib
import json
import math

import pytest
import torch
from keyed import keyed_input
from lora_files import GOLDEN
from torch import nn

from ldm.adapters.embedding import Embedding, read_folder
from ldm.checkpoints import save_safetensors
from ldm.errors import (
    AbsentError,
    FormatError,
    LdmError,
    MismatchError,
    NumericError,
    UnsafeFileError,
    UsageError,
)

ONE, TWO = keyed_input("one", (768,)), keyed_input("two", (2, 768))


def a1111(vectors, **more):
    return {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": vectors},
        "name": "told",
        "step": 7,
        **more,
    }


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".safetensors":
        save_safetensors(path, content, {})
    else:
        torch.save(content, path)
    return path


def check_line(error):
    assert isinstance(error, LdmError) and "\n" not in str(error) and len(str(error)) <= 400


FORMS = {
    "A1111": ("x.pt", a1111(TWO), TWO, "x"),
    "A1111, a parameter": ("x.pt", a1111(nn.Parameter(TWO)), TWO, "x"),
    "the authors', in a ParameterDict": (
        "x.pt",
        {
            "string_to_token": {"*": torch.tensor(265)},
            "string_to_param": nn.ParameterDict({"*": nn.Parameter(TWO)}),
        },
        TWO,
        "x",
    ),
    "A1111 with a name inside": ("x.pt", {"string_to_param": {"<cat>": TWO}}, TWO, "<cat>"),
    "diffusers, one vector": ("learned_embeds.bin", {"<cat>": ONE}, ONE[None], "<cat>"),
    "diffusers, two": ("learned_embeds.bin", {"<cat>": TWO}, TWO, "<cat>"),
    "diffusers, a token of other letters": ("learned_embeds.bin", {"<猫 1>": TWO}, TWO, "<猫 1>"),
    "diffusers, safetensors": ("learned_embeds.safetensors", {"<cat>": TWO}, TWO, "<cat>"),
    "emb_params": ("x.safetensors", {"emb_params": TWO}, TWO, "x"),
    "emb_params in half": ("x.safetensors", {"emb_params": TWO.half()}, TWO.half().float(), "x"),
    "A1111's names in safetensors": ("x.safetensors", {"string_to_param.*": TWO}, TWO, "x"),
    "clip_l alone": ("x.safetensors", {"clip_l": TWO}, TWO, "x"),
    "a vector alone": ("x.pt", ONE, ONE[None], "x"),
    "vectors alone": ("x.bin", TWO, TWO, "x"),
    "a list of one": ("x.pt", [{"cat": TWO}], TWO, "cat"),
    "a list of one, A1111's": ("x.pt", [a1111(TWO)], TWO, "x"),
    "a token that no one can type": ("x.bin", {"a\nb": TWO}, TWO, "x"),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form, tmp_path):
    name, content, vectors, token = FORMS[form]
    found = Embedding(write(tmp_path / name, content))
    assert torch.equal(found.vectors, vectors) and found.vectors.dtype == torch.float32
    assert not found.vectors.requires_grad
    stem = name.split(".")[0]
    assert found.token == token
    assert found.names == tuple(dict.fromkeys((token, stem, f"embedding:{stem}")))


RECORDED = json.loads((GOLDEN / "textual_inversion.json").read_text())["files"]
# The kinds of files that were recorded, of width 16 -> what is in them, and what we say: vectors, or words.
KINDS = {
    "a1111": (a1111(torch.ones(3, 16)), 3),
    "diffusers1": ({"<a>": torch.ones(16)}, 1),
    "diffusers2": ({"<a>": torch.ones(2, 16)}, 2),
    "emb_params": ({"emb_params": torch.ones(4, 16)}, 4),
    "two_terms": ({"<a>": torch.ones(16), "<b>": torch.ones(16)}, "2 tensors .*say with token="),  # as A1111
    "two_params": (
        {"string_to_param": {"a": torch.ones(1, 16), "b": torch.ones(1, 16)}},
        "2 tensors",
    ),  # as A1111
    "sdxl": (
        {"clip_l": torch.ones(2, 16), "clip_g": torch.ones(2, 20)},
        "for Stable Diffusion XL",
    ),  # as nobody
    "list": ([{"a": torch.ones(2, 16)}], 2),  # as ComfyUI
    "nested": ({"a": {"b": torch.ones(2, 16)}}, 2),  # nobody reads it; nothing in it is in doubt
}


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_kinds_of_files(kind, tmp_path):
    content, wanted = KINDS[kind]
    path = write(tmp_path / "x.pt", content)
    if isinstance(wanted, str):
        with pytest.raises(MismatchError, match=wanted):
            Embedding(path, width=16)
        return
    assert Embedding(path, width=16).vectors.shape == (wanted, 16)
    theirs = RECORDED[kind]
    if "vectors" in theirs["a1111"]:
        assert (theirs["a1111"]["vectors"], theirs["a1111"]["shape"]) == (wanted, 16)
        assert theirs["a1111"]["name"] == kind  # the file's name is what triggers it
    if isinstance(theirs["comfyui"], list):
        assert math.prod(theirs["comfyui"]) == wanted * 16


def test_the_recorded_kinds_are_all_there():
    assert KINDS.keys() == RECORDED.keys()


def test_a_token_names_it_or_chooses_one(tmp_path):
    path = write(tmp_path / "x.bin", {"<a>": ONE, "<b>": TWO})
    assert torch.equal(Embedding(path, token="<b>").vectors, TWO)
    assert Embedding(path, "<a>").names == ("<a>", "x", "embedding:x")
    with pytest.raises(MismatchError, match=r"2 tensors \('<a>', '<b>'\); none is '<c>'"):
        Embedding(path, token="<c>")
    path = write(tmp_path / "y.pt", a1111(TWO))
    assert Embedding(path, token="my cat").names == ("my cat", "y", "embedding:y")


def test_describe(tmp_path):
    path = write(tmp_path / "x.pt", {"<a>": TWO})
    whole = hashlib.sha256(path.read_bytes()).hexdigest()
    found = Embedding(path)
    wanted = {"name": "x", "token": "<a>", "vectors": 2, "hash": whole[:12], "sha256": whole}
    assert found.describe() == wanted
    path.write_bytes(path.read_bytes() + b" ")
    assert found.describe() == wanted  # of what was read
    with pytest.raises(FormatError, match="changed since it was read"):
        other = write(tmp_path / "y.pt", {"<a>": TWO})
        found = Embedding(other)
        other.write_bytes(other.read_bytes() + b" ")
        found.describe()


LORA = {
    f"lora_unet_mid_block_attentions_0_proj_in.lora_{one}.weight": torch.ones(4, 4) for one in ("up", "down")
}
BAD = {
    "of v2": (
        "x.pt",
        a1111(torch.ones(3, 1024)),
        MismatchError,
        "width 1024, for Stable Diffusion v2; .* width 768",
    ),
    "of XL's second encoder": (
        "x.bin",
        {"<a>": torch.ones(1280)},
        MismatchError,
        "width 1280, .*XL.* width 768",
    ),
    "of nobody's": (
        "x.safetensors",
        {"emb_params": torch.ones(3, 7)},
        MismatchError,
        "width 7; .* width 768",
    ),
    "of XL": (
        "x.safetensors",
        {"clip_l": TWO, "clip_g": torch.ones(2, 1280)},
        MismatchError,
        "Stable Diffusion XL",
    ),
    "half of XL": ("x.safetensors", {"clip_g": torch.ones(2, 1280)}, MismatchError, "width 1280"),
    "a LoRA": ("x.safetensors", LORA, MismatchError, "an embedding was wanted, and this is a LoRA"),
    "a pickled LoRA": ("x.pt", LORA, MismatchError, "an embedding was wanted, and this is a LoRA"),
    "a VAE": ("x.pt", {"decoder.conv_in.weight": torch.ones(2, 2)}, MismatchError, "this is a VAE"),
    "NaN": ("x.pt", a1111(torch.full((2, 768), math.nan)), NumericError, "values that are not finite"),
    "whole numbers": ("x.pt", a1111(torch.ones(2, 768, dtype=torch.int64)), MismatchError, "stored as int64"),
    "three dimensions": (
        "x.pt",
        a1111(torch.ones(1, 2, 768)),
        MismatchError,
        r"shape \[1, 2, 768\]; .*\(n, 768\)",
    ),
    "a number": (
        "x.pt",
        {"<a>": torch.tensor(1.0)},
        MismatchError,
        r"shape \[\]; an embedding has \(n, 768\)",
    ),
    "none": ("x.pt", a1111(torch.ones(0, 768)), MismatchError, r"shape \[0, 768\]"),
    "nothing": ("x.pt", {"string_to_param": {}, "step": 3}, MismatchError, "holds no tensors"),
    "two in a list": ("x.pt", [{"a": ONE}, {"b": ONE}], MismatchError, "holds a list"),
    "a number alone": ("x.pt", 3, MismatchError, "holds a int"),
    "code": ("x.pt", {"<a>": TWO, "b": print}, UnsafeFileError, "contains code"),
}


@pytest.mark.parametrize("case", BAD)
def test_files_that_are_refused(case, tmp_path):
    name, content, error, words = BAD[case]
    with pytest.raises(error, match=words) as caught:
        Embedding(write(tmp_path / name, content))
    check_line(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "lfs.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    )
    with pytest.raises(FormatError, match="git-lfs pointer"):
        Embedding(tmp_path / "lfs.safetensors")
    cut = write(tmp_path / "cut.safetensors", {"emb_params": TWO})
    cut.write_bytes(cut.read_bytes()[:-5])
    with pytest.raises(FormatError, match="incomplete"):
        Embedding(cut)
    with pytest.raises(AbsentError, match="is not there"):
        Embedding(tmp_path / "none.pt")


def test_a_large_file_is_named_before_its_values_are_read(tmp_path):
    """A whole model in a folder of embeddings, sparse on the disk."""
    from ldm.adapters.embedding import MAX_BYTES

    path = tmp_path / "model.safetensors"
    size = MAX_BYTES // 2
    header = {}
    for n, name in enumerate(
        ("model.diffusion_model.out.2.weight", "model.diffusion_model.time_embed.0.weight")
    ):
        header[name] = {"dtype": "F32", "shape": [size // 4], "data_offsets": [n * size, (n + 1) * size]}
    text = json.dumps(header).encode()
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + 2 * size)
    with pytest.raises(MismatchError, match="an embedding was wanted, and this is a UNet only"):
        Embedding(path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"token": ""}, "token should be a printable text"),
        ({"token": "a\nb"}, "token should be a printable text"),
        ({"token": "a" * 101}, "token should be a printable text of up to 100 characters"),
        ({"token": 3}, "token should be a printable text"),
        ({"width": 0}, "width should be a whole number from 1"),
        ({"width": "768"}, "width should be a whole number"),
        ({"file": None}, "an embedding's file should be"),
    ],
)
def test_options_that_are_refused(options, words, tmp_path):
    with pytest.raises(UsageError, match=words) as caught:
        Embedding(**{"file": tmp_path / "x.pt", **options})
    check_line(caught.value)


def test_a_folder(tmp_path):
    write(tmp_path / "a.pt", a1111(TWO))
    write(tmp_path / "inner" / "b.bin", {"<b>": ONE})
    write(tmp_path / "inner" / "c.safetensors", {"emb_params": torch.ones(2, 1024)})
    write(tmp_path / "inner" / "d.bin", {"a": ONE})
    (tmp_path / "notes.txt").write_text("words")
    names, refused = read_folder(tmp_path)
    assert {name: one.file for name, one in names.items()} == {
        **dict.fromkeys(("a", "embedding:a"), str(tmp_path / "a.pt")),
        **dict.fromkeys(("<b>", "b", "embedding:b"), str(tmp_path / "inner" / "b.bin")),
        **dict.fromkeys(("d", "embedding:d"), str(tmp_path / "inner" / "d.bin")),
    }
    assert {path.split("/")[-1]: words for path, words in refused.items()} == {
        "c.safetensors": refused[str(tmp_path / "inner" / "c.safetensors")],
        "d.bin": f"'a' is a name of '{tmp_path / 'a.pt'}' already",
    }
    with pytest.raises(AbsentError, match="is no folder"):
        read_folder(tmp_path / "none")
