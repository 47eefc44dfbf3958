"""What happens between steps: the log and its curve, validation, pictures, checkpoints, and an orderly stop.

None of it changes a run: every batch draws its random numbers afresh from the seed and its number.
"""

import contextlib
import json
import logging
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from ldm.checkpoints import replacing
from ldm.errors import OutputError
from ldm.images import grid, to_pil
from ldm.training.checkpointing import FORMAT, save_state
from ldm.training.data import Stream
from ldm.training.draws import Draws

logger = logging.getLogger(__name__)

SAVE_ATTEMPTS = 3
VALIDATION_SEED = 1 << 20  # no run's own seed is likely to be this one
CURVES = ("train/loss", "train/loss_1", "train/rec_loss", "train/loss_simple", "val/psnr", "val/loss", "lr")


class AfterSteps(pl.Callback):
    """Calls `after_step` when an optimizer step is complete, not after every batch."""

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if module.has_stepped:
            self.after_step(trainer, module, batch)

    def after_step(self, trainer: pl.Trainer, module: Any, batch: Any) -> None:
        raise NotImplementedError(f"{type(self).__name__} does not say what to do after a step")


def spelled(seconds: float) -> str:
    """Write a duration as 45 s, 12 min or 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def peak_memory(device: torch.device) -> str:
    """Say the most memory that was taken: of the GPU by tensors, or of this process."""
    if device.type == "cuda":
        return f"peak {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB of GPU memory"
    try:
        import resource  # not on Windows
    except ImportError:
        return "peak memory unknown"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"


BAR = "step {n_fmt}/{total_fmt} |{bar:20}| {rate_inv_fmt}, {remaining} left{postfix}"


class RunLog(AfterSteps):
    """Writes every step's figures to metrics.jsonl as they come, a line now and then to the console, and a curve.

    A terminal has a bar instead of the lines. Elsewhere the first and the third step have a line of their own, so that
    what a run will take is soon known.

    Args:
        folder: of the run.
        total: steps of the whole run.
        print_every: seconds between two lines on the console.
        curve_every: steps between two drawings of loss.png; 0 for none.
    """

    def __init__(self, folder: Path, total: int, *, print_every: float = 10.0, curve_every: int = 500):
        self.path, self.curve = folder / "metrics.jsonl", folder / "loss.png"
        self.total, self.print_every, self.curve_every = total, print_every, curve_every
        self._file = None
        self._bar = None
        self._redirected = contextlib.ExitStack()
        self._printed, self._printed_step = 0.0, 0
        self._early: set[int] = set()

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        if not trainer.is_global_zero:
            return
        self.drop_after(module.step)
        self._file = open(self.path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 - closed in on_train_end
        self._printed, self._printed_step = time.monotonic(), module.step
        self._early = {module.step + 1, module.step + 3}
        if sys.stderr.isatty():
            from tqdm import tqdm
            from tqdm.contrib.logging import logging_redirect_tqdm

            self._bar = tqdm(
                total=self.total,
                initial=module.step,
                unit="step",
                bar_format=BAR,
                dynamic_ncols=True,
                mininterval=0.5,
            )
            self._redirected.enter_context(logging_redirect_tqdm([logging.getLogger("ldm")]))

    def drop_after(self, step: int) -> None:
        """Remove the lines of steps that a resumed run will do again, and a line cut short."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                if line.endswith("\n") and json.loads(line)["step"] < step:
                    kept.append(line)
            except (ValueError, KeyError):
                continue
        with replacing(self.path) as file:
            file.write("".join(kept).encode())

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Add a line for step `step` (0-based)."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **figures}) + "\n")

    def after_step(self, trainer: pl.Trainer, module: Any, batch: Any) -> None:
        if self._file is None:
            return
        self.write(module.step - 1, module.figures)
        if self._bar is not None:
            loss = module.figures["train/loss"]
            self._bar.set_postfix_str(f"loss {loss:.4g}, {peak_memory(module.device)}", refresh=False)
            self._bar.update(1)
        else:
            self._print(module)
        if self.curve_every and module.step % self.curve_every == 0:
            self.draw()

    def _print(self, module: Any) -> None:
        """Print a line where one is due."""
        now = time.monotonic()
        if now - self._printed < self.print_every and module.step not in self._early:
            return
        each = (now - self._printed) / max(1, module.step - self._printed_step)
        shown = " ".join(
            f"{name.removeprefix('train/')} {module.figures[name]:.4g}"
            for name in ("train/loss", "train/rec_loss", "train/loss_1", "grad_norm", "loss_scale", "lr")
            if name in module.figures
        )
        left = spelled((self.total - module.step) * each)
        cost = f"{each:.3f} s/step, {left} left, {peak_memory(module.device)}"
        print(f"step {module.step}/{self.total} {shown} {cost}", flush=True)
        self._printed, self._printed_step = now, module.step

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        if self._file is not None and self.curve_every:
            self.draw()
        self.close()

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._redirected.close()

    def draw(self) -> None:
        """Draw the figures over the steps as loss.png, each with its running mean."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        lines = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        names = [name for name in CURVES if any(name in line for line in lines)]
        if not names:
            return
        figure, axes = pyplot.subplots(
            len(names), 1, figsize=(8, 2.2 * len(names)), squeeze=False, sharex=True
        )
        for axis, name in zip(axes[:, 0], names, strict=True):
            points = [(line["step"], line[name]) for line in lines if name in line]
            stride = max(1, len(points) // 2000)
            steps, values = zip(*points[::stride], strict=True)
            axis.plot(steps, values, linewidth=0.6, alpha=0.5)
            if len(points) > 100 and name.startswith("train/"):
                width = max(1, len(points) // 50)
                ends = range(width, len(points) + 1, max(1, width // 4))
                means = [sum(v for _, v in points[e - width : e]) / width for e in ends]
                axis.plot([points[e - 1][0] for e in ends], means, linewidth=1.4)
            if name.startswith("train/") and min(values) > 0:
                axis.set_yscale("log")
            axis.set_ylabel(name)
            axis.grid(alpha=0.3)
        axes[-1, 0].set_xlabel("optimizer step")
        figure.tight_layout()
        with replacing(self.curve) as file:
            figure.savefig(file, format="png", dpi=100)
        pyplot.close(figure)


class Validation(AfterSteps):
    """Measures a fixed set of unseen samples now and then, on the first process.

    Args:
        source: of the samples.
        run_log: where the figures go.
        every: steps between two measurements.
        batches, batch_size: how many samples; of a source with fewer than batch_size all, which is said.
    """

    def __init__(self, source: Any, run_log: RunLog, *, every: int, batches: int, batch_size: int):
        if len(source) < batch_size:
            print(
                f"validation is on {len(source)} pictures, fewer than batch_size ({batch_size})", flush=True
            )
        batch_size = min(batch_size, len(source))
        batches = min(batches, len(source) // batch_size) if batch_size else 0
        self.stream = Stream(source, batch_size, shuffle=False) if batches else None
        self.run_log, self.every, self.batches = run_log, every, batches

    def after_step(self, trainer: pl.Trainer, module: Any, batch: Any) -> None:
        if not trainer.is_global_zero or self.stream is None or module.step % self.every:
            return
        sums: dict[str, float] = {}
        module.eval()
        for number in range(self.batches):
            taken = module.transfer_batch_to_device(self.stream[number], module.device, 0)
            draws = Draws(VALIDATION_SEED, number)
            with trainer.precision_plugin.forward_context():
                measured = module.objective.validate(taken, draws, module.step)
            for name, value in measured.items():
                sums[name] = sums.get(name, 0.0) + value / self.batches
        module.train()
        self.run_log.write(module.step - 1, sums)
        self.run_log.say(f"step {module.step} " + " ".join(f"{k} {v:.4f}" for k, v in sums.items()))


class ImageLogger(AfterSteps):
    """Writes grids of pictures now and then: images/train/{name}_gs-{step}_e-{epoch}_b-{batch}.png, as CompVis.

    Args:
        batch_frequency: steps between two grids.
        max_images: pictures in a grid.
        clamp: accepted for CompVis's files; pictures are always clamped to [-1, 1].
        increase_log_steps: also at steps 1, 2, 4, ... below batch_frequency.
        rescale, disabled, log_on_batch_idx, log_first_step, log_images_kwargs: CompVis's; of these `disabled`
            and `log_first_step` act.
    """

    def __init__(
        self,
        batch_frequency: int = 750,
        max_images: int = 4,
        clamp: bool = True,
        increase_log_steps: bool = True,
        rescale: bool = True,
        disabled: bool = False,
        log_on_batch_idx: bool = False,
        log_first_step: bool = False,
        log_images_kwargs: Any = None,
    ):
        self.batch_frequency, self.max_images, self.disabled = batch_frequency, max_images, disabled
        self.early = {1} if log_first_step else set()
        if increase_log_steps:
            self.early |= {2**n for n in range(30) if 2**n < batch_frequency}
        self.folder: Path | None = None
        self.source: Any = None

    def attach(self, folder: Path, source: Any) -> None:
        """Set the folder of the grids and what they show (None: the batch just trained on)."""
        self.folder, self.source = folder / "images" / "train", source

    def after_step(self, trainer: pl.Trainer, module: Any, batch: Any) -> None:
        is_due = module.step % self.batch_frequency == 0 or module.step in self.early
        if self.disabled or self.folder is None or not trainer.is_global_zero or not is_due:
            return
        if self.source is not None and len(self.source):
            count = min(self.max_images, len(self.source))
            batch = module.transfer_batch_to_device(
                Stream(self.source, count, shuffle=False)[0], module.device, 0
            )
        module.eval()
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            pictures = module.objective.pictures(batch, self.max_images)
        module.train()
        for name, tensor in pictures.items():
            if not torch.isfinite(tensor).all():
                logger.warning("step %d: '%s' is not finite and is not shown", module.step, name)
                continue
            file_name = (
                f"{name}_gs-{module.step:06d}_e-{trainer.current_epoch:06d}_b-{module.step - 1:06d}.png"
            )
            with replacing(self.folder / file_name) as file:
                grid(to_pil(as_colours(tensor.float().clamp(-1, 1))), nrow=4).save(file, format="PNG")


def as_colours(pictures: torch.Tensor) -> torch.Tensor:
    """Make (b, 3, height, width) of pictures, masks, maps, or of one grid (c, height, width).

    One channel is grey; of more than three the first three are shown.
    """
    pictures = pictures[None] if pictures.dim() == 3 else pictures
    channels = pictures.shape[1]
    if channels < 3:
        return torch.cat([pictures] * 3, dim=1)[:, :3]
    return pictures[:, :3]


class Checkpoints(AfterSteps):
    """Saves the run now and then and at its end; on SIGINT or SIGTERM finishes the step, saves and stops.

    SIGUSR1 saves after the step and goes on, as CompVis's main.py does.

    Args:
        folder: of the run; states go to its checkpoints/.
        every: steps between two.
        run: plain data to save with each.

    Attributes:
        stopped_by: the signal that ended the run, if one did.
    """

    def __init__(self, folder: Path, *, every: int, run: dict[str, Any]):
        self.folder, self.every, self.run = folder / "checkpoints", every, run
        self.stopped_by: int | None = None
        self._saved_step = -1
        self._is_asked_to_save = False
        self._wishes = {signal.SIGINT: self._ask_to_stop, signal.SIGTERM: self._ask_to_stop}
        if hasattr(signal, "SIGUSR1"):
            self._wishes[signal.SIGUSR1] = self._ask_to_save

    @contextlib.contextmanager
    def minding_signals(self) -> Iterator[None]:
        """Handle signals, from before the trainer starts until after the last save.

        Lightning itself would end the process with code 1 at a Ctrl-C before the first batch or after the last.
        """
        before = {number: signal.getsignal(number) for number in self._wishes}
        self._mind_signals()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _mind_signals(self) -> None:
        for number, wish in self._wishes.items():
            signal.signal(number, wish)

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self._mind_signals()  # once more, because Lightning has just put a handler of its own before ours

    def _ask_to_save(self, number: int, frame: Any) -> None:
        self._is_asked_to_save = True

    def _ask_to_stop(self, number: int, frame: Any) -> None:
        if self.stopped_by is not None:  # the second one: at once, with whatever is on the disk
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.stopped_by = number

    def after_step(self, trainer: pl.Trainer, module: Any, batch: Any) -> None:
        asked = module.any_process(self.stopped_by or 0)
        if asked:
            self.stopped_by = asked
            trainer.should_stop = True
        if asked or self._is_asked_to_save or module.step % self.every == 0:
            self._is_asked_to_save = False
            self.save(trainer, module)

    def save(self, trainer: pl.Trainer, module: Any) -> None:
        """Save now, on the first process; a failed save is tried twice more.

        Raises:
            OutputError: it failed three times.
        """
        if not trainer.is_global_zero or module.step == self._saved_step:
            return
        state = module.training_state()
        data = self.run["data"]
        state["epoch"] = module.step * data["accumulate"] * data["global_batch"] // data["length"]
        state["run"] = {
            "format": FORMAT,
            "guard": state.pop("guard"),
            "moments": state.pop("moments"),
            "loss_scale": state.pop("loss_scale"),
            **self.run,
        }
        for attempt in range(SAVE_ATTEMPTS):
            try:
                save_state(self.folder, state)
                break
            except OutputError as error:
                if attempt == SAVE_ATTEMPTS - 1:
                    raise
                logger.warning("%s; trying again", error)
        self._saved_step = module.step

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.save(trainer, module)
