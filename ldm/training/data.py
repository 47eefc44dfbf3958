"""Training data in an addressable order: sample k of a run depends on (seed, k) only.

That is what makes a resumed run the same run, with any number of loader workers and of processes. A source is a
dataset with `item(index, rng, step) -> dict`; `Stream` turns it into batches; `DataModuleFromConfig` is the way in
that CompVis's configurations name (`main.DataModuleFromConfig`).
"""

import contextlib
import logging
import signal
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ldm.config import instantiate_from_config, place_of
from ldm.config_text import first_line
from ldm.errors import (
    AbsentError,
    FormatError,
    LdmError,
    MismatchError,
    ResourceError,
    UsageError,
    is_out_of_memory,
)
from ldm.shapes.scenes import COLOURS, SHAPES, ShapesDataset, as_array, render_crowd

logger = logging.getLogger(__name__)

Item = dict[str, Any]
LABELS = {"shape": SHAPES, "colour": tuple(COLOURS)}
MAX_SHUFFLED = 1 << 24  # a permutation of more items than this is refused: 128 MiB of indices per epoch


class Shapes(Dataset):
    """Renders of the world of shapes, made on access; see `ldm.shapes.scenes`.

    Args:
        image_size: pixels a side of the whole picture.
        length: how many scenes there are; the default never comes round.
        seed: of the scenes. Runs with another seed see other scenes.
        split: "train" leaves the held-out pairs away, "test" has only them, "any" has all.
        crop_size: cut a random square of so many pixels instead of the whole picture.
        crop_until_step: whole pictures from this optimizer step on (None: always crops).
        crowd_until_step: before this optimizer step, the crowds of `shapes.render_crowd` instead of scenes, in
            squares of crop_size (or whole); for first stages, as a crowd has no caption.
        paraphrase: share of captions in other words than the grammar's.
        label: "shape" or "colour" of the object that the caption names first: its number in shapes.SHAPES or
            shapes.COLOURS becomes the item's "class_label".

    Raises:
        UsageError: crop_size is larger than image_size; an unknown label, or one with crowds, which have none.
    """

    is_endless = True  # scenes are independent draws, so their order needs no shuffling

    def __init__(
        self,
        image_size: int = 128,
        length: int = 1 << 40,
        seed: int = 0,
        split: str = "train",
        crop_size: int | None = None,
        crop_until_step: int | None = None,
        crowd_until_step: int = 0,
        paraphrase: float = 0.0,
        label: str | None = None,
    ):
        if label is not None and label not in LABELS:
            raise UsageError(f"label should be {' or '.join(LABELS)}, or left out; got {label!r}")
        if label is not None and crowd_until_step:
            raise UsageError(
                f"crowds have no label, got label={label!r} and crowd_until_step={crowd_until_step}"
            )
        if crop_size is not None and not 0 < crop_size <= image_size:
            raise UsageError(f"crop_size should be between 1 and image_size ({image_size}), got {crop_size}")
        self.scenes = ShapesDataset(
            length=length, seed=seed, split=split, image_size=image_size, paraphrase=paraphrase
        )
        self.label = label
        self.crop_size, self.crop_until_step = crop_size, crop_until_step
        self.image_size, self.crowd_until_step = image_size, crowd_until_step

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Item:
        made = self.scenes[index]
        if self.label is not None:
            said = self.scenes.scene(index).claim.objects[0]
            made["class_label"] = np.array(LABELS[self.label].index(getattr(said, self.label)))
        return made

    def item(self, index: int, rng: np.random.Generator, step: int) -> Item:
        """Make scene `index`, cropped at a place drawn from rng while crops are due at this step."""
        if step < self.crowd_until_step:
            size = self.crop_size or self.image_size
            return {"image": as_array(render_crowd(rng, size, self.image_size)), "caption": "", "txt": ""}
        made = self[index]
        if self.crop_size is not None and (self.crop_until_step is None or step < self.crop_until_step):
            made["image"] = crop(made["image"], self.crop_size, rng)
        return made


def crop(image: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Cut a square of size x size at a random place out of (h, w, c)."""
    top, left = (int(rng.integers(side - size + 1)) for side in image.shape[:2])
    return image[top : top + size, left : left + size]


class Stream(Dataset):
    """The batches of a whole run, by number; batch m of process r holds samples m*b*world + r*b .. + b.

    An epoch is one random order of the source, drawn from (seed, epoch); epochs follow each other without a gap, so
    a batch may straddle two. An endless source is read in order. Item m is one batch of one process:
    {"image" | "moments": (b, ...) tensor, "caption": list[str], "txt": the same, "micro": m}.

    Args:
        source: a dataset with `item(index, rng, step)`, or any map-style dataset of dicts.
        batch_size: b, samples of one process in one batch.
        seed: of the order, and of each sample's generator.
        accumulate: batches in one optimizer step (from which an item learns at which step it is used).
        rank, world: this process and how many there are.
        shuffle: False reads every epoch in order.

    Raises:
        MismatchError: the source holds fewer samples than one batch of all processes.
        UsageError: batch_size below 1, or a source without numbers.
    """

    def __init__(
        self,
        source: Dataset,
        batch_size: int,
        *,
        seed: int = 0,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
    ):
        if batch_size < 1:
            raise UsageError(f"batch_size should be at least 1, got {batch_size}")
        if isinstance(source, IterableDataset):
            raise UsageError(
                f"{type(source).__name__} is a stream, but a run that can be resumed asks for samples by number; give "
                "the data set a __getitem__ and a __len__, or train with a loop of your own"
            )
        if len(source) < batch_size * world:
            raise MismatchError(
                f"the data holds {len(source)} samples but one batch takes {batch_size * world}, so there are no "
                "batches; lower batch_size or add data"
            )
        self.is_shuffled = shuffle and not getattr(source, "is_endless", False)
        if self.is_shuffled and len(source) > MAX_SHUFFLED:
            raise UsageError(
                f"shuffling is for up to {MAX_SHUFFLED} samples, the data has {len(source)}; set shuffle: false"
            )
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.accumulate, self.rank, self.world = accumulate, rank, world
        self._epoch, self._order = -1, None

    def index(self, k: int) -> int:
        """Say which item of the source sample k of the run is."""
        epoch, position = divmod(k, len(self.source))
        if not self.is_shuffled:
            return position
        if epoch != self._epoch:
            rng = np.random.default_rng((self.seed, 1, epoch))
            self._epoch, self._order = epoch, rng.permutation(len(self.source))
        return int(self._order[position])

    def sample(self, k: int) -> Item:
        """Take sample k of the run.

        Raises:
            FormatError, AbsentError, ResourceError, or what else of ldm's own kinds the source raised: the source could
                not give it; the source, the item and its own error are named.
        """
        step = k // (self.batch_size * self.world * self.accumulate)
        index = self.index(k)
        with naming_source(self.source, f"item {index}"):
            if hasattr(self.source, "item"):
                made = self.source.item(index, np.random.default_rng((self.seed, 2, k)), step)
            else:
                made = self.source[index]
            if not hasattr(made, "keys"):
                raise TypeError(f"it should be a dict, got a {type(made).__name__}")
        return made

    def batch(self, micro: int) -> Item:
        """Make batch `micro` of this process; see `sample` for the errors."""
        first = (micro * self.world + self.rank) * self.batch_size
        samples = [self.sample(first + i) for i in range(self.batch_size)]
        with naming_source(self.source, f"items of batch {micro}"):
            batch = collate(samples)
        batch["micro"] = micro
        return batch

    def __getitem__(self, micro: int) -> Any:
        """Make a batch; in a loader process an error is handed over as a `Failed`, for `Loader` to raise."""
        if torch.utils.data.get_worker_info() is None:
            return self.batch(micro)
        try:
            return self.batch(micro)
        except LdmError as error:
            error.add_note("".join(traceback.format_exception(error)))  # for --debug; a cause does not travel
            return Failed(error)

    def loader(self, first: int, last: int, *, num_workers: int = 0) -> DataLoader:
        """Load batches first .. last - 1, each made in one worker from start to end."""
        return Loader(
            self,
            sampler=range(first, last),
            batch_size=None,  # an item is a batch already
            num_workers=num_workers,
            persistent_workers=False,
            worker_init_fn=outlive_signals if num_workers else None,
        )


def outlive_signals(worker: int) -> None:
    """Let a loader process go on when a terminal sends Ctrl-C, or a system SIGTERM, to the whole group of processes.

    The run still needs its batches to finish the step and save. A second SIGTERM ends it, so that the run itself can
    end one that hangs: torch and multiprocessing send one each. Where the run is gone, torch notices.
    """

    def wait_for_another(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, wait_for_another)


@dataclass(frozen=True)
class Failed:
    """What a loader process hands over in a batch's place: torch would make one text of an error and its traceback."""

    error: LdmError


class Loader(DataLoader):
    """A DataLoader that raises the errors of its processes as what they are."""

    def __iter__(self) -> Iterator[Item]:
        for batch in super().__iter__():
            if isinstance(batch, Failed):
                raise batch.error
            yield batch


@contextlib.contextmanager
def naming_source(source: Any, part: str) -> Iterator[None]:
    """Name a data set and a part of it in the errors that it raises, each in one line and of ldm's own kinds.

    Its own kind of error decides: a file that is not there is absent, a lack of memory one of resources, one of ldm's
    stays what it is, and any other means data that cannot be read.
    """
    try:
        yield
    except Exception as error:
        kinds = ((LdmError, type(error)), (FileNotFoundError, AbsentError))
        kind = next((ours for theirs, ours in kinds if isinstance(error, theirs)), FormatError)
        if is_out_of_memory(error):
            kind = ResourceError
        name = f"data set {type(source).__module__}.{type(source).__qualname__}"
        what = str(error) if isinstance(error, LdmError) else f"{type(error).__name__}: {error}"
        raise kind(f"{name}, {part}: {first_line(what.removesuffix(': '))}") from error


def is_of_a_lost_loader(error: Exception) -> bool:
    """Tell whether an error means that a loader process died, rather than that its source raised something.

    torch names the process whose end it has seen. One that dies after it announced a batch and before the batch's
    memory was handed over is seen only as a connection that breaks, below the loader in this process.
    """
    message = str(error)
    if isinstance(error, RuntimeError):
        return message.startswith("DataLoader worker (pid")
    if not isinstance(error, ConnectionError | EOFError):
        return False
    modules = {frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)}
    # what a source raised in its process comes through the loader too, and says where it was caught
    return torch.utils.data.dataloader.__name__ in modules and not message.startswith("Caught ")


def collate(items: list[Item]) -> Item:
    """Stack the arrays and list the rest."""
    joined: Item = {}
    for key in items[0]:
        values = [item[key] for item in items]
        if isinstance(values[0], np.ndarray):
            values = [torch.from_numpy(value.copy()) for value in values]
        joined[key] = torch.stack(values) if isinstance(values[0], torch.Tensor) else values
    return joined


def built_source(config: Any, part: str) -> Any:
    """Build a data set from its configuration.

    Raises:
        MismatchError: it is no data set with a length and items, or its own constructor failed.
        As instantiate_from_config otherwise.
    """
    where = place_of(config) or f"data.params.{part}"
    try:
        source = instantiate_from_config(config, where=where)
        length = len(source)
    except LdmError:
        raise
    except Exception as error:
        raise MismatchError(
            f"{where}: data set {str(config['target']):.80} cannot be built: {type(error).__name__}: "
            f"{first_line(error)}"
        ) from error
    if not isinstance(length, int) or not (hasattr(source, "item") or hasattr(source, "__getitem__")):
        raise MismatchError(
            f"{where} should be a data set with a length and items, got {type(source).__name__}"
        )
    return source


class DataModuleFromConfig(pl.LightningDataModule):
    """CompVis's data module: sources from configurations, the same batch size for all.

    Args:
        batch_size: samples of one process in one batch.
        train, validation, test, predict: {"target", "params"} of a source; only the first two are used here.
        wrap: accepted for CompVis's files; sources are never wrapped.
        num_workers: loader processes. CompVis has twice the batch size; here 0, which gives the same data.
        shuffle_test_loader, shuffle_val_dataloader, use_worker_init_fn: accepted for CompVis's files; the order
            is always the one of the seed.
        shuffle: False reads the training data in order.
        cache_latents: diffusion only: encode so many samples once with the frozen first stage and train on those
            (0: encode each picture when it comes; -1: all of a finite source).
        latent_cache: folder of the cache, if not the run folder.
    """

    def __init__(
        self,
        batch_size: int,
        train: Mapping[str, Any] | None = None,
        validation: Mapping[str, Any] | None = None,
        test: Mapping[str, Any] | None = None,
        predict: Mapping[str, Any] | None = None,
        wrap: bool = False,
        num_workers: int | None = None,
        shuffle_test_loader: bool = False,
        use_worker_init_fn: bool = False,
        shuffle_val_dataloader: bool = False,
        shuffle: bool = True,
        cache_latents: int = 0,
        latent_cache: str | Path | None = None,
    ):
        super().__init__()
        if train is None:
            raise UsageError(
                "the data configuration has no 'train' entry; give it {target: ..., params: ...}"
            )
        self.batch_size, self.num_workers, self.shuffle = batch_size, num_workers or 0, shuffle
        self.cache_latents, self.latent_cache = cache_latents, latent_cache
        self.train_source = built_source(train, "train")
        self.validation_source = None if validation is None else built_source(validation, "validation")
        self.first_batch, self.last_batch, self.seed, self.accumulate = 0, 0, 0, 1

    def set_span(self, *, first: int, last: int, seed: int, accumulate: int) -> None:
        """Say which batches of the run are to come (after a resumption, not from 0)."""
        self.first_batch, self.last_batch, self.seed, self.accumulate = first, last, seed, accumulate

    def train_dataloader(self) -> DataLoader:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        stream = Stream(
            self.train_source,
            self.batch_size,
            seed=self.seed,
            accumulate=self.accumulate,
            rank=rank,
            world=world,
            shuffle=self.shuffle,
        )
        return stream.loader(self.first_batch, self.last_batch, num_workers=self.num_workers)
