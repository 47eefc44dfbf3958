"""Deep features kept from step to step: what is asked when, whose features are used, and that nothing stays behind."""

import importlib.util
import json
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from keyed import fill, keyed_input
from tiny import tiny_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ldm
from ldm.adapters.deepcache import DeepCache
from ldm.errors import UsageError
from ldm.generate import denoise
from ldm.kernels import restore
from ldm.kernels.fused_module import FusedModule
from ldm.modules import seams
from ldm.modules.diffusionmodules.openaimodel import SuperResModel, UNetModel
from ldm.pipeline import StableDiffusion

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
CONFIGS = {
    name: entry["config"]
    for file in ("modules.json", "sd2_and_control.json")
    for name, entry in json.loads((GOLDEN / file).read_text()).items()
    if name.startswith("unet")
}
SPACES = {1: (7,), 2: (5, 9), 3: (2, 5, 7)}  # odd sides, that halve unevenly
PLAIN = {
    "image_size": 8,
    "in_channels": 4,
    "model_channels": 32,
    "out_channels": 5,
    "num_res_blocks": 1,
    "attention_resolutions": [2, 4],
    "channel_mult": [1, 2, 2],
    "num_heads": 2,
    "use_spatial_transformer": True,
    "context_dim": 24,
    "legacy": False,
}
PROMPT = "a large red circle"


@pytest.fixture(scope="module")
def unet():
    return fill(UNetModel(**PLAIN), "u.")


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion(tiny_model())


def question(name="q", batch=2, height=5, width=9, t=(3.0, 757.5)):
    return {
        "x": keyed_input(name, (batch, 4, height, width)),
        "timesteps": torch.tensor([t[i % 2] for i in range(batch)]),
        "context": keyed_input(name + "c", (batch, 7, 24)),
    }


def attached(cache, unet, **asked):
    with torch.no_grad(), seams.attached(unet, cache):
        return unet(**asked)


class Count:
    """How often, and with how many rows, a module was asked."""

    def __init__(self, module):
        self.rows = []
        self.handle = module.register_forward_hook(lambda m, given, output: self.rows.append(len(output)))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.handle.remove()


# --- the way through one UNet ---


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
@pytest.mark.thinned(4)
def test_every_geometry_answers_the_same_question_from_memory_bit_for_bit(name):
    """Shallow, halfway and to the middle: the whole answer is the UNet's own, and kept features of the same input give
    it once more."""
    config = CONFIGS[name]
    unet = fill(UNetModel(**config), name + ".")
    asked = {
        "x": keyed_input(name + ".x", (2, config["in_channels"], *SPACES[config.get("dims", 2)])),
        "timesteps": torch.tensor([3, 757]),
    }
    if "context_dim" in config:
        asked["context"] = keyed_input(name + ".context", (2, 7, 24))
    if config.get("num_classes") == "continuous":
        asked["y"] = keyed_input("y", (2, 1))
    elif "num_classes" in config:
        asked["y"] = torch.tensor([1, 9])
    want = unet(**asked)
    blocks = len(unet.output_blocks)
    for depth in (1, blocks // 2, blocks):
        cache = DeepCache(2, depth)
        with Count(unet.middle_block) as middle, Count(unet.input_blocks[0]) as first:
            assert torch.equal(attached(cache, unet, **asked), want)
            cache.next_level()
            assert torch.equal(attached(cache, unet, **asked), want)
        assert len(middle.rows) == 1 and len(first.rows) == 2


@torch.no_grad()
def test_an_upsampler_is_served_as_well():
    unet = fill(SuperResModel(**{**PLAIN, "in_channels": 3, "out_channels": 3}), "s.")
    asked = {"low_res": keyed_input("low", (2, 3, 3, 4)), **question()}
    asked["x"] = keyed_input("x", (2, 3, 6, 8))
    want, cache = unet(**asked), DeepCache(2)
    for _ in range(2):
        assert torch.equal(attached(cache, unet, **asked), want)
        cache.next_level()


@pytest.mark.parametrize("depth", [1, 2, 5, 6])
@torch.no_grad()
def test_only_the_shallow_blocks_are_asked_in_between(unet, depth):
    cache, asked = DeepCache(3, depth), question()
    attached(cache, unet, **asked)
    cache.next_level()
    blocks = [*unet.input_blocks, unet.middle_block, *unet.output_blocks]
    counts = [Count(block) for block in blocks]
    attached(cache, unet, **asked)
    shallow = [i < depth or i >= len(blocks) - depth for i in range(len(blocks))]
    assert [len(count.rows) == 1 for count in counts] == shallow
    for count in counts:
        count.handle.remove()


@torch.no_grad()
def test_what_the_shallow_part_sees_is_of_today_and_the_rest_of_before(unet):
    """Another input: neither today's whole answer nor yesterday's, but the last block's of the two together."""
    old, new = question("old"), question("new", t=(200.0, 301.0))
    cache = DeepCache(2, 1)
    seen = []
    hook = unet.output_blocks[-1].register_forward_pre_hook(lambda m, given: seen.append(given[0]))
    attached(cache, unet, **old)
    whole = unet(**new)
    cache.next_level()
    mixed = attached(cache, unet, **new)
    hook.remove()
    skip = unet.input_blocks[0](new["x"], None)  # a convolution alone
    deep = seen[0][:, : -skip.shape[1]]
    assert torch.equal(seen[2], torch.cat([deep, skip], dim=1))
    assert not torch.allclose(mixed, whole, atol=1e-3) and not torch.allclose(mixed, unet(**old), atol=1e-3)


@pytest.mark.parametrize("depth", [2, 4])
@torch.no_grad()
def test_features_that_never_change_lose_nothing(depth):
    """Where the deep part ends in a deaf upsampler, kept features are right for ever, and so is every answer."""
    unet = fill(UNetModel(**PLAIN), "u.")
    unet.output_blocks[-depth - 1][-1].conv.weight.zero_()
    cache = DeepCache(1000, depth)
    with Count(unet.middle_block) as middle:
        answers = []
        for i in range(4):
            answers.append(attached(cache, unet, **question(f"q{i}", t=(900.0 - i, 50.0 + i))))
            cache.next_level()
    assert len(middle.rows) == 1
    for i, answer in enumerate(answers):
        assert torch.equal(answer, unet(**question(f"q{i}", t=(900.0 - i, 50.0 + i))))


# --- levels, questions, shapes ---


@pytest.mark.parametrize("interval", [1, 2, 3, 7])
def test_every_nth_level_is_whole(unet, interval):
    cache = DeepCache(interval)
    with Count(unet.middle_block) as middle:
        whole = []
        for level in range(7):
            attached(cache, unet, **question(f"{level}"))
            cache.next_level()
            whole.append(len(middle.rows))
    assert whole == [math.ceil((level + 1) / interval) for level in range(7)]


def test_the_questions_of_a_level_keep_their_own_features(unet):
    """Separate passes: conditional and unconditional, each of the same shape, asked in the same order."""
    first, second = question("one"), question("two")
    cache = DeepCache(2)
    for _ in range(2):
        for asked in (first, second):
            with torch.no_grad():
                assert torch.equal(attached(cache, unet, **asked), unet(**asked))
        cache.next_level()


def test_another_shape_is_asked_in_full_and_counts_its_levels_from_there(unet):
    cache = DeepCache(3)
    with Count(unet.middle_block) as middle:
        for level, batch in enumerate([4, 4, 2, 2, 2, 2, 4]):
            attached(cache, unet, **question(f"{level}", batch=batch))
            cache.next_level()
    assert middle.rows == [4, 2, 2, 4]  # at levels 0, 2, 5, and 6, which has another batch again


def test_another_dtype_is_asked_in_full(unet):
    cache = DeepCache(2)
    asked = question()
    attached(cache, unet, **asked)
    cache.next_level()
    with Count(unet.middle_block) as middle:
        attached(cache, unet, **{**asked, "x": asked["x"].double()})
    assert len(middle.rows) == 1


def test_old_features_are_let_go(unet):
    """A first level of two questions (PLMS's) leaves no second features behind for good."""
    cache = DeepCache(2)
    attached(cache, unet, **question("a"))
    attached(cache, unet, **question("b"))
    cache.next_level()
    assert sorted(cache._cached) == [0, 1]
    attached(cache, unet, **question("c"))
    cache.next_level()
    assert cache._cached == {}


def test_gradients_are_not_kept(unet):
    cache = DeepCache(2)
    with seams.attached(unet, cache):
        unet(**question())
    assert not cache._cached[0].features.requires_grad


# --- nothing stays behind ---


@torch.no_grad()
def test_outside_the_unet_is_as_it_was(unet):
    asked, other = question("a"), question("b")
    plain, before = unet(**other), set(vars(unet))
    cache = DeepCache(2)
    attached(cache, unet, **asked)
    cache.next_level()
    assert torch.equal(unet(**other), plain)  # though features of another question lie ready
    attached(cache, unet, **other)
    assert torch.equal(unet(**other), plain)
    assert set(vars(unet)) == before and not unet.output_blocks[-2]._forward_hooks
    assert len(unet.output_blocks) == 6


@pytest.mark.parametrize("kept", [False, True])
def test_an_error_inside_leaves_nothing_behind(unet, kept):
    cache, asked = DeepCache(2), question()
    if kept:
        attached(cache, unet, **asked)
        cache.next_level()
    with pytest.raises(RuntimeError):
        attached(cache, unet, **{**asked, "timesteps": torch.zeros(3)})
    assert "forward" not in vars(unet) and not unet.output_blocks[-2]._forward_hooks
    with torch.no_grad():
        assert torch.equal(attached(DeepCache(2), unet, **asked), unet(**asked))


# --- runs ---


def paint(sd, **options):
    return sd.txt2img(PROMPT, **{"seed": 3, "steps": 5, "output_type": "latent", **options}).latents


@pytest.mark.parametrize("sampler", ["ddim", "plms", "ddpm", "dpm_solver", "dpmpp_2m"])
@pytest.mark.thinned(3)
def test_interval_one_is_off_bit_for_bit(sd, sampler):
    assert torch.equal(paint(sd, sampler=sampler, cache_interval=1), paint(sd, sampler=sampler))


@pytest.mark.parametrize("sampler", ["ddim", "plms", "ddpm", "dpm_solver", "dpmpp_2m"])
@pytest.mark.parametrize("steps", [5, 6])
@pytest.mark.thinned(3)
def test_interval_two_asks_the_deep_part_every_other_step(sd, sampler, steps):
    plain = paint(sd, sampler=sampler, steps=steps)
    with Count(sd.model.model.diffusion_model.middle_block) as middle:
        cached = paint(sd, sampler=sampler, steps=steps, cache_interval=2)
    # PLMS asks twice at its first level, for which nothing is kept yet.
    assert len(middle.rows) == math.ceil(steps / 2) + (sampler == "plms")
    difference = ((cached - plain).abs().max() / plain.abs().max()).item()
    assert 1e-4 < difference < 1


def test_img2img_counts_the_levels_that_it_runs(sd):
    image = torch.rand(1, 3, 64, 72) * 2 - 1
    with Count(sd.model.model.diffusion_model.middle_block) as middle:
        sd.img2img(PROMPT, image, strength=0.6, seed=1, steps=9, cache_interval=2, output_type="latent")
    assert len(middle.rows) == 3  # int(0.6 * 9) = 5 levels


def test_each_batch_of_a_wish_begins_in_full_and_no_image_depends_on_it(sd):
    options = {"cache_interval": 3, "num_images": 3, "steps": 4}
    with Count(sd.model.model.diffusion_model.middle_block) as middle:
        parted = paint(sd, batch_size=2, **options)
    assert middle.rows == [4, 4, 2, 2]
    together = paint(sd, batch_size=3, **options)
    torch.testing.assert_close(parted, together, rtol=0, atol=5e-6 * float(together.abs().max()))


def test_two_streams_taken_in_turns_do_not_mix(sd):
    alone = [paint(sd, cache_interval=2), paint(sd, seed=8, cache_interval=2), paint(sd)]
    wishes = ({"seed": 3, "cache_interval": 2}, {"seed": 8, "cache_interval": 2}, {"seed": 3})
    streams = [sd.stream(PROMPT, steps=5, output_type="latent", **wish) for wish in wishes]
    for progresses in zip(*streams, strict=True):
        results = [progress.result for progress in progresses]
    assert all(torch.equal(r.latents, want) for r, want in zip(results, alone, strict=True))


def test_a_stream_left_halfway_leaves_nothing_behind(sd):
    want = paint(sd)
    stream = sd.stream(PROMPT, steps=5, cache_interval=2)
    next(stream), next(stream)
    assert "forward" not in vars(sd.model.model.diffusion_model)
    assert torch.equal(paint(sd), want)
    stream.close()


def test_separate_passes_and_an_interval_of_guidance_meet_their_own_features(sd):
    """Both ways of asking keep the same features: they may differ only by how a batch is summed."""
    model, x = sd.model, keyed_input("xT", (2, 4, 8, 8))
    c, u = (keyed_input(name, (2, 32, 128)) for name in ("c", "u"))

    def last(**options):
        guidance = {"guidance_scale": 3.0, "unconditional_conditioning": u, "sampler": "ddim", "steps": 8}
        *_, step = denoise(model, x, c, **guidance, cache_interval=3, **options)
        return step.x_t

    joint, apart = last(), last(separate_passes=True)
    torch.testing.assert_close(apart, joint, rtol=0, atol=2e-5 * float(joint.abs().max()))
    with Count(model.model.diffusion_model.middle_block) as middle:
        last(guidance_interval=(0.3, 0.8))
    # Levels 875, 750 | 625, 500, 375 | 250, 125, 0: guided from 750 to 375, another batch at both borders.
    assert middle.rows == [2, 4, 4, 2]


@pytest.mark.parametrize("knobs", [{"cache_interval": 2, "cache_depth": 2}, {"merge_ratio": 0.4}])
@pytest.mark.slow
def test_an_optimized_model_takes_the_knobs_as_the_plain_one(sd, knobs):
    """The knob changes the picture; how the numbers are computed does not, beyond rounding."""
    plain, turned = paint(sd), paint(sd, **knobs)
    unet = sd.model.model.diffusion_model
    try:
        sd.optimize()
        before = unet.forward
        assert isinstance(before, FusedModule)
        with Count(unet.middle_block) as middle:
            fast = paint(sd, **knobs)
        assert unet.forward is before and len(middle.rows) == (3 if "cache_interval" in knobs else 5)
        assert torch.equal(paint(sd, **knobs), fast)
    finally:
        restore(sd.model)
    torch.testing.assert_close(fast, turned, rtol=0, atol=1e-3 * float((turned - plain).abs().max()))
    assert torch.equal(paint(sd, **knobs), turned)


# --- refusals ---


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((0,), "cache_interval must be a whole number from 1 to 1000, got 0"),
        ((1001,), "cache_interval must be a whole number from 1 to 1000, got 1001"),
        ((2.0,), "got 2.0"),
        ((True,), "got True"),
        (("2",), "got '2'"),
        ((2, 0), "cache_depth must be a whole number from 1 to 1000, got 0"),
        ((1, 7), "cache_depth must be a whole number from 1 to 6, got 7"),
    ],
)
def test_numbers_out_of_range_are_refused(unet, options, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        DeepCache(*options).check(unet)


@pytest.mark.slow
def test_networks_that_it_cannot_serve_are_refused():
    class Controlled(UNetModel):
        def forward(self, x, timesteps=None, context=None, control=None, **kwargs):
            return x

    own = UNetModel(**PLAIN)
    own.forward = own.forward
    compiled = UNetModel(**PLAIN)
    compiled.compile()
    for network, words in (
        (nn.Conv2d(4, 4, 1), "cache_interval > 1 needs a UNetModel, got Conv2d"),
        (Controlled(**PLAIN), "needs the UNet's own forward, but this Controlled has another one"),
        (own, "needs the UNet's own forward, but this UNetModel has another one"),
        (compiled, "cache_interval > 1 needs the plain UNetModel, but this one was compiled"),
    ):
        with pytest.raises(UsageError, match=words), seams.attached(network, DeepCache(2)):
            pass
        with seams.attached(network, DeepCache(1)):
            pass


def test_two_cannot_be_attached_at_once(unet):
    with pytest.raises(UsageError, match="has a DeepCache already"):
        with seams.attached(unet, DeepCache(2), DeepCache(2)):
            pass
    assert "forward" not in vars(unet)


# --- the page ---

PAGE = (ROOT / "docs" / "knobs.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", [code for language, code in BLOCKS if language == "python"])
@pytest.mark.slow
def test_blocks_of_the_page_run(code):
    names: dict = {}
    exec(compile(code, "docs/knobs.md", "exec"), names)
    if "share" in names:
        low, high = names["interval"]
        assert 0 < low < high < 1
    if "fast" in names:
        full, fast = names["full"].latents, names["fast"].latents
        assert 1e-3 < ((fast - full).norm() / full.norm()).item() < 1


@pytest.mark.slow
def test_commands_of_the_page_run(tmp_path, monkeypatch):
    commands = [code.strip() for language, code in BLOCKS if language == "bash"]
    assert {language for language, _ in BLOCKS} == {"python", "bash"} and len(commands) == 1
    program, path, *argv = shlex.split(commands[0])
    spec = importlib.util.spec_from_file_location("txt2img", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    module.main(argv)
    told = ldm.read_metadata("outputs/txt2img-samples/samples/00000.png")
    assert told["guidance_interval"] == [0.2, 0.9] and (told["cache_depth"], told["merge_seed"]) == (2, 7)


@torch.no_grad()
@pytest.mark.slow
def test_a_shallow_step_costs_what_the_page_says():
    """The shares of the model in the box, and the gains that follow from all shares."""
    from omegaconf import OmegaConf

    config = OmegaConf.load(ROOT / "model_data/shapes/config.yaml").model.params.unet_config.params
    with torch.device("meta"):
        unet = UNetModel(**OmegaConf.to_container(config)).eval()
        x, t, context = torch.empty(1, 4, 16, 16), torch.empty(1), torch.empty(1, 32, 128)

    def operations():
        with FlopCounterMode(display=False) as counter:
            unet(x, t, context=context)
        return counter.get_total_flops()

    lines = re.findall(r"^\| (\d) \| (.+?) \|$", PAGE, re.MULTILINE)
    assert [depth for depth, _ in lines] == list("1234")
    for depth, cells in lines:
        told = [float(cell.rstrip(" %x")) for cell in cells.split("|")]
        cache = DeepCache(2, int(depth))
        with seams.attached(unet, cache):
            whole = operations()
            cache.next_level()
            share = operations() / whole
        assert told[3] == round(100 * share, 1)
        for percent, *gains in (told[:3], told[3:]):
            wanted = [n / (1 + (n - 1) * percent / 100) for n in (2, 3)]
            assert gains == pytest.approx(wanted, abs=0.02)
