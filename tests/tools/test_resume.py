"""A run that is killed and resumed ends with the weights of one that was not."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from linzoo.tools import train

ROOT = Path(__file__).resolve().parents[2]
fork = multiprocessing.get_context("fork")

MIXUP_AND_EMA = """
model.update(train_cfg=dict(augments=[dict(type="Mixup", alpha=0.8), dict(type="CutMix", alpha=1.0)]))
data_preprocessor.update(to_onehot=True)
default_hooks = dict(ema=dict(type="EMAHook", momentum=0.1, update_buffers=True))
"""


def checkpoint(path):
    return torch.load(path, weights_only=False)


def assert_same_end(one: Path, two: Path, epoch: int = 3):
    """Weights, averaged weights and optimizer state equal to the bit."""
    a, b = (checkpoint(folder / f"epoch_{epoch}.pth") for folder in (one, two))
    for part in ("state_dict", "ema_state_dict"):
        assert (part in a) == (part in b)
        for key in a.get(part, {}):
            assert torch.equal(a[part][key], b[part][key]), f"{part} {key}"
    for i, state in a["optimizer"]["state"].items():
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(b["optimizer"]["state"][i][key])), (i, key)
    scalars = [x["message_hub"]["log_scalars"] for x in (a, b)]
    assert scalars[0]["train/loss"].data[0].tolist() == scalars[1]["train/loss"].data[0].tolist()


def killed(argv: list[str], when) -> None:
    """Run train.py in a process of its own and kill it as soon as `when()` holds, if it has not ended by then."""
    child = fork.Process(target=train.main, args=(argv,))
    child.start()
    while child.is_alive() and not when():
        time.sleep(0.002)
    if child.is_alive():
        os.kill(child.pid, signal.SIGKILL)
    child.join()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("recipe", ["", MIXUP_AND_EMA], ids=["plain", "mixup_ema"])
def test_killed_run_resumes_bit_equal(tmp_path, config, workers, recipe):
    path = config(recipe + f"train_dataloader.update(num_workers={workers}, persistent_workers={workers > 0})\n")
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    train.main([path, "--work-dir", str(whole)])
    rng = random.Random(workers)
    for epoch in (1, 2):
        delay, seen = rng.uniform(0, 0.3), []

        def when(epoch=epoch, delay=delay, seen=seen):
            if not seen and (torn / f"epoch_{epoch}.pth").exists():
                seen.append(time.monotonic())
            return seen and time.monotonic() - seen[0] > delay

        killed([path, "--work-dir", str(torn), "--resume"], when)
    train.main([path, "--work-dir", str(torn), "--resume"])
    assert_same_end(whole, torn)
    assert not list(torn.glob(".*.partial"))
