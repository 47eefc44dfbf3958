"""Who runs in a row: each library's way through a part, plain and at its strongest, on the same weights and inputs."""

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import load
from bench.speedlib import models, process
from bench.speedlib.contestants import Contestant, Room, in_process, tidy
from bench.speedlib.models import Geometry
from bench.speedlib.rows import BASELINE, OURS, PLAIN, PROCESSES, Row
from bench.speedlib.timing import Figures
from bench.speedlib.training import TrainingRow
from ldm.checkpoints.key_mapping import TEXT, UNET, VAE
from ldm.errors import UsageError

GATE_STEPS = 2  # of whole pictures at the gate: the same code as any number, before errors have grown

OUR_CALLS: dict[str, Callable[[Any, dict[str, Tensor]], Tensor]] = {
    "clip": lambda model, i: model.cond_stage_model.transformer(input_ids=i["ids"]).last_hidden_state,
    "unet": lambda model, i: model.apply_model(i["x"], i["t"], i["context"]),
    "vae-encode": lambda model, i: model.encode_first_stage(i["pixels"]).parameters,
    "vae-decode": lambda model, i: model.decode_first_stage(i["latents"]),
}
THEIR_CALLS: dict[str, Callable[[Any, dict[str, Tensor]], Tensor]] = {
    "clip": lambda encoder, i: encoder(input_ids=i["ids"]).last_hidden_state,
    "unet": lambda unet, i: unet(i["x"], i["t"], i["context"], return_dict=False)[0],
    "vae-encode": lambda vae, i: vae.encode(i["pixels"]).latent_dist.parameters,
    "vae-decode": lambda vae, i: vae.decode(i["latents"] / vae.config.scaling_factor, return_dict=False)[0],
}


class Studio:
    """Builds the contestants of row after row, and holds no more in memory than the row at hand needs.

    Weights stay for the next row of their dtype, references (small) for all rows; what `open` built is to be let go
    when it closes.
    """

    def __init__(self, shape: Geometry, device: torch.device):
        self.shape = shape
        self.device = device
        self._weights: tuple[str, dict[str, Tensor]] | None = None
        self._references: dict[str, Tensor] = {}
        self._folder: Path | None = None

    def close(self) -> None:
        """Forget the weights and remove the files."""
        self._weights = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    # --- what the contestants share ---

    def weights(self, dtype: str) -> dict[str, Tensor]:
        """All weights in this dtype; those of the last dtype are dropped."""
        if self._weights is None or self._weights[0] != dtype:
            self._forget()
            self._weights = dtype, models.make_weights(self.shape, getattr(torch, dtype), self.device)
        return self._weights[1]

    def _forget(self) -> None:
        """Drop the weights, and with them networks that only the garbage collector knows of."""
        if self._weights is not None:
            self._weights = None
            tidy()

    def folder(self) -> Path:
        """The folder of the model's configurations and tokenizer, in both libraries' words."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="speed-"))
            load.write_diffusers_config(self._folder / "config", self.shape.settings)
        return self._folder / "config"

    def file(self) -> Path:
        """A checkpoint of these weights in float16, in the page cache."""
        file = self.folder().with_name("model.safetensors")
        if not file.exists():
            from ldm.checkpoints import save_safetensors

            weights = models.make_weights(self.shape, torch.float16, torch.device("cpu"))
            save_safetensors(file, weights, {"format": "pt"})
        load.read_through(file)
        return file

    def reference(self, row: Row) -> Tensor | None:
        """Diffusers' float32 answer, computed once for all dtypes; None where a part has no gate."""
        if row.part in ("import", "load"):
            return None
        # Starting and remembering paint the same picture, and all numbers of steps have one gate.
        place = f"{'memory' if row.part == 'cold-start' else row.part}/{row.px}/{row.batch}"
        if place not in self._references:
            plain = Row(row.part, "float32", row.px, row.batch, row.steps)
            self._references[place] = self.answer(BASELINE, plain)
            if row.part == "train":
                tidy()  # its weights are nobody else's
        return self._references[place]

    def answer(self, name: str, row: Row) -> Tensor:
        """Build one contestant, ask what the gate would, and let it go."""
        with self.open(row) as build:
            return build(name).answer()

    @contextlib.contextmanager
    def open(self, row: Row) -> Iterator[Callable[[str], Contestant]]:
        """Open a row: yields what builds a contestant by its name.

        The builder raises ResourceError where the memory would not do, UsageError where there are no kernels.
        """
        if row.part == "train" or row.part in PROCESSES:
            self._forget()  # not needed, and training needs the memory
        else:
            self.weights(row.dtype)  # before the room that is left is measured
        with ExitStack() as stack:
            if row.part == "train":
                yield TrainingRow(self.shape, row, self.device, stack).build
            elif row.part in PROCESSES:
                yield lambda name: self._process(name, row)
            else:
                build = self._image if row.part == "image" else self._network
                room = Room(self.device)
                yield lambda name: build(name, row, room, stack)

    # --- parts of a model ---

    def _network(self, name: str, row: Row, room: Room, stack: ExitStack) -> Contestant:
        weights = self.weights(row.dtype)
        inputs = models.make_inputs(
            self.shape, row.part, row.batch, getattr(torch, row.dtype), self.device, row.px
        )
        prefix = {"clip": TEXT, "unet": UNET}.get(row.part, VAE)
        if name not in PLAIN:
            used = "" if name in OURS else prefix  # kernels are for a whole model
            room.take(sum(w.nbytes for key, w in weights.items() if key.startswith(used)), name)
        if name == "openvino":
            return self._openvino(row, prefix, inputs)
        if name in OURS:
            model: Any = models.build_ours(self.shape, weights, self.device)
            if name == "ldm-kernels":
                process.use_kernels(model, row.compiled, stack)
            calls = OUR_CALLS
        else:
            model = self._theirs(row.part, weights)
            if name in ("diffusers-best", "diffusers-frozen"):
                process.strengthen(model, row.compiled or name == "diffusers-frozen")
            calls = THEIR_CALLS
        return in_process(lambda: calls[row.part](model, inputs), name, row, self.device)

    def _theirs(self, part: str, weights: dict[str, Tensor]) -> torch.nn.Module:
        build = {"clip": models.build_their_text_encoder, "unet": models.build_their_unet}
        return build.get(part, models.build_their_vae)(self.shape, weights, self.device)

    def _openvino(self, row: Row, prefix: str, inputs: dict[str, Tensor]) -> Contestant:
        """Convert the part at hand, in float32: the same numbers, whatever it is to compute in."""
        from bench.speedlib import peers

        if self.device.type != "cpu":
            raise UsageError("OpenVINO runs on a CPU here, this row is elsewhere; leave it out of --peers")
        weights = {
            name: weight.float()
            for name, weight in self.weights(row.dtype).items()
            if name.startswith(prefix)
        }
        inputs = {
            name: value.float() if value.is_floating_point() else value for name, value in inputs.items()
        }
        call, version = peers.openvino_call(
            self._theirs(row.part, weights), THEIR_CALLS[row.part], inputs, row.dtype
        )
        return dataclasses.replace(in_process(call, "openvino", row, self.device), notes={"version": version})

    # --- whole pictures ---

    def _image(self, name: str, row: Row, room: Room, stack: ExitStack) -> Contestant:
        weights = self.weights(row.dtype)
        if name not in PLAIN:
            room.take(sum(w.nbytes for w in weights.values()), name)
        if name in OURS:
            painter: Any = process.painter_of(models.build_ours(self.shape, weights, self.device))
            if name == "ldm-kernels":
                process.use_kernels(painter.model, row.compiled, stack)
        else:
            painter = process.painter_of(their_pipeline(self.shape, weights, self.device, self.folder()))
            if name == "diffusers-best":
                process.strengthen_pipeline(painter, row.compiled)

        def paint(steps: int = row.steps) -> Tensor:
            return process.paint(painter, px=row.px, steps=steps, batch=row.batch)

        return in_process(paint, name, row, self.device, answer=lambda: paint(GATE_STEPS))

    # --- whole processes ---

    def _process(self, name: str, row: Row) -> Contestant:
        if row.part == "import":

            def import_once() -> Figures:
                found = load.fresh_process(load.__file__, ["--one", name])
                return found | {"seconds": found["torch_seconds"] + found["import_seconds"]}

            return Contestant(None, import_once)
        file, config = self.file(), self.folder()
        if row.part == "load":
            return Contestant(None, lambda: load.run_one(name, file, row.dtype, config, self.device.type))
        if name == "ldm-kernels":
            process.need_kernels()
        picture = file.with_name("picture.npy")
        wish = {
            "contestant": name,
            "file": str(file),
            "config": str(config),
            "dtype": row.dtype,
            "device": self.device.type,
            "px": row.px,
            "compiled": row.compiled,
            "threads": torch.get_num_threads(),
            "picture": str(picture),
        }
        # The first compiled run, that which answers, fills a cache of its own; those after it find what it left.
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(file.with_name(f"cache-{name}-{row.dtype}"))}

        def measure() -> Figures:
            return load.fresh_process(process.__file__, [json.dumps(wish)], cache)

        notes: dict[str, Any] = {}

        def answer() -> Tensor:
            notes["first_run"] = measure()
            return torch.from_numpy(np.load(picture))

        return Contestant(answer, measure, notes=notes)


def their_pipeline(shape: Geometry, weights: dict[str, Tensor], device: torch.device, config: Path) -> Any:
    """Build diffusers' StableDiffusionPipeline upon these weights; its tokenizer is read from the folder."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizer

    return StableDiffusionPipeline(
        unet=models.build_their_unet(shape, weights, device),
        vae=models.build_their_vae(shape, weights, device),
        text_encoder=models.build_their_text_encoder(shape, weights, device),
        tokenizer=CLIPTokenizer.from_pretrained(config / "tokenizer"),
        scheduler=DDIMScheduler.from_config(shape.diffusers["scheduler"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
