"""Runs that do not fit into memory: what is counted, what is free, and what is said before and in the first step."""

import pytest
import torch
from omegaconf import OmegaConf
from tiny_training import first_stage, run

from ldm.config import instantiate_from_config
from ldm.errors import ResourceError
from ldm.training.room import (
    added_bytes,
    available_memory,
    check_room,
    free_memory,
    held_bytes,
    training_device,
)

GIB = 1 << 30
CPU = torch.device("cpu")


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = torch.nn.Linear(5, 7), torch.nn.Linear(7, 3)

    def forward(self, x, timesteps, context=None):
        return self.two(self.one(x))


def of_tensors(tensors):
    return sum(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t) and t.dim() > 0)


@pytest.mark.parametrize(
    "kind, params", [("AdamW", {}), ("Adam", {"amsgrad": True}), ("SGD", {"momentum": 0.5})]
)
@pytest.mark.parametrize("use_ema", [True, False])
def test_what_is_counted_is_what_a_step_leaves(kind, params, use_ema):
    config = {"target": "ldm.models.diffusion.ddpm.DDPM"}
    config["params"] = {
        "timesteps": 3,
        "use_ema": use_ema,
        "unet_config": {"target": f"{__name__}.Net", "params": {}},
    }
    model = instantiate_from_config(OmegaConf.create(config))
    trained = list(model.model.diffusion_model.one.parameters())  # the rest is frozen
    for parameter in model.model.diffusion_model.two.parameters():
        parameter.requires_grad_(False)
    optimizer = getattr(torch.optim, kind)(trained, lr=0.1, **params)
    counted = held_bytes(model) + added_bytes([optimizer])
    model.model.diffusion_model(torch.ones(2, 5), None).sum().backward()
    optimizer.step()
    left = of_tensors([*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())])
    left += of_tensors(value for state in optimizer.state.values() for value in state.values())
    scalars = sum(b.element_size() for b in model.buffers() if b.dim() == 0)
    assert counted == left + scalars
    if kind == "AdamW":  # the rule of docs/training.md, beside the schedule's tables
        tables = of_tensors(b for name, b in model.named_buffers() if "model_ema" not in name)
        numbers, frozen = 5 * 7 + 7, 7 * 3 + 3
        averages = 4 * (numbers + frozen) * use_ema  # it was frozen after the averages were made
        assert counted - tables - scalars - averages == 16 * numbers + 4 * frozen


def test_a_model_that_does_not_fit_says_what_it_takes_and_what_there_is():
    check_room(3 * GIB, 3 * GIB, CPU)
    check_room(3 * GIB, None, CPU)
    with pytest.raises(ResourceError) as caught:
        check_room(13 * GIB, 11 * GIB, torch.device("cuda", 1))
    text = str(caught.value)
    assert "at least 13.0 GiB" in text and "on cuda:1" in text and "11.0 GiB are free" in text
    assert "use_ema=false" in text and len(text) <= 400 and "\n" not in text and caught.value.exit_code == 6


# What /proc and the control groups say, in MiB, and what is then left.
GROUPS = {
    "no limit": ({}, "0::/\n", 900),
    "no limit of its own": ({"": ("max", 70, 5)}, "0::/\n", 900),
    "a limit": ({"a": (500, 120, 20)}, "0::/a\n", 400),
    "a parent's limit": ({"a/b": ("max", 9, 0), "a": (300, 80, 30)}, "0::/a/b\n", 250),
    "of a container that cannot see its own": ({"": (200, 50, 0)}, "0::/docker/12ab\n", 150),
    "used up": ({"": (100, 130, 10)}, "0::/\n", 0),
    "more than there is": ({"": (7000, 1, 0)}, "0::/\n", 900),
    "version 1": ({"memory/x": (700, 30, 10)}, "5:cpu,cpuacct:/y\n4:memory:/x\n", 680),
    "version 1 of another controller": ({"memory/x": (700, 30, 10)}, "5:cpu:/x\n", 900),
}


@pytest.mark.parametrize("name", GROUPS)
def test_available_memory_minds_control_groups(tmp_path, name):
    limits, line, wanted = GROUPS[name]
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(f"MemTotal: 9000 kB\nMemAvailable:  {900 * 1024} kB\n")
    (tmp_path / "proc" / "self" / "cgroup").write_text(line)
    for path, (limit, used, cached) in limits.items():
        folder = tmp_path / "groups" / path
        folder.mkdir(parents=True, exist_ok=True)
        first = path.startswith("memory")
        names = ("limit_in_bytes", "usage_in_bytes") if first else ("max", "current")
        for file_name, value in zip(names, (limit, used), strict=True):
            text = value if value == "max" else value << 20
            (folder / f"memory.{file_name}").write_text(f"{text}\n")
        (folder / "memory.stat").write_text(f"anon 3\n{'total_' * first}inactive_file {cached << 20}\n")
    assert available_memory(tmp_path / "proc", tmp_path / "groups") == wanted << 20


def test_where_the_system_does_not_say_nothing_is_refused(tmp_path):
    assert available_memory(tmp_path, tmp_path) is None


def test_this_machine_s_own_memory_is_told():
    free = free_memory(training_device("cpu"))
    assert free is None or 0 < free < 1 << 50


class Short(torch.nn.Module):
    """A network that finds no memory."""

    def __init__(self):
        super().__init__()
        self.one = torch.nn.Linear(2, 3)

    def forward(self, x, timesteps, context=None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")


def test_a_step_without_memory_says_what_makes_it_smaller(tmp_path):
    config = first_stage()
    config["model"] = {
        "base_learning_rate": 1e-3,
        "target": "ldm.models.diffusion.ddpm.DDPM",
        "params": {
            "timesteps": 3,
            "image_size": 16,
            "first_stage_key": "image",
            "unet_config": {"target": f"{__name__}.Short", "params": {}},
        },
    }
    with pytest.raises(ResourceError, match=r"out of memory in step 1 \(CUDA out of memory") as caught:
        run(config, tmp_path)
    text = str(caught.value)
    assert all(name in text for name in ("batch_size", "accumulate_grad_batches", "precision"))
    assert len(text) <= 400 and "\n" not in text
