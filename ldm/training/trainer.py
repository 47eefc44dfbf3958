"""A training run from its configuration: model, data, optimizers, resumption, and the exported weights.

The manner is that of CompVis's main.py: YAML files merged from left to right, then `a.b=c` words; `model`, `data`
and `lightning` as there, and a section `training` for what CompVis's has no words for.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import SIGTERMException

from ldm.checkpoints import replacing
from ldm.config import instantiate_from_config
from ldm.config_text import first_line
from ldm.errors import FormatError, LdmError, MismatchError, ResourceError, UsageError, is_out_of_memory
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.diffusion.ddpm import DDPM, LatentDiffusion
from ldm.modules.encoders.modules import ClassEmbedder
from ldm.training.callbacks import Checkpoints, ImageLogger, RunLog, Validation
from ldm.training.checkpointing import RunLock, read_newest, read_state
from ldm.training.data import DataModuleFromConfig, Stream, is_of_a_lost_loader
from ldm.training.export import export_run
from ldm.training.folder import ImageFolder
from ldm.training.latents import cache_latents, fingerprint
from ldm.training.module import GradientAverage, TrainingModule
from ldm.training.objectives import AutoencoderObjective, DiffusionObjective, Objective
from ldm.training.optimizers import build_optimizers, chosen_precision, learning_rate
from ldm.training.options import (
    SECTIONS,
    mapping,
    refuse_unknown_keys,
    take,
    trainer_options,
    training_options,
)
from ldm.training.resumption import compare
from ldm.training.room import check_fits, training_device
from ldm.values import RANGES, check_value

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """What the command line says about a run.

    Args:
        config: merged configuration.
        folder: of the run.
        seed: of everything.
        resume: True goes on where the folder's newest checkpoint is (or starts, if there is none); a path names
            the checkpoint.
        scale_lr: multiply the base learning rate by accumulate x devices x batch.
    """

    config: Any
    folder: Path
    seed: int = 23
    resume: bool | Path = False
    scale_lr: bool = True


class Run:
    """One training run: everything built, ready to `fit`.

    Raises:
        UsageError, MismatchError, FormatError, AbsentError, UnsafeFileError: the configuration or the checkpoint
            asks for what cannot be; before any step.
    """

    def __init__(self, options: RunOptions):
        self.options = options
        config = options.config
        for key in ("model", "data"):
            if key not in config:
                raise FormatError(
                    f"a training configuration needs 'model' and 'data', but '{key}' is missing"
                )
        refuse_unknown_keys(config, list(SECTIONS), "the configuration")
        lightning = mapping(config.get("lightning"), "lightning")
        self.training = take(config.get("training"), training_options, "training")
        self.settings = take(lightning.get("trainer"), trainer_options, "lightning.trainer")
        self.max_steps = self.settings["max_steps"]
        base = config.model.get("base_learning_rate", 4.5e-6) if hasattr(config.model, "keys") else 0
        base = check_value(base, float, "model.base_learning_rate", RANGES["base_learning_rate"])
        # Under one name, so that a run that goes on with another spelling has changed nothing.
        self.precision = self.settings["precision"] = chosen_precision(self.settings["precision"])
        self.accumulate = self.settings["accumulate_grad_batches"]
        self.world = self.settings["devices"] * self.settings["num_nodes"]
        # The same first weights on every process and in every run of this seed.
        pl.seed_everything(options.seed, verbose=False)
        self.model = instantiate_from_config(config.model, where="model")
        self.data = instantiate_from_config(config.data, where="data")
        if not isinstance(self.data, DataModuleFromConfig):
            raise MismatchError(
                f"data.target should be main.DataModuleFromConfig, got {type(self.data).__name__}"
            )
        self._look_at_pictures()
        Stream(self.data.train_source, self.data.batch_size, world=self.world, shuffle=self.data.shuffle)
        self.rate, self.rate_line = learning_rate(
            base,
            scale=options.scale_lr,
            accumulate=self.accumulate,
            devices=self.world,
            batch_size=self.data.batch_size,
        )
        self.memory_format = (
            torch.channels_last if self.training["channels_last"] else torch.contiguous_format
        )
        self.model.to(memory_format=self.memory_format)
        self.callbacks_config = mapping(lightning.get("callbacks"), "lightning.callbacks")

    def _look_at_pictures(self) -> None:
        """Open every picture of folders before anything is trained; the record of it is kept in the run folder."""
        source = self.data.train_source
        self.pictures = (
            source if isinstance(source, ImageFolder) else None
        )  # stays, where latents take its place
        room, option = getattr(self.model, "num_classes", None), "num_classes"
        stage = getattr(self.model, "cond_stage_model", None)
        if isinstance(stage, ClassEmbedder):
            room, option = stage.embedding.num_embeddings, "cond_stage_config.params.n_classes"
        classes = [] if self.pictures is None else self.pictures.classes or []
        if room is not None and len(classes) > room:
            raise MismatchError(
                f"the folder has {len(classes)} classes, the model {room}; set model.params.{option}={len(classes)}"
            )
        for part, source in (("train", self.data.train_source), ("validation", self.data.validation_source)):
            if isinstance(source, ImageFolder):
                account = self.options.folder / "pictures" / f"{part}.json"
                for line in source.look(account, write=is_first_process()):
                    say(f"{part} {line}")

    def signature(self) -> dict[str, Any]:
        """Say what fixes the order of the data; a resumed run must have the same, up to a folder's pictures."""
        of_folder = {}
        if self.pictures is not None:
            of_folder = {"pictures": self.pictures.digest(), "classes": self.pictures.classes}
        return {
            "length": len(self.data.train_source),
            "global_batch": self.data.batch_size * self.world,
            "accumulate": self.accumulate,
            "shuffle": self.data.shuffle,
            **of_folder,
        }

    def lasting_options(self, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
        """List all settings that decide what is trained and how; a resumed run is compared with them."""
        from omegaconf import OmegaConf

        config = OmegaConf.to_container(self.options.config)
        model = {key: value for key, value in config["model"].items() if key != "base_learning_rate"}
        lasting = ("optimizer", "scheduler", "channels_last", "posterior_logvar_start", "identity_start")
        options = {
            "learning_rate": self.rate,
            "optimizers": [type(optimizer).__name__ for optimizer in optimizers],
            "model": model,
            "data": {"params": {"train": config["data"]["params"]["train"]}},
            "training": {name: self.training[name] for name in (*lasting, "cond_stage_rate")},
            "lightning": {
                "trainer": {name: self.settings[name] for name in ("precision", "gradient_clip_val")}
            },
        }
        return OmegaConf.to_container(OmegaConf.create(options), resolve=True)

    def fit(self) -> int:
        """Train to the end.

        Returns:
            0, or 128 + the signal that stopped the run after saving it.

        Raises:
            NumericError: too many steps were not finite; the last good checkpoint is kept.
            OutputError: the run folder is in use, or cannot be written.
            ResourceError: the model does not fit on the device, a step ran out of memory, or a loader worker died.
        """
        folder = self.options.folder
        with RunLock(folder) if is_first_process() else contextlib.nullcontext():
            return self._fit(folder)

    def _objective(self) -> Objective:
        if isinstance(self.model, AutoencoderKL):
            return AutoencoderObjective(
                self.model,
                memory_format=self.memory_format,
                posterior_logvar_start=self.training["posterior_logvar_start"],
                identity_start=self.training["identity_start"],
            )
        if isinstance(self.model, DDPM):
            return DiffusionObjective(
                self.model,
                memory_format=self.memory_format,
                identity_start=self.training["identity_start"],
                guidance_scale=self.training["image_guidance"],
                sample_steps=self.training["image_steps"],
            )
        if hasattr(self.model, "make_objective"):
            for name, default in (("identity_start", False), ("posterior_logvar_start", None)):
                if self.training[name] != default:
                    raise UsageError(
                        f"training.{name} is not for pixel models, got {self.training[name]}; leave it out"
                    )
            return self.model.make_objective(
                memory_format=self.memory_format, sample_steps=self.training["image_steps"]
            )
        raise MismatchError(
            f"model.target should be an AutoencoderKL or a diffusion model, got {type(self.model).__name__}"
        )

    def _cache_latents(self, folder: Path, objective: Any) -> None:
        """Replace the training pictures by their latents, if the data's options say so."""
        from omegaconf import OmegaConf

        if not isinstance(self.model, LatentDiffusion):
            raise MismatchError(f"cache_latents needs a LatentDiffusion, got {type(self.model).__name__}")
        if not objective.draws_itself:
            raise MismatchError(
                "cache_latents keeps latents and captions, but this model has other conditions (cond_stage_key "
                f"'{self.model.cond_stage_key}', {type(self.model).__name__}); set data.params.cache_latents: 0"
            )
        is_bf16 = self.precision == "bf16-mixed"
        source = {**OmegaConf.to_container(self.options.config.data.params.train), "is_bf16": is_bf16}
        if self.pictures is not None:
            source["pictures"] = self.pictures.digest()
        self.data.train_source = cache_latents(
            self.model,
            self.data.train_source,
            self.data.cache_latents,
            Path(self.data.latent_cache or folder / "latents"),
            name=fingerprint(self.model.first_stage_model, source),
            device="cpu"
            if self.settings["accelerator"] == "cpu" or not torch.cuda.is_available()
            else "cuda",
            is_bf16=is_bf16,
            report=lambda done, count: say(f"latents {done}/{count}"),
        )

    def _state(self, folder: Path) -> tuple[dict[str, Any], Path] | None:
        resume = self.options.resume
        if isinstance(resume, Path) and resume.is_file():
            return read_state(resume), resume
        source = resume if isinstance(resume, Path) else folder
        if not resume:
            if any((source / "checkpoints").glob("*.ckpt")):
                raise UsageError(
                    f"'{source}' already holds a run; add --resume to go on, or choose another --logdir"
                )
            return None
        found = read_newest(source / "checkpoints")
        if found is None and isinstance(resume, Path):
            raise MismatchError(f"there is no checkpoint in '{source}' to resume from")
        return found

    def _fit(self, folder: Path) -> int:
        objective = self._objective()
        optimizers, schedulers = build_optimizers(self.model, self.rate, self.training)
        check_fits(self.model, optimizers, training_device(self.settings["accelerator"]))
        if self.data.cache_latents:
            self._cache_latents(folder, objective)
        module = TrainingModule(
            objective,
            optimizers,
            schedulers,
            seed=self.options.seed,
            accumulate=self.accumulate,
            clip=self.settings["gradient_clip_val"],
            scales_loss=self.precision == "16-mixed",
        )
        options = self.lasting_options(optimizers)
        found = self._state(folder)
        if found is not None:
            state, path = found
            self._check(state, path)
            taken = compare(state["run"].get("options", options), options, path)
            module.load_training_state(state)
            say(f"resuming at step {module.step} from {path}")
            for line in taken:
                say(line)
        else:
            say(f"starting a run in {folder}")
        say(self.rate_line)
        if is_first_process():
            self._write_config(folder)
        self.data.set_span(
            first=module.step * self.accumulate,
            last=self.max_steps * self.accumulate,
            seed=self.options.seed,
            accumulate=self.accumulate,
        )
        checkpoints = Checkpoints(
            folder,
            every=self.training["checkpoint_every"],
            run={"seed": self.options.seed, "data": self.signature(), "options": options},
        )
        if module.step >= self.max_steps:
            if not any((folder / "checkpoints").glob("*.ckpt")):
                raise UsageError(
                    f"'{path}' is at step {module.step} and lightning.trainer.max_steps is {self.max_steps}, so "
                    "nothing is left to train; raise it, or resume the run in its own folder"
                )
            say(f"nothing is left to do: step {module.step} of {self.max_steps} is done")
        else:
            trainer = self._trainer(folder, [*self._observers(folder), checkpoints])
            with checkpoints.minding_signals(), quiet():
                self._train(trainer, module, checkpoints)
        self.module = module
        if is_first_process() and module.step >= self.max_steps:
            export_run(folder, folder / "weights.safetensors", dtype=torch.float32)
            say(f"weights are in {folder / 'weights.safetensors'}")
            for rate in getattr(self.model, "ema_rates", [])[1:]:
                path = folder / f"weights-ema_{rate!r}.safetensors"
                export_run(folder, path, dtype=torch.float32, ema_rate=rate)
                say(f"weights averaged at rate {rate!r} are in {path}")
        return 0 if checkpoints.stopped_by is None else 128 + checkpoints.stopped_by

    def _train(self, trainer: pl.Trainer, module: TrainingModule, checkpoints: Checkpoints) -> None:
        try:
            trainer.fit(module, datamodule=self.data)
        except SIGTERMException:  # of a handler of Lightning's own, which stands for a moment before ours
            checkpoints.save(trainer, module)
        except Exception as error:
            if is_out_of_memory(error):
                raise ResourceError(
                    f"out of memory in step {module.step + 1} ({first_line(error):.120}); set a smaller "
                    "data.params.batch_size, with lightning.trainer.accumulate_grad_batches to make up for it, "
                    "lightning.trainer.precision=bf16-mixed (16-mixed before Ampere), or smaller pictures"
                ) from error
            if not is_of_a_lost_loader(error):
                raise
            kept = "its last checkpoint is kept"
            if not module.is_amid_step:  # torch's handler of a lost process raises wherever this one is,
                try:
                    checkpoints.save(trainer, module)
                except RuntimeError as again:  # amid this, too, where the other loaders follow
                    if not is_of_a_lost_loader(again):
                        raise
                    checkpoints.save(trainer, module)
                kept = "the run is saved"
            if checkpoints.stopped_by is not None:  # whatever stopped this process ended that one, too
                return
            raise ResourceError(
                f"a loader process died at step {module.step} ({str(error).splitlines()[0]}); {kept}: "
                "free memory or room in /dev/shm, or set data.params.num_workers=0, and --resume"
            ) from error

    def _check(self, state: dict[str, Any], path: Path) -> None:
        run = state["run"]
        if run["seed"] != self.options.seed:
            raise MismatchError(
                f"'{path}' is of a run with seed {run['seed']}, asked for {self.options.seed}; use its own"
            )
        source = self.pictures
        free = () if source is None else ("length", "pictures")
        for key, mine in self.signature().items():
            was = run["data"].get(key)
            if key == "pictures" and was not in (None, mine):
                what = source.changes or "other names, captions or order"
                say(
                    f"resuming with other pictures: {run['data']['length']} before, {len(source)} now: {what}"
                )
            if key == "classes" and key not in run["data"]:
                continue
            if key not in free and was != mine:
                raise MismatchError(
                    f"'{path}' is of a run with another order of data: {key} {run['data'].get(key)}, now {mine}; "
                    "resume with the run's own configuration"
                )

    def _observers(self, folder: Path) -> list[pl.Callback]:
        log = RunLog(
            folder,
            self.max_steps,
            print_every=self.training["print_every"],
            curve_every=self.training["curve_every"],
        )
        images = ImageLogger()
        observers: list[pl.Callback] = [log]
        for name, entry in self.callbacks_config.items():
            made = instantiate_from_config(entry, where=f"lightning.callbacks.{name}")
            if isinstance(made, ImageLogger):
                images = made
            elif isinstance(made, pl.Callback):
                observers.append(made)
            else:
                raise MismatchError(f"lightning.callbacks.{name} is no callback but a {type(made).__name__}")
        source = self.data.validation_source
        images.attach(folder, source)
        observers.append(images)
        if source is not None:
            observers.append(
                Validation(
                    source,
                    log,
                    every=self.training["validate_every"],
                    batches=self.training["validation_batches"],
                    batch_size=self.data.batch_size,
                )
            )
        return observers

    def _trainer(self, folder: Path, callbacks: list[pl.Callback]) -> pl.Trainer:
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        cores = max(2, os.cpu_count() or 1)
        on_cpu = self.settings["accelerator"] == "cpu" or not torch.accelerator.is_available()
        if on_cpu and self.settings["devices"] > cores:
            raise UsageError(
                f"lightning.trainer: accelerator {self.settings['accelerator']!r} with devices "
                f"{self.settings['devices']} cannot be had: this machine has {cores} cores"
            )
        with quiet():
            try:
                return self._make_trainer(folder, callbacks)
            except (MisconfigurationException, ImportError, RuntimeError, TypeError, ValueError) as error:
                if isinstance(error, LdmError):
                    raise
                raise UsageError(
                    f"lightning.trainer: accelerator {self.settings['accelerator']!r} with devices "
                    f"{self.settings['devices']} cannot be had: {first_line(error)}"
                ) from error

    def _make_trainer(self, folder: Path, callbacks: list[pl.Callback]) -> pl.Trainer:
        half = None
        if self.precision == "16-mixed":  # named alone, Lightning takes bfloat16 instead on a CPU
            half = MixedPrecision("16-mixed", "cpu")
            half.scaler = None  # the module has its own
        trainer = pl.Trainer(
            accelerator=self.settings["accelerator"],
            devices=self.settings["devices"],
            num_nodes=self.settings["num_nodes"],
            strategy=GradientAverage() if self.world > 1 else "auto",
            precision=None if half else self.precision,
            plugins=half,
            max_epochs=1,  # the loader holds exactly what is left of the run
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,  # Lightning's would shuffle; the stream shares the batch itself
            default_root_dir=folder,
        )
        if half:
            half.device = trainer.strategy.root_device.type
        return trainer

    def _write_config(self, folder: Path) -> None:
        from omegaconf import OmegaConf

        with replacing(folder / "configs" / "project.yaml") as file:
            file.write(OmegaConf.to_yaml(self.options.config).encode())


def say(text: str) -> None:
    """Print a line, once for all processes."""
    if is_first_process():
        print(text, flush=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's advertisements, and its warnings about what is meant to be so, off the console."""
    chatter = logging.getLogger("lightning.pytorch")
    level = chatter.level
    chatter.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in (".*LeafSpec.*", ".*in eval mode at the start.*", ".*does not have many workers.*"):
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        finally:
            chatter.setLevel(level)


def is_first_process() -> bool:
    """Tell whether this process does the writing."""
    return pl.utilities.rank_zero_only.rank == 0
