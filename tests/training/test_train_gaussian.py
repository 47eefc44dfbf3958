"""Training of OpenAI's pixel models."""

import pytest
import torch

from ldm.errors import UsageError
from ldm.training.data import Shapes, Stream
from ldm.training.shapes import COLOURS, SHAPES, parse_caption


def batch_of(count, label="shape"):
    return Stream(Shapes(image_size=16, label=label), count, seed=3)[0]


@pytest.mark.parametrize(("label", "names"), [("shape", SHAPES), ("colour", tuple(COLOURS))])
def test_a_label_is_the_number_of_what_the_caption_names_first(label, names):
    batch = batch_of(9, label)
    labels = batch["class_label"]
    assert labels.dtype == torch.int64 and labels.shape == (9,) and len(set(labels.tolist())) > 2
    for number, caption in zip(labels.tolist(), batch["caption"], strict=True):
        assert names[number] == getattr(parse_caption(caption).objects[0], label)
    assert "class_label" not in batch_of(2, None)


def test_labels_that_cannot_be_are_named():
    with pytest.raises(UsageError, match=r"label should be shape or colour, or left out; got 'size'"):
        Shapes(image_size=16, label="size")
    with pytest.raises(UsageError, match=r"got label='shape' and crowd_until_step=7"):
        Shapes(image_size=16, label="shape", crowd_until_step=7)
