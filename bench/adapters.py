"""What LoRAs cost a guided step of the UNet: with none and some on, plain and optimized, beside diffusers with peft.

One process, identical weights, LoRAs (made up, of rank 16 on every product of the transformers, in kohya's layout) and
inputs. All of a row run in turn, so every round switches the LoRAs off and on again. Each finished row is saved at
once; a second run does what is missing. diffusers needs peft (`pip install peft`) for its part.

    python bench/adapters.py                                       # v1, float32 and bfloat16, 0, 1, 3 and 10 LoRAs
    python bench/adapters.py --dtypes bfloat16 --counts 3 --px 256
    python bench/adapters.py --set --dtypes bfloat16 --repeats 2   # a ControlNet, a LoRA and an IP-Adapter together
"""

import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # the tests have the means to make weights up

from bench import quality  # noqa: E402
from ldm import cli  # noqa: E402
from ldm.errors import MismatchError  # noqa: E402

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bench.speedlib.models import Geometry

RESULTS = Path(__file__).parent / "results" / "adapters.json"
RANK = 16
COUNTS = (1, 3, 10)
# Of the largest number, between a contestant's answer and that of diffusers or, without it, of plain ldm.
LIMITS = {"float32": 1e-4, "bfloat16": 0.1}

Step = Callable[[], "Tensor"]


def make_loras(shape: "Geometry", folder: Path, count: int) -> list[Path]:
    """Write LoRAs for every product and projection of the UNet's transformers, in kohya's layout and float16."""
    import torch

    from ldm.checkpoints import save_safetensors
    from ldm.checkpoints.build import build_empty
    from ldm.checkpoints.key_mapping import unet_to_diffusers

    unet = build_empty(shape.settings).model.diffusion_model
    shapes = {name: tuple(weight.shape) for name, weight in unet.named_parameters()}
    theirs = unet_to_diffusers(shapes)
    kinds = ("attn1.", "attn2.", "ff.", "proj_in.", "proj_out.")
    chosen = [n for n, s in shapes.items() if len(s) > 1 and any(kind in n for kind in kinds)]
    paths = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for name in chosen:
            rows, columns, *kernel = shapes[name]
            module = "lora_unet_" + theirs[name].removesuffix(".weight").replace(".", "_")
            down = torch.randn(RANK, columns, *kernel, generator=generator) / columns**0.5
            up = 0.02 * torch.randn(rows, RANK, *[1] * len(kernel), generator=generator)
            tensors[f"{module}.lora_down.weight"], tensors[f"{module}.lora_up.weight"] = (
                down.half(),
                up.half(),
            )
            tensors[f"{module}.alpha"] = torch.tensor(float(RANK))
        paths.append(folder / f"style{number}.safetensors")
        save_safetensors(paths[-1], tensors, {})
    return paths


def our_step(
    shape: "Geometry",
    weights: dict[str, "Tensor"],
    inputs: dict[str, "Tensor"],
    optimized: bool,
    stack: ExitStack,
) -> Callable[[list[Path]], Step]:
    """Build our model; gives what makes a step with some LoRAs on."""
    from bench.speedlib.models import build_ours
    from ldm.adapters import LoRA
    from ldm.kernels import optimize, restore
    from ldm.modules.seams import Scope

    model = build_ours(shape, weights, inputs["x"].device)
    if optimized:
        optimize(model)
        stack.callback(restore, model)

    def with_loras(files: list[Path]) -> Step:
        scope = Scope(model.model.diffusion_model, [LoRA(file, 0.7) for file in files])

        def step() -> "Tensor":
            with scope:
                return model.apply_model(inputs["x"], inputs["t"], inputs["context"])

        return step

    return with_loras


def their_step(
    shape: "Geometry",
    weights: dict[str, "Tensor"],
    inputs: dict[str, "Tensor"],
    files: list[Path],
    fused: bool,
) -> Step:
    """Build diffusers' UNet with LoRAs on, beside the weights or within them."""
    from bench.speedlib.models import build_their_unet

    if fused:  # it writes into the weights
        weights = {name: weight.clone() for name, weight in weights.items()}
    unet = build_their_unet(shape, weights, inputs["x"].device)
    names = load_their_loras(unet, files)
    unet.to(inputs["x"].dtype)  # the files are float16
    is_ready = not fused

    def step() -> "Tensor":
        nonlocal is_ready
        if not is_ready:  # within the first step, as ours
            unet.fuse_lora(adapter_names=names)
            unet.unload_lora()
            is_ready = True
        return unet(inputs["x"], inputs["t"], inputs["context"], return_dict=False)[0]

    return step


def load_their_loras(unet: Any, files: list[Path]) -> list[str]:
    """Put LoRAs beside the weights of diffusers' UNet; gives their names there."""
    from safetensors.torch import load_file

    modules = {name.replace(".", "_"): name for name, _ in unet.named_modules()}
    for number, file in enumerate(files):
        state = {}
        for key, tensor in load_file(file).items():
            module, _, role = key.removeprefix("lora_unet_").partition(".")
            if role != "alpha":  # it is the rank, which diffusers takes where nothing is said
                end = "lora_A.weight" if role.startswith("lora_down") else "lora_B.weight"
                state[f"{modules[module]}.{end}"] = tensor
        unet.load_lora_adapter(state, prefix=None, adapter_name=f"style{number}")
    names = [f"style{number}" for number in range(len(files))]
    if files:
        unet.set_adapters(names, weights=[0.7] * len(files))
    return names


def held_bytes(device: "torch.device") -> int:
    """Count the memory that this process holds, on a GPU what torch allocated there."""
    if device.type == "cuda":
        import torch

        return torch.cuda.memory_allocated(device)
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")
    )
    return int(line.split()[1]) * 1024


def begin(build: Callable[[], Step], device: "torch.device") -> tuple[Step, dict[str, Any], "Tensor"]:
    """Build what makes a step and make the first one: (it, its seconds and the memory that stays, its answer)."""
    from bench.speedlib import timing
    from bench.speedlib.contestants import tidy

    tidy()
    before = held_bytes(device)
    step = build()
    answers: list[Tensor] = []
    first = timing.clocked(lambda: answers.append(step()), device)
    answer = answers.pop().float()
    tidy()
    found = {"first_seconds": first["seconds"], "held_gb": (held_bytes(device) - before) / 1e9}
    return step, found, answer


def errors_of(name: str, dtype: str, answer: "Tensor", reference: "Tensor") -> dict[str, float]:
    """Compare an answer with the reference.

    Raises:
        MismatchError: it is wrong.
    """
    from bench.speedlib.gate import relative_errors

    error, rms = relative_errors(answer, reference)
    if error > LIMITS[dtype]:
        raise MismatchError(f"{name} in {dtype} is off by {error:.2g} of the largest number, not timed")
    return {"max_error": error, "rms_error": rms}


def time_in_turn(steps: dict[str, Step], device: "torch.device", repeats: int) -> dict[str, list[float]]:
    """Time steps in rounds, each in turn: seconds by name."""
    from bench.speedlib import timing

    timed = {name: lambda step=step: timing.clocked(step, device) for name, step in steps.items()}
    runs = timing.interleave(timed, repeats=repeats)
    return {name: [run["seconds"] for run in several] for name, several in runs.items()}


def measure(
    shape: "Geometry", dtype: str, count: int, px: int, device: "torch.device", repeats: int
) -> dict[str, Any]:
    """Measure a row: first steps, then rounds in turn.

    Raises:
        MismatchError: an answer is wrong.
    """
    import torch

    from bench.speedlib import models, timing
    from ldm.checkpoints.key_mapping import UNET

    weights = models.make_weights(shape, getattr(torch, dtype), device, prefixes=(UNET,))
    inputs = models.make_inputs(shape, "unet", 2, getattr(torch, dtype), device, px)
    row: dict[str, Any] = {"contestants": {}, "left_out": {}}
    steps: dict[str, Step] = {}
    with ExitStack() as stack, torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        files = make_loras(shape, Path(folder), count)
        for name, optimized in (("ldm", False), ("ldm optimized", True)):
            with_loras = our_step(shape, weights, inputs, optimized, stack)
            steps[f"{name}, none"], steps[f"{name}, {count}"] = with_loras([]), with_loras(files)
        if importlib.util.find_spec("peft") is None:
            row["left_out"] = {"diffusers": "no peft: pip install peft"}
        else:
            steps["diffusers, none"] = their_step(shape, weights, inputs, [], False)
            steps[f"diffusers, {count} beside"] = their_step(shape, weights, inputs, files, False)
            steps[f"diffusers, {count} fused"] = their_step(shape, weights, inputs, files, True)
        answers: dict[str, torch.Tensor] = {}
        for name, step in steps.items():
            _, row["contestants"][name], answers[name] = begin(lambda step=step: step, device)
        for name, answer in answers.items():
            of = "none" if name.endswith("none") else f"{count} beside"
            reference = answers.get(f"diffusers, {of}", answers[f"ldm, {name.split(', ')[1].split()[0]}"])
            row["contestants"][name] |= errors_of(name, dtype, answer, reference)
        seconds = time_in_turn(steps, device, repeats)
    for name, several in seconds.items():
        row["contestants"][name] |= {"seconds": timing.spread(several)}
        if not name.endswith("none"):
            none = seconds[f"{name.split(',')[0]}, none"]
            row["contestants"][name] |= {"to_none": timing.compare(several, none)}
    return row


def measure_set(
    shape: "Geometry", dtype: str, px: int, device: "torch.device", repeats: int
) -> dict[str, Any]:
    """Measure a ControlNet, a LoRA and an IP-Adapter together, as `measure` does; held is all but the UNet's weights.

    Raises:
        MismatchError: an answer is wrong.
    """
    import torch

    from bench.speedlib import adapter_set, models, timing
    from ldm.checkpoints.key_mapping import UNET

    weights = models.make_weights(shape, getattr(torch, dtype), device, prefixes=(UNET,))
    inputs = models.make_inputs(shape, "unet", 2, getattr(torch, dtype), device, px)
    extras = adapter_set.make_extras(px)
    row: dict[str, Any] = {"contestants": {}, "left_out": {}}
    steps: dict[str, Step] = {}
    with ExitStack() as stack, torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        files = {"lora": make_loras(shape, Path(folder), 1)[0], **adapter_set.make_files(shape, Path(folder))}
        given = (shape, weights, inputs, files, extras)
        builders = {
            "diffusers, set": lambda: adapter_set.their_set(*given, load_their_loras),
            "ldm, set": lambda: adapter_set.our_set(*given, False, stack),
            "ldm optimized, set": lambda: adapter_set.our_set(*given, True, stack),
        }
        if importlib.util.find_spec("peft") is None:
            del builders["diffusers, set"]
            row["left_out"] = {"diffusers": "no peft: pip install peft"}
        reference = None
        for name, build in builders.items():
            steps[name], row["contestants"][name], answer = begin(build, device)
            reference = answer if reference is None else reference
            row["contestants"][name] |= errors_of(name, dtype, answer, reference)
        seconds = time_in_turn(steps, device, repeats)
    for name, several in seconds.items():
        row["contestants"][name]["seconds"] = timing.spread(several)
        if name != "diffusers, set" and "diffusers, set" in seconds:
            row["contestants"][name]["to_diffusers"] = timing.compare(several, seconds["diffusers, set"])
    return row


def make_table(results: dict[str, Any]) -> str:
    """Lay the rows out as Markdown."""
    lines = [
        "# What LoRAs cost",
        "",
        f"A guided step of the UNet ({results['model']}), LoRAs of rank {RANK} on its transformers. First: the first "
        "step, in which ldm adds the LoRAs to a copy of the weights and, optimized, packs them, and diffusers fuses "
        "where it does. Then all run in turn, so that every round switches ldm's LoRAs off and on again: medians and, "
        "in brackets, the least and the greatest. To none: the ratio of medians, and of the least, to its step "
        "without LoRAs. Held: "
        "memory that stays after the first step, without the network itself (of a set with all that it brings). Set: "
        "a ControlNet, a LoRA and an IP-Adapter (plain, one picture) together, diffusers' LoRA beside the weights. "
        "Made by `python bench/adapters.py` on "
        f"{results['machine']}, {results['threads']} threads, torch {results['versions']['torch']}, diffusers "
        f"{results['versions']['diffusers']}, peft {results['versions']['peft']}.",
        "",
        "| row | who, LoRAs | first, s | step, s | to none | held, GB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for key, row in results["rows"].items():
        for name, one in row["contestants"].items():
            s, ratio = one["seconds"], one.get("to_none")
            none = row["contestants"].get(f"{name.split(',')[0]}, none")
            least = None if none is None else s["min"] / none["seconds"]["min"]
            cells = (
                f"`{key}`",
                name,
                f"{one['first_seconds']:.3g}",
                f"{s['median']:.3g} ({s['min']:.3g} to {s['max']:.3g})",
                "" if ratio is None else f"{ratio['of_medians']:.2f}, {least:.2f}",
                f"{one['held_gb']:.2f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
        lines += [f"| `{key}` | {name}: left out, {why} | | | | |" for name, why in row["left_out"].items()]
    return "\n".join(lines) + "\n"


def parse(argv: list[str] | None) -> Any:
    parser = cli.Parser(description="Measure what LoRAs cost a step, beside diffusers and peft.")
    parser.add_argument(
        "--model", choices=("v1", "shapes", "tiny"), default="v1", help="geometry; v1 is Stable Diffusion's"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    parser.add_argument("--dtypes", nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument(
        "--counts", nargs="+", type=cli.integer(1, 100), default=list(COUNTS), help="how many LoRAs"
    )
    parser.add_argument("--set", action="store_true", help="not --counts: three kinds at once")
    parser.add_argument(
        "--px", type=cli.integer(64, 2048), help="side of the pictures (default: the model's)"
    )
    parser.add_argument("--repeats", type=cli.integer(1, 10_000), default=5, help="rounds of each row")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file; .md goes beside it")
    parser.add_argument("--fresh", action="store_true", help="begin again, whatever --results holds")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    opt = parse(argv)
    from importlib.metadata import version

    import torch

    from bench.load import versions
    from bench.speedlib import models, report
    from bench.speedlib.contestants import tidy
    from bench.speedlib.process import forbid_tf32
    from ldm.devices import pick_device

    device, shape = pick_device(opt.device), models.geometry(opt.model)
    forbid_tf32()
    peft = version("peft") if importlib.util.find_spec("peft") is not None else None
    if peft is None:
        cli.say("diffusers is left out: no peft; pip install peft")
    head = {
        "model": shape.name,
        "machine": report.machine_name(device),
        "threads": torch.get_num_threads(),
        "versions": versions() | {"peft": peft},
    }
    results = {**head, "rows": {}} if opt.fresh else quality.load_results(opt.results, head)
    px = opt.px or shape.px
    for dtype in opt.dtypes:
        for count in ["set"] if opt.set else opt.counts:
            key = f"{dtype}/{px}/{count}"
            if key in results["rows"]:
                continue
            one = (shape, dtype) if opt.set else (shape, dtype, count)
            results["rows"][key] = (measure_set if opt.set else measure)(*one, px, device, opt.repeats)
            tidy()
            quality.save_results(opt.results, results)
            quality.write(opt.results.with_suffix(".md"), make_table(results).encode())
            cli.say(f"{key}: {json.dumps(results['rows'][key])}")
    cli.say(make_table(results))


if __name__ == "__main__":
    cli.run(main)
