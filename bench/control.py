"""A ControlNet on outlines for the model in the box: a plain training loop, and how often shapes follow the hint.

The training takes minutes on one core. It is saved every 50 steps, and a second run goes on where it was. Then unseen
scenes are painted with the hint and without it, from the same noise, and read by `ldm.shapes.checker`: whether every
attribute of the caption holds, and whether every object of the hint is there with its shape, its centre within 3 of
128 pixels and its extent within a tenth.

    python bench/control.py --logdir logs/control            # into bench/results/control.{json,md,png}
    python bench/control.py --logdir logs/control --steps 20 --scenes 4 --results /tmp/control.json
"""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from bench import quality  # noqa: E402
from ldm import cli  # noqa: E402

if TYPE_CHECKING:
    from PIL import Image

    from ldm.modules.diffusionmodules.controlnet import ControlNetModel
    from ldm.pipeline import StableDiffusion
    from ldm.shapes.checker import Sighting
    from ldm.shapes.scenes import Scene

RESULTS = Path(__file__).parent / "results" / "control.json"
SCENES = 2048  # of the training, encoded once
BATCH = 16
RATE = 2e-4  # of what is copied from the UNet
NEW_RATE = 1e-3  # of the hint's own layers and the zero convolutions, which begin from nothing
WARM_UP = 20  # steps
EVERY = 50  # steps between two saves
NO_CAPTION = 0.3  # share of captions that are dropped, for guidance
PAINTED = 25  # pictures at once
SHOWN = 10  # scenes of the contact sheet
EVALUATION_SEED = 7  # of the scenes that are painted; the quality table's is 0
CENTRE = 3 / 128  # how far an object's centre may be from the hint's, in pictures
EXTENT = 0.1  # and its extent, as a share of the hint's


def outlines(picture: "Image.Image") -> np.ndarray:
    """Draw where the colours of a picture change, white on black: (h, w, 3) bytes."""
    from PIL import ImageFilter

    change = np.asarray(picture.convert("RGB").filter(ImageFilter.FIND_EDGES)).max(2) > 40
    change[[0, -1]] = change[:, [0, -1]] = False  # where the filter has no neighbours
    return np.repeat(255 * change[..., None].astype(np.uint8), 3, 2)


def hints(scenes: Sequence["Scene"]) -> Any:
    """Give the outlines of scenes as a tensor (n, 3, 128, 128) in [0, 1]."""
    import torch

    from ldm.shapes.scenes import render

    pixels = np.stack([outlines(render(scene)) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def follows(seen: "Sighting", scene: "Scene") -> bool:
    """Tell whether a picture has every object of a scene where, as large and as shaped as it is, and no other."""
    left = list(seen.objects)
    for item in scene.items:
        near = [
            one
            for one in left
            if one.shape == item.shape
            and max(abs(one.x - item.x), abs(one.y - item.y)) <= CENTRE
            and abs(one.extent / item.extent - 1) <= EXTENT
        ]
        if not near:
            return False
        left.remove(near[0])
    return not left


# --- training ---------------------------------------------------------------------------------------


def train(pipeline: "StableDiffusion", steps: int, folder: Path) -> tuple["ControlNetModel", dict[str, Any]]:
    """Train a ControlNet to predict what the frozen UNet predicts, from the hint; resume what lies in a folder.

    Step i draws its scenes, levels and noise from seed i, so that a run that was interrupted ends as one that was not.

    Returns:
        the network, and its account: steps, seconds, losses (the mean of each 100 steps).
    """
    import torch

    from ldm.modules.diffusionmodules.controlnet import ControlNetModel
    from ldm.shapes.scenes import ShapesDataset

    model = pipeline.model
    unet = model.model.diffusion_model
    torch.manual_seed(0)  # of the hint's own layers
    network = ControlNetModel.beside(unet).start_from(unet).to(pipeline.device)
    for layer in network.input_hint_block[:-1:2]:
        # With torch's own start each of these seven layers keeps a part of the signal, and next to none is left.
        torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        torch.nn.init.zeros_(layer.bias)
    copied = set(unet.state_dict())
    groups = [
        {
            "rate": rate,
            "params": [x for name, x in network.named_parameters() if (name in copied) == is_copied],
        }
        for rate, is_copied in ((RATE, True), (NEW_RATE, False))
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    account: dict[str, Any] = {"steps": 0, "seconds": 0.0, "losses": []}
    saved = folder / "state.pt"
    if saved.exists():
        state = torch.load(saved, map_location=pipeline.device, weights_only=True)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        account = state["account"]
    if account["steps"] >= steps:
        return network.eval(), account
    dataset = ShapesDataset(seed=1, length=SCENES)
    scenes = [dataset.scene(i) for i in range(SCENES)]
    with torch.no_grad():
        latents = torch.cat(list(quality.encode_renders(pipeline, scenes, 64)))
        contexts = torch.cat(
            [
                model.get_learned_conditioning([scene.caption for scene in scenes[i : i + 64]])
                for i in range(0, SCENES, 64)
            ]
        )
        nothing = model.get_learned_conditioning([""])
    all_hints = hints(scenes)
    unet.requires_grad_(False)
    losses: list[float] = []
    began = time.monotonic()
    for step in range(account["steps"], steps):
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(SCENES, (BATCH,), generator=generator)
        t = torch.randint(model.num_timesteps, (BATCH,), generator=generator).to(pipeline.device)
        noise = torch.randn(BATCH, *latents.shape[1:], generator=generator).to(pipeline.device)
        is_dropped = torch.rand(BATCH, generator=generator) < NO_CAPTION
        context = torch.where(is_dropped[:, None, None].to(pipeline.device), nothing, contexts[rows])
        x_start = latents[rows]
        x_t = model.q_sample(x_start, t, noise)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * min(1.0, (step + 1) / WARM_UP)
        with torch.autocast(pipeline.device.type, torch.bfloat16):
            maps = network(x_t, all_hints[rows].to(pipeline.device), t, context)
            guess = unet(x_t, t, context=context, control=maps)
        loss = (guess.float() - model.get_v(x_start, noise, t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            account["steps"] = step + 1
            account["seconds"] = round(account["seconds"] + time.monotonic() - began, 1)
            account["losses"].append(round(float(np.mean(losses)), 5))
            began, losses = time.monotonic(), []
            _save(saved, network, optimizer, account)
            cli.say(f"step {step + 1}/{steps}: loss {account['losses'][-1]:.5f}, {account['seconds']:.0f} s")
    return network.eval(), account


def _save(path: Path, network: Any, optimizer: Any, account: dict[str, Any]) -> None:
    import io

    import torch

    whole = io.BytesIO()
    torch.save(
        {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "account": account}, whole
    )
    quality.write(path, whole.getvalue())


# --- painting and judging ---------------------------------------------------------------------------


def paint(pipeline: "StableDiffusion", scenes: list["Scene"], control: Any) -> list[np.ndarray]:
    """Paint the captions of scenes, each from a seed of its own, along their outlines or without.

    Args:
        control: a ControlNetFile, or None.
    """
    from ldm.adapters import ControlNet

    pictures: list[np.ndarray] = []
    for start in range(0, len(scenes), PAINTED):
        part = scenes[start : start + PAINTED]
        result = pipeline.txt2img(
            [scene.caption for scene in part],
            seed=list(range(start, start + len(part))),
            batch_size=len(part),
            adapters=[] if control is None else [ControlNet(control, hints(part))],
        )
        pictures += [np.asarray(image) for image in result.images]
    return pictures


def judged(pictures: Sequence[np.ndarray], scenes: Sequence["Scene"]) -> dict[str, int]:
    """Count how many pictures keep their caption's promise, and how many follow the hint."""
    from ldm.shapes.checker import judge, see

    seen = [(see(picture), scene) for picture, scene in zip(pictures, scenes, strict=True)]
    return {
        "pictures": len(seen),
        "right": sum(judge(one, scene.claim).holds for one, scene in seen),
        "follow": sum(follows(one, scene) for one, scene in seen),
    }


def sheet(rows: list[list[np.ndarray]]) -> bytes:
    """Lay pictures out in rows, two pixels apart, as a PNG."""
    import io

    from PIL import Image

    rule = np.full((rows[0][0].shape[0], 2, 3), 255, np.uint8)
    lines = []
    for row in rows:
        line = np.concatenate([part for picture in row for part in (picture, rule)], 1)
        lines += [line, np.full((2, line.shape[1], 3), 255, np.uint8)]
    out = io.BytesIO()
    Image.fromarray(np.concatenate(lines)).save(out, "png", optimize=True)
    return out.getvalue()


def make_table(results: dict[str, Any]) -> str:
    """Lay the counts out as Markdown."""
    training, rows = results["training"], results["rows"]
    lines = [
        "# A ControlNet on outlines for the model in the box",
        "",
        f"Trained for {training['steps']} steps of {BATCH} scenes in {training['seconds'] / 60:.0f} minutes; loss "
        f"(mean of each {EVERY} steps) {training['losses'][0]:.4f} to {training['losses'][-1]:.4f}. "
        f"{results['scenes']} unseen scenes whose pairs of colour and shape training had, the model's own sampler, "
        f"steps and guidance, weights {results['weights'][:10]}. Right: every attribute of the scene's caption holds. "
        f"Follow: every object has the hint's shape, its centre within {128 * CENTRE:.0f} of 128 pixels and its extent "
        f"within {100 * EXTENT:.0f} % (of the renders that the hints were made from, "
        f"{rows['renders']['follow']} do). Made by `python bench/control.py` on "
        f"{results['machine']}.",
        "",
        "| painted | right | follow |",
        "|---|---:|---:|",
    ]
    lines += [f"| {name} | {row['right']} | {row['follow']} |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def parse(argv: list[str] | None) -> Any:
    parser = cli.Parser(description="Train a ControlNet on outlines, and count how often shapes follow.")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto")
    parser.add_argument("--steps", type=cli.integer(1, 1_000_000), default=250, help="of the training")
    parser.add_argument("--scenes", type=cli.integer(1, 10_000), default=100, help="that are painted")
    parser.add_argument("--logdir", type=Path, required=True, help="folder of the training's state")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file; .md and .png go beside it")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    opt = parse(argv)
    from ldm.adapters.controlnet import ControlNetFile
    from ldm.checkpoints import save_safetensors
    from ldm.shapes.scenes import evaluation_scenes, render

    pipeline = quality.load_pipeline(None, None, opt.device)
    network, account = train(pipeline, opt.steps, opt.logdir)
    path = opt.logdir / "control.safetensors"
    save_safetensors(path, {f"control_model.{name}": x for name, x in network.state_dict().items()})
    scenes = evaluation_scenes(opt.scenes, EVALUATION_SEED)
    ways = {"without the hint": None, "along the hint": ControlNetFile(path)}
    head = {
        "model": pipeline.name,
        "weights": quality.weights_hash(pipeline.file),
        "machine": quality.machine_name(pipeline),
        "scenes": opt.scenes,
        "training": account,
    }
    results = quality.load_results(opt.results, head)
    results["rows"].setdefault("renders", judged([np.asarray(render(scene)) for scene in scenes], scenes))
    for name, control in ways.items():
        if name not in results["rows"]:
            results["rows"][name] = judged(paint(pipeline, scenes, control), scenes)
            cli.say(f"{name}: {json.dumps(results['rows'][name])}")
        quality.save_results(opt.results, results)
    shown = scenes[:SHOWN]
    rows = [[np.asarray(render(scene)) for scene in shown], [outlines(render(scene)) for scene in shown]]
    rows += [paint(pipeline, shown, control) for control in ways.values()]
    quality.write(opt.results.with_suffix(".png"), sheet(rows))
    quality.write(opt.results.with_suffix(".md"), make_table(results).encode())
    cli.say(make_table(results))


if __name__ == "__main__":
    cli.run(main)
