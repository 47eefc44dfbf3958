"""Recordings of networks: replayed back where nothing has changed, made anew or left alone where something has.

There is no CUDA here, so what records keeps the operations that it saw and does them again on other inputs: like a CUDA
graph it reads weights where they lay, and knows nothing of the Python around them. Where a test asks the same again and
again, to keep the answer will do.
"""

import copy
import functools
import gc
import logging
import pickle
import weakref

import pytest
import torch
from keyed import fill, keyed_input
from tiny_networks import UNET as LARGER
from tiny_networks import VAE, replace_weights_in_place
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ldm.adapters.deepcache import DeepCache
from ldm.errors import UsageError
from ldm.kernels import cuda_graphs, fused, fused_module, optimize, restore, vae_tiling
from ldm.kernels.cuda_graphs import GraphedModule
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from ldm.modules.processors import IPAttnProcessor
from ldm.modules.seams import Change, Rank, attached, forget_said
from ldm.modules.seams import fill as fill_slot

# Of one level.
UNET = {**LARGER, "channel_mult": [1], "attention_resolutions": [1]}
captured = []


@pytest.fixture(autouse=True)
def without_gradients(monkeypatch):
    captured.clear()
    forget_said()
    monkeypatch.setattr(cuda_graphs, "CALLS_TO_CAPTURE", 1)  # but where the count of calls is the subject
    with torch.no_grad():
        yield


class Operations(TorchDispatchMode):
    """Keeps every operation with its arguments and its result."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.kept.append((function, args, kwargs or {}, out))
        return out


def capture_operations(run, inputs):
    captured.append([tuple(x.shape) for x in inputs])
    static = [x.clone() for x in inputs]
    with Operations() as operations:
        answer = run(static)

    def replay(tensors):
        new = dict(zip(map(id, static), tensors, strict=True))

        def renewed(values):
            return tree_map_only(Tensor, lambda x: new.get(id(x), x), values)

        for function, args, kwargs, out in operations.kept:
            again = function(*renewed(args), **renewed(kwargs))
            pairs = zip(tree_leaves(out), tree_leaves(again), strict=True)
            new.update((id(old), x) for old, x in pairs if isinstance(old, Tensor))
        return renewed(answer)

    return replay


def capture_static(run, inputs):
    """As a CUDA graph replays: inputs are copied to the tensors of the capture."""
    static = [x.clone() for x in inputs]
    replayed = capture_operations(run, static)

    def replay(tensors):
        for mine, given in zip(static, tensors, strict=True):
            mine.copy_(given)
        return replayed(static)

    return replay


def capture_answer(run, inputs):
    """For tests that give one form of arguments the same values each time: says what it said when it was made."""
    captured.append([tuple(x.shape) for x in inputs])
    answer = run(inputs)
    return lambda tensors: answer.clone()


@functools.cache
def built():
    return fill(UNetModel(**UNET), "graphs.")


@pytest.fixture
def answering():
    made = copy.deepcopy(built())
    assert cuda_graphs.attach(made, capture_answer) == 1
    return made


@pytest.fixture
def unet():
    made = copy.deepcopy(built())
    assert cuda_graphs.attach(made, capture_operations) == 1
    return made


def given(batch=2, size=(6, 4), scale=1.0):
    x, context = keyed_input("graphs.x", (batch, 4, *size)), keyed_input("graphs.context", (batch, 7, 24))
    return {"x": x * scale, "timesteps": torch.arange(batch) * 100, "context": context * scale}


def fallback(unet, **inputs):
    return UNetModel.forward(unet, **inputs)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_each_shape_is_captured_once_and_gives_the_plain_numbers(unet):
    for scale in (1.0, 0.5, 2.0):
        for size in ((6, 4), (4, 10)):
            inputs = given(size=size, scale=scale)
            close(unet(**inputs), fallback(unet, **inputs))
    assert captured == [
        [(2, 4, 6, 4), (2,), (2, 7, 24)],
        [(2, 4, 4, 10), (2,), (2, 7, 24)],
    ]


def test_another_dtype_is_another_graph(unet):
    inputs = given()
    close(unet(**inputs), fallback(unet, **inputs))
    bf16 = copy.deepcopy(restore(unet)).bfloat16()
    cuda_graphs.attach(bf16, capture_operations)
    inputs = {k: v.bfloat16() if k != "timesteps" else v for k, v in given().items()}
    assert bf16(**inputs).dtype == torch.bfloat16 and len(captured) == 2


def test_a_shape_is_captured_at_its_third_call(answering, monkeypatch):
    monkeypatch.undo()
    assert cuda_graphs.CALLS_TO_CAPTURE == 3
    one, two = given(), given(size=(4, 10))
    for inputs, so_far in ((one, 0), (two, 0), (one, 0), (one, 1), (two, 1), (one, 1), (two, 2), (two, 2)):
        close(answering(**inputs), fallback(answering, **inputs))
        assert len(captured) == so_far == sum(answering.forward.captured)
    write_weight(answering)
    for so_far in (2, 2, 3, 3):  # other weights: the count begins again
        close(answering(**one), fallback(answering, **one))
        assert len(captured) == so_far


def test_arguments_are_distinguished_by_name_and_layout(answering):
    inputs = given()
    want = fallback(answering, **inputs)
    close(answering(inputs["x"], inputs["timesteps"], inputs["context"]), want)
    close(answering(inputs["x"], inputs["timesteps"], context=inputs["context"], y=None), want)
    last = inputs["x"].contiguous(memory_format=torch.channels_last)
    close(answering(last, inputs["timesteps"], inputs["context"]), want)
    assert len(captured) == 3


@pytest.mark.slow
def test_results_are_the_caller_s_own(unet):
    first = unet(**given())
    kept = first.clone()
    unet(**given(scale=3.0))
    assert torch.equal(first, kept)


def test_whole_and_shallow_steps_of_deepcache_are_captured():
    def capture_shapes(run, inputs):
        captured.append([tuple(x.shape) for x in inputs])
        return run

    unet, runs = fill(UNetModel(**UNET), "graphs."), []
    for network in (copy.deepcopy(unet), unet):
        if network is unet:
            cuda_graphs.attach(unet, capture_shapes)
        cache = DeepCache(2)
        runs.append([])
        for scale in (1.0, 0.5, 2.0, 3.0):
            with attached(network, cache):
                runs[-1].append(network(**given(scale=scale)))
            cache.next_level()
    for got, want in zip(*reversed(runs), strict=True):
        close(got, want)
    whole = [(2, 4, 6, 4), (2,), (2, 7, 24)]
    assert captured == [whole, [whole[0], (2, UNET["model_channels"], 6, 4), *whole[1:]]]


def test_the_shapes_seen_last_are_kept(answering, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_SHAPES", 2)
    one, two, three = given(), given(size=(4, 4)), given(size=(2, 8))
    for inputs in (one, two, one, three, one, two):
        close(answering(**inputs), fallback(answering, **inputs))
    sizes = [shapes[0][2:] for shapes in captured]
    assert sizes == [(6, 4), (4, 4), (2, 8), (4, 4)]  # two had gone when three came


def replace_weight(unet):
    unet.out[2].weight = torch.nn.Parameter(unet.out[2].weight * 2)


def write_weight(unet):
    unet.out[2].weight.mul_(2)


def replace_weight_in_place(unet):
    replace_weights_in_place(unet, 1.2)


def replace_layer(unet):
    unet.out[2] = torch.nn.Conv2d(32, 5, 1)


def put_in_another_dtype_and_back(unet):
    unet.out[2].weight.mul_(1 + 2**-9)
    unet.half().float()


def add_a_layer(unet):
    unet.middle_block.append(torch.nn.Conv2d(32, 32, 1))


def change_the_class(unet):
    class Doubled(type(unet.out[2])):
        def forward(self, x):
            return 2 * super().forward(x)

    unet.out[2].__class__ = Doubled


@pytest.mark.parametrize(
    "change",
    [
        replace_weight,
        replace_weight_in_place,
        write_weight,
        replace_layer,
        put_in_another_dtype_and_back,
        add_a_layer,
        change_the_class,
    ],
)
def test_what_changes_is_captured_anew(answering, change):
    inputs = given()
    before = answering(**inputs)
    change(answering)
    after = answering(**inputs)
    close(after, fallback(answering, **inputs))
    assert not torch.allclose(after, before, atol=1e-3) and len(captured) == 2


def test_patched_classes_are_captured_anew(answering, monkeypatch):
    inputs = given()
    before = answering(**inputs)
    kind = type(answering.middle_block[1].transformer_blocks[0])
    own = kind._forward
    monkeypatch.setattr(kind, "_forward", lambda self, *args: own(self, *args) * 1.5)
    close(answering(**inputs), fallback(answering, **inputs))
    assert len(captured) == 2
    monkeypatch.undo()
    close(answering(**inputs), before)


def test_hooks_fire_each_time(answering):
    seen, inputs = [], given()
    want = answering(**inputs)
    hook = answering.middle_block.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    for _ in range(3):
        close(answering(**inputs), want)
    assert len(seen) == 3 and len(captured) == 1
    hook.remove()
    close(answering(**inputs), want)
    assert len(captured) == 1


def test_a_forward_that_someone_put_there_is_called_each_time(answering):
    seen, inputs = [], given()
    want = answering(**inputs)
    block = answering.middle_block[0]
    own = block.forward
    block.forward = lambda *args: seen.append(1) or own(*args)
    for _ in range(2):
        close(answering(**inputs), want)
    assert seen == [1, 1] and len(captured) == 1


def test_training_and_gradients_go_the_plain_way(unet):
    inputs = given()
    with torch.enable_grad():
        unet(**inputs).sum().backward()
    assert unet.out[2].weight.grad is not None
    unet.train()
    unet(**inputs)
    assert captured == []


def test_tensors_within_an_argument_are_inputs_too(unet):
    inputs = given()
    for scale in (1.0, 0.5):
        contexts = [scale * inputs["context"]] * len(
            unet.middle_block[1].transformer_blocks
        )  # one for each block
        close(unet(**inputs | {"context": contexts}), fallback(unet, **inputs | {"context": contexts}))
    assert captured == [[(2, 4, 6, 4), (2,), (2, 7, 24)]]


def test_a_control_is_an_input_of_its_graph(unet):
    inputs = given()
    shapes = [(2, UNET["model_channels"], 6, 4)] * (len(unet.input_blocks) + 1)
    for scale in (1.0, 0.5):
        control = [scale * keyed_input(f"graphs.control{i}", s) for i, s in enumerate(shapes)]
        close(unet(**inputs, control=control), fallback(unet, **inputs, control=control))
    assert len(captured) == 1 and len(captured[0]) == 3 + len(shapes)
    unet(**inputs)
    assert len(captured) == 2


def test_arguments_without_a_form_go_the_plain_way(unet):
    inputs = given()
    odd = inputs["context"].as_subclass(type("Odd", (torch.Tensor,), {}))
    close(unet(**inputs | {"context": odd}), fallback(unet, **inputs))
    assert captured == []


class OfItsOwnKind(Exception):
    """As Triton's errors are: no RuntimeError."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            RuntimeError("operation not permitted when stream is capturing\nand more"),
            "operation not permitted when stream is capturing",
        ),
        (OfItsOwnKind("out of resource: shared memory"), "out of resource: shared memory"),
        (OfItsOwnKind(), "OfItsOwnKind"),
    ],
)
def test_what_cannot_be_captured_is_said_once_and_called(caplog, error, words):
    def refuse(run, inputs):
        captured.append(1)
        raise error

    unet = fill(UNetModel(**UNET), "graphs.")
    cuda_graphs.attach(unet, refuse)
    inputs = given()
    with caplog.at_level(logging.WARNING, "ldm.kernels.cuda_graphs"):
        for _ in range(3):
            close(unet(**inputs), fallback(unet, **inputs))
    assert len(captured) == 1
    assert caplog.messages == [f"no CUDA graph of UNetModel is used: {words}"]


@pytest.mark.parametrize(("factor", "much"), [(1.2, "0.2"), (float("nan"), "inf")])
def test_a_graph_that_replays_something_else_is_not_used(caplog, factor, much):
    unet = fill(UNetModel(**UNET), "graphs.")
    cuda_graphs.attach(unet, lambda run, inputs: lambda tensors: run(tensors) * factor)
    inputs = given()
    with caplog.at_level(logging.WARNING, "ldm.kernels.cuda_graphs"):
        close(unet(**inputs), fallback(unet, **inputs))
        close(unet(**inputs), fallback(unet, **inputs))
    assert caplog.messages == [f"no CUDA graph of UNetModel is used: its replay differs by {much}"]


def test_broken_numbers_are_played_as_they_are(unet):
    inputs = given()
    inputs["x"][0, 0, 0, 0] = float("nan")
    assert unet(**inputs)[0].isnan().any() and unet(**inputs)[1].isfinite().all()
    assert len(captured) == 1


@pytest.mark.slow
def test_both_halves_of_an_autoencoder_are_captured_around_their_fused_forwards():
    encoder, decoder = fill(Encoder(**VAE), "graphs.e."), fill(Decoder(**VAE), "graphs.d.")
    x, z = keyed_input("graphs.pixels", (1, 3, 12, 20)), keyed_input("graphs.z", (1, 4, 6, 10))
    want = encoder(x), decoder(z)
    both = torch.nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    fused.attach(both)
    assert cuda_graphs.attach(both, capture_operations) == 0  # they would hold gigabytes and save little
    assert cuda_graphs.attach(both, capture_operations, vae=True) == 2
    assert isinstance(decoder.forward.inner, fused.FusedDecoder)
    for _ in range(2):
        close(encoder(x), want[0])
        close(decoder(z), want[1])
    assert len(captured) == 2
    decoder(z[..., :4])
    decoder(z)
    assert decoder.last_z_shape == z.shape  # as if its code had run
    restore(both)
    assert "forward" not in vars(decoder) and torch.equal(decoder(z), want[1])


def test_tiling_is_not_captured():
    decoder = fill(Decoder(**VAE), "graphs.d.")
    vae_tiling.attach(decoder)
    assert cuda_graphs.attach(decoder, capture_operations, vae=True) == 0


@pytest.mark.slow
def test_a_graph_captured_in_inference_mode_replays_outside_of_it():
    unet = fill(UNetModel(**LARGER), "graphs.")
    cuda_graphs.attach(unet, capture_static)
    want = fallback(unet, **given())
    with torch.inference_mode():
        for _ in range(2):
            close(unet(**given()), want)
    for _ in range(2):
        close(unet(**given()), want)
    assert len(captured) == 1


def tensors_in(value):
    if isinstance(value, (list, tuple)):
        return [x for part in value for x in tensors_in(part)]
    return [value] if isinstance(value, torch.Tensor) else []


def test_what_a_graph_reads_lives_as_long_as_the_graph(unet, monkeypatch):
    """What fused modules computed from weights, too, even if they have computed it anew since."""
    restore(unet)
    fused.attach(unet)
    cuda_graphs.attach(unet, lambda run, inputs: run)  # which keeps nothing by itself
    inputs = given()
    unet(**inputs)
    read = [weakref.ref(x) for x in tensors_in(cuda_graphs.cached_values(unet))]
    assert len(read) > 10
    monkeypatch.setattr(fused_module.WeightCache, "MAX_ENTRIES", 1)
    doubled = Doubled(unet)
    with attached(unet, doubled):
        close(unet(**inputs), fallback(unet, **inputs))
    gc.collect()
    assert all(ref() is not None for ref in read)
    for weight in unet.parameters():
        weight.mul_(1.1)
    unet(**inputs)
    gc.collect()
    assert all(ref() is None for ref in read)


class Doubled:
    """All weights of a network, doubled."""

    rank = Rank.WEIGHTS

    def __init__(self, network):
        self.by_name = {name: Change(lambda w: 2 * w) for name, _ in network.named_parameters()}

    def changes(self, network):
        return self.by_name


def test_weights_that_go_on_and_off_are_captured_once_each(answering):
    inputs, doubled, other = given(), Doubled(answering), Doubled(answering)
    want = answering(**inputs)
    for times, change in ((2, doubled), (3, other), (3, doubled), (3, other), (3, doubled)):
        with attached(answering, change):
            close(answering(**inputs), fallback(answering, **inputs))
        assert torch.equal(answering(**inputs), want) and len(captured) == times


def test_only_the_weights_used_last_keep_their_graphs(answering, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "MAX_STATES", 2)
    inputs, changes = given(), [Doubled(answering) for _ in range(2)]
    for present in ([], changes[:1], [], changes[1:], [], changes[:1]):
        with attached(answering, *present):
            close(answering(**inputs), fallback(answering, **inputs))
    assert len(captured) == 4 and len(answering.forward._states) == 2


def test_what_is_attached_with_a_state_is_captured_with_it(answering, caplog):
    inputs, attn = given(), answering.middle_block[1].transformer_blocks[0].attn2
    want = answering(**inputs)
    for scale, times in ((0.0, 2), (1.0, 3), (0.0, 3)):
        undo = fill_slot(attn, "processor", IPAttnProcessor(attn.inner_dim, 24, scale=scale, num_tokens=3))
        fill(attn.processor, "graphs.ip.")
        close(answering(**inputs), fallback(answering, **inputs))
        assert len(captured) >= times
        undo()
        assert torch.equal(answering(**inputs), want)
    assert not caplog.messages


def test_what_has_no_state_is_called_and_said_once(answering, caplog):
    inputs, attn = given(), answering.middle_block[1].transformer_blocks[0].attn2
    asked = []

    def theirs(attn, x, encoder_hidden_states=None, attention_mask=None):
        asked.append(attn)
        return x

    attn.set_processor(theirs)
    for _ in range(3):
        answering(**inputs)
    assert len(asked) == 3 and captured == []
    assert len(caplog.messages) == 1 and "theirs" in caplog.messages[0]
    attn.set_processor(None)
    answering(**inputs)
    assert len(captured) == 1 and len(caplog.messages) == 1


def test_a_hook_on_a_part_is_called_and_said_once_and_one_on_the_network_itself_costs_nothing(
    answering, caplog
):
    inputs, called = given(), []
    handles = [answering.register_forward_hook(lambda *_: called.append("network"))]
    for _ in range(3):
        answering(**inputs)
    assert called == ["network"] * 3 and len(captured) == 1 and not caplog.messages
    handles.append(answering.out[2].register_forward_hook(lambda *_: called.append("part")))
    for _ in range(2):
        answering(**inputs)
    assert called[3:] == ["part", "network"] * 2 and len(captured) == 1
    assert len(caplog.messages) == 1 and "a hook on a Conv2d" in caplog.messages[0]
    for handle in handles:
        handle.remove()
    answering(**inputs)
    assert len(captured) == 1


def test_graphs_of_other_weights_go_first(answering):
    one, two = given(), given(size=(4, 10))
    answering(**one)
    answering(**two)
    answering.out[2].weight.mul_(2)
    close(answering(**two), fallback(answering, **two))
    assert [len(shapes) for _, shapes in answering.forward._states] == [1]
    close(answering(**one), fallback(answering, **one))
    assert len(captured) == 4


def test_labels_are_checked_at_a_replay_too():
    unet = fill(UNetModel(**{**UNET, "num_classes": 5}), "graphs.")
    cuda_graphs.attach(unet, capture_answer)
    inputs = given() | {"y": torch.tensor([4, 0])}
    for _ in range(2):
        close(unet(**inputs), fallback(unet, **inputs))
    with pytest.raises(UsageError, match=r"labels must be from 0 to 4, got \[5, 0\]"):
        unet(inputs["x"], inputs["timesteps"], inputs["context"], torch.tensor([5, 0]))
    with pytest.raises(UsageError, match=r"got \[0, -1\]"):
        unet(**{**inputs, "y": torch.tensor([0, -1])})
    assert len(captured) <= 2


def test_copies_begin_with_nothing(answering):
    inputs = given()
    want = answering(**inputs)
    for copied in (copy.deepcopy(answering), pickle.loads(pickle.dumps(answering))):
        assert isinstance(copied.forward, GraphedModule) and copied.forward.module is copied
        for weight in copied.parameters():
            weight.mul_(1.1)
        assert not torch.allclose(copied(**inputs), want, atol=1e-3)
    close(answering(**inputs), want)
    assert len(captured) == 3


def test_a_model_that_went_back_to_the_cpu_goes_the_plain_way(caplog):
    unet = fill(UNetModel(**UNET), "graphs.")
    cuda_graphs.attach(unet)  # as optimize() does on a GPU
    inputs = given()
    close(unet(**inputs), fallback(unet, **inputs))
    assert not unet.forward._states and not caplog.messages


@pytest.mark.parametrize(
    ("parts", "options", "words"),
    [
        ("decoder", {}, "are on CUDA, got a model on cpu"),
        ("decoder", {"low_vram": torch.device("cuda", 0)}, "are on CUDA, got low_vram"),
        ("unet", {}, "vae_graphs is for a model with an autoencoder, UNetModel has none"),
    ],
)
def test_graphs_of_the_vae_where_there_can_be_none_are_refused(parts, options, words):
    model = Decoder(**VAE) if parts == "decoder" else UNetModel(**UNET)
    with pytest.raises(UsageError, match=words):
        optimize(model, vae_graphs=True, **options)
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_cpu_gets_no_graphs():
    unet = optimize(fill(UNetModel(**UNET), "graphs."))
    assert not any(isinstance(vars(m).get("forward"), GraphedModule) for m in unet.modules())
