"""The speed table: its order, its arithmetic, its gate, and both libraries upon one set of weights."""

import ctypes
import json
import sys
from contextlib import ExitStack

import numpy as np
import pytest
import torch

from bench import box, load, speed
from bench.speedlib import contestants, gate, models, peak, process, report, timing
from bench.speedlib import peers as peers_module
from bench.speedlib import run as run_module
from bench.speedlib import studio as studio_module
from bench.speedlib.contestants import Room
from bench.speedlib.rows import CONTESTANTS, PEERS, PLAIN, SHORT, THEIRS, Row, all_rows
from bench.speedlib.run import Effort, run_row, unable
from bench.speedlib.studio import Studio
from bench.speedlib.training import LEARNING_RATE, TrainingRow
from ldm import kernels
from ldm.checkpoints.folders import folder_settings
from ldm.checkpoints.key_mapping import unet_to_diffusers
from ldm.errors import FormatError, MismatchError, ResourceError, UsageError

CPU = torch.device("cpu")
ONCE = Effort(repeats=1, warmup=0, budget=0.0)


@pytest.fixture(scope="module")
def tiny():
    return models.geometry("tiny")


@pytest.fixture(scope="module")
def studio(tiny):
    studio = Studio(tiny, CPU)
    yield studio
    studio.close()


# --- rounds and ratios ---------------------------------------------------------------------------------


def runners(order, names="ABC"):
    """Contestants that write their name down; each one's figure is how many had run before."""

    def runner(name):
        def run():
            order.append(name)
            return {"seconds": float(len(order))}

        return run

    return {name: runner(name) for name in names}


def test_contestants_take_turns_and_warm_up_in_turn_too():
    order = []
    figures = timing.interleave(runners(order), repeats=2, warmup=1)
    assert "".join(order) == "ABC" * 3
    assert figures == {
        "A": [{"seconds": 4.0}, {"seconds": 7.0}],
        "B": [{"seconds": 5.0}, {"seconds": 8.0}],
        "C": [{"seconds": 6.0}, {"seconds": 9.0}],
    }


@pytest.mark.parametrize(
    ("repeats", "budget", "rounds"), [(9, 0.0, 3), (2, 0.0, 2), (9, 10.0, 5), (4, 99.0, 4)]
)
def test_a_budget_ends_a_row_between_rounds_and_not_before_the_third(repeats, budget, rounds):
    order = []
    # Every run takes a second, so that a round of A and B takes two.
    found = timing.interleave(
        runners(order, "AB"), repeats=repeats, budget=budget, clock=lambda: float(len(order))
    )
    assert [len(runs) for runs in found.values()] == [rounds] * 2 and len(order) == 2 * rounds


def test_the_five_numbers_are_those_of_the_definition():
    assert timing.spread([4, 1, 3, 2]) == {"min": 1, "q1": 1.75, "median": 2.5, "q3": 3.25, "max": 4, "n": 4}
    assert timing.spread([7.0])["q3"] == 7.0


def test_the_ratio_is_of_medians_and_its_spread_over_rounds():
    found = timing.compare([2.0, 9.0, 12.0], [1.0, 2.0, 6.0])
    assert found["of_medians"] == 4.5  # 9 / 2, where the rounds' own median is 2
    assert found["rounds"] == {"min": 2, "q1": 2, "median": 2, "q3": 3.25, "max": 4.5, "n": 3}


def test_rounds_of_one_are_never_held_against_those_of_another():
    with pytest.raises(ValueError, match="shorter"):
        timing.compare([1.0, 2.0, 3.0], [1.0, 2.0])


def test_peaks_are_work_over_time(monkeypatch):
    monkeypatch.setattr(timing, "clocked", lambda call, device: call() is None or {"seconds": 0.5})
    found = timing.measure_gemm(torch.float32, CPU, side=20)
    assert found == {"side": 20, "tflops": 2 * 20**3 / 0.5 / 1e12, "median": 2 * 20**3 / 0.5 / 1e12}
    assert timing.measure_copy(CPU, size=30)["gbps"] == pytest.approx(2 * 30 / 0.5 / 1e9, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_unit_does_at_least_what_a_product_of_matrices_does(dtype):
    found = peak.measure_unit(dtype, CPU, seconds=0.01)
    if "not_measured" in found:
        pytest.skip(found["not_measured"])
    assert found["unit"] in ("AVX-512", "AVX512-BF16", "AMX")
    # By a factor that no busy hour makes: the least of one against half of the best of the other.
    assert found["tflops"] > 0.5 * timing.measure_gemm(dtype, CPU, side=256)["median"]


def test_loops_count_their_operations():
    library, sink = peak.library(), ctypes.c_double()
    for kind, per_turn in ((0, 24 * 2 * 16), (1, {3: 4 * 2 * 16 * 16 * 32, 2: 24 * 2 * 32})):
        unit = library.peak_unit(kind)
        wanted = per_turn.get(unit, 0) if isinstance(per_turn, dict) else per_turn * bool(unit)
        sink.value = 0.0
        assert library.peak_run(kind, 3, 1, ctypes.byref(sink)) == 3 * wanted
        # Three turns of products of ones, 32 terms each, in two of the tiles; of halves in 24 vectors of 16.
        if unit in (1, 3):
            assert sink.value == {1: 3 * 24 * 16 * 0.5, 3: 2 * 3 * 32.0}[unit]


@pytest.mark.parametrize(
    ("dtype", "device", "reason"),
    [
        (torch.float16, "cpu", "no unit for float16"),
        (torch.bfloat16, "cuda", "no loop for cuda"),
    ],
)
def test_what_has_no_loop_is_said_not_to_be_measured(dtype, device, reason):
    found = peak.measure_unit(dtype, torch.device(device))
    assert found == {"not_measured": reason}
    assert report._unit(found) == f", units not measured: {reason}"


def test_without_a_compiler_the_units_are_not_measured(monkeypatch, tmp_path):
    peak.library.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "there is no C++ compiler" in peak.measure_unit(torch.float32, CPU)["not_measured"]
    peak.library.cache_clear()


# --- the gate --------------------------------------------------------------------------------------------


def test_float32_is_judged_by_the_largest_difference_over_the_largest_number():
    reference = torch.tensor([1.0, -4.0, 2.0])
    verdict = gate.judge(reference + torch.tensor([3.9e-4, 0.0, 0.0]), reference, torch.float32)
    assert verdict.passed and verdict.max_error == pytest.approx(3.9e-4 / 4, rel=1e-3)
    assert verdict.rms_error == pytest.approx(3.9e-4 / 21**0.5, rel=1e-3)
    assert not gate.judge(reference + torch.tensor([4.1e-4, 0.0, 0.0]), reference, torch.float32).passed


def test_half_precision_is_judged_by_diffusers_own_error():
    reference = torch.full((2, 3), 2.0)
    for error, passed in ((0.0109, True), (0.0111, False)):
        verdict = gate.judge(reference * (1 + error), reference, torch.bfloat16, yardstick=0.01)
        assert verdict.passed is passed and verdict.rms_error == pytest.approx(error, rel=1e-4)
    assert gate.judge(reference * 2, reference, torch.float16).passed  # a rival, who is only to be finite


def test_pictures_are_judged_in_decibels():
    reference = torch.full((1, 3, 4, 5), 0.5)
    for difference, passed in ((0.9e-3, True), (1.1e-3, False)):
        verdict = gate.judge(reference + difference, reference, torch.float32, pictures=True)
        assert verdict.passed is passed
        assert verdict.psnr == pytest.approx(-20 * np.log10(difference), abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_not_finite_or_of_another_shape_never_passes(dtype):
    reference = torch.ones(2, 3)
    for wrong in (torch.full((2, 3), float("nan")), torch.ones(3, 2)):
        verdict = gate.judge(wrong, reference, dtype, pictures=True, yardstick=1.0)
        assert not verdict.passed
        assert json.loads(json.dumps(verdict.as_dict()))["rms_error"] is None


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_diffusers_ours_are_held_against_our_plain_code(tiny, monkeypatch, dtype):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for module in (run_module, studio_module):
        monkeypatch.setattr(module, "BASELINE", "ldm")
    monkeypatch.setattr(run_module, "HAS_DIFFUSERS", False)
    alone = Studio(tiny, CPU)
    found = run_row(alone, Row("unet", dtype, tiny.px, 2), CONTESTANTS, ONCE)
    alone.close()
    assert set(found["contestants"]) == {"ldm", "ldm-kernels"} and "flop" not in found
    assert all(one["gate"]["passed"] and one["figures"] for one in found["contestants"].values())
    assert {"diffusers", "diffusers-best"} == set(found["left_out"])
    assert all("diffusers" in reason for reason in found["left_out"].values())


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
@pytest.mark.slow
def test_a_model_with_one_weight_changed_is_not_timed(studio, monkeypatch, dtype):
    build = models.build_ours

    def build_wrongly(*arguments):
        model = build(*arguments)
        weight = model.model.diffusion_model.middle_block[0].out_layers[3].weight
        weight.data = weight.data.clone()  # diffusers' model lies in the same memory
        weight.data[5, 3, 1, 1] += 2.0
        return model

    monkeypatch.setattr(models, "build_ours", build_wrongly)
    found = run_row(studio, Row("unet", dtype, 64, 2), PLAIN, ONCE, gemm=1.0)
    wrong, right = found["contestants"]["ldm"], found["contestants"]["diffusers"]
    assert not wrong["gate"]["passed"] and "figures" not in wrong and "efficiency" not in wrong
    assert right["gate"]["passed"] and right["figures"]["seconds"]["n"] == 1
    assert found["ratios"] == {} and "ldm WRONG, not timed" in report.headline(found)
    head = report.describe(studio.shape, CPU)
    text = report.make_table({**head, "peaks": {}, "rows": {"unet": found}})
    assert "| `unet` | ldm | **wrong** | wanted " in text


# --- rows ------------------------------------------------------------------------------------------------


def test_every_row_has_a_key_of_its_own():
    keys = [
        row.key
        for compiled in (False, True)
        for row in all_rows(512, "cuda", ("float32", "bfloat16", "float16"), compiled)
    ]
    assert len(keys) == len(set(keys)) == 1 + 3 * (13 + 1 + 3) + 3 * (13 + 3)
    assert {
        "import",
        "clip/b2/float16",
        "unet/b16/bfloat16",
        "image/50-b8/float32",
        "train/b1/float32/compiled",
        "load/float16",
        "cold-start/bfloat16/compiled",
        "memory/1024/float32",
    } <= set(keys)


def test_a_cpu_has_no_whole_processes_in_float16_but_loading():
    keys = {row.key for row in all_rows(512, "cpu", ("float16",))}
    assert "load/float16" in keys and not {key for key in keys if key.startswith(("cold-start", "memory"))}


def chosen(*words):
    opt = speed.make_parser().parse_args([*words])
    return [row.key for row in speed.choose(opt, 512, "cpu")]


def test_rows_are_chosen_by_patterns_and_dtypes():
    assert chosen("--rows", "unet/b[12]/*", "--dtypes", "float16", "bfloat16") == [
        "unet/b1/bfloat16",
        "unet/b2/bfloat16",
        "unet/b1/float16",
        "unet/b2/float16",
    ]
    assert chosen("--rows", "unet/b2/*", "--compile", "--dtypes", "float32") == ["unet/b2/float32/compiled"]
    with pytest.raises(UsageError, match=r"--rows 'vae/\*' matches no row; --list shows them all"):
        chosen("--rows", "vae/*")


def test_the_short_form_has_the_rows_that_matter_most():
    assert chosen("--short") == [
        "clip/b2/float32",
        "unet/b2/float32",
        "vae-decode/b1/float32",
        "clip/b2/bfloat16",
        "unet/b2/bfloat16",
        "vae-decode/b1/bfloat16",
    ]
    assert chosen("--short", "--dtypes", "float32", "--compile")[1] == "unet/b2/float32/compiled"
    assert chosen("--short", "--rows", "import") == ["import"]
    assert all(any(key.startswith(p.split("/")[0]) for key in chosen("--short")) for p in SHORT)


@pytest.mark.parametrize(
    ("row", "run"),
    [
        (Row("clip", "float32", 64, 2), True),
        (Row("unet", "bfloat16", 64, 2), True),
        (Row("vae-decode", "bfloat16", 64), True),
        (Row("unet", "float16", 64, 2), False),
        (Row("unet", "bfloat16", 64, 2, compiled=True), False),
        (Row("vae-encode", "float32", 64), False),
        (Row("image", "float32", 64, steps=3), False),
        (Row("load", "float32", 64), False),
    ],
    ids=lambda value: getattr(value, "key", None),
)
def test_peers_run_in_the_rows_of_single_networks(row, run):
    assert set(PEERS) & {*row.contestants} == (set(PEERS) if run else set())


@pytest.mark.parametrize(
    ("words", "peers"),
    [
        ([], []),
        (["--peers"], ["openvino", "diffusers-frozen"]),
        (["--peers", "openvino"], ["openvino"]),
        (["--peers", "diffusers-frozen"], ["diffusers-frozen"]),
    ],
)
def test_peers_run_where_they_are_asked_for(monkeypatch, words, peers):
    monkeypatch.setattr(peers_module, "need_openvino", lambda: None)
    opt = speed.make_parser().parse_args(words)
    assert speed.choose_contestants(opt.contestants, opt.peers) == [*CONTESTANTS, *peers]


def test_without_openvino_a_line_says_so_and_the_others_run(monkeypatch, capsys):
    monkeypatch.setattr(peers_module.importlib.util, "find_spec", lambda name: None)
    assert speed.choose_contestants(["ldm"], []) == ["ldm", "diffusers-frozen"]
    assert capsys.readouterr().out == (
        "openvino is left out: OpenVINO is not installed; pip install openvino, or leave it out of --peers\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_openvino_computes_what_the_others_do(studio, dtype):
    pytest.importorskip("openvino")
    found = run_row(studio, Row("clip", dtype, 64, 2), ["ldm", "diffusers", "openvino"], ONCE, gemm=1.0)
    peer = found["contestants"]["openvino"]
    assert found["left_out"] == {} and peer["version"] and peer["gate"]["passed"]
    assert 0 < peer["gate"]["rms_error"] < (1e-5 if dtype == "float32" else 3e-2)
    assert "openvino / ldm" in found["ratios"] and peer["efficiency"]["gemm"] > 0


def test_the_list_shows_each_row_with_its_arithmetic(capsys, tiny):
    speed.main(["--list", "--model", "tiny", "--device", "cpu", "--rows", "import", "unet/b2/float32"])
    first, second = capsys.readouterr().out.splitlines()
    assert first == "import"
    flop = models.count_flop(tiny, "unet", 2)
    assert second.split() == ["unet/b2/float32", f"{flop / 1e12:.4g}", "TFLOP"]


# --- one set of weights ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_dtype_holds_the_same_weights_and_inputs(tiny):
    sets = [models.make_weights(tiny, dtype, CPU) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    assert len(sets[0]) > 200
    for name, weight in sets[0].items():
        assert weight.dtype == torch.float32 and weight.abs().max() > 0
        assert all(torch.equal(other[name].float(), weight) for other in sets[1:]), name
    full, half = (models.make_inputs(tiny, "unet", 4, d, CPU) for d in (torch.float32, torch.float16))
    assert half["x"].dtype == torch.float16 and full["t"].tolist() == [models.LEVEL] * 4
    assert all(torch.equal(half[name].to(full[name]), full[name]) for name in full)
    assert torch.equal(full["x"][:2], full["x"][2:])  # a guided step
    assert not torch.equal(full["context"][:2], full["context"][2:])


def test_exact_numbers_stay_exact_at_the_ends_of_the_scale():
    x = torch.tensor([1.2345678, 3.1e-5, 1.77e-7, 6e-8, 0.0, -65000.0])
    rounded = models.exactly(x)
    assert torch.equal(rounded.to(torch.float16).float(), rounded.float())
    torch.testing.assert_close(rounded.float()[:2], x[:2], rtol=2**-8, atol=0)


@pytest.mark.slow
def test_both_libraries_lie_in_the_same_memory(tiny):
    weights = models.make_weights(tiny, torch.float32, CPU)
    where = {weight.data_ptr() for weight in weights.values()}
    ours = models.build_ours(tiny, weights, CPU)
    theirs = [
        build(tiny, weights, CPU)
        for build in (models.build_their_unet, models.build_their_vae, models.build_their_text_encoder)
    ]
    assert {parameter.data_ptr() for parameter in ours.parameters()} == where
    assert {parameter.data_ptr() for network in theirs for parameter in network.parameters()} == where


@pytest.mark.parametrize("name", ["v1", "tiny"])
def test_diffusers_words_lead_back_to_ours(name, tmp_path):
    """ldm.checkpoints.folders reads what write_diffusers_config wrote: the same networks, schedule and scale."""
    settings = models.geometry(name).settings
    load.write_diffusers_config(tmp_path, settings)
    family, back = folder_settings(tmp_path)
    want, got = settings["model"]["params"], back["model"]["params"]
    assert family == "v1"
    for key in ("linear_start", "linear_end", "timesteps", "channels", "scale_factor", "image_size"):
        assert got[key] == want[key], key
    unet = {**want["unet_config"]["params"], "image_size": want["image_size"]}
    unet["attention_resolutions"] = sorted(unet["attention_resolutions"])
    assert unet.items() <= got["unet_config"]["params"].items()
    vae, vae_back = (p["first_stage_config"]["params"]["ddconfig"] for p in (want, got))
    assert {**vae, "resolution": 0} == {**vae_back, "resolution": 0}
    assert got["cond_stage_config"]["params"]["max_length"] == models.geometry(name).tokens


@pytest.mark.slow
def test_the_count_at_full_size_is_that_of_the_arithmetic():
    """Convolutions, matrix products and attention of SD v1 at 512 pixels, two operations each."""
    v1 = models.geometry("v1")
    gigaflop = {part: models.count_flop(v1, part, 1) / 1e9 for part in ("clip", "unet", "vae-decode")}
    wanted = {"clip": 13.30, "unet": 803.27, "vae-decode": 2514.52}
    assert gigaflop == pytest.approx(wanted, abs=0.005)


@pytest.mark.slow
def test_a_picture_counts_as_its_parts(tiny):
    parts = [
        models.count_flop(tiny, "clip", 2),
        models.count_flop(tiny, "unet", 6),
        models.count_flop(tiny, "vae-decode", 3),
    ]
    assert models.count_flop(tiny, "image", 3, steps=5) == parts[0] + 5 * parts[1] + parts[2]


# --- end to end --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        Row("clip", "float32", 64, 2),
        Row("unet", "float32", 64, 2),
        Row("vae-encode", "float32", 64),
        Row("vae-decode", "float32", 64),
        pytest.param(Row("image", "float32", 64, batch=2, steps=3), marks=pytest.mark.slow),
        pytest.param(Row("train", "float32", 64), marks=pytest.mark.slow),
    ],
    ids=lambda row: row.key,
)
@pytest.mark.slow
def test_ours_and_diffusers_agree_on_every_part(studio, row):
    found = run_row(
        studio, row, [name for name in CONTESTANTS if name != "ldm-kernels"], ONCE, gemm=2.0, unit=5.0
    )
    assert found["left_out"] == {} and tuple(found["contestants"]) == tuple(
        name for name in row.contestants if name not in ("ldm-kernels", *PEERS)
    )
    for name, one in found["contestants"].items():
        assert one["gate"]["max_error"] < 2e-5, name
        assert one["gate"].get("psnr", 99) > 90, name
        seconds = one["figures"]["seconds"]["median"]
        rate = found["flop"] / seconds
        assert one["efficiency"] == pytest.approx({"gemm": rate / 2e12, "unit": rate / 5e12})
    assert found["ratios"]["diffusers / ldm"]["of_medians"] == pytest.approx(
        found["contestants"]["diffusers"]["runs"][0] / found["contestants"]["ldm"]["runs"][0]
    )


@pytest.mark.slow
def test_in_half_precision_our_error_is_held_to_theirs(studio):
    """Also where diffusers itself is not to run."""
    row = Row("unet", "bfloat16", 64, 2)
    both = run_row(studio, row, PLAIN, ONCE)
    errors = [both["contestants"][name]["gate"]["rms_error"] for name in PLAIN]
    assert all(1e-4 < error < 0.1 for error in errors) and errors[0] <= 1.1 * errors[1]
    alone = run_row(studio, row, ["ldm"], ONCE)["contestants"]
    assert list(alone) == ["ldm"] and alone["ldm"]["gate"] == both["contestants"]["ldm"]["gate"]


@pytest.mark.skipif(not hasattr(kernels, "optimize"), reason="this ldm has no kernels yet")
@pytest.mark.slow
def test_the_kernels_take_part(studio):
    found = run_row(studio, Row("unet", "float32", 64, 2), ["ldm", "ldm-kernels", "diffusers"], ONCE)
    assert found["left_out"] == {} and found["contestants"]["ldm-kernels"]["gate"]["passed"]
    assert {"ldm / ldm-kernels", "diffusers / ldm-kernels"} <= set(found["ratios"])


@pytest.mark.slow
def test_training_moves_one_set_of_weights_for_all(tiny):
    """A step of ours and one of diffusers, in turn, are two steps of one AdamW, as a plain loop takes them."""
    row = Row("train", "float32", 64)
    with ExitStack() as stack:
        training = TrainingRow(tiny, row, CPU, stack)
        before = {key: weight.detach().clone() for key, weight in training.masters.items()}
        for one in [training.build(name) for name in PLAIN]:
            one.measure()
    assert {state["step"].item() for state in training.optimizer.state.values()} == {2.0}

    unet = models.build_their_unet(tiny, models.make_weights(tiny, torch.float32, CPU), CPU)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=LEARNING_RATE)
    i = models.make_inputs(tiny, "train", 1, torch.float32, CPU)
    for _ in range(2):
        optimizer.zero_grad()
        (unet(i["x"], i["t"], i["context"]).sample - i["target"]).square().mean().backward()
        optimizer.step()
    names, weights = unet_to_diffusers(before), dict(unet.named_parameters())
    # Here a norm has groups of one channel: what only shifts its input has gradients of rounding, which Adam's
    # steps magnify. Products inside transformer blocks have real ones.
    compared = [key for key, start in before.items() if "transformer_blocks" in key and start.dim() == 2]
    assert len(compared) > 10
    for key in compared:
        start = before[key]
        moved, wanted = training.masters[key].detach() - start, weights[names[key]].detach() - start
        assert (moved - wanted).norm() < 0.1 * wanted.norm(), key


def test_memory_is_promised_only_once(monkeypatch):
    monkeypatch.setattr(contestants, "free_memory", lambda device: Room.SPARE + 5_000_000_000)
    room = Room(CPU)
    room.take(3_000_000_000, "one")
    with pytest.raises(ResourceError, match=r"another needs 2\.5 GB, 2\.0 GB are free"):
        room.take(2_500_000_000, "another")
    room.take(2_000_000_000, "a third")


@pytest.mark.slow
def test_who_does_not_fit_is_left_out_and_the_others_run(studio, monkeypatch):
    monkeypatch.setattr(contestants, "free_memory", lambda device: Room.SPARE)
    found = run_row(studio, Row("unet", "float32", 64), ["ldm", "diffusers-best"], ONCE)
    assert list(found["contestants"]) == ["ldm"]
    assert "ResourceError: diffusers-best needs" in found["left_out"]["diffusers-best"]


# --- whole processes -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_file_of_the_weights_loads_and_paints_alike_in_both_libraries(studio, tmp_path, monkeypatch):
    """What the fresh processes do, done in this one."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
    file, config = studio.file(), studio.folder()
    pictures = {}
    for name in PLAIN:
        wish = {
            "contestant": name,
            "file": str(file),
            "config": str(config),
            "dtype": "float32",
            "device": "cpu",
        }
        wish |= {"px": 64, "compiled": False, "threads": 1, "picture": str(tmp_path / f"{name}.npy")}
        figures = process.run_once(wish)
        stages = ("torch", "import", "load", "strengthen", "image")
        assert figures["seconds"] == pytest.approx(sum(figures[f"{stage}_seconds"] for stage in stages))
        assert figures["gb"] == figures["resident_gb"] >= figures["anonymous_gb"] > 0
        pictures[name] = torch.from_numpy(np.load(wish["picture"]))
        assert pictures[name].shape == (1, 3, 64, 64)
    for name in Row("load", "bfloat16", 64).contestants:  # of which one loads as float32
        loaded = load.measure(name, str(file), "bfloat16", str(config))
        assert loaded["ready_seconds"] >= loaded["seconds"] > 0
    assert Row("load", "float32", 64).contestants == PLAIN == Row("import", "", 64).contestants
    assert gate.decibels(pictures["ldm"], pictures["diffusers"]) > 90
    assert 0.05 < pictures["ldm"].std() < 0.5  # no flat grey, no clipped black and white


def test_a_process_that_fails_is_named_with_its_last_words():
    with pytest.raises(
        ResourceError, match=r"'load\.py --one nobody' ended with code 2 .*invalid choice: 'nobody'"
    ):
        load.fresh_process(load.__file__, ["--one", "nobody"])


# --- the file --------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """The command at tiny size with small peaks; returns what runs it, and the results file."""
    monkeypatch.setattr(timing, "GEMM_SIDE", {"cpu": 32})
    monkeypatch.setattr(timing, "COPY_BYTES", {"cpu": 4096})
    path = tmp_path / "deep" / "r.json"
    words = ["--model", "tiny", "--device", "cpu", "--dtypes", "float32", "--results", str(path)]
    words += ["--repeats", "2", "--warmup", "0"]

    def run(*more):
        speed.main([*words, *more])
        return json.loads(path.read_text())

    return run, path


@pytest.mark.slow
def test_a_run_saves_each_row_and_a_second_does_what_is_missing(quick, capsys):
    run, path = quick
    before = run("--rows", "clip/b1/*", "--contestants", "ldm")
    row = before["rows"]["clip/b1/float32"]
    assert list(before["rows"]) == ["clip/b1/float32"] and list(row["contestants"]) == ["ldm"]
    assert before["model"] == "tiny" and before["threads"] == torch.get_num_threads()
    assert before["versions"]["torch"] == torch.__version__
    assert before["peaks"]["float32"]["tflops"] > 0 < before["peaks"]["copy"]["gbps"]
    assert set(before["peaks"]["float32"]["attention"]) == {"64x64x8", "64x32x8", "16x16x16", "16x32x16"}

    more = run("--rows", "clip/*", "--contestants", "ldm")
    assert more["rows"]["clip/b1/float32"] == row and list(more["rows"]) == [
        "clip/b1/float32",
        "clip/b2/float32",
    ]

    # Contestants of a row run together, so one more means all of them again.
    wider = run("--rows", "clip/b1/*", "--contestants", *PLAIN)
    assert list(wider["rows"]["clip/b1/float32"]["contestants"]) == list(PLAIN)
    assert wider["rows"]["clip/b2/float32"] == more["rows"]["clip/b2/float32"]
    assert run("--rows", "clip/b1/*", "--contestants", "ldm")["rows"] == wider["rows"]
    fresh = run("--rows", "clip/b2/*", "--contestants", "ldm", "--fresh")
    assert fresh["rows"]["clip/b2/float32"] != more["rows"]["clip/b2/float32"]
    assert fresh["rows"]["clip/b1/float32"] == wider["rows"]["clip/b1/float32"]

    text = path.with_suffix(".md").read_text()
    assert "| `clip/b1/float32` | ldm | " in text and "|  | diffusers | " in text
    assert "0 rows to measure, 1 are in" in capsys.readouterr().out


def test_results_of_another_kind_are_not_mixed(tiny, tmp_path):
    path, head = tmp_path / "r.json", report.describe(tiny, CPU)
    held = report.load_results(path, head)
    assert held["rows"] == {} and held["model"] == "tiny"
    row = unable(Row("clip", "float32", 64), ["ldm"], ResourceError("no room"))
    report.save(path, {**held, "rows": {"clip": row}})
    assert report.load_results(path, head)["rows"] == {"clip": row}
    old = {"clip": {**row, "contestants": {"ldm": {"efficiency": 0.25}}}}
    path.write_text(json.dumps({**held, "rows": old}))
    kept = report.load_results(path, head)["rows"]["clip"]["contestants"]["ldm"]
    assert kept["efficiency"] == {"gemm": 0.25}
    other = {**head, "threads": 7}
    with pytest.raises(MismatchError, match="has results for threads 1, this run is for 7; give another"):
        report.load_results(path, other)
    assert report.load_results(path, other, fresh=True)["rows"] == {}
    path.write_text("{}")
    with pytest.raises(FormatError, match="is no file of speed results"):
        report.load_results(path, head)


@pytest.mark.slow
def test_a_row_that_breaks_off_is_told_and_the_next_runs(quick, monkeypatch):
    run, path = quick
    reference = Studio.reference

    def fail_for_text(self, row):
        if row.part == "clip":
            raise RuntimeError("can't allocate memory: 7 bytes")
        return reference(self, row)

    monkeypatch.setattr(Studio, "reference", fail_for_text)
    rows = run("--rows", "clip/b1/*", "unet/b1/*", "--contestants", "ldm")["rows"]
    assert rows["clip/b1/float32"]["left_out"] == {"ldm": "RuntimeError: can't allocate memory: 7 bytes"}
    assert rows["unet/b1/float32"]["contestants"]["ldm"]["gate"]["passed"]
    assert "| `clip/b1/float32` | ldm | left out: RuntimeError" in path.with_suffix(".md").read_text()


def test_without_kernels_their_contestant_is_left_out_and_the_user_told(monkeypatch, capsys):
    monkeypatch.delattr(kernels, "optimize", raising=False)
    assert speed.choose_contestants(None) == ["ldm", *THEIRS]
    assert "ldm-kernels is left out: ldm.kernels has no optimize()" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"ldm\.kernels has no optimize\(\)"):
        speed.choose_contestants(["ldm-kernels"])


def test_files_are_named_by_model_machine_and_torch(tiny, monkeypatch):
    monkeypatch.setattr(report, "machine_name", lambda device: "Intel(R) Xeon(R) Gold 6154 CPU @ 3.00GHz")
    release = ".".join(torch.__version__.split(".")[:2])
    name = f"intel-xeon-gold-6154-cpu-3-00ghz-1-threads-torch{release}.json"
    assert report.default_path(tiny, CPU).name == f"speed-tiny-{name}"
    assert report.default_path(models.geometry("v1"), CPU).name == f"speed-{name}"


# --- the model in the box ------------------------------------------------------------------------------------


def test_a_step_is_what_more_steps_take_longer():
    # 40 ms a picture and 7 ms a step, with a busy moment in one round of each.
    few, many = [0.040 + 5 * 0.007, 0.2, 0.075], [0.040 + 25 * 0.007, 0.215, 0.9]
    found = box.step_times(few, many, (5, 25))
    assert found == pytest.approx({"step_ms": 7.0, "step_ms_median": 7.0, "once_ms": 40.0})


def test_the_box_s_table_stands_beside_an_earlier_one(tmp_path):
    row = {"step_ms": 8.0, "step_ms_median": 9.25, "once_ms": 41.0}
    head = {"machine": "m", "torch": "t", "rounds": 3, "load_average": [0.1, 0.2]}
    new = {**head, "rows": {"float32, plain, 1 thread": row, "float32, optimized, 1 thread": row}}
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"rows": {"float32, plain, 1 thread": {**row, "step_ms": 20.0}}}))
    text = box.make_table(new, box.read_results(old))
    assert "| float32, plain, 1 thread | 20.0 | 8.0 | 9.2 | 41 | 2.50 |" in text
    assert "| float32, optimized, 1 thread | - | 8.0 | 9.2 | 41 | - |" in text
    assert "| float32, plain, 1 thread | 8.0 | 9.2 | 41 |" in box.make_table(new, None)
    for wrong in ("{}", "[]", '{"rows": {"a": {}}}', "no JSON"):
        old.write_text(wrong)
        with pytest.raises(FormatError, match="is no file of bench/box.py's results"):
            box.read_results(old)


def test_the_box_s_shorter_run_comes_first():
    with pytest.raises(UsageError, match="--steps needs the shorter run first, got 9 9"):
        box.main(["--steps", "9", "9"])


@pytest.mark.slow
def test_the_box_is_measured_and_written_down(tmp_path):
    path = tmp_path / "box.json"
    words = ["--dtypes", "float32", "--threads", "1", "--steps", "5", "6", "--rounds", "1"]
    box.main([*words, "--results", str(path)])
    found = json.loads(path.read_text())
    assert list(found["rows"]) == ["float32, plain, 1 thread", "float32, optimized, 1 thread"]
    assert "float32, optimized, 1 thread" in path.with_suffix(".md").read_text()
