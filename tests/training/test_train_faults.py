"""What ends a training run before or while it trains: words, sections, values, Lightning's options, and data."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_training
import torch
from omegaconf import OmegaConf
from PIL import Image
from tiny_training import diffusion, first_stage, put, run

from ldm.errors import (
    AbsentError,
    FormatError,
    LdmError,
    MismatchError,
    ResourceError,
    UnsafeFileError,
    UsageError,
)
from ldm.training.data import DataModuleFromConfig, Shapes, Stream, collate
from ldm.training.folder import ImageFolder
from ldm.training.merging import merge_configs
from ldm.training.trainer import Run, RunOptions

SCRIPT = Path(tiny_training.__file__).parents[1] / "scripts" / "train.py"


def one_line(caught, most=400):
    text = str(caught.value)
    assert "\n" not in text and len(text) <= most and "Traceback" not in text, text
    return text


# -- words of the command line --------------------------------------------------------------------------------------

WORDS = {
    "a.b": (UsageError, "wanted a.b=c"),
    "model.params.timesteps=" + "1" * 100_000: (FormatError, "a number of 100000 digits"),
    "model.params.timesteps=0x" + "f" * 100_000: (FormatError, "a number of 100002 digits"),
    "a.b=!!bool maybe": (FormatError, "'maybe' is no value of !!bool"),
    "a.b=!!python/name:os.system x": (UnsafeFileError, "Python tag"),
    "a.b=[1, 2": (FormatError, "not readable YAML|is no value"),
    "a.b={": (FormatError, "not readable YAML|is no value"),
    "a.b=" + "[" * 5000: (FormatError, "too large"),
    "a.b=&x [*x]": (FormatError, "stands for nothing before it"),
    "a.b=${oc.env:HOME}": (UnsafeFileError, "asks a resolver"),
    "a.b=${a.b}": (FormatError, "Recursive"),
    "a.b=${nowhere}": (FormatError, "not found"),
    "a.b=${x": (UsageError, "cannot be laid over"),
    "model.target.x=3": (UnsafeFileError, "target {'x': 3} is not a dotted class name"),
    "model=3": (MismatchError, "model: a configuration needs 'target' and 'params', got 3"),
    "a.b=\t-": (FormatError, "not readable YAML"),
}


@pytest.mark.parametrize("word", WORDS, ids=[word[:30] for word in WORDS])
def test_a_word_that_cannot_be_read_is_one_line(tmp_path, word):
    OmegaConf.save(OmegaConf.create(first_stage()), tmp_path / "a.yaml")
    error, message = WORDS[word]
    with pytest.raises(error, match=message) as caught:
        Run(RunOptions(config=merge_configs([tmp_path / "a.yaml"], [word]), folder=tmp_path))
    one_line(caught)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("model.params.embed_dim=1e999", "model.params.embed_dim should be a whole number .* got inf"),
        ("model.params.embed_dim=.inf", "got inf"),
        ("model.params.embed_dim=.nan", "got nan"),
        ("model.params.embed_dim=", "got None|got ''"),
        ("model.base_learning_rate=1e999", "model.base_learning_rate should be .* got inf"),
        ("lightning.trainer.max_steps=1e999", "lightning.trainer.max_steps should be .* got inf"),
        (
            "data.params.batch_size=" + "9" * 99,
            "data.params.batch_size should be a whole number from 1 to 1048576, got 99999",
        ),
        ("model.params.ddconfig.ch=x", "model.params.ddconfig.ch should be a whole number .* got 'x'"),
        (
            "data.params.train.params.image_size=3",
            "data.params.train.params.image_size should be .* 16 to 4096",
        ),
    ],
)
def test_a_word_that_is_read_may_still_be_wrong(tmp_path, word, message):
    OmegaConf.save(OmegaConf.create(first_stage()), tmp_path / "a.yaml")
    with pytest.raises(UsageError, match=message) as caught:
        Run(RunOptions(config=merge_configs([tmp_path / "a.yaml"], [word]), folder=tmp_path))
    one_line(caught)


def test_numbers_may_have_an_exponent_without_a_dot(tmp_path):
    OmegaConf.save(OmegaConf.create(first_stage()), tmp_path / "a.yaml")
    words = ["lightning.trainer.max_steps=1e3", "model.base_learning_rate=5e-4", "data.params.batch_size=4.0"]
    made = Run(RunOptions(config=merge_configs([tmp_path / "a.yaml"], words), folder=tmp_path))
    assert (made.max_steps, made.rate, made.data.batch_size) == (1000, 2e-3, 4)


# -- values of the sections -----------------------------------------------------------------------------------------

VALUES = [
    ("training.checkpoint_every", 0, "should be a whole number from 1 to .* got 0"),
    ("training.checkpoint_every", "x", "got 'x'"),
    ("training.validate_every", 0, "got 0"),
    ("training.validation_batches", -1, "got -1"),
    ("training.curve_every", -5, "got -5"),
    ("training.print_every", None, "got None"),
    ("training.image_steps", 0, "got 0"),
    ("training.image_guidance", "3", "a number from 0 to 1000, got '3'"),
    ("training.posterior_logvar_start", "x", "or null, got 'x'"),
    ("training.identity_start", "yes", "true or false, got 'yes'"),
    ("training.channels_last", [True], r"true or false, got \[True\]"),
    ("training.optimizer", "torch.optim.Adam", "a mapping, or null, got 'torch.optim.Adam'"),
    ("training.scheduler", [1], "a mapping, or null, got "),
    ("training", [1], "'training' should be a mapping of options to values, got "),
    ("training", "x", "'training' should be a mapping of options to values, got 'x'"),
    ("lightning", 3, "'lightning' should be a mapping of options to values, got 3"),
    ("lightning.trainer", None, "max_steps should be a whole number above 0, got None"),
    ("lightning.trainer", "x", "'lightning.trainer' should be a mapping"),
    ("lightning.callbacks", [1], "'lightning.callbacks' should be a mapping"),
    ("lightning.trainer.max_steps", 1.5, "got 1.5"),
    ("lightning.trainer.max_steps", "6", "got '6'"),
    ("lightning.trainer.max_steps", 10**18, "got 1000000000000000000"),
    ("lightning.trainer.gradient_clip_val", 0, "above 0 .* got 0"),
    ("lightning.trainer.gradient_clip_val", -1.0, "got -1.0"),
    ("lightning.trainer.accumulate_grad_batches", "2", "got '2'"),
    ("lightning.trainer.devices", 0, "got 0"),
    ("lightning.trainer.devices", "auto", "a whole number from 1 to 1024, got 'auto'"),
    ("lightning.trainer.devices", [0, 1], r"got \[0, 1\]"),
    ("lightning.trainer.num_nodes", 0, "got 0"),
    ("lightning.trainer.precision", [32], "a text, or a whole number, got "),
    ("lightning.trainer.accelerator", 7, "a text, got 7"),
    ("lightning.trainer.benchmark", "x", "true or false, got 'x'"),
    ("data.params.batch_size", "x", "a whole number from 1 to 1048576, got 'x'"),
    ("data.params.batch_size", 0, "got 0"),
    ("data.params.num_workers", -1, "got -1"),
    ("data.params.num_workers", 100_000, "from 0 to 256, or null, got 100000"),
    ("data.params.cache_latents", "all", "got 'all'"),
    ("data.params.train", "x", "a mapping, or null, got 'x'"),
    ("data.params.train.params.seed", -1, "got -1"),
    ("data.params.train.params.length", 0.5, "got 0.5"),
    ("model.base_learning_rate", "x", "a number from 0 to 10, got 'x'"),
    ("model.base_learning_rate", None, "got None"),
]


@pytest.mark.parametrize(("path", "value", "message"), VALUES, ids=[f"{row[0]}={row[1]}" for row in VALUES])
def test_a_wrong_value_of_a_section_is_named(tmp_path, path, value, message):
    config = first_stage()
    put(config, path, value)
    with pytest.raises(UsageError, match=message) as caught:
        Run(RunOptions(config=OmegaConf.create(config), folder=tmp_path))
    text = one_line(caught)
    assert caught.value.exit_code == 2 and path.rpartition(".")[2] in text


@pytest.mark.parametrize(
    ("path", "value", "error", "message"),
    [
        ("training.optimizer", {"params": {}}, MismatchError, "training.optimizer needs the key 'target'"),
        (
            "training.optimizer",
            {"target": "torch.nn.Identity"},
            MismatchError,
            "should be an optimizer, got Identity",
        ),
        ("training.optimizer", {"target": 3}, UnsafeFileError, "target 3 is not a dotted class name"),
        (
            "training.optimizer",
            {"target": "torch.optim.Adam", "params": {"betas": [0.5]}},
            UsageError,
            r"training.optimizer.params.betas should be .* got \[0.5\]",
        ),
        (
            "training.optimizer",
            {"target": "torch.optim.Adam", "params": {"eps": "x"}},
            UsageError,
            "training.optimizer.params.eps should be a number from 0 to 1, got 'x'",
        ),
        (
            "training.optimizer",
            {"target": "torch.optim.Adam", "params": {"betas": [0.5, 1.0]}},
            MismatchError,
            "training.optimizer: Invalid beta parameter",
        ),
        (
            "training.optimizer",
            {"target": "torch.optim.Adam", "params": [1]},
            UsageError,
            "should be a mapping",
        ),
        (
            "training.scheduler",
            {"target": "torch.nn.Identity"},
            MismatchError,
            "should be a schedule of ldm.lr_sched",
        ),
        (
            "training.scheduler",
            {"target": "ldm.lr_scheduler.LambdaLinearScheduler", "params": {"warm_up_steps": 3}},
            UsageError,
            "training.scheduler.params.warm_up_steps should be a list .* got 3",
        ),
        ("model", 3, MismatchError, "model: a configuration needs 'target' and 'params', got 3"),
        ("data", None, MismatchError, "data: a configuration needs 'target' and 'params', got None"),
        ("lightning.callbacks", {"a": 3}, MismatchError, "lightning.callbacks.a: a configuration needs"),
        (
            "lightning.callbacks",
            {"a": {"target": "main.ImageLogger", "params": {"batch_frequency": 0}}},
            UsageError,
            "lightning.callbacks.a.params.batch_frequency should be .* got 0",
        ),
        (
            "data.params.train",
            {"target": "torch.nn.Identity"},
            MismatchError,
            "data.params.train: data set .* built",
        ),
    ],
)
def test_a_part_that_cannot_be_built_is_named(tmp_path, path, value, error, message):
    config = first_stage()
    put(config, path, value)
    with pytest.raises(error, match=message) as caught:
        run(config, tmp_path)
    assert type(caught.value) is error
    one_line(caught)


# -- Lightning's own options ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accelerator": "gpu"}, "accelerator 'gpu' with devices 1 cannot be had: "),
        ({"accelerator": "tpu"}, "accelerator 'tpu' with devices 1 cannot be had: "),
        ({"accelerator": "x"}, "accelerator 'x' with devices 1 cannot be had: "),
        ({"accelerator": ""}, "accelerator '' with devices 1 cannot be had: "),
        ({"devices": 99}, "devices 99 .* this machine has"),
        ({"devices": 99, "accelerator": "auto"}, "devices 99"),
    ],
)
def test_a_machine_that_is_not_there_is_a_matter_of_usage(tmp_path, options, message):
    if torch.cuda.is_available() and options["accelerator"] == "gpu":
        pytest.skip("there is a GPU")
    config = first_stage()
    config["data"]["params"]["train"]["params"]["length"] = 1000
    config["lightning"]["trainer"] |= options
    with pytest.raises(UsageError, match=f"lightning.trainer: .*{message}") as caught:
        run(config, tmp_path)
    one_line(caught)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["lightning.trainer.accelerator=tpu"], 2, "lightning.trainer: accelerator 'tpu'"),
        (
            ["lightning.trainer.acelerator=cpu"],
            2,
            "has no option 'acelerator'; did you mean 'accelerator'",
        ),
        (["model.params.embed_dim=[3]"], 2, "model.params.embed_dim should be a whole number"),
        (
            ["data.params.num_workers=1", "data.params.train.target=tiny_training.Odd"],
            3,
            "Odd, item 0: ZeroDiv",
        ),
    ],
)
def test_the_script_ends_with_the_code_of_the_kind_and_one_line(
    tmp_path, monkeypatch, capfd, words, code, message
):
    OmegaConf.save(OmegaConf.create(first_stage()), tmp_path / "a.yaml")
    call = ["--base", tmp_path / "a.yaml", *words, "--logdir", tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, call)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    said = capfd.readouterr().err
    errors = [line for line in said.splitlines() if not line.startswith("ldm: warning")]
    assert stop.value.code == code and len(errors) == 1, said
    assert errors[0].startswith("ldm: error: ") and message in errors[0] and "this is a bug" not in errors[0]


# -- data sets that fail --------------------------------------------------------------------------------------------


class Fails(torch.utils.data.Dataset):
    """Items that raise, or are not what they should be."""

    def __init__(self, what):
        self.what = what

    def __len__(self):
        return 4

    def __getitem__(self, index):
        if isinstance(self.what, BaseException):
            raise self.what
        return self.what(index)


ERRORS = [
    (RuntimeError("the source's\nown trouble"), FormatError, "RuntimeError: the source's own trouble"),
    (ConnectionResetError("gone"), FormatError, "ConnectionResetError: gone"),
    (ValueError(), FormatError, "item 1: ValueError$"),
    (KeyError("a"), FormatError, "KeyError: 'a'"),
    (StopIteration(), FormatError, "StopIteration"),
    (AssertionError("x" * 9000), FormatError, "AssertionError: xxx"),
    (PermissionError(13, "no", "f.png"), FormatError, "PermissionError"),
    (FileNotFoundError(2, "No such file", "f.png"), AbsentError, "FileNotFoundError: .*f.png"),
    (MemoryError("much"), ResourceError, "MemoryError: much"),
    (RuntimeError("CUDA out of memory"), ResourceError, "out of memory"),
    (UnsafeFileError("bad pickle"), UnsafeFileError, "item 1: bad pickle"),
    (UsageError("a wrong size"), UsageError, "item 1: a wrong size"),
    (lambda index: None, FormatError, "item 1: TypeError: it should be a dict, got a NoneType"),
    (lambda index: [1], FormatError, "should be a dict, got a list"),
    (
        lambda index: {"image": np.zeros((index, 4, 3), np.float32)},
        FormatError,
        "items of batch 0: RuntimeError",
    ),
    (lambda index: {"a" * index: 1}, FormatError, "items of batch 0: KeyError"),
]


# In this process, and in a loader process for what can be sent to one.
PLACES = [
    (*row, workers)
    for row in ERRORS
    for workers in (0, 1)
    if not workers or isinstance(row[0], BaseException)
]


@pytest.mark.parametrize(("what", "error", "message", "workers"), PLACES, ids=map(str, range(len(PLACES))))
def test_an_error_of_a_data_set_is_one_line_with_its_name_and_item(what, error, message, workers):
    stream = Stream(Fails(what), 2, shuffle=False, seed=3)
    stream.index = lambda k: k + 1
    with pytest.raises(error, match=rf"data set {__name__}.Fails, .*{message}") as caught:
        list(stream.loader(0, 2, num_workers=workers))
    assert type(caught.value) is error
    one_line(caught)


def test_where_an_error_of_a_loader_process_came_from_is_kept_for_debugging():
    with pytest.raises(FormatError) as caught:
        list(Stream(Fails(RuntimeError("trouble")), 2, shuffle=False).loader(0, 1, num_workers=1))
    assert (
        "in __getitem__" in caught.value.__notes__[0] and "RuntimeError: trouble" in caught.value.__notes__[0]
    )


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["RuntimeError", "ConnectionResetError"])
def test_an_error_of_the_source_is_not_taken_for_a_dead_loader(tmp_path, kind, workers):
    config = first_stage()
    config["data"]["params"] |= {
        "num_workers": workers,
        "train": {"target": "tiny_training.Raises", "params": {"image_size": 16, "error": kind}},
    }
    with pytest.raises(FormatError, match=f"Raises, item 0: {kind}: the source's own trouble") as caught:
        run(config, tmp_path)
    one_line(caught)


class Broken(Shapes):
    def __init__(self, error="ValueError", **params):
        raise {"ValueError": ValueError, "UsageError": UsageError}[error]("cannot be\nopened")


class NoLength:
    pass


def test_a_data_set_that_cannot_be_built_is_named():
    for error, kind, message in (
        (
            "ValueError",
            MismatchError,
            f"data.params.train: data set {__name__}.Broken cannot be built: ValueError: ca",
        ),
        ("UsageError", UsageError, "cannot be"),
    ):
        with pytest.raises(kind, match=message):
            DataModuleFromConfig(2, {"target": f"{__name__}.Broken", "params": {"error": error}})


# -- what batches hold ----------------------------------------------------------------------------------------------


class Batches(torch.utils.data.Dataset):
    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return 8

    def __getitem__(self, index):
        image = np.zeros((16, 16, 3), np.float32)
        return {
            "no picture": {"caption": "a"},
            "bytes": {"image": image.astype(np.uint8), "caption": "a"},
            "gray": {"image": image[..., :1], "caption": "a"},
            "flat": {"image": image[..., 0], "caption": "a"},
            "odd": {"image": image[:15], "caption": "a"},
            "text": {"image": "x", "caption": "a"},
            "no caption": {"image": image},
            "caption null": {"image": image, "caption": None},
            "caption a number": {"image": image, "caption": 3},
            "caption a list": {"image": image, "caption": ["a"]},
        }[self.kind]


BATCHES = [
    (first_stage, "no picture", "a batch has no 'image', only 'caption'"),
    (first_stage, "bytes", r"should be pictures .* got torch.uint8 of shape \[2, 16, 16, 3\]"),
    (first_stage, "gray", "takes pictures of 3 channels .* are 16 x 16 x 1"),
    (first_stage, "flat", r"got torch.float32 of shape \[2, 16, 16\]"),
    (first_stage, "odd", "sides are multiples of 2, a batch's 'image' are 15 x 16 x 3"),
    (first_stage, "text", "should be pictures .* got list"),
    (diffusion, "no picture", "a batch has no 'image'"),
    (diffusion, "no caption", "'caption' should be captions, one text for each picture, got None"),
    (diffusion, "caption null", "got None"),
    (diffusion, "caption a number", "got 3"),
    (diffusion, "caption a list", r"got \['a'\]"),
]


@pytest.mark.parametrize(
    ("make", "kind", "message"), BATCHES, ids=[f"{row[0].__name__} {row[1]}" for row in BATCHES]
)
def test_a_batch_that_a_model_cannot_use_is_named(tmp_path, make, kind, message, stages):
    from ldm.training.draws import Draws

    source = Batches(kind)
    objective = stages[make]
    with pytest.raises(MismatchError, match=message) as caught:
        objective.forward({**collate([source[0], source[1]]), "micro": 0}, Draws(5, 0))
    one_line(caught)


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    return {
        make: Run(RunOptions(config=OmegaConf.create(make()), folder=folder))._objective()
        for make in (first_stage, diffusion)
    }


# -- metadata.jsonl -------------------------------------------------------------------------------------------------

FINE = {"file_name": "0.png", "text": "a"}
LINES = [
    (
        '{"file_name": "a\\u0000.png", "text": "a"}',
        FormatError,
        r"the name of a picture, got 'a\\x00",
    ),
    ('{"file_name": "a\\n.png", "text": "a"}', FormatError, "should be the name of a picture"),
    ('{"file_name": "\\ud800.png", "text": "a"}', FormatError, "should be the name of a picture"),
    ('{"file_name": "", "text": "a"}', FormatError, "should be the name of a picture, got ''"),
    ('{"file_name": "%s.png", "text": "a"}' % ("x" * 5000), FormatError, "should be the name of a picture"),
    ('{"file_name": "/etc/passwd", "text": "a"}', UnsafeFileError, "'/etc/passwd' lies outside the folder"),
    ('{"file_name": "../x.png", "text": "a"}', UnsafeFileError, "'../x.png' lies outside the folder"),
    ('{"file_name": "a/../../x.png", "text": "a"}', UnsafeFileError, "lies outside the folder"),
    ('{"file_name": ".", "text": "a"}', UnsafeFileError, "lies outside the folder"),
    ('{"file_name": "loop/x.png", "text": "a"}', LdmError, "loop/x.png"),
    ('{"file_name": 3, "text": "a"}', FormatError, "should be strings, got 3"),
    ('{"file_name": null, "text": "a"}', FormatError, "should be strings, got None"),
    ('{"file_name": "0.png", "text": null}', FormatError, "should be strings, got None"),
    ('{"file_name": "0.png", "text": 3}', FormatError, "should be strings, got 3"),
    ('{"file_name": "0.png", "text": ["a"]}', FormatError, r"should be strings, got \['a'\]"),
    ('{"file_name": "0.png"}', FormatError, "should be strings, got None"),
    ('{"text": "a"}', FormatError, "KeyError: 'file_name'"),
    (json.dumps({**FINE, "text": "x" * 70_000}), FormatError, "a text of 70000 characters is no caption"),
    ('{"file_name": "0.png", "text": "\\ud800"}', FormatError, "half a character"),
    ("x" * 2_000_000, FormatError, "has 2000000 characters; at most 1048576 are read"),
    ("[" * 100_000, FormatError, "RecursionError|JSONDecodeError"),
    (
        '{"file_name": "0.png", "text": "a", "n": %s}' % ("1" * 5000),
        FormatError,
        "ValueError: Exceeds the limit",
    ),
    ("[1]", FormatError, "TypeError"),
    ("3", FormatError, "TypeError"),
    ("null", FormatError, "TypeError"),
    ('"a"', FormatError, "TypeError"),
    ("{", FormatError, "JSONDecodeError"),
    ("\0", FormatError, "JSONDecodeError"),
]


@pytest.mark.parametrize(("line", "error", "message"), LINES, ids=[line[:40] for line, *_ in LINES])
def test_a_line_of_metadata_that_cannot_be_used_is_named_by_its_number(tmp_path, line, error, message):
    Image.new("RGB", (8, 9)).save(tmp_path / "0.png")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "metadata.jsonl").write_text(json.dumps(FINE) + "\n\n" + line + "\n", encoding="utf-8")
    with pytest.raises(error, match=message) as caught:
        ImageFolder(tmp_path, image_size=8)[0]
        raise FormatError("line 3: loop/x.png" if "loop" in line else "read")
    assert "line 3" in one_line(caught)


def test_metadata_that_is_no_text_is_named(tmp_path):
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe{")
    with pytest.raises(FormatError, match="metadata.jsonl' cannot be read as text in UTF-8"):
        ImageFolder(tmp_path)


def test_unusual_lines_that_are_sound_are_read(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("0.png", "in/\u3000 \u00e4.png"):
        Image.new("RGB", (8, 9)).save(tmp_path / name)
    lines = [
        json.dumps({"file_name": "0.png", "text": "two\u2028lines\u0085and\ttabs"}, ensure_ascii=False),
        json.dumps({"file_name": "in/\u3000 \u00e4.png", "caption": "", "more": [1, None]}),
        json.dumps({"file_name": "in/../0.png", "text": "again"}),
    ]
    (tmp_path / "metadata.jsonl").write_text("\ufeff" + "\r\n".join(lines) + "\r\n\r\n", encoding="utf-8")
    folder = ImageFolder(tmp_path, image_size=8)
    assert [folder[i]["caption"] for i in range(3)] == ["two\u2028lines\u0085and\ttabs", "", "again"]


@pytest.mark.parametrize("folder", ["a\0b", "\0"])
def test_a_folder_that_is_no_path_is_named(folder):
    with pytest.raises(UsageError, match="is no path; set data.params.train.params.folder"):
        ImageFolder(folder)


def test_a_configuration_that_advises_how_to_paint_trains(tmp_path):
    """configs/v1-inference.yaml carries `sampling:`; merged under data and training settings it is no fault."""
    config = OmegaConf.create(first_stage() | {"sampling": {"known_sizes": [384, 1024]}})
    assert Run(RunOptions(config=config, folder=tmp_path)).max_steps == config.lightning.trainer.max_steps
