"""The published image_train.py: its main by its names, its files, exact resumption, and image_sample.py on them."""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

pytest.importorskip("lightning", reason="training needs the extra")

from ldm.guided_diffusion.resample import create_named_schedule_sampler

from ldm.errors import AbsentError, FormatError, MismatchError, NumericError, UnsafeFileError, UsageError

# The script's own import lines, with `ldm.` before guided_diffusion.
from ldm.guided_diffusion import dist_util, logger, script_util
from ldm.guided_diffusion.files import load_openai_model
from ldm.guided_diffusion.image_datasets import center_crop_arr, load_data, random_crop_arr
from ldm.guided_diffusion.script_util import (
    add_dict_to_argparser,
    args_to_dict,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)
from ldm.guided_diffusion.train_util import TrainLoop, parse_resume_step_from_filename

TINY = {
    "image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "num_heads": 2,
    "attention_resolutions": "16", "diffusion_steps": 4, "noise_schedule": "cosine",
    "learn_sigma": True, "rescale_learned_sigmas": True,
}  # fmt: skip
NETWORK = {key: value for key, value in TINY.items() if not key.startswith(("diffusion", "rescale", "noise"))}


def create_argparser():
    """The script's own defaults."""
    defaults = dict(
        data_dir="", schedule_sampler="uniform", lr=1e-4, weight_decay=0.0, lr_anneal_steps=0, batch_size=1,
        microbatch=-1, ema_rate="0.9999", log_interval=10, save_interval=10000, resume_checkpoint="", use_fp16=False,
        fp16_scale_growth=1e-3,
    )  # fmt: skip
    defaults.update(model_and_diffusion_defaults())
    parser = argparse.ArgumentParser()
    add_dict_to_argparser(parser, defaults)
    return parser


def main(argv):
    """The script's main."""
    args = create_argparser().parse_args(argv)

    dist_util.setup_dist()
    logger.configure()

    logger.log("creating model and diffusion...")
    model, diffusion = create_model_and_diffusion(**args_to_dict(args, model_and_diffusion_defaults().keys()))
    model.to(dist_util.dev())
    schedule_sampler = create_named_schedule_sampler(args.schedule_sampler, diffusion)

    logger.log("creating data loader...")
    data = load_data(
        data_dir=args.data_dir,
        batch_size=args.batch_size,
        image_size=args.image_size,
        class_cond=args.class_cond,
    )

    logger.log("training...")
    TrainLoop(
        model=model, diffusion=diffusion, data=data, batch_size=args.batch_size, microbatch=args.microbatch,
        lr=args.lr, ema_rate=args.ema_rate, log_interval=args.log_interval, save_interval=args.save_interval,
        resume_checkpoint=args.resume_checkpoint, use_fp16=args.use_fp16, fp16_scale_growth=args.fp16_scale_growth,
        schedule_sampler=schedule_sampler, weight_decay=args.weight_decay, lr_anneal_steps=args.lr_anneal_steps,
    ).run_loop()  # fmt: skip


def train(folder, pictures, monkeypatch, **flags):
    """Run main with a log folder, from one initial network."""
    monkeypatch.setenv("OPENAI_LOGDIR", str(folder))
    torch.manual_seed(0)
    words = {"data_dir": pictures, "batch_size": 4, "log_interval": 1, "save_interval": 3, **TINY, **flags}
    main([word for name, value in words.items() for word in (f"--{name}", str(value))])
    return folder


@pytest.fixture
def pictures(tmp_path):
    """Seven pictures of three classes, the first by name of the last class; and files that are none."""
    folder = tmp_path / "pictures"
    (folder / "above").mkdir(parents=True)
    names = ["cat_0.png", "cat_1.jpg", "dog_0.png", "ant_0.webp", "dog_1.png", "cat_2.bmp", "above/dog_2.png"]
    for i, name in enumerate(names):
        rng = np.random.default_rng(i)
        Image.fromarray(rng.integers(0, 256, (20 + i, 25, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("none")
    (folder / "._cat_0.png").write_bytes(b"a Mac's")
    return folder


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No process group, no log folder and no starter's words outlive a test."""
    for name in (
        "WORLD_SIZE",
        "RANK",
        "LOCAL_RANK",
        "OPENAI_LOGDIR",
        "OPENAI_LOG_FORMAT",
        *dist_util.MPI_SIZES,
    ):
        monkeypatch.delenv(name, raising=False)
    yield
    logger.reset()
    if dist.is_initialized():
        dist.destroy_process_group()


def same(a, b):
    """Whether two states hold the same bits."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, list) else a == b


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.suffix == ".pt")


OPTIONS = {"lr": 1e-3, "ema_rate": "0.9,0.99", "lr_anneal_steps": 6, "weight_decay": 0.01}


@pytest.mark.slow
def test_the_script_trains_and_a_resumed_run_is_the_uninterrupted_one(
    pictures, tmp_path, monkeypatch, capsys
):
    """Weights, both averages, moments and the sampler's losses, bit for bit, with labels and microbatches."""
    flags = {
        **OPTIONS,
        "schedule_sampler": "loss-second-moment",
        "microbatch": 3,
        "class_cond": True,
        "dropout": 0.1,
    }
    whole = train(tmp_path / "whole", pictures, monkeypatch, **flags)
    names = ["ema_0.9_{}.pt", "ema_0.99_{}.pt", "loop{}.pt", "model{}.pt", "opt{}.pt"]
    assert files(whole) == sorted(name.format(n) for name in names for n in ("000000", "000003", "000005"))
    # As if the run had been killed after step 4, which is in no file; it goes on elsewhere.
    part = tmp_path / "part"
    part.mkdir()
    for name in names:
        shutil.copy(whole / name.format("000003"), part)
    again = train(part, pictures, monkeypatch, resume_checkpoint=part / "model000003.pt", **flags)
    for name in names:
        a, b = (dist_util.load_state_dict(run / name.format("000005")) for run in (whole, again))
        assert same(a, b), name
    started = dist_util.load_state_dict(whole / "model000000.pt")
    ended = dist_util.load_state_dict(whole / "model000005.pt")
    assert not same(started, ended) and not same(
        ended, dist_util.load_state_dict(whole / "ema_0.9_000005.pt")
    )
    assert "saving model 0.9..." in capsys.readouterr().out


def test_what_a_run_writes_and_says(pictures, tmp_path, monkeypatch, capsys):
    """model, ema and opt of step 0, as the original names them; log.txt, progress.csv, and image_sample.py's way in."""
    run = train(tmp_path / "run", pictures, monkeypatch, lr_anneal_steps=2, save_interval=1000)
    wanted = ["ema_0.9999_{}.pt", "model{}.pt", "opt{}.pt"]
    assert files(run) == sorted(name.format(n) for name in wanted for n in ("000000", "000001"))
    with (run / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["samples"]) for row in rows] == [("0.0", "4.0"), ("1.0", "8.0")]
    assert {"loss", "mse", "vb", "grad_norm", "param_norm"} <= set(rows[0])
    assert any(name.startswith("loss_q") for name in rows[0])
    said = capsys.readouterr().out
    assert (
        said.count("creating model and diffusion...") == 1
        and "| loss " in said
        and (run / "log.txt").read_text()
    )

    # image_sample.py: the model by flags, the weights by dist_util, samples gathered from all processes.
    model, diffusion = create_model_and_diffusion(
        **{**model_and_diffusion_defaults(), **TINY, "timestep_respacing": "ddim2"}
    )
    model.load_state_dict(dist_util.load_state_dict(str(run / "ema_0.9999_000001.pt"), map_location="cpu"))
    model.to(dist_util.dev()).eval()
    sample = diffusion.ddim_sample_loop(model, (2, 3, 16, 16), clip_denoised=True, model_kwargs={})
    sample = ((sample + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    gathered = [torch.zeros_like(sample) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, sample)
    dist.barrier()
    assert dist.get_rank() == 0 and torch.equal(gathered[0], sample) and sample.shape == (2, 16, 16, 3)
    loaded, _, report = load_openai_model(run / "ema_0.9999_000001.pt", **NETWORK)
    assert same(dict(loaded.state_dict()), dict(model.state_dict())) and len(report.assigned) == report.total


def network(**flags):
    torch.manual_seed(0)
    return create_model_and_diffusion(**{**model_and_diffusion_defaults(), **TINY, **flags})


def loop(data, **changes):
    """A TrainLoop over the tiny network."""
    model, diffusion = changes.pop("network", None) or network()
    return TrainLoop(
        **{
            **dict(
                model=model, diffusion=diffusion, data=data, batch_size=4, microbatch=-1, lr=1e-3, ema_rate="0.9",
                log_interval=1, save_interval=100, resume_checkpoint="",
            ),
            **changes,
        }
    )  # fmt: skip


def batches(count=None, shape=(4, 3, 16, 16)):
    generator = torch.Generator().manual_seed(0)
    while count is None or count > 0:
        yield torch.rand(shape, generator=generator) * 2 - 1, {}
        count = None if count is None else count - 1


def test_microbatches_do_not_change_the_gradient():
    """3 + 1 of 4 pictures weigh 3/4 and 1/4; the original's sum depended on how many there were."""
    batch, cond = next(batches())
    gradients = []
    for microbatch in (-1, 3, 1):
        one = loop(batches(), microbatch=microbatch)
        with torch.no_grad():  # its last layer begins at zero, and hides all others
            one.model.out[2].weight.fill_(0.01)
        one.forward_backward(batch, cond)
        gradients.append(torch.cat([p.grad.flatten() for p in one.model.parameters()]))
    assert gradients[0].abs().max() > 1e-3
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=0, atol=2e-5)


def test_the_average_and_the_rate_are_what_they_say(tmp_path):
    """shadow = rate shadow + (1 - rate) weights, from the first weights on; lr (1 - n / steps) at step n."""
    logger.configure(dir=tmp_path, format_strs=[])
    one = loop(batches(), lr_anneal_steps=3, ema_rate="0.9,0.5")
    shadows = {rate: [p.detach().clone() for p in one.model.parameters()] for rate in (0.9, 0.5)}
    rates = []
    step = one.opt.step

    def watched(*args, **kwargs):
        rates.append(one.opt.param_groups[0]["lr"])
        return step(*args, **kwargs)

    one.opt.step = watched
    update = one._update_ema

    def follow():
        for rate, values in shadows.items():
            for value, p in zip(values, one.model.parameters(), strict=True):
                value.mul_(rate).add_(p.detach(), alpha=1 - rate)
        update()

    one._update_ema = follow
    one.run_loop()
    assert rates == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])
    for rate, values in shadows.items():
        held = dist_util.load_state_dict(tmp_path / f"ema_{rate}_000002.pt")
        for (name, _), value in zip(one.model.named_parameters(), values, strict=True):
            torch.testing.assert_close(held[name], value, rtol=0, atol=1e-6)


def test_half_precision_keeps_float32_weights_and_lowers_its_scale(tmp_path):
    small = (1, 3, 4, 6)  # half precision is slow on a CPU
    logger.configure(dir=tmp_path, format_strs=[])
    one = loop(
        batches(shape=small),
        network=network(use_fp16=True),
        use_fp16=True,
        fp16_scale_growth=0.25,
        lr_anneal_steps=2,
    )
    assert one.model.input_blocks[0][0].weight.dtype == torch.float16
    before = {name: value.clone() for name, value in one.master.state_dict().items()}
    one.run_loop()
    held = dist_util.load_state_dict(tmp_path / "model000001.pt")
    assert {value.dtype for value in held.values()} == {torch.float32} and list(held) == list(before)
    assert any(not torch.equal(held[name], before[name]) for name in held)
    for name, value in one.model.state_dict().items():
        torch.testing.assert_close(value.float(), held[name].to(value.dtype).float(), rtol=0, atol=0)
    assert one.lg_loss_scale == 20.5
    again = loop(
        batches(shape=small),
        network=network(use_fp16=True),
        use_fp16=True,
        resume_checkpoint=tmp_path / "model000001.pt",
    )
    assert again.lg_loss_scale == 20.5 and again.total_step == 2
    next(again.model.parameters()).register_hook(lambda g: g * float("inf"))
    again.run_step(*next(batches(shape=small)))
    assert again.lg_loss_scale == 19.5  # a step was skipped, and the scale lowered


@pytest.mark.slow
def test_steps_that_are_not_finite_are_skipped_and_many_end_the_run(tmp_path, caplog):
    logger.configure(dir=tmp_path, format_strs=[])

    def data():
        for n, (batch, cond) in enumerate(batches()):
            yield (batch * float("nan") if n >= 2 else batch), cond

    one = loop(data(), save_interval=2)
    with pytest.raises(NumericError, match="10 steps in a row were not finite"):
        one.run_loop()
    weights = dist_util.load_state_dict(tmp_path / "model000000.pt")
    assert all(value.isfinite().all() for value in weights.values())
    assert all(p.isfinite().all() for p in one.model.parameters())


def test_foreign_data_begins_anew_with_a_word_and_may_not_end(tmp_path, caplog):
    logger.configure(dir=tmp_path, format_strs=[])
    with pytest.raises(UsageError, match="the data ended before step 3; it should go on for ever"):
        loop(batches(count=3)).run_loop()
    assert (tmp_path / "model000002.pt").is_file()  # what was trained is kept
    loop(batches(), resume_checkpoint=tmp_path / "model000002.pt", lr_anneal_steps=4).run_loop()
    assert "this data cannot be set to batch 3; it begins anew" in caplog.text
    assert (tmp_path / "model000003.pt").is_file()


def test_other_files_are_begun_with_at_step_zero_and_lacking_ones_are_said(tmp_path, caplog):
    model, _ = network()
    torch.save(model.state_dict(), tmp_path / "64x64_diffusion.pt")
    torch.save(model.state_dict(), tmp_path / "model000120.pt")
    one = loop(batches(), resume_checkpoint=str(tmp_path / "64x64_diffusion.pt"))
    assert one.total_step == 0 and caplog.text == ""
    one = loop(batches(), resume_checkpoint=tmp_path / "model000120.pt")
    assert one.total_step == 121
    assert "ema_0.9_000120.pt' is not there" in caplog.text and "opt000120.pt' is not there" in caplog.text
    assert parse_resume_step_from_filename("logs/model000120.pt") == 120
    assert parse_resume_step_from_filename("64x64_diffusion.pt") == 0


class Evil:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("file", "state", "kind", "words"),
    [
        ("model000007.pt", None, AbsentError, "is not there"),
        ("model000007.pt", {"a": torch.ones(2)}, MismatchError, "is of another network: .* tensors differ"),
        ("model000007.pt", Evil(), UnsafeFileError, "refused"),
        ("model000007.pt", [1, 2], FormatError, "should hold a dict, got list"),
        ("ema_0.9_000007.pt", {"a": torch.ones(2)}, MismatchError, "is of another network"),
        ("opt000007.pt", {"a": 1}, MismatchError, "is of another optimizer or network"),
        (
            "opt000007.pt",
            {"state": {}, "param_groups": []},
            MismatchError,
            "is of another optimizer or network",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, file, state, kind, words):
    if file != "model000007.pt":
        torch.save(network()[0].state_dict(), tmp_path / "model000007.pt")
    if state is not None:
        torch.save(state, tmp_path / file)
    with pytest.raises(kind, match=words) as caught:
        loop(batches(), resume_checkpoint=tmp_path / "model000007.pt")
    assert "\n" not in str(caught.value) and len(str(caught.value)) <= 400


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 0}, "batch_size must be"),
        ({"microbatch": -2}, "microbatch must be"),
        ({"lr": float("nan")}, "lr must be"),
        ({"ema_rate": "1.5"}, "ema_rate should be"),
        ({"log_interval": 0}, "log_interval must be"),
        ({"save_interval": 0}, "save_interval must be"),
        ({"lr_anneal_steps": -1}, "lr_anneal_steps must be"),
        ({"weight_decay": -1}, "weight_decay must be"),
        (
            {"network": (torch.nn.Linear(2, 2), None), "use_fp16": True, "schedule_sampler": object()},
            "convert_to_fp16",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(changes, words):
    with pytest.raises(UsageError, match=words):
        loop(batches(), **changes)


# --- load_data ---


def test_classes_are_what_stands_before_the_first_underscore(pictures, caplog):
    data = load_data(data_dir=str(pictures), batch_size=7, image_size=12, class_cond=True, deterministic=True)
    batch, cond = next(data)
    assert (
        batch.shape == (7, 3, 12, 12)
        and batch.dtype == torch.float32
        and -1 <= batch.min() < batch.max() <= 1
    )
    assert cond["y"].tolist() == [2, 0, 1, 1, 1, 2, 2] and cond["y"].dtype == torch.int64  # ant, cat, dog
    assert "1 files in" in caplog.text
    assert next(load_data(data_dir=pictures, batch_size=2, image_size=12))[1] == {}


def test_batches_can_be_set_to_any_and_come_again(pictures):
    options = {
        "data_dir": pictures,
        "batch_size": 3,
        "image_size": 12,
        "random_crop": True,
        "class_cond": True,
    }
    data = load_data(**options)
    first = [next(data) for _ in range(6)]
    data.seek(4)
    assert torch.equal(next(data)[0], first[4][0])
    again = load_data(**options)
    again.seek(5)
    batch, cond = next(again)
    assert torch.equal(batch, first[5][0]) and torch.equal(cond["y"], first[5][1]["y"])
    assert not torch.equal(next(load_data(**options, seed=1))[0], first[0][0])


def test_half_the_pictures_are_mirrored_unless_told_otherwise(pictures):
    plain = load_data(data_dir=pictures, batch_size=7, image_size=12, deterministic=True, random_flip=False)
    flipped = load_data(data_dir=pictures, batch_size=7, image_size=12, deterministic=True)
    mirrored = 0
    for _ in range(6):
        a, b = next(plain)[0], next(flipped)[0]
        for one, other in zip(a, b, strict=True):
            assert torch.equal(one, other) or torch.equal(one.flip(-1), other)
            mirrored += not torch.equal(one, other)
    assert 8 <= mirrored <= 34  # of 42


def test_a_picture_that_cannot_be_read_is_left_out_with_a_word(pictures, caplog):
    (pictures / "dog_0.png").write_bytes(b"not a picture")
    data = load_data(data_dir=pictures, batch_size=7, image_size=12, class_cond=True, deterministic=True)
    for _ in range(2):
        assert next(data)[1]["y"].tolist() == [2, 0, 1, 1, 1, 2, 2]
    assert caplog.text.count("a picture is left out") == 1 and "dog_0.png" in caplog.text
    for path in pictures.rglob("*_*"):
        path.write_bytes(b"no")
    with pytest.raises(FormatError, match="none of 7 pictures can be read"):
        next(load_data(data_dir=pictures, batch_size=7, image_size=12))


def test_names_without_an_underscore_are_said(pictures, caplog):
    (pictures / "cat_0.png").rename(pictures / "cat.png")
    load_data(data_dir=pictures, batch_size=2, image_size=12, class_cond=True)
    assert "1 of 7 pictures have no underscore in their name" in caplog.text and "cat.png" in caplog.text


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"data_dir": ""}, UsageError, "unspecified data directory"),
        ({"data_dir": "https://host/pictures"}, UnsafeFileError, "is an address; nothing is downloaded"),
        ({"data_dir": "/nowhere/pictures"}, AbsentError, "is no folder"),
        ({"data_dir": "empty"}, AbsentError, "holds no pictures"),
        ({"batch_size": 8}, MismatchError, "the data holds 7 samples but one batch takes 8"),
        ({"batch_size": 0}, UsageError, "batch_size must be"),
        ({"image_size": 0}, UsageError, "image_size must be"),
    ],
)
def test_folders_that_cannot_be_read_are_refused(pictures, tmp_path, monkeypatch, changes, kind, words):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=words):
        load_data(**{"data_dir": pictures, "batch_size": 2, "image_size": 12, **changes})


def test_squares_are_cut_as_openai_does():
    """The shorter side to the size, by halves first; the middle, or a square of 0.8 to 1 of it anywhere."""
    ramp = Image.fromarray(np.tile(np.arange(80, dtype=np.uint8)[None, :, None], (40, 1, 3)))
    middle = center_crop_arr(ramp, 10)  # 80 x 40 -> halves 40 x 20, 20 x 10
    assert middle.shape == (10, 10, 3)
    assert np.abs(middle[0, :, 0].astype(int) - (np.arange(10) * 4 + 20 + 1.5)).max() <= 1
    seen = {random_crop_arr(ramp, 10, rng=np.random.default_rng(i)).tobytes() for i in range(20)}
    assert len(seen) > 10 and random_crop_arr(ramp, 10).shape == (10, 10, 3)


# --- logger and dist_util ---


def test_numbers_are_averaged_kept_and_added_to(tmp_path, capsys):
    logger.configure(dir=tmp_path, format_strs=["stdout", "log", "csv", "json"])
    assert logger.get_dir() == str(tmp_path)
    logger.logkv("step", 1)
    for value in (1.0, 2.0, torch.tensor(6.0)):
        logger.logkv_mean("loss", value)
    assert logger.getkvs()["loss"] == 3.0
    assert logger.dumpkvs() == {"step": 1.0, "loss": 3.0} and logger.getkvs() == {}
    logger.logkvs({"step": 2, "new": 0.5})
    logger.dumpkvs()
    logger.configure(dir=tmp_path, format_strs=["csv", "json"])  # a resumed run adds to what is there
    logger.logkv_mean("loss", 7)
    logger.logkv("step", 3)
    logger.dumpkvs()
    with (tmp_path / "progress.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"loss": "3.0", "step": "1.0", "new": ""},
        {"loss": "", "step": "2.0", "new": "0.5"},
        {"loss": "7.0", "step": "3.0", "new": ""},
    ]
    lines = [json.loads(line) for line in (tmp_path / "progress.json").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1.0, 2.0, 3.0]
    said = capsys.readouterr().out
    assert "| loss | 3 |" in said and said.count("Logging to") == 1
    assert "| loss | 3 |" in (tmp_path / "log.txt").read_text()


def test_levels_scopes_and_times(tmp_path, capsys):
    with logger.scoped_configure(dir=tmp_path / "scoped", format_strs=["log"]):
        logger.warn("a", 3)
        with logger.profile_kv("work"):
            pass
        assert 0 <= logger.getkvs()["wait_work"] < 60
    assert (tmp_path / "scoped" / "log.txt").read_text().endswith("a 3\n") and logger.get_dir() is None
    logger.set_level(logger.ERROR)
    logger.info("unheard")
    logger.error("heard")
    assert capsys.readouterr().out == "heard\n"


def test_formats_and_folders_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(
        UsageError, match="log format 'tensorboard' is unknown; choose some of stdout, log, csv, json"
    ):
        logger.configure(dir=tmp_path, format_strs=["tensorboard"])
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match="cannot be made"):
        logger.configure(dir=tmp_path / "file")


def test_one_process_is_a_group_of_its_own_and_mpi_is_told_of_torchrun(monkeypatch):
    assert dist_util.place() == (0, 1)
    dist_util.setup_dist()
    dist_util.setup_dist()
    assert dist.get_world_size() == 1 and dist_util.dev().type in ("cpu", "cuda")
    dist.destroy_process_group()
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="torchrun --nproc_per_node 3"):
        dist_util.setup_dist()


def test_the_other_modules_are_ldms_own():
    """So that rebinding the number of classes, which scripts do, takes effect."""
    from ldm.guided_diffusion import gaussian_diffusion, respace, unet
    from ldm.models.diffusion import script_util as own
    from ldm.modules.diffusionmodules import openaimodel

    assert script_util is own and unet is openaimodel
    assert gaussian_diffusion.GaussianDiffusion and respace.space_timesteps


WORKER = """
import sys
import torch
from ldm.guided_diffusion import dist_util, logger
from ldm.guided_diffusion.image_datasets import load_data
from ldm.guided_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
from ldm.guided_diffusion.train_util import TrainLoop
torch.set_num_threads(1)
folder, pictures, batch, flags = sys.argv[1], sys.argv[2], int(sys.argv[3]), eval(sys.argv[4])
dist_util.setup_dist()
logger.configure(dir=folder)
torch.manual_seed(dist_util.place()[0])  # unlike in each process, until the first one's are given to all
model, diffusion = create_model_and_diffusion(**{**model_and_diffusion_defaults(), **flags})
data = load_data(data_dir=pictures, batch_size=batch, image_size=16)
TrainLoop(model=model, diffusion=diffusion, data=data, batch_size=batch, microbatch=-1, lr=1e-3, ema_rate="0.9",
          log_interval=1, save_interval=10, resume_checkpoint="", lr_anneal_steps=2).run_loop()
"""


@pytest.mark.slow
def test_two_processes_train_as_one(pictures, tmp_path):
    """With half the batch each: the same pictures, levels and noise, and the mean of the gradients."""

    def start(folder, batch, **environment):
        return subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path / folder), str(pictures), str(batch), repr(TINY)],
            env={**os.environ, **environment},
        )

    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29641"}
    jobs = [start("two", 2, RANK=str(rank), **group) for rank in (0, 1)]
    assert [job.wait(timeout=300) for job in jobs] == [0, 0]
    assert start("one", 4).wait(timeout=300) == 0
    a, b = (dist_util.load_state_dict(tmp_path / run / "model000001.pt") for run in ("one", "two"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=2e-5)
