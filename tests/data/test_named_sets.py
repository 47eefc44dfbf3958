"""The data sets under CompVis's names: what an item holds, where files are looked for, and what is refused."""

import logging
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ChainDataset, ConcatDataset, DataLoader

from ldm.config import instantiate_from_config
from ldm.data.base import Txt2ImgIterableBaseDataset
from ldm.data.imagenet import (
    ImageNetBase,
    ImageNetSR,
    ImageNetSRTrain,
    ImageNetSRValidation,
    ImageNetTrain,
    ImageNetValidation,
)
from ldm.data.lsun import (
    LSUNBase,
    LSUNBedroomsTrain,
    LSUNBedroomsValidation,
    LSUNCatsTrain,
    LSUNCatsValidation,
    LSUNChurchesTrain,
    LSUNChurchesValidation,
)
from ldm.errors import AbsentError, FormatError, UnsafeFileError, UsageError

TALL = (9, 13)  # pixels wide, high


def picture(path, size=TALL, seed=0, mode="RGB"):
    """Write noise, without loss; returns its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, format="PNG")
    return pixels


@pytest.fixture
def lsun(tmp_path):
    folder = tmp_path / "churches"
    pixels = [picture(folder / name, seed=i) for i, name in enumerate(("a.png", "deep/b.png", "c.webp"))]
    (tmp_path / "list.txt").write_text("deep/b.png\na.png\n\nc.webp\n")
    return {"txt_file": str(tmp_path / "list.txt"), "data_root": str(folder)}, pixels


def test_lsun_cuts_the_middle_square(lsun):
    where, pixels = lsun
    data = LSUNBase(**where, flip_p=0.0)
    assert len(data) == 3
    item = data[0]
    assert item["relative_file_path_"] == "deep/b.png"
    assert item["file_path_"] == os.path.join(where["data_root"], "deep/b.png")
    assert set(item) == {"image", "relative_file_path_", "file_path_"}
    assert item["image"].dtype == np.float32
    np.testing.assert_allclose(item["image"], pixels[1][2:11] / 127.5 - 1.0, atol=1e-6)  # 13 high, 9 wide


def test_lsun_resizes_by_name_and_mirrors_by_chance(lsun):
    where, pixels = lsun
    square = Image.fromarray(pixels[0][2:11])
    for name, method in (("linear", 2), ("bilinear", 2), ("bicubic", 3), ("lanczos", 1)):
        got = LSUNBase(**where, size=16, interpolation=name, flip_p=0.0)[1]["image"]
        np.testing.assert_allclose(got, np.asarray(square.resize((16, 16), method)) / 127.5 - 1.0, atol=1e-6)
    np.testing.assert_array_equal(
        LSUNBase(**where, size=16, flip_p=1.0)[1]["image"][:, ::-1],
        LSUNBase(**where, size=16, flip_p=0.0)[1]["image"],
    )
    torch.manual_seed(0)
    data = LSUNBase(**where)
    drawn = [data[1]["image"].tobytes() for _ in range(20)]
    torch.manual_seed(0)
    assert drawn == [data[1]["image"].tobytes() for _ in range(20)] and len(set(drawn)) == 2


@pytest.mark.parametrize(
    ("cls", "listed", "folder", "flip_p"),
    [
        (LSUNChurchesTrain, "church_outdoor_train", "churches", 0.5),
        (LSUNChurchesValidation, "church_outdoor_val", "churches", 0.0),
        (LSUNBedroomsTrain, "bedrooms_train", "bedrooms", 0.5),
        (LSUNBedroomsValidation, "bedrooms_val", "bedrooms", 0.0),
        (LSUNCatsTrain, "cat_train", "cats", 0.5),
        (LSUNCatsValidation, "cat_val", "cats", 0.0),
    ],
)
def test_the_parts_of_lsun_lie_where_latent_diffusion_has_them(
    cls, listed, folder, flip_p, tmp_path, monkeypatch, lsun
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        AbsentError, match=f"put the pictures into 'data/lsun/{folder}'.*nothing is downloaded"
    ):
        cls(size=16)
    picture(tmp_path / "data/lsun" / folder / "x.png")
    with pytest.raises(AbsentError, match=f"into 'data/lsun/{listed}.txt', which is not there"):
        cls(size=16)
    (tmp_path / f"data/lsun/{listed}.txt").write_text("x.png")
    target = f"ldm.data.lsun.{cls.__name__}"
    data = instantiate_from_config({"target": target, "params": {"size": 16, "interpolation": "bilinear"}})
    assert type(data) is cls and data.flip_p == flip_p and data[0]["image"].shape == (16, 16, 3)
    assert len(cls(**lsun[0], flip_p=0.25)) == 3 and cls(**lsun[0], flip_p=0.25).flip_p == 0.25


@pytest.mark.parametrize(
    ("text", "params", "error", "message"),
    [
        ("../secret.png", {}, UnsafeFileError, "'../secret.png', which is outside of"),
        ("/etc/hostname", {}, UnsafeFileError, "'/etc/hostname', which is outside of"),
        ("a/../../x.png", {}, UnsafeFileError, "outside of"),
        ("", {}, FormatError, "names no pictures"),
        ("\n \n", {}, FormatError, "names no pictures"),
        (b"\xff\xfe\x00", {}, FormatError, "cannot be read"),
        ("a.png", {"interpolation": "area"}, UsageError, "linear, bilinear, bicubic, lanczos; got 'area'"),
        ("a.png", {"size": 3}, UsageError, "from 8 on, or null for each picture's own; got 3"),
        ("a.png", {"size": "x"}, UsageError, "got 'x'"),
        ("a.png", {"flip_p": 1.5}, UsageError, "from 0 .never. to 1 .always., got 1.5"),
    ],
)
def test_lists_and_values_that_are_refused(lsun, tmp_path, text, params, error, message):
    (tmp_path / "list.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(error, match=message) as caught:
        LSUNBase(**lsun[0], **params)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_a_picture_that_cannot_be_read_is_left_out_and_named_once(lsun, tmp_path, caplog):
    where, pixels = lsun
    (tmp_path / "list.txt").write_text("a.png\ndeep/b.png\nc.webp\n")
    (tmp_path / "churches/deep/b.png").write_bytes(b"no picture at all")
    data = LSUNBase(**where, flip_p=0.0)
    with caplog.at_level(logging.WARNING):
        assert [data[i]["relative_file_path_"] for i in (0, 1, 1, 2)] == [
            "a.png",
            "c.webp",
            "c.webp",
            "c.webp",
        ]
    assert [r.getMessage().count("deep/b.png") for r in caplog.records] == [1]
    (tmp_path / "churches/c.webp").unlink()
    with pytest.raises(FormatError, match="2 of 3 pictures cannot be read, more than 1%; last: .*c.webp"):
        data[2]


@pytest.fixture
def imagenet(tmp_path):
    root = tmp_path / "ILSVRC2012_train"
    pixels = {}
    for i, name in enumerate(("n02/x.JPEG", "n02/y.png", "n01/z.JPEG", "n03/grey.JPEG")):
        pixels[name] = picture(root / "data" / name, seed=i, mode="L" if "grey" in name else "RGB")
    (root / "data/n01/n06596364_9591.JPEG").write_bytes(b"known to be broken")
    (root / "data/n01/notes.txt").write_text("no picture")
    return root, pixels


def test_imagenet_is_folders_of_classes(imagenet, tmp_path):
    root, pixels = imagenet
    data = ImageNetTrain(data_root=str(tmp_path), config={"size": 16})
    assert [data[i]["relpath"] for i in range(4)] == [
        "n01/z.JPEG",
        "n02/x.JPEG",
        "n02/y.png",
        "n03/grey.JPEG",
    ]
    assert [int(data[i]["class_label"]) for i in range(4)] == [0, 1, 1, 2] == data.class_labels
    assert [data[i]["human_label"] for i in range(4)] == ["n01", "n02", "n02", "n03"] == data.synsets
    assert data[3]["image"].shape == (16, 16, 3) and data[3]["file_path_"] == str(root / "data/n03/grey.JPEG")
    batch = next(iter(DataLoader(data, batch_size=3)))
    assert batch["class_label"].tolist() == [0, 1, 1] and batch["image"].shape == (3, 16, 16, 3)
    (root / "synset_human.txt").write_text("n01 tench, Tinca tinca\nn03 great white shark\n\n")
    (root / "filelist.txt").write_text("n03/grey.JPEG\nn01/z.JPEG\nn01/n06596364_9591.JPEG\n")
    data = ImageNetTrain(data_root=str(tmp_path), process_images=False)
    assert data.human_labels == ["great white shark", "tench, Tinca tinca"] and data.class_labels == [1, 0]
    assert list(data) == [str(root / "data/n03/grey.JPEG"), str(root / "data/n01/z.JPEG")]
    with pytest.raises(UsageError, match="only lists its pictures"):
        data.item(0, np.random.default_rng(0), 0)


def test_imagenets_own_numbers(imagenet, tmp_path):
    root, _ = imagenet
    config = {"keep_orig_class_label": True}
    with pytest.raises(AbsentError, match="index_synset.yaml', which is not there; nothing is downloaded"):
        ImageNetTrain(config, data_root=str(tmp_path))
    (root / "index_synset.yaml").write_text("5: n01\n7: n02\n30: n03\n")
    assert ImageNetTrain(config, data_root=str(tmp_path)).class_labels == [5, 7, 7, 30]
    some = ImageNetTrain({"sub_indices": "0-5, 29-31"}, data_root=str(tmp_path))
    assert some.relpaths == ["n01/z.JPEG", "n03/grey.JPEG"] and some.class_labels == [0, 1]
    with pytest.raises(AbsentError, match="holds no pictures .* of these classes"):
        ImageNetTrain({"sub_indices": "1"}, data_root=str(tmp_path))
    with pytest.raises(UsageError, match="sub_indices should be such as '0-9, 20', got 'a-b'"):
        ImageNetTrain({"sub_indices": "a-b"}, data_root=str(tmp_path))
    (root / "index_synset.yaml").write_text("n01: 5\n")
    with pytest.raises(FormatError, match="'number: synset' for each class"):
        ImageNetTrain(config, data_root=str(tmp_path))
    (root / "index_synset.yaml").write_text("5: n01\n7: n02\n")
    with pytest.raises(FormatError, match="index_synset.yaml' has no class 'n03'"):
        ImageNetTrain(config, data_root=str(tmp_path))


def test_imagenet_cuts_at_random_to_train_and_in_the_middle_to_validate(imagenet, tmp_path):
    root, pixels = imagenet
    (tmp_path / "ILSVRC2012_validation").symlink_to(root)
    middle = pixels["n02/y.png"][2:11] / 127.5 - 1.0
    validation = ImageNetValidation(data_root=str(tmp_path), config={"size": None})
    np.testing.assert_allclose(validation[2]["image"], middle, atol=1e-6)
    train = ImageNetTrain(data_root=str(tmp_path), config={"size": None})
    torch.manual_seed(0)
    drawn = {train[2]["image"].tobytes() for _ in range(60)}
    places = {(pixels["n02/y.png"][i : i + 9].astype(np.float32) / 127.5 - 1.0).tobytes() for i in range(5)}
    assert drawn == places
    for key, count in (("ImageNetTrain/random_crop", 1), ("ImageNetValidation/random_crop", 5)):
        still = ImageNetTrain(data_root=str(tmp_path), config={"size": None, key: False})
        assert len({still[2]["image"].tobytes() for _ in range(60)}) == count
    rng = [np.random.default_rng(5) for _ in range(2)]
    one, other = (train.item(2, r, 0)["image"] for r in rng)
    np.testing.assert_array_equal(one, other)


def test_imagenet_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(
        AbsentError, match="cache/autoencoders/data/ILSVRC2012_train/data/<synset>/'.*nothing is down"
    ):
        instantiate_from_config(
            {"target": "ldm.data.imagenet.ImageNetTrain", "params": {"config": {"size": 256}}}
        )
    with pytest.raises(AbsentError, match="ILSVRC2012_validation"):
        ImageNetValidation()
    with pytest.raises(UsageError, match="take one of them"):
        ImageNetBase()
    with pytest.raises(UsageError, match="no key 'sise' in its config; it has size,"):
        ImageNetTrain({"sise": 3})


def test_small_versions_by_pillow_and_by_opencvs_formulas(imagenet, tmp_path):
    """A share of 1 of a 9-pixel side, enlarged to 16 and shrunk four times."""
    options = {"size": 16, "min_crop_f": 1.0, "random_crop": False, "data_root": str(tmp_path)}
    made = {
        name: ImageNetSRTrain(degradation=name, **options)[2]
        for name in ("pil_bicubic", "cv_area", "cv_nearest", "cv_bilinear", "cv_bicubic")
    }
    item = made["cv_area"]
    assert item["image"].shape == (16, 16, 3) and item["LR_image"].shape == (4, 4, 3)
    assert item["relpath"] == "n02/y.png" and int(item["class_label"]) == 1
    large = (item["image"] + 1) * 127.5
    blocks = large.reshape(4, 4, 4, 4, 3)
    np.testing.assert_allclose((item["LR_image"] + 1) * 127.5, blocks.mean(axis=(1, 3)), atol=0.51)
    np.testing.assert_allclose((made["cv_nearest"]["LR_image"] + 1) * 127.5, large[::4, ::4], atol=1e-3)
    # Between the two middle pixels of each four, for the sample lies half-way between them.
    two = blocks[:, 1:3, :, 1:3].mean(axis=(1, 3))
    np.testing.assert_allclose((made["cv_bilinear"]["LR_image"] + 1) * 127.5, two, atol=0.51)
    weights = np.array([-0.09375, 0.59375, 0.59375, -0.09375])  # cubic convolution half-way, a = -0.75
    cubic = np.einsum("iajbc,a,b->ijc", blocks, weights, weights).clip(0, 255)
    np.testing.assert_allclose((made["cv_bicubic"]["LR_image"] + 1) * 127.5, cubic, atol=0.51)
    square = Image.fromarray(large.round().astype(np.uint8)).resize((4, 4), 3)
    np.testing.assert_allclose((made["pil_bicubic"]["LR_image"] + 1) * 127.5, np.asarray(square), atol=1e-3)


def test_upscalers_squares_are_between_the_shares(imagenet, tmp_path):
    data = ImageNetSRTrain(size=8, degradation="pil_nearest", downscale_f=2, data_root=str(tmp_path))
    shown = [data.item(2, np.random.default_rng(i), 0)["image"] for i in range(12)]
    assert len({one.tobytes() for one in shown}) == 12
    again = data.item(2, np.random.default_rng(3), 7)["image"]
    np.testing.assert_array_equal(again, shown[3])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"size": 16}, "degradation should be one of pil_nearest, .*; got None"),
        ({"size": 16, "degradation": "bsrgan_light"}, "got 'bsrgan_light'"),
        ({"degradation": "cv_area"}, "a multiple of downscale_f .4. from 8 on, got None"),
        ({"size": 18, "degradation": "cv_area"}, "got 18"),
        (
            {"size": 16, "degradation": "cv_area", "min_crop_f": 0.0},
            "min_crop_f <= max_crop_f <= 1 .*got 0.0 and 1",
        ),
        ({"size": 16, "degradation": "cv_area", "max_crop_f": 1.2}, "got 0.5 and 1.2"),
    ],
)
def test_degradations_that_are_refused(params, message):
    with pytest.raises(UsageError, match=message):
        ImageNetSRValidation(**params)
    with pytest.raises(UsageError, match="take one of them"):
        ImageNetSR(size=16, degradation="cv_area")


class Captions(Txt2ImgIterableBaseDataset):
    def __iter__(self):
        return iter({"txt": f"{i}", "size": self.size} for i in self.sample_ids)


def test_the_base_of_streams_can_be_chained():
    """main.py of CompVis asks isinstance, len, valid_ids and sample_ids of it."""
    one, two = Captions(2, [0, 1], size=8), Captions(num_records=3, valid_ids=[5, 6, 7])
    assert [item["txt"] for item in ChainDataset([one, two])] == ["0", "1", "5", "6", "7"]
    assert (len(one), len(two), one.size, two.size, two.valid_ids) == (2, 3, 8, 256, [5, 6, 7])
    two.sample_ids = two.valid_ids[1:]
    assert [item["txt"] for item in DataLoader(two, batch_size=None)] == ["6", "7"]
    assert isinstance(one, torch.utils.data.IterableDataset)
    with pytest.raises(AssertionError):
        ConcatDataset([one])


def test_a_data_module_trains_on_a_named_set(lsun):
    """The items of our trainer's own order: sample k depends on the seed and k alone."""
    data = pytest.importorskip("ldm.training.data", exc_type=ImportError)
    source = LSUNBase(**lsun[0], size=16)
    streams = [data.Stream(source, 2, seed=3) for _ in range(2)]
    batches = [[stream[i]["image"] for i in range(6)] for stream in streams]
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))
    assert batches[0][0].shape == (2, 16, 16, 3)
    with pytest.raises(UsageError, match="Captions is a stream, but a run that can be resumed asks"):
        data.Stream(Captions(9, list(range(9))), 2)
