"""A picture does not depend on its neighbours: between batch sizes lies the rounding of float32, and nothing else.

Convolutions and matrix products add in another order when the batch has another size, and guidance and fresh noise
carry such a last bit on. With weights in float64 those last bits vanish when the latents are rounded to float32.
"""

import pytest
import torch

import ldm
from ldm.batches import in_batches
from ldm.errors import NumericError, ResourceError

PROMPT = "a small yellow star to the left of a large purple ring on a gray background"


@pytest.fixture(scope="module")
def exact() -> ldm.StableDiffusion:
    """The model in the box, computing in float64."""
    sd = ldm.StableDiffusion.default()
    sd.model.double()
    return sd


def latents(sd: ldm.StableDiffusion, batch_size: int, **options) -> torch.Tensor:
    return sd.txt2img(
        PROMPT, seed=42, num_images=3, batch_size=batch_size, output_type="latent", **options
    ).latents


@pytest.mark.parametrize(
    ("sampler", "eta"),
    [
        ("ddim", 1.0),
        ("dpmpp_2m", 0.0),
        *(pytest.param(name, 0.0, marks=pytest.mark.slow) for name in ("ddim", "ddpm", "plms", "dpm_solver")),
    ],
)
@pytest.mark.thinned(6)
def test_latents_of_a_batch_are_those_of_its_pictures_alone(exact, sampler, eta):
    options = {"sampler": sampler, "eta": eta, "steps": 3, "guidance_scale": 7.5}
    alone, together = latents(exact, 1, **options), latents(exact, 2, **options)
    largest = alone.abs().amax((1, 2, 3), keepdim=True)
    # 5e-6 is for the one value in millions that lies on the edge between two float32 numbers.
    assert ((together - alone).abs() <= 5e-6 * largest).all()
    assert not torch.equal(alone[0], alone[1])


def halved(count, batch_size, room, **options):
    """Batches of range(count) on a device with room for so many items: [(batch, index, count)], finished or not."""
    tried = []

    def work(batch, index, total):
        tried.append((list(batch), index, total))
        yield from batch[: room - 1]  # a batch may have given something before it meets the end of the memory
        if len(batch) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        yield from batch[room - 1 :]

    given = list(in_batches(range(count), batch_size, work, refusal="{} do not fit".format, **options))
    return tried, given


@pytest.mark.parametrize(
    ("count", "batch_size", "room", "tried"),
    [
        (5, 2, 2, [([0, 1], 0, 3), ([2, 3], 1, 3), ([4], 2, 3)]),
        (3, 7, 9, [([0, 1, 2], 0, 1)]),
        (0, 4, 1, []),
        # 5 do not fit, then 3 do, and the 2 that are left.
        (5, 5, 3, [([0, 1, 2, 3, 4], 0, 1), ([0, 1, 2], 0, 2), ([3, 4], 1, 2)]),
        # Halved twice; the batches behind it wait for their turn.
        (5, 4, 1, [([0, 1, 2, 3], 0, 2), ([0, 1], 0, 3), ([0], 0, 4), ([1], 1, 4), ([2, 3], 2, 4), ([2], 2, 5),
                   ([3], 3, 5), ([4], 4, 5)]),
    ],
)  # fmt: skip
def test_a_batch_that_does_not_fit_is_halved_and_every_item_is_finished_once(
    count, batch_size, room, tried, caplog
):
    got, given = halved(count, batch_size, room)
    assert got == tried
    assert [item for batch, *_ in got if len(batch) <= room for item in batch] == list(range(count))
    assert set(given) == set(range(count))
    failed = [len(batch) for batch, *_ in got if len(batch) > room]
    assert [record.args for record in caplog.records] == [(size, (size + 1) // 2) for size in failed]


@pytest.mark.parametrize(
    ("error", "options", "kind", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), {}, ResourceError, "^1 do not fit$"),
        (MemoryError(), {"may_halve": False}, ResourceError, "^3 do not fit$"),
        (RuntimeError("shapes cannot be multiplied"), {}, RuntimeError, "^shapes cannot be multiplied$"),
        (NumericError("not finite"), {}, NumericError, "^not finite$"),
        (ResourceError("out of memory, said already"), {}, ResourceError, "said already$"),
    ],
)
def test_what_halving_cannot_mend_comes_out(error, options, kind, words):
    def work(batch, index, count):
        raise error
        yield

    with pytest.raises(kind, match=words):
        list(in_batches(range(3), 3, work, refusal="{} do not fit".format, **options))
