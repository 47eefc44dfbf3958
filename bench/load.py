"""Loading the full-size v1-5 file: seconds and peak memory beside diffusers' from_single_file.

    python bench/load.py [--file v1-5-pruned-emaonly.safetensors] [--repeats 3] [--save bench/results/load.json]

Without --file a file of the same layout is made up (2.13 GB, fp16) and removed at the end. Every load runs in a
process of its own, the two libraries in turn, after one read of the file that fills the page cache. Seconds are
from a process that has imported its library to a model in evaluation mode; "ready" is when, besides, every weight
has been read once, for diffusers leaves weights mapped in the file and pays for them at the first use. Peak memory
is the largest sum of anonymous pages (what the process owns) and the largest resident set (that, and mapped pages).
diffusers is given its configuration and tokenizer as local files, so that neither side asks a network.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("ldm", "diffusers")
UNET = {
    "_class_name": "UNet2DConditionModel",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "sample_size": 64,
}
VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_diffusers_config(folder: Path) -> None:
    """Write what diffusers would fetch from the hub for a v1 file: JSON files and the tokenizer, no weights."""
    from ldm.modules.encoders.modules import CLIP_L_FIELDS
    from ldm.modules.encoders.tokenizer import read_vocabulary, write_vocabulary
    from ldm.paths import PACKAGE

    text = {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **CLIP_L_FIELDS}
    for name, content in (
        ("model_index.json", INDEX),
        ("unet/config.json", UNET),
        ("vae/config.json", VAE),
        ("scheduler/scheduler_config.json", SCHEDULER),
        ("text_encoder/config.json", text),
        ("tokenizer/tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}),
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    write_vocabulary(folder / "tokenizer", *read_vocabulary(PACKAGE / "data" / "clip_merges.txt.gz"))


class Watch:
    """Watch this process's memory every five milliseconds until stopped."""

    def __init__(self) -> None:
        self.anonymous = self.resident = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._over.is_set():
            fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.anonymous = max(self.anonymous, int(fields["RssAnon"].split()[0]) * 1024)
            self.resident = max(self.resident, int(fields["VmRSS"].split()[0]) * 1024)
            self._over.wait(0.005)

    def stop(self) -> None:
        self._over.set()
        self._thread.join()


def measure(library: str, file: str, dtype_name: str, config: str) -> dict[str, float]:
    """Load once in this process."""
    import torch

    dtype = getattr(torch, dtype_name)
    started = time.perf_counter()
    if library == "ldm":
        from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

        import ldm.models.diffusion.ddpm  # noqa: F401
        from ldm.checkpoints import load_latent_diffusion
        from ldm.modules.encoders.modules import FrozenCLIPEmbedder  # noqa: F401
    else:
        from diffusers import StableDiffusionPipeline
    imported = time.perf_counter()
    watch = Watch()
    if library == "ldm":
        model, report = load_latent_diffusion(file, dtype=dtype)
        assert report.total == 1131, report.summary()
        networks = [model]
    else:
        pipe = StableDiffusionPipeline.from_single_file(
            file, config=config, torch_dtype=dtype, local_files_only=True, safety_checker=None
        )
        networks = [pipe.unet, pipe.vae, pipe.text_encoder]
    loaded = time.perf_counter()
    weights = [weight for network in networks for weight in network.parameters()]
    assert sum(weight.numel() for weight in weights) == 1_066_235_307
    assert all(weight.dtype == dtype and bool(torch.isfinite(weight.detach().sum())) for weight in weights)
    ready = time.perf_counter()
    watch.stop()
    return {
        "import_seconds": imported - started,
        "seconds": loaded - imported,
        "ready_seconds": ready - imported,
        "anonymous_gb": watch.anonymous / 1e9,
        "resident_gb": watch.resident / 1e9,
    }


def run_one(library: str, file: Path, dtype: str, config: Path) -> dict[str, float]:
    """Load once in a fresh process."""
    words = [
        sys.executable,
        __file__,
        "--one",
        library,
        "--file",
        str(file),
        "--dtypes",
        dtype,
        "--config",
        str(config),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment["HF_HUB_OFFLINE"] = "1"
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{library} failed: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(file: Path, dtypes: list[str], repeats: int, folder: Path) -> dict:
    """Measure both libraries in turn; of each figure the smallest, which other work on the machine disturbs least."""
    write_diffusers_config(folder)
    with file.open("rb") as stream:
        while stream.read(1 << 24):
            pass
    results: dict = {}
    for dtype in dtypes:
        runs: dict[str, list[dict[str, float]]] = {library: [] for library in LIBRARIES}
        for _ in range(repeats):
            for library in LIBRARIES:
                runs[library].append(run_one(library, file, dtype, folder))
        results[dtype] = {
            library: {key: round(min(run[key] for run in found), 3) for key in found[0]}
            | {"all_ready_seconds": [round(run["ready_seconds"], 3) for run in found]}
            for library, found in runs.items()
        }
    return results


def versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "transformers", "diffusers", "safetensors")
    return {name: version(name) for name in names} | {"cpus": str(os.cpu_count())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", type=Path, help="a v1 file; default: one that is made up")
    parser.add_argument("--dtypes", nargs="+", default=["float16", "float32"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--save", type=Path, help="write the results as JSON")
    parser.add_argument("--one", choices=LIBRARIES, help=argparse.SUPPRESS)
    parser.add_argument("--config", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, str(options.file), options.dtypes[0], options.config)))
        return
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    with tempfile.TemporaryDirectory() as folder:
        file = options.file
        if file is None:
            from make_synthetic import make_full

            file = Path(folder) / "v1-5-pruned-emaonly.safetensors"
            make_full(file)
        results = compare(file, options.dtypes, options.repeats, Path(folder) / "config")
    for dtype, found in results.items():
        for library, numbers in found.items():
            print(
                f"{dtype:>8} {library:<10} {numbers['seconds']:6.2f} s   ready {numbers['ready_seconds']:6.2f} s   "
                f"import {numbers['import_seconds']:5.2f} s   {numbers['anonymous_gb']:.2f} GB anonymous   "
                f"{numbers['resident_gb']:.2f} GB resident"
            )
    if options.save:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text(json.dumps({"versions": versions(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
