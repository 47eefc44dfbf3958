"""Building from configurations, which are untrusted text, and the small helpers."""

import logging
import math
import sys

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import ldm.modules.ema
from ldm import config, config_text, paths, util
from ldm.config import get_obj_from_str, instantiate_from_config
from ldm.config_text import load_config
from ldm.errors import AbsentError, FormatError, MismatchError, UnsafeFileError, UsageError
from ldm.models.autoencoder import AutoencoderKL, IdentityFirstStage

LINEAR = {"target": "torch.nn.Linear", "params": {"in_features": 3, "out_features": 5}}


# -- targets ------------------------------------------------------------------------------------------------------


def test_a_target_is_built_with_its_params():
    for given in (LINEAR, OmegaConf.create(LINEAR)):
        built = instantiate_from_config(given)
        assert isinstance(built, nn.Linear) and built.weight.shape == (5, 3)
    assert isinstance(instantiate_from_config({"target": "torch.nn.Identity"}), nn.Identity)
    assert isinstance(instantiate_from_config({"target": "torch.nn.Identity", "params": None}), nn.Identity)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "posix.system",
        "subprocess.Popen",
        "subprocess.run",
        "builtins.exec",
        "builtins.eval",
        "builtins.__import__",
        "importlib.import_module",
        "pickle.loads",
        "ctypes.CDLL",
        "antigravity.fly",
        "torch.load",
        "torch.hub.load",
        "torch.Tensor",
        "torch.serialization.load",
        "torch.utils.collect_env.run",
        "torch.utils.cpp_extension.load_inline",
        "logging.os.system",
        "numpy.os.system",
        "ldm.config.importlib.import_module",
        "ldm.util.os.system",
        "ldm.config.HISTORIC_NAMES.update",
        "ldm.config.HISTORIC_NAMES",
        "ldm.util.get_obj_from_str",
        "ldm.config_text.Path",
        "ldm.checkpoints.read_tensors",
        "tqdm.__main__.main",
        "main.Trainer",
    ],
)
def test_anything_but_a_buildable_class_is_refused_by_name(target, tmp_path):
    before = set(sys.modules)
    canary = tmp_path / "ran"
    with pytest.raises(UnsafeFileError, match=f"target '{target}' is not allowed") as caught:
        instantiate_from_config({"target": target, "params": {"command": f"touch {canary}"}})
    assert caught.value.exit_code == 4
    assert not canary.exists()
    # Refused before it is imported: nothing came in but modules of ldm.
    assert [name for name in set(sys.modules) - before if name.split(".")[0] != "ldm"] == []


@pytest.mark.parametrize("imported", [False, True])
def test_a_function_of_another_library_is_refused_whether_imported_or_not(imported, monkeypatch):
    if imported:
        pytest.importorskip("transformers")
    else:
        monkeypatch.delitem(sys.modules, "transformers", raising=False)
    with pytest.raises(UnsafeFileError, match="target 'transformers.pipeline' is not allowed"):
        instantiate_from_config({"target": "transformers.pipeline", "params": {"task": "text-generation"}})


@pytest.mark.parametrize(
    "target",
    [
        "ldm.lr_scheduler.LambdaLinearScheduler",
        "ldm.training.data.Shapes",
        "torch.nn.modules.activation.SiLU",
        "torch.optim.AdamW",
        "torch.optim.lr_scheduler.StepLR",
        "torch.utils.data.TensorDataset",
    ],
)
def test_models_data_sets_schedulers_and_optimizers_may_be_named(target):
    if target.startswith("ldm.training"):
        pytest.importorskip("lightning")
    assert get_obj_from_str(target).__name__ == target.split(".")[-1]


@pytest.mark.parametrize(
    "target",
    [
        "os",
        "",
        " ldm.models.autoencoder.AutoencoderKL",
        "ldm.models.autoencoder.AutoencoderKL ",
        "ldm..autoencoder.AutoencoderKL",
        "ldm.models.autoencoder.AutoencoderKL.",
        ".models.autoencoder.AutoencoderKL",
        "ldm.models.autoencoder.Autoencoder\nKL",
        "ldm\u2024models.autoencoder.AutoencoderKL",
        "\uff4cdm.models.autoencoder.AutoencoderKL",
        "ldm/models.autoencoder.AutoencoderKL",
        "1dm.models.AutoencoderKL",
        None,
        7,
        ["ldm.models.autoencoder.AutoencoderKL"],
        "x." * 5000,
    ],
)
def test_a_malformed_target_is_named(target):
    with pytest.raises(UnsafeFileError, match="is not a dotted class name such as") as caught:
        instantiate_from_config({"target": target})
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package on the path whose import leaves a canary, with a module and a function in it."""
    folder = tmp_path / "foreign_nets"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        f"import pathlib\nimport torch\npathlib.Path({str(tmp_path / 'imported')!r}).touch()\n"
        "class Net(torch.nn.Module):\n    def __init__(self, width):\n        super().__init__()\n"
        "        self.width = width\n"
        "class Plain:\n    pass\n"
        "def act():\n    pathlib.Path('acted').touch()\n"
    )
    (folder / "later.py").write_text("from foreign_nets import Net\nclass Deeper(Net):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "imported"
    for name in [name for name in sys.modules if name.startswith("foreign_nets")]:
        del sys.modules[name]


def test_a_package_that_nobody_imported_stays_out(package):
    for target in ("foreign_nets.Net", "foreign_nets.later.Deeper"):
        with pytest.raises(UnsafeFileError, match=rf"import it first, or pass allow=\['{target}'\]"):
            instantiate_from_config({"target": target, "params": {"width": 3}})
    assert not package.exists() and "foreign_nets" not in sys.modules


def test_a_package_that_the_program_imported_is_chosen(package):
    import foreign_nets

    for target in ("foreign_nets.Net", "foreign_nets.later.Deeper"):
        built = instantiate_from_config({"target": target, "params": {"width": 3}})
        assert isinstance(built, foreign_nets.Net) and built.width == 3
    for target in ("foreign_nets.Plain", "foreign_nets.act", "foreign_nets.pathlib.Path"):
        with pytest.raises(UnsafeFileError, match=f"target '{target}' is not allowed"):
            instantiate_from_config({"target": target})


def test_the_caller_may_allow_a_class_by_its_full_name(package):
    for allow in (["foreign_nets.Plain"], "foreign_nets.Plain"):
        assert (
            type(instantiate_from_config({"target": "foreign_nets.Plain"}, allow=allow)).__name__ == "Plain"
        )
    assert package.exists()
    with pytest.raises(UnsafeFileError, match="it is no model, dataset, scheduler or callback class"):
        instantiate_from_config({"target": "foreign_nets.act"}, allow=["foreign_nets.act"])
    with pytest.raises(UnsafeFileError, match="target 'os.system' is not allowed"):
        instantiate_from_config(
            {"target": "os.system", "allow": ["os.system"], "params": {"allow": ["os.system"]}}
        )


def test_historic_names_lead_to_their_new_homes(monkeypatch):
    monkeypatch.setitem(config.HISTORIC_NAMES, "main.Stage", "ldm.models.autoencoder.IdentityFirstStage")
    assert get_obj_from_str("main.Stage") is IdentityFirstStage
    homes = {
        "main.DataModuleFromConfig": "ldm.training.data.DataModuleFromConfig",
        "main.ImageLogger": "ldm.training.callbacks.ImageLogger",
    }
    assert {name: config.HISTORIC_NAMES[name] for name in homes} == homes


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            "ldm.models.autoencoder.AutoencoderKl",
            "has no 'AutoencoderKl'; did you mean 'ldm.models.autoencoder.A",
        ),
        (
            "ldm.models.autoencodr.AutoencoderKL",
            "no module 'ldm.models.autoencodr'; did you mean 'ldm.models.auto",
        ),
        ("ldm.model.autoencoder.AutoencoderKL", "no module 'ldm.model'; did you mean 'ldm.models'?"),
        ("ldm.attic.Chest", "there is no module 'ldm.attic'"),
        ("torch.nn.Linaer", "module 'torch.nn' has no 'Linaer'; did you mean 'torch.nn.Linear'?"),
    ],
)
def test_a_misspelt_target_gets_its_neighbour(target, message):
    with pytest.raises(MismatchError, match=message.replace("?", r"\?")) as caught:
        get_obj_from_str(target)
    assert caught.value.exit_code == 5


def test_reload_imports_the_module_anew():
    try:
        assert get_obj_from_str("ldm.modules.ema.LitEma") is ldm.modules.ema.LitEma
        before = ldm.modules.ema.LitEma
        assert get_obj_from_str("ldm.modules.ema.LitEma", reload=True) is not before
    finally:
        ldm.modules.ema.LitEma = before


# -- params -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"in_features": 3, "out_featurs": 5},
            "'torch.nn.Linear' has no parameter 'out_featurs'; did you mean 'out_f",
        ),
        (
            {"in_features": 3, "q": 5},
            "no parameter 'q'; it takes in_features, out_features, bias, device, dtype",
        ),
        ({"in_features": 3}, "params of 'torch.nn.Linear' lack 'out_features'"),
        ({}, "params of 'torch.nn.Linear' lack 'in_features' and 'out_features'"),
        ([3, 5], r"params of 'torch.nn.Linear' should be a mapping of names to values, got \[3, 5\]"),
        ({3: 5}, r"params of 'torch.nn.Linear' should be a mapping of names to values, got \{3: 5\}"),
    ],
)
def test_params_that_do_not_fit_are_named(params, message):
    with pytest.raises(MismatchError, match=message) as caught:
        instantiate_from_config({"target": "torch.nn.Linear", "params": params})
    assert caught.value.exit_code == 5 and len(str(caught.value)) < 400


def test_a_misspelt_param_is_found_through_the_constructors_it_is_handed_on_to():
    config = load_config(paths.shipped("configs/v1-inference.yaml")).model
    config.params.linear_strat = config.params.pop("linear_start")
    with (
        torch.device("meta"),
        pytest.raises(MismatchError, match="'linear_strat'; did you mean 'linear_start'?"),
    ):
        instantiate_from_config(config)
    unet = config.params.unet_config
    unet.params.in_chanels = unet.params.pop("in_channels")
    with pytest.raises(
        MismatchError, match="UNetModel' has no parameter 'in_chanels'; did you mean 'in_channels'?"
    ):
        instantiate_from_config(unet)


def test_a_type_error_of_the_class_itself_stays_what_it_is(package):
    import foreign_nets

    class Broken(foreign_nets.Net):
        def __init__(self):
            super().__init__(depth=3)

    foreign_nets.Broken = Broken
    with pytest.raises(TypeError, match="unexpected keyword argument 'depth'"):
        instantiate_from_config({"target": "foreign_nets.Broken"})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("ldm.models.autoencoder.AutoencoderKL", "needs 'target' and 'params', got 'ldm.models"),
        (None, "needs 'target' and 'params', got None"),
        ([1, 2], r"needs 'target' and 'params', got \[1, 2\]"),
        ({"traget": "x.y", "params": {}}, "needs the key 'target', got only 'traget', 'params'"),
        ({}, "needs the key 'target', got only nothing"),
    ],
)
def test_what_is_no_configuration_is_named(config, message):
    with pytest.raises(MismatchError, match=message):
        instantiate_from_config(config)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("params: {in_features: '???', out_features: 5}", "Missing mandatory value: in_features"),
        (
            "params: {in_features: '${params.out_features}', out_features: '${params.in_features}'}",
            "Recursive",
        ),
        ("params: {in_features: '${nowhere}', out_features: 5}", "Interpolation key 'nowhere' not found"),
    ],
)
def test_references_that_lead_nowhere_are_named(text, message):
    with pytest.raises(FormatError, match=f"cannot be resolved: {message}") as caught:
        instantiate_from_config(OmegaConf.create(f"target: torch.nn.Linear\n{text}"))
    assert "\n" not in str(caught.value)


def test_references_to_other_values_are_read():
    config = OmegaConf.create(
        {"width": 3, "net": {**LINEAR, "params": {"in_features": "${width}", "out_features": 5}}}
    )
    assert instantiate_from_config(config.net).weight.shape == (5, 3)


# -- files --------------------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "config.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_a_configuration_is_read(write):
    config = load_config(write("model:\n  target: torch.nn.Identity\n  base_learning_rate: 1.0e-04\n"))
    assert config.model.base_learning_rate == 1e-4 and config.model.target == "torch.nn.Identity"
    assert load_config(str(write("\ufeffa: &x [1, 2]\nb: *x\n"))) == {"a": [1, 2], "b": [1, 2]}


def bomb(levels):
    """Each level has nine of the one before: 9 ** levels values from a few bytes."""
    lines = ["l0: &l0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


BAD_FILES = {
    "empty": ("", FormatError, "should be a mapping with a 'model:' key, but holds none"),
    "comments": ("# nothing\n", FormatError, "should be a mapping"),
    "empty mapping": ("{}", FormatError, "should be a mapping"),
    "list": ("- model\n- data\n", FormatError, "should be a mapping"),
    "scalar": ("hello\n", FormatError, "should be a mapping"),
    "two documents": ("a: 1\n---\nb: 2\n", FormatError, "expected a single document|line 2"),
    "bad line": ("model:\n  a: [1, 2\n  b: 3\n", FormatError, r"not readable YAML: line 3, column \d+: "),
    "tab": ("model:\n\ta: 1\n", FormatError, "line 2, column 1: .*cannot start any token"),
    "duplicate": ("a: 1\nb: 2\na: 3\n", FormatError, "line 3, column 1: found duplicate key a"),
    "tag": (
        "a: !!python/object/apply:os.system ['touch ran']\n",
        UnsafeFileError,
        "a Python tag in line 1; only plain",
    ),
    "name tag": ("a: 1\nb: !!python/name:os.system ''\n", UnsafeFileError, "a Python tag in line 2"),
    "verbose tag": (
        "a: !<tag:yaml.org,2002:python/object/new:os.system> [x]",
        UnsafeFileError,
        "a Python tag",
    ),
    "other tag": ("a: !mine 3\n", FormatError, "line 1, column 4: could not determine a constructor"),
    "environment": (
        "a: ${oc.env:HOME}\n",
        UnsafeFileError,
        r"'\$\{oc.env:HOME\}' asks a resolver for a value",
    ),
    "in a key": ("${oc.env:HOME}: 1\n", UnsafeFileError, "asks a resolver"),
    "in a list": ("a: [1, {b: 'x${oc.decode:1}y'}]\n", UnsafeFileError, "asks a resolver"),
    "nested": ("n: env\na: ${oc.${n}:HOME}\n", UnsafeFileError, "asks a resolver"),
    "create": ("a: ${oc.create:${b}}\nb: 1\n", UnsafeFileError, "asks a resolver"),
    "grammar": ("a: ${b\n", FormatError, "not readable YAML: "),
    "deep": (
        "[" * 2000,
        FormatError,
        "is too large: by line 1 it has 65 values 65 levels deep; at most 10000 and 64",
    ),
    "deep mapping": ("{a: " * 2000, FormatError, "is too large"),
    "deep block": ("- " * 2000 + "x", FormatError, "is too large"),
    "bomb of 3": (bomb(3) + "\n" + "\n".join(f"m{i}: *l2" for i in range(20)), FormatError, "is too large"),
    "bomb of 9": (bomb(9), FormatError, "is too large: by line 5"),
    "many": ("a: [" + "1," * 20_000 + "]", FormatError, "is too large: by line 1 it has 10001 values"),
    "circle": ("a: &a [1, *a]\n", FormatError, "alias 'a' in line 1 stands for nothing before it"),
    "unknown alias": ("a: 1\nb: *c\n", FormatError, "alias 'c' in line 2 stands for nothing before it"),
    "long": ("a: " + "x" * (1 << 20), FormatError, "has 1048579 bytes; at most 1048576 are read"),
    "UTF-16": ("a: 1".encode("utf-16"), FormatError, "is not text in UTF-8; save it as such"),
    "UTF-16 without mark": ("a: 1".encode("utf-16-le"), FormatError, "not readable YAML: "),
    "Latin-1": ("a: caf\u00e9".encode("latin-1"), FormatError, "is not text in UTF-8"),
    "binary": (bytes(range(256)), FormatError, "is not text in UTF-8"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_gets_one_line(write, kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, error, message = BAD_FILES[kind]
    path = write(content)
    with pytest.raises(error, match=message) as caught:
        load_config(path)
    text = str(caught.value)
    assert type(caught.value) is error and str(path) in text
    assert "\n" not in text and len(text) < 300 + len(str(path))
    assert not (tmp_path / "ran").exists()


def test_a_resolvers_answer_is_never_in_the_message(write, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "s3cr3t")
    with pytest.raises(UnsafeFileError) as caught:
        load_config(write("a: ${oc.env:SECRET_TOKEN}\n"))
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize("name", ["absent.yaml", "", ".", "x" * 5000, "a\0b"])
def test_an_absent_file_is_named(tmp_path, name):
    with pytest.raises(
        AbsentError, match="is not a file; name a YAML file such as configs/v1-inference.yaml"
    ):
        load_config(tmp_path / name)


@pytest.mark.parametrize("value", ["${oc.env:HOME}", "${oc.${part}:HOME}", "${secret}"])
def test_resolvers_do_not_resolve_without_a_file_either(value):
    """A part may refer to the whole tree it hangs in."""
    tree = OmegaConf.create(
        {"part": "env", "secret": "${oc.env:HOME}", "net": {"target": "torch.nn.Identity"}}
    )
    tree.net.params = {"a": value}
    with pytest.raises(UnsafeFileError, match="asks a resolver for a value"):
        instantiate_from_config(tree.net)


@pytest.mark.parametrize(
    "value", ["${a}", "x: ${a}", "${a}: x", "${a.b}${c}", "{a: b}", "https://x", "$:{a:b}", "}: ${a}"]
)
def test_colons_outside_references_may_stay(value):
    config_text.refuse_resolvers({"key": [value]})
    with pytest.raises(UnsafeFileError, match="asks a resolver"):
        config_text.refuse_resolvers({"key": [value + "${n:v}"]})


def test_every_shipped_configuration_is_read():
    files = sorted((paths.CHECKOUT / "configs").glob("*.yaml"))
    assert len(files) >= 2
    for file in files:
        if not file.name.startswith("own-pictures"):  # those are laid over another
            assert "target" in load_config(file).model


# -- shipped files ------------------------------------------------------------------------------------------------


def test_shipped_files_are_found_in_a_checkout_and_in_a_package(tmp_path, monkeypatch):
    assert paths.shipped("configs/v1-inference.yaml").is_file()
    checkout, package = tmp_path, tmp_path / "ldm"
    monkeypatch.setattr(paths, "CHECKOUT", checkout)
    monkeypatch.setattr(paths, "PACKAGE", package)
    (package / "configs").mkdir(parents=True)
    (package / "configs" / "a.yaml").touch()
    assert paths.shipped("configs/a.yaml") == package / "configs" / "a.yaml"
    (checkout / "configs").mkdir()
    (checkout / "configs" / "a.yaml").touch()
    assert paths.shipped("configs/a.yaml") == checkout / "configs" / "a.yaml"


@pytest.mark.parametrize("name", ["configs/none.yaml", "x" * 5000, "configs/" + "y" * 300, "a\0b"])
def test_a_shipped_file_that_is_absent_is_named_with_both_places(name):
    with pytest.raises(
        AbsentError, match="ships with ldm but is in neither .* nor .*; reinstall ldm"
    ) as caught:
        paths.shipped(name)
    assert caught.value.exit_code == 9
    assert str(paths.CHECKOUT) in str(caught.value) and len(str(caught.value)) < 400


# -- helpers ------------------------------------------------------------------------------------------------------


def test_exists_and_default():
    assert util.exists(0) and util.exists(False) and not util.exists(None)
    assert util.default(0, 7) == 0 and util.default(None, 7) == 7
    assert util.default(None, lambda: 7) == 7
    assert util.default(None, nn.Identity) is nn.Identity  # a class is a value, as for the original


@pytest.mark.parametrize(
    ("shape", "map_", "picture"),
    [((2, 4, 5, 6), True, False), ((2, 3, 5, 6), False, True), ((2, 1, 5, 6), False, True)]
    + [((2, 2, 5, 6), False, False), ((4, 5, 6), False, False)],
)
def test_maps_and_pictures_are_told_by_their_channels(shape, map_, picture):
    assert (util.ismap(torch.zeros(shape)), util.isimage(torch.zeros(shape))) == (map_, picture)
    assert not util.ismap("text") and not util.isimage(None)


@pytest.mark.parametrize("shape", [(2,), (2, 3), (2, 3, 4, 5)])
def test_mean_flat_keeps_the_first_axis(shape):
    values = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)
    torch.testing.assert_close(util.mean_flat(values), values.reshape(2, -1).mean(1), rtol=0, atol=1e-12)


def test_parameters_are_counted_and_said_if_asked(caplog):
    with caplog.at_level(logging.INFO, "ldm.helpers"):
        assert util.count_params(nn.Linear(3, 5)) == 20
        assert caplog.text == ""
        assert util.count_params(nn.Linear(1000, 1234), verbose=True) == 1_235_234
    assert "Linear has 1.24 M parameters" in caplog.text


def test_captions_are_drawn_in_black_on_white():
    drawn = util.log_txt_as_img((70, 40), ["", "short", "a text of so many words that it goes over the edge"])
    assert drawn.shape == (3, 3, 40, 70) and drawn.dtype == torch.float32
    assert drawn.min() >= -1 and drawn.max() == 1
    ink = (drawn < 0).float().mean(dim=(1, 2, 3))
    assert ink[0] == 0 and 0 < ink[1] < ink[2]
    rows = (drawn[2] < 0).any(dim=0).any(dim=1).nonzero().flatten()
    assert rows.max() > 20  # wrapped to lines below the first
    larger = util.log_txt_as_img((70, 40), ["short"], size=20)
    assert (larger < 0).float().mean() > ink[1]


def halve(part):
    return part / 2


def number(part, worker):
    return [(worker, one) for one in part]


@pytest.mark.parametrize("cpu_intensive", [False, True])
def test_slices_side_by_side_come_back_in_order(cpu_intensive):
    data = np.arange(11.0)
    got = util.parallel_data_prefetch(np.negative, data, n_proc=3, cpu_intensive=cpu_intensive)
    assert np.array_equal(got, -data)


def test_slices_of_lists_and_mappings_with_their_workers():
    options = {"target_data_type": "list", "cpu_intensive": False}
    got = util.parallel_data_prefetch(number, {"a": 1, "b": 2, "c": 3}, 2, use_worker_id=True, **options)
    assert got == [(0, 1), (1, 2), (1, 3)]
    assert util.parallel_data_prefetch(sorted, [3, 1, 2], 1, **options) == [1, 2, 3]
    assert np.array_equal(
        util.parallel_data_prefetch(halve, np.ones((5, 2)), 4, cpu_intensive=False), np.full((5, 2), 0.5)
    )


def test_prefetching_refuses_what_it_cannot_do():
    with pytest.raises(UsageError, match="target_data_type should be 'ndarray' or 'list', got 'tuple'"):
        util.parallel_data_prefetch(halve, [1], 1, target_data_type="tuple")
    with pytest.raises(UsageError, match="n_proc should be at least 1, got 0"):
        util.parallel_data_prefetch(halve, [1], 0)


def test_a_class_of_the_package_is_itself():
    assert get_obj_from_str("ldm.models.autoencoder.AutoencoderKL") is AutoencoderKL
