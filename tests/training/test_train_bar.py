"""What a run shows while it trains: a bar in a terminal, lines elsewhere."""

import io
import logging
import re
import sys

import pytest
from tiny_training import first_stage, run

from ldm.training.callbacks import AfterSteps


class WarnsAt(AfterSteps):
    def after_step(self, trainer, module, batch):
        if module.step == 2:
            logging.getLogger("ldm.training").warning("a warning on the way")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def config_of(steps):
    config = first_stage()
    params = {"timesteps": 7, "image_size": 16, "first_stage_key": "image"}
    params["unet_config"] = {"target": "tiny_training.Layer", "params": {}}
    config["model"]["target"], config["model"]["params"] = "ldm.models.diffusion.ddpm.DDPM", params
    config["data"]["params"]["validation"] = {
        "target": "ldm.training.data.Shapes",
        "params": {"image_size": 16},
    }
    config["training"] |= {"validate_every": 2, "validation_batches": 1, "checkpoint_every": 1000}
    config["lightning"]["trainer"]["max_steps"] = steps
    config["lightning"]["callbacks"] = {
        "images": {"target": "main.ImageLogger", "params": {"disabled": True}},
        "warns": {"target": f"{__name__}.WarnsAt", "params": {}},
    }
    return config


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_a_terminal_has_a_bar_and_others_lines(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.setattr(sys, "stderr", screen := kind())
    handler = logging.StreamHandler(screen)
    logging.getLogger("ldm").addHandler(handler)
    try:
        run(config_of(3), tmp_path)
        run(config_of(5), tmp_path, resume=True)
    finally:
        logging.getLogger("ldm").removeHandler(handler)
    bar, said = screen.getvalue(), capsys.readouterr().out
    lines = re.findall(r"^step \d/\d loss .* grad_norm .* s/step, .* left, peak .* GiB$", said, re.M)
    assert "step 2 val/loss_simple" in said and bar.count("a warning on the way") == 1
    if kind is Terminal:  # blocks or hashes, as its encoding allows
        assert not lines
        assert re.search(
            r"step 5/5 \|[█#]+\| +[\d.]+s/step, 00:00 left, loss [\d.]+, peak [\d.]+ GiB", bar.split("\r")[-1]
        )
        assert re.search(r"step 3/5 \|[█#]+ +\|", bar)  # a resumed run begins where it was
        assert "\ra warning on the way\n" in bar  # on a line of its own, the bar wiped away
    else:
        assert len(lines) == 3 and "|" not in bar  # the first and the third step of each run
