"""Loading the full-size v1-5 file: seconds and peak memory beside diffusers' from_single_file.

    python bench/load.py [--file v1-5-pruned-emaonly.safetensors] [--repeats 3] [--save bench/results/load.json]

Without --file a file of the same layout is made up (2.13 GB, fp16) and removed at the end. Every load runs in a
process of its own, the two libraries in turn, after one read of the file that fills the page cache. Seconds are
from a process that has imported its library to a model in evaluation mode; "ready" is when, besides, every weight
has been read once, for diffusers leaves weights mapped in the file and pays for them at the first use. Peak memory
is the largest sum of anonymous pages (what the process owns) and the largest resident set (that, and mapped pages).
diffusers is given its configuration and tokenizer as local files, so that neither side asks a network;
"diffusers-default" is told no dtype, which is how from_single_file is usually called, and makes float32 of any file.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ("ldm", "diffusers", "diffusers-default")
SETTINGS = "ldm.yaml"  # in the folder of diffusers' configuration: the same model in CompVis's keys
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


def diffusers_config(settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Say a configuration with CompVis's keys in diffusers' words: of "unet", "vae", "scheduler", "text_encoder".

    Serves the networks that both libraries have; ldm.checkpoints.folders is the way back.
    """
    from ldm.checkpoints.folders import PREDICTIONS
    from ldm.modules.encoders.modules import CLIP_L_FIELDS
    from ldm.paths import shipped

    params = settings["model"]["params"]
    unet, first_stage, stage = (
        params[f"{name}_config"].get("params", {}) for name in ("unet", "first_stage", "cond_stage")
    )
    levels, vae = len(unet["channel_mult"]), first_stage["ddconfig"]
    attends = [2**level in unet["attention_resolutions"] for level in range(levels)]
    widths = [unet["model_channels"] * factor for factor in unet["channel_mult"]]
    heads: Any = unet.get("num_heads", -1)
    if heads == -1:
        heads = [width // unet["num_head_channels"] for width in widths]
    predicts = params.get("parameterization", "eps")
    text = CLIP_L_FIELDS
    if "version" in stage:
        text = json.loads((shipped(stage["version"]) / "config.json").read_text(encoding="utf-8"))
    return {
        "unet": {
            "_class_name": "UNet2DConditionModel",
            "attention_head_dim": heads,
            "block_out_channels": widths,
            "cross_attention_dim": unet["context_dim"],
            "down_block_types": ["CrossAttnDownBlock2D" if at else "DownBlock2D" for at in attends],
            "up_block_types": ["CrossAttnUpBlock2D" if at else "UpBlock2D" for at in reversed(attends)],
            "in_channels": unet["in_channels"],
            "out_channels": unet["out_channels"],
            "layers_per_block": unet["num_res_blocks"],
            "resnet_time_scale_shift": "scale_shift" if unet.get("use_scale_shift_norm") else "default",
            "sample_size": params["image_size"],
        },
        "vae": {
            "_class_name": "AutoencoderKL",
            "block_out_channels": [vae["ch"] * factor for factor in vae["ch_mult"]],
            "down_block_types": ["DownEncoderBlock2D"] * len(vae["ch_mult"]),
            "up_block_types": ["UpDecoderBlock2D"] * len(vae["ch_mult"]),
            "in_channels": vae["in_channels"],
            "out_channels": vae["out_ch"],
            "latent_channels": vae["z_channels"],
            "layers_per_block": vae["num_res_blocks"],
            "norm_num_groups": vae.get("num_groups", 32),
            "sample_size": params["image_size"] * 2 ** (len(vae["ch_mult"]) - 1),
            "scaling_factor": params.get("scale_factor", 1.0),
        },
        "scheduler": {
            "_class_name": "DDIMScheduler",
            "beta_end": params["linear_end"],
            "beta_schedule": "scaled_linear",
            "beta_start": params["linear_start"],
            "clip_sample": False,
            "num_train_timesteps": params["timesteps"],
            "prediction_type": next(theirs for theirs, ours in PREDICTIONS.items() if ours == predicts),
            "set_alpha_to_one": False,
            "steps_offset": 1,
        },
        "text_encoder": {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **text},
    }


def write_diffusers_config(folder: Path, settings: dict[str, Any] | None = None) -> None:
    """Write what diffusers would fetch from the hub for such a model: JSON files and the tokenizer, no weights.

    Args:
        settings: with CompVis's keys; they are written beside, for ldm. None stands for Stable Diffusion v1.
    """
    from ldm.checkpoints.configs import read_settings
    from ldm.modules.encoders.tokenizer import read_vocabulary, write_vocabulary
    from ldm.paths import PACKAGE, shipped

    if settings is None:
        settings = read_settings(shipped("configs/v1-inference.yaml"))
    parts = diffusers_config(settings)
    stage = settings["model"]["params"]["cond_stage_config"].get("params", {})
    tokenizer = {"tokenizer_class": "CLIPTokenizer", "model_max_length": stage.get("max_length", 77)}
    for name, content in (
        ("model_index.json", INDEX),
        ("tokenizer/tokenizer_config.json", tokenizer),
        (SETTINGS, settings),
        ("unet/config.json", parts["unet"]),
        ("vae/config.json", parts["vae"]),
        ("scheduler/scheduler_config.json", parts["scheduler"]),
        ("text_encoder/config.json", parts["text_encoder"]),
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    vocabulary = shipped(stage["version"]) if "version" in stage else PACKAGE / "data" / "clip_merges.txt.gz"
    write_vocabulary(folder / "tokenizer", *read_vocabulary(vocabulary))


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


def import_library(library: str) -> dict[str, float]:
    """Import all that loading and painting need, in this process; seconds of torch, and of what comes after."""
    started = time.perf_counter()
    import torch  # noqa: F401

    imported = time.perf_counter()
    if library == "ldm":
        import omegaconf  # noqa: F401
        from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

        import ldm.checkpoints
        import ldm.generate
        import ldm.models.diffusion.ddpm
        import ldm.modules.encoders.modules  # noqa: F401
    else:
        from diffusers import StableDiffusionPipeline  # noqa: F401
    return {"torch_seconds": imported - started, "import_seconds": time.perf_counter() - imported}


def load_library(library: str, file: str, dtype_name: str, config: str, device: str = "cpu") -> Any:
    """Load a file in evaluation mode: a LatentDiffusion, or diffusers' pipeline.

    Args:
        config: the folder that write_diffusers_config wrote.
    """
    import torch

    dtype = getattr(torch, dtype_name)
    if library == "ldm":
        from ldm.checkpoints import load_latent_diffusion

        return load_latent_diffusion(file, config=Path(config) / SETTINGS, dtype=dtype, device=device)[0]
    from diffusers import StableDiffusionPipeline

    asked = {} if library == "diffusers-default" else {"torch_dtype": dtype}
    pipe = StableDiffusionPipeline.from_single_file(
        file, config=config, local_files_only=True, safety_checker=None, **asked
    )
    return pipe.to(device)


def measure(library: str, file: str, dtype_name: str, config: str, device: str = "cpu") -> dict[str, float]:
    """Load once in this process."""
    seconds = import_library(library)
    import torch

    watch = Watch()
    started = time.perf_counter()
    model = load_library(library, file, dtype_name, config, device)
    loaded = time.perf_counter()
    networks = [model] if library == "ldm" else [model.unet, model.vae, model.text_encoder]
    weights = [weight for network in networks for weight in network.parameters()]
    # Reading a sum back also waits for a GPU.
    assert all(bool(torch.isfinite(weight.detach().sum())) for weight in weights)
    ready = time.perf_counter()
    watch.stop()
    made = "float32" if library == "diffusers-default" else dtype_name
    assert all(weight.dtype == getattr(torch, made) for weight in weights)
    assert sum(weight.numel() for weight in weights) == count_parameters(file)
    return seconds | {
        "seconds": loaded - started,
        "ready_seconds": ready - started,
        "anonymous_gb": watch.anonymous / 1e9,
        "resident_gb": watch.resident / 1e9,
    }


def count_parameters(file: str) -> int:
    """Count the weights in a file: of the three networks, without averages, tables and constants."""
    from ldm.checkpoints import open_weights
    from ldm.checkpoints.key_mapping import POSITION_IDS, TEXT, UNET, VAE

    with contextlib.closing(open_weights(file)) as weights:
        infos = weights.infos.items()
        networks = [(name, info) for name, info in infos if name.startswith((UNET, VAE, TEXT))]
    return sum(info.numel for name, info in networks if not name.endswith(POSITION_IDS))


def fresh_process(
    script: str, words: list[str], environment: dict[str, str] | None = None
) -> dict[str, float]:
    """Run a script of ours in a process of its own, without a network, and read the figures that it prints last.

    Raises:
        ResourceError: it failed; its last words are named.
    """
    from ldm.errors import ResourceError

    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **(environment or {}), "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, env=environment)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise ResourceError(
            f"'{Path(script).name} {' '.join(words)}' ended with code {done.returncode} and said: {said}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def run_one(library: str, file: Path, dtype: str, config: Path, device: str = "cpu") -> dict[str, float]:
    """Load once in a fresh process."""
    words = ["--one", library, "--file", str(file), "--dtypes", dtype, "--config", str(config)]
    return fresh_process(__file__, [*words, "--device", device])


def read_through(file: Path) -> None:
    """Read a file once, so that it lies in the page cache."""
    with file.open("rb") as stream:
        while stream.read(1 << 24):
            pass


def compare(file: Path, dtypes: list[str], repeats: int, folder: Path) -> dict:
    """Measure both libraries in turn; of each figure the smallest, which other work on the machine disturbs least."""
    write_diffusers_config(folder)
    read_through(file)
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
    parser.add_argument("--device", default="cpu", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one and options.file is None:
        print(json.dumps(import_library(options.one)))
        return
    if options.one:
        found = measure(options.one, str(options.file), options.dtypes[0], options.config, options.device)
        print(json.dumps(found))
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
                f"{dtype:>8} {library:<18} {numbers['seconds']:6.2f} s   ready {numbers['ready_seconds']:6.2f} s   "
                f"import {numbers['import_seconds']:5.2f} s   {numbers['anonymous_gb']:.2f} GB anonymous   "
                f"{numbers['resident_gb']:.2f} GB resident"
            )
    if options.save:
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text(json.dumps({"versions": versions(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
