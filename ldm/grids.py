"""Grids of pictures that differ in a few options: X/Y/Z grids and A1111's prompt matrix.

`sd` is a StableDiffusion throughout, whose methods `grid` and `prompt_matrix` are these functions one after the other.
"""

from __future__ import annotations

import io
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import images as pictures
from ldm.adapters.lora import LoRA, LoraFile
from ldm.axes import TEXTS, Axis, read_axis, with_seeds
from ldm.checks.seeds import draw_seed, is_list, list_seeds
from ldm.cli.adapters import LoraFlag, read_loras
from ldm.errors import LdmError, OptionError, UsageError, shown
from ldm.labels import Label, labelled, plain, side_by_side
from ldm.metadata import Painted
from ldm.option_kinds import Kind, Switch
from ldm.results import GenerationParameters, GenerationResult, Progress, with_bar

if TYPE_CHECKING:
    from PIL import Image

    from ldm.request import Request

MAX_CELLS = 10_000
MAX_PIXELS = 200_000_000  # of all cells together, as A1111
MAX_PARTS = 13  # of a prompt matrix that are put in or left out: 8,192 pictures
# In which order axes change a cell, whichever of x, y and z they are: what replaces before what is replaced in it.
_FIRST = {"prompt": -2, "negative_prompt": -2, "adapters": -2, "lora": -1, "lora_strength": 1}
_SCRIPT, _MATRIX = "X/Y/Z plot", "Prompt matrix"


@dataclass(frozen=True)
class Cell:
    """One place of a grid.

    Attributes:
        at: label of each axis here, by "x", "y" and "z"; of a prompt matrix, {"prompt": the combination}.
        request: what is painted.
        result: the picture with what made it; None where painting was ended before.
    """

    at: dict[str, str]
    request: Request = field(repr=False)
    result: GenerationResult | None = None

    @property
    def image(self) -> Image.Image | None:
        """The picture."""
        return None if self.result is None else self.result.images[0]

    @property
    def parameters(self) -> GenerationParameters | None:
        """How it was made."""
        return None if self.result is None else self.result.parameters[0]


@dataclass(repr=False)
class Grid:
    """Pictures of a grid; before it is painted, all that they are to be.

    Attributes:
        cells: columns go fastest, then rows, then the grids side by side.
        columns, rows: what is written above and beside them.
        titles: of the grids side by side; one empty one if there is one grid.
        said: what the grid's metadata say beside those of its first cell.
        interrupted: a callback ended the run.
    """

    cells: list[Cell]
    columns: Sequence[Sequence[Label]]
    rows: Sequence[Sequence[Label]]
    titles: list[str]
    said: dict[str, Any]
    interrupted: bool = False

    def __len__(self) -> int:
        return len(self.cells)

    def __repr__(self) -> str:
        done = sum(cell.result is not None for cell in self.cells)
        sides = f"{len(self.columns)} x {len(self.rows)} x {len(self.titles)}"
        return f"Grid({sides} cells, {done} painted)"

    @property
    def images(self) -> list[Image.Image | None]:
        """The picture of each cell."""
        return [cell.image for cell in self.cells]

    @property
    def parameters(self) -> dict[str, Any]:
        """What the grid's picture says: how its first cell was made, the script and the values of each axis."""
        return self._first().metadata(0) | self.said

    @property
    def image(self) -> Image.Image:
        """The grid with its labels, which carries `parameters` wherever PIL saves it."""
        size = len(self.columns) * len(self.rows)
        sheets = [
            labelled(part, self.columns, self.rows)
            for part in (self.images[i : i + size] for i in range(0, len(self.cells), size))
            if any(picture is not None for picture in part)
        ]
        self._first()  # refuses a grid without pictures; their metadata are for when they are saved
        return Painted.of(side_by_side(sheets, self.titles[: len(sheets)]), lambda: self.parameters)

    def _first(self) -> GenerationResult:
        painted = [cell.result for cell in self.cells if cell.result is not None]
        if not painted:
            raise UsageError("no cell of the grid was painted; let it run")
        return painted[0]

    def save(
        self, folder: str | os.PathLike, pattern: str = "grid-{:04}.png", *, metadata: bool = True
    ) -> Path:
        """Save the grid's picture under the next free number; returns its path.

        Args:
            pattern: see ldm.images.split_pattern.

        Raises:
            OutputError: the folder cannot be written. UsageError: the pattern is none.
        """
        from ldm.metadata import png_info

        pictures.split_pattern(pattern)  # before a folder is made
        folder = pictures.prepare_folder(folder)
        return pictures.save_numbered(
            self.image, folder, pattern, png_info(self.parameters) if metadata else None
        )

    def _repr_png_(self) -> bytes | None:
        if all(picture is None for picture in self.images):
            return None
        buffer = io.BytesIO()
        self.image.save(buffer, format="PNG")
        return buffer.getvalue()


# --- what is to be painted ------------------------------------------------------------------------


def plan_grid(sd: Any, prompt: str, x: Any = None, y: Any = None, z: Any = None, **options: Any) -> Grid:
    """Check every cell of an X/Y/Z grid, without painting.

    Args:
        x, y, z: see ldm.axes.read_axis; an Axis that was read before may be given as well.
        options: of StableDiffusion.plan, of all cells. A seed that is left to chance is drawn once, for all.

    Raises:
        UsageError: an axis that is none, or a cell that cannot be painted, which is named; more than MAX_CELLS cells or
            MAX_PIXELS pixels.
    """
    axes = {
        where: with_seeds(one if isinstance(one, Axis) else read_axis(where, one), draw_seed)
        for where, one in (("x", x), ("y", y), ("z", z))
        if one is not None
    }
    if not axes:
        raise UsageError('a grid needs an axis, got none; give x=("steps", [10, 20])')
    names = [axis.name for axis in axes.values()]
    for name in names:
        if names.count(name) > 1 and name != "prompt_sr":
            raise UsageError(f"two axes of the grid go along {name}; give one of them")
    if math.prod(map(len, axes.values())) > MAX_CELLS:
        sides = " x ".join(str(len(axis)) for axis in axes.values())
        raise UsageError(f"a grid has at most {MAX_CELLS} cells, got {sides}; give fewer values")
    common = _common(prompt, options)
    common["seed"] = list_seeds(common.get("seed"), 1)[0]
    if common.get("variation_strength") or "variation_strength" in names:
        common["variation_seed"] = list_seeds(common.get("variation_seed"), 1, "variation_seed")[0]
    order = sorted(axes, key=lambda where: _FIRST.get(axes[where].name, 0))
    files: dict[str, LoraFile] = {}
    cells = []
    # The last axis goes slowest.
    for numbers in itertools.product(*(range(len(axis)) for axis in reversed(axes.values()))):
        places = dict(zip(axes, reversed(numbers), strict=True))
        at = {where: axis.labels[places[where]] for where, axis in axes.items()}
        cell = dict(common)
        try:
            for where in order:
                axes[where].put(cell, places[where])
            if "variation_strength" in names and not cell["variation_strength"]:
                cell.pop("variation_seed")  # a cell without variation has no use for it
            cells.append(Cell(at, _plan(sd, cell, files)))
        except OptionError:  # is of all cells
            raise
        except LdmError as error:
            told = ", ".join(f"{axes[where].name} ({label})" for where, label in at.items())
            raise type(error)(f"in the grid's cell of {shown(told, 120)}: {error}") from None
    _check_size([cell.request for cell in cells])
    said: dict[str, Any] = {"script": _SCRIPT}
    for where, axis in axes.items():
        said |= {f"{where}_type": axis.name, f"{where}_values": axis.given}
        if axis.is_drawn:
            said[f"fixed_{where}_values"] = ", ".join(map(str, axis.values))
    columns, rows, titles = (axes[where].labels if where in axes else [""] for where in "xyz")
    return Grid(cells, plain(columns), plain(rows), list(titles), said)


def plan_matrix(
    sd: Any,
    prompt: str,
    *,
    in_negative: bool = False,
    at_start: bool = False,
    delimiter: str = ", ",
    different_seeds: bool = False,
    **options: Any,
) -> Grid:
    """Check every picture of a prompt matrix, without painting: a prompt "a|b|c" with and without each of b and c.

    Args:
        in_negative: the negative prompt is what has the parts.
        at_start: put them before the first part, and not behind.
        delimiter: between the parts.
        different_seeds: give picture i the seed + i, and not all the same.
        options: of StableDiffusion.plan.

    Raises:
        UsageError: no "|", more than MAX_PARTS parts, or a prompt that cannot be painted.
    """
    for flag, value in (
        ("in_negative", in_negative),
        ("at_start", at_start),
        ("different_seeds", different_seeds),
    ):
        Switch().check(flag, value)
    Kind().check("delimiter", delimiter)
    common = _common(prompt, options)
    name = TEXTS[int(in_negative)]
    combinations = matrix_prompts(common[name], at_start=at_start, delimiter=delimiter)
    seed = list_seeds(common.get("seed"), len(combinations) if different_seeds else 1)
    files: dict[str, LoraFile] = {}
    cells = []
    for i, text in enumerate(combinations):
        own = {**common, name: text, "seed": seed[i % len(seed)]}
        cells.append(Cell({"prompt": text}, _plan(sd, own, files)))
    _check_size([cell.request for cell in cells])
    parts = common[name].split("|")[1:]
    middle = math.ceil(len(parts) / 2)
    columns, rows = (
        [
            [Label(text.strip().strip(","), bool(place & 1 << i)) for i, text in enumerate(some)]
            for place in range(1 << len(some))
        ]
        for some in (parts[:middle], parts[middle:])
    )
    return Grid(cells, columns, rows, [""], {"script": _MATRIX, name: common[name]})


def matrix_prompts(text: str, *, at_start: bool = False, delimiter: str = ", ") -> list[str]:
    """List the prompts of a matrix in A1111's order: the i-th has part n + 1 if bit n of i is set.

    Raises:
        UsageError: no "|", or more than MAX_PARTS parts behind the first.
    """
    first, *parts = text.split("|")
    if not parts:
        raise UsageError(f'a prompt matrix is written "a|b|c", got {shown(text)} without |')
    if len(parts) > MAX_PARTS:
        raise UsageError(
            f"a prompt matrix has at most {MAX_PARTS} parts behind the first, got {len(parts)}; each doubles the "
            "pictures"
        )
    found = []
    for number in range(1 << len(parts)):
        chosen = [part.strip().strip(",") for n, part in enumerate(parts) if number & 1 << n]
        found.append(delimiter.join([*chosen, first] if at_start else [first, *chosen]))
    return found


def _common(prompt: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Give the options of all cells, of which each is one picture."""
    common = {"negative_prompt": "", **options, "prompt": prompt}
    common["negative_prompt"] = "" if common["negative_prompt"] is None else common["negative_prompt"]
    for name in TEXTS:
        if not isinstance(common[name], str):
            raise UsageError(f"{name} of a grid must be one text, got {shown(common[name])}")
    for name, wanted in (("num_images", 1), ("output_type", "pil")):
        if common.get(name, wanted) != wanted:
            raise UsageError(
                f"{name} of a grid is {wanted!r}, got {shown(common[name])}; go along the seed for more pictures"
            )
    if is_list(common.get("seed")):
        raise UsageError(f'a list of seeds is an axis of its own, as x=("seed", {shown(common["seed"])})')
    return common


def _plan(sd: Any, cell: dict[str, Any], files: dict[str, LoraFile]) -> Request:
    """Check one cell. A LoRA's file is kept once, however many cells have it.

    Args:
        files: those of the cells before.
    """
    cell = dict(cell)
    strength = cell.pop("lora_strength", None)
    given = cell.pop("adapters", ())
    if isinstance(given, list | tuple):  # another kind is refused below
        given = [_read_lora(one, files) for one in given if one is not None]
    request = sd.plan(cell.pop("prompt"), adapters=given, **cell)
    found = []
    for one in request.adapters:
        if isinstance(one, LoRA):
            one = replace(one, file=files.setdefault(os.path.realpath(one.file.path), one.file))
            if strength is not None:
                one = replace(one, weight=strength, text_weight=None)
        found.append(one)
    if strength is not None and not any(isinstance(one, LoRA) for one in found):
        raise UsageError(
            "lora_strength is of the LoRAs that are given, and there are none; give adapters or tags"
        )
    return request.replace(adapters=tuple(found))


def _read_lora(one: Any, files: dict[str, LoraFile]) -> Any:
    """Make a LoRA of what the lora axis says of it; other adapters are what they are."""
    if isinstance(one, LoraFlag):
        (one,) = read_loras([one], files)
    return one


def _check_size(requests: Sequence[Request]) -> None:
    pixels = len(requests) * math.prod(
        max(sides) for sides in zip(*(one.size for one in requests), strict=True)
    )
    if pixels > MAX_PIXELS:
        raise UsageError(
            f"a grid has at most {MAX_PIXELS // 10**6} million pixels, got {len(requests)} cells of "
            f"{pixels // len(requests)}; give fewer values or a smaller size"
        )


# --- painting -------------------------------------------------------------------------------------


def stream_grid(sd: Any, grid: Grid) -> Iterator[Progress]:
    """Paint a grid cell by cell, putting each result into its cell; Progress counts cells as batches."""
    sd.advise([cell.request for cell in grid.cells])
    for i, cell in enumerate(grid.cells):
        for step in sd.paint(cell.request):
            if step.result is not None:
                grid.cells[i] = replace(cell, result=step.result)
            yield replace(step, batch=i, batches=len(grid.cells))


def paint_grid(
    sd: Any,
    grid: Grid,
    callback: Callable[[Progress], Any] | None = None,
    progress: bool | None = None,
) -> Grid:
    """Paint a grid that was planned; callback and progress are as in StableDiffusion.txt2img."""
    if callback is not None and not callable(callback):
        raise UsageError(f"callback must be a function of one Progress, got {shown(callback)}")
    with closing(with_bar(stream_grid(sd, grid), progress)) as steps:
        for step in steps:
            if callback is not None and callback(step) is False:
                grid.interrupted = True
                break
    return grid
