"""The order of training data, folders of captioned pictures, and latents made once."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import DDCONFIG

from ldm.errors import AbsentError, FormatError, MismatchError, UnsafeFileError, UsageError
from ldm.training.data import DataModuleFromConfig, Shapes, Stream
from ldm.training.folder import ImageFolder
from ldm.training.latents import cache_latents, fingerprint


class Numbered(torch.utils.data.Dataset):
    """Items that say who they are and which generator they were given."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def item(self, index, rng, step):
        return {"index": np.array(index), "drawn": np.array(rng.integers(1 << 40)), "step": np.array(step)}


def take(stream, first, last):
    return [stream[m] for m in range(first, last)]


def test_every_epoch_is_a_permutation_and_batches_straddle_epochs():
    stream = Stream(Numbered(7), 2, seed=3)
    seen = torch.cat([batch["index"] for batch in take(stream, 0, 14)]).tolist()  # 4 epochs
    epochs = [seen[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_sample_depends_on_seed_and_position_only():
    stream = Stream(Numbered(7), 2, seed=3)
    forwards, again = take(stream, 0, 9), Stream(Numbered(7), 2, seed=3)
    for m in (8, 2, 5):
        assert torch.equal(again[m]["drawn"], forwards[m]["drawn"])
        assert torch.equal(again[m]["index"], forwards[m]["index"])
    other = Stream(Numbered(7), 2, seed=4)
    assert any(not torch.equal(other[m]["index"], forwards[m]["index"]) for m in range(9))


def test_processes_share_one_batch_without_overlap():
    whole = take(Stream(Numbered(11), 6, seed=1), 0, 5)
    shares = [take(Stream(Numbered(11), 2, seed=1, rank=rank, world=3), 0, 5) for rank in range(3)]
    for m in range(5):
        joined = torch.cat([share[m]["index"] for share in shares])
        assert torch.equal(joined, whole[m]["index"])
        assert torch.equal(torch.cat([share[m]["drawn"] for share in shares]), whole[m]["drawn"])


def test_accumulated_batches_belong_to_one_step():
    steps = [batch["step"].tolist() for batch in take(Stream(Numbered(11), 2, accumulate=3), 0, 7)]
    assert steps == [[0, 0]] * 3 + [[1, 1]] * 3 + [[2, 2]]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_workers_change_nothing(workers):
    stream = Stream(Shapes(image_size=16, crop_size=9), 2, seed=3)
    batches = list(stream.loader(3, 6, num_workers=workers))
    assert [batch["micro"] for batch in batches] == [3, 4, 5]
    for batch in batches:
        mine = stream[batch["micro"]]
        assert torch.equal(batch["image"], mine["image"]) and batch["caption"] == mine["caption"]


def test_crops_come_from_the_picture_and_end_at_their_step():
    source = Shapes(image_size=16, crop_size=9, crop_until_step=2)
    stream = Stream(source, 3, accumulate=2)
    assert [tuple(b["image"].shape) for b in take(stream, 0, 6)] == [(3, 9, 9, 3)] * 4 + [(3, 16, 16, 3)] * 2
    whole = source[1]["image"]
    cut = stream[0]["image"][1].numpy()
    places = [(y, x) for y in range(8) for x in range(8) if np.array_equal(whole[y : y + 9, x : x + 9], cut)]
    assert places


def test_shapes_of_the_held_out_pairs_never_come_in_training():
    from ldm.shapes.scenes import HELD_OUT

    captions = [text for batch in take(Stream(Shapes(image_size=16), 50), 0, 4) for text in batch["caption"]]
    assert not any(f"{colour} {shape}" in text for text in captions for colour, shape in HELD_OUT)


def test_data_that_cannot_fill_a_batch_is_refused():
    with pytest.raises(MismatchError, match=r"holds 7 samples but one batch takes 8"):
        Stream(Numbered(7), 4, world=2)
    with pytest.raises(UsageError, match=r"batch_size should be at least 1, got 0"):
        Stream(Numbered(7), 0)
    with pytest.raises(UsageError, match=r"shuffling is for up to 16777216 samples, the data has 16777217"):
        Stream(Numbered((1 << 24) + 1), 2)
    with pytest.raises(UsageError, match=r"crop_size should be between 1 and image_size \(16\), got 17"):
        Shapes(image_size=16, crop_size=17)
    with pytest.raises(UsageError, match=r"no 'train' entry"):
        DataModuleFromConfig(batch_size=2)


# -- folders -----------------------------------------------------------------------------------------------


def paint(folder, count, size=(20, 12)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.full((size[1], size[0], 3), 10 * i % 256, np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")


def test_captions_come_from_files_beside_the_pictures(tmp_path):
    paint(tmp_path, 3)
    for i in range(3):
        (tmp_path / f"{i:03d}.txt").write_text(f"picture {i}\n")
    folder = ImageFolder(tmp_path, image_size=8)
    assert [folder[i]["caption"] for i in range(3)] == ["picture 0", "picture 1", "picture 2"]
    assert folder[2]["image"].shape == (8, 8, 3)
    np.testing.assert_allclose(folder[2]["image"], 20 / 127.5 - 1, atol=1e-6)


def test_captions_come_from_metadata_where_there_is_one(tmp_path):
    paint(tmp_path / "in", 2)
    lines = [{"file_name": "in/001.png", "text": "one"}, {"file_name": "in/000.png", "caption": "none"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    folder = ImageFolder(tmp_path, image_size=8)
    assert [folder[i]["txt"] for i in range(2)] == ["one", "none"]
    assert folder[0]["image"].mean() > folder[1]["image"].mean()


def test_random_crops_and_mirrors_follow_their_generator(tmp_path):
    ramp = np.broadcast_to(np.arange(40, dtype=np.uint8)[None, :, None] * 6, (10, 40, 3))
    Image.fromarray(ramp.copy()).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a ramp")
    folder = ImageFolder(tmp_path, image_size=10, random_crop=True, flip=True)
    items = [folder.item(0, np.random.default_rng(seed), 0)["image"] for seed in range(8)]
    again = folder.item(0, np.random.default_rng(5), 0)["image"]
    assert np.array_equal(again, items[5])
    slopes = {bool(item[0, -1, 0] > item[0, 0, 0]) for item in items}
    assert slopes == {True, False}
    assert len({float(item.min()) for item in items}) > 3


def test_pictures_that_become_unreadable_are_replaced_by_the_next_and_many_end_the_run(tmp_path, caplog):
    paint(tmp_path, 30)
    folder = ImageFolder(tmp_path, image_size=8, caption="all")
    folder.look(tmp_path / "account.json")
    for i in range(4, 15):
        (tmp_path / f"{i:03d}.png").write_bytes(b"no picture")
    np.testing.assert_allclose(folder[14]["image"], 150 / 127.5 - 1, atol=1e-6)
    assert np.array_equal(folder[14]["image"], folder[15]["image"])
    assert caplog.text.count("014.png' cannot be read") == 1
    with pytest.raises(FormatError, match=r"11 of 30 pictures in .* could not be read any more"):
        folder[4]


def test_folders_that_cannot_be_used_say_why(tmp_path, caplog):
    with pytest.raises(AbsentError, match=r"is not there; set data\.params\.train\.params\.folder"):
        ImageFolder(tmp_path / "none")
    with pytest.raises(AbsentError, match=r"holds no pictures"):
        ImageFolder(tmp_path)
    with pytest.raises(UnsafeFileError, match=r"is an address; nothing is downloaded"):
        ImageFolder("https://example.org/pictures")
    with pytest.raises(UsageError, match=r"image_size should be at least 8, got 7"):
        ImageFolder(tmp_path, image_size=7)
    paint(tmp_path, 2)
    (tmp_path / "000.txt").write_text("zero")
    with pytest.raises(
        FormatError, match=r"001\.png' has no caption \(1 of 2 have none\); put one into '001\.txt'"
    ):
        ImageFolder(tmp_path)
    assert ImageFolder(tmp_path, image_size=8, needs_captions=False)[1]["caption"] == ""
    (tmp_path / "001.txt").write_bytes(b"\xff\xfe no utf-8")
    assert [path.name for path, _ in ImageFolder(tmp_path).samples] == ["000.png"]
    assert "1 of 2 captions cannot be read; their pictures are left out: '" in caplog.text
    listed = tmp_path / "metadata.jsonl"
    listed.write_text('{"file_name": "000.png"}\n')
    with pytest.raises(FormatError, match=r"line 1: file_name and text should be strings"):
        ImageFolder(tmp_path)
    listed.write_text('{"file_name": "000.png", "text": "a"}\nnot json\n')
    with pytest.raises(FormatError, match=r"line 2 should be"):
        ImageFolder(tmp_path)
    listed.write_text('{"file_name": "../../x.png", "text": "a"}\n')
    with pytest.raises(UnsafeFileError, match=r"lies outside the folder"):
        ImageFolder(tmp_path)


# -- latents made once -------------------------------------------------------------------------------------


class Stage(torch.nn.Module):
    """As much of a latent diffusion model as encoding needs."""

    first_stage_key, device = "image", torch.device("cpu")

    def __init__(self):
        super().__init__()
        from ldm.models.autoencoder import AutoencoderKL

        torch.manual_seed(0)
        self.first_stage_model = AutoencoderKL(DDCONFIG, {"target": "torch.nn.Identity"}, embed_dim=3)
        self.calls = 0

    def encode_first_stage(self, x):
        self.calls += 1
        return self.first_stage_model.encode(x)


def test_latents_are_those_of_the_pictures_and_are_made_once(tmp_path):
    model, source = Stage(), Shapes(image_size=16, length=9)
    made = cache_latents(model, source, 7, tmp_path, name="a", batch_size=3)
    assert len(made) == 7 and model.calls == 3
    item = made[4]
    assert item["caption"] == source[4]["caption"]
    image = torch.from_numpy(source[4]["image"]).permute(2, 0, 1)[None]
    with torch.no_grad():
        exact = model.first_stage_model.encode(image).parameters[0]
    torch.testing.assert_close(item["moments"], exact, rtol=1e-3, atol=1e-3)  # float16 on disk
    again = cache_latents(model, source, 7, tmp_path, name="a")
    assert model.calls == 3 and torch.equal(again.moments, made.moments) and again.captions == made.captions
    assert len(cache_latents(model, source, -1, tmp_path, name="a")) == 9 and model.calls == 4


def test_latents_made_in_bfloat16_are_those_of_the_pictures_to_its_rounding(tmp_path):
    model, source = Stage(), Shapes(image_size=16, length=5)
    exact = cache_latents(model, source, -1, tmp_path, name="a").moments.float()
    rounded = cache_latents(model, source, -1, tmp_path, name="b", is_bf16=True).moments.float()
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02)  # 8 bits a product
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_another_first_stage_or_source_has_another_name():
    first, second = Stage(), Stage()
    name = fingerprint(first.first_stage_model, {"a": 1})
    assert name == fingerprint(second.first_stage_model, {"a": 1})
    assert name != fingerprint(first.first_stage_model, {"a": 2})
    with torch.no_grad():
        second.first_stage_model.quant_conv.bias[0] += 1e-6
    assert name != fingerprint(second.first_stage_model, {"a": 1})


def test_more_latents_than_pictures_are_refused(tmp_path):
    with pytest.raises(
        UsageError, match=r"cache_latents should be between 1 and 9 \(or -1 for all\), got 10"
    ):
        cache_latents(Stage(), Shapes(image_size=16, length=9), 10, tmp_path, name="a")
