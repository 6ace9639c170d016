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
from linzoo.tools.engine.files import write_atomically
from linzoo.tools.engine.resume import latest_checkpoint
from linzoo.tools.engine.weights import read_checkpoint

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
    # mmengine writes a validation to its epoch's checkpoint only where it was the best one of its process.
    validations = (x["val/accuracy/top1"].data[0].tolist() for x in scalars if "val/accuracy/top1" in x)
    assert all(first == second for first, second in zip(*validations, strict=False))


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


def test_killed_before_the_first_checkpoint(tmp_path, config):
    path = config("train_cfg.update(max_epochs=1)\n")
    torn = tmp_path / "torn"
    killed([path, "--work-dir", str(torn)], lambda: list(torn.glob("*/*.log")))
    assert not list(torn.glob("*.pth"))
    train.main([path, "--work-dir", str(torn), "--resume"])
    train.main([path, "--work-dir", str(tmp_path / "whole")])
    assert_same_end(tmp_path / "whole", torn, epoch=1)


def test_killed_while_validating(tmp_path, config, monkeypatch):
    """The validation that was cut off is made up for: curve, best checkpoint and export are there."""
    from mmengine.runner import ValLoop

    path = config("train_cfg.update(max_epochs=1)\n")
    monkeypatch.setattr(ValLoop, "run", lambda self: os.kill(os.getpid(), signal.SIGKILL))
    killed([path, "--work-dir", str(tmp_path / "w")], lambda: False)
    monkeypatch.undo()
    assert (tmp_path / "w/epoch_1.pth").exists() and not list(tmp_path.glob("w/best*"))
    train.main([path, "--work-dir", str(tmp_path / "w"), "--resume"])
    assert list(tmp_path.glob("w/best*")) and (tmp_path / "w/export/model.safetensors").exists()


def test_killed_while_writing(tmp_path):
    """A cut-off write leaves the old file and a partial one beside it."""
    target = tmp_path / "epoch_1.pth"
    write_atomically(target, lambda partial: partial.write_bytes(b"old"))

    def cut_off(partial):
        partial.write_bytes(b"ne")
        os.kill(os.getpid(), signal.SIGKILL)

    child = fork.Process(target=write_atomically, args=(target, cut_off))
    child.start()
    child.join()
    assert target.read_bytes() == b"old"
    assert (tmp_path / ".epoch_1.pth.partial").read_bytes() == b"ne"
    write_atomically(target, lambda partial: partial.write_bytes(b"new"))
    assert target.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["epoch_1.pth"]


def test_latest_checkpoint(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for epoch in (1, 2):
        torch.save({"state_dict": {}}, tmp_path / f"epoch_{epoch}.pth")
        os.utime(tmp_path / f"epoch_{epoch}.pth", (epoch, epoch))
    assert latest_checkpoint(tmp_path) is None, "these are another run's: a run of its own writes the pointer"
    pointer = tmp_path / "last_checkpoint"
    pointer.write_text("/moved/away/epoch_1.pth")
    assert latest_checkpoint(tmp_path).name == "epoch_1.pth"
    pointer.write_text("")
    assert latest_checkpoint(tmp_path).name == "epoch_2.pth"


def test_new_run_in_a_used_work_dir(tmp_path, config):
    """A run without --resume starts anew, and forgets partial files and the pointer of the one before it."""
    path, work_dir = config("train_cfg.update(max_epochs=1)\n"), tmp_path / "w"
    train.main([path, "--work-dir", str(work_dir)])
    (work_dir / ".epoch_7.pth.partial").write_bytes(b"torn")
    (work_dir / ".export.partial").mkdir()
    killed([path, "--work-dir", str(work_dir)], lambda: not (work_dir / "last_checkpoint").exists())
    assert latest_checkpoint(work_dir) is None
    assert not list(work_dir.glob(".*.partial"))


def test_finished_run_is_left_alone(tmp_path, config):
    path, work_dir = config("train_cfg.update(max_epochs=1)\n"), tmp_path / "w"
    train.main([path, "--work-dir", str(work_dir)])
    before = read_checkpoint(work_dir / "epoch_1.pth")[0]
    time.sleep(1)  # mmengine names a run by its second
    train.main([path, "--work-dir", str(work_dir), "--resume"])
    assert "Epoch(val)" not in max(work_dir.glob("*/*.log")).read_text()
    after = read_checkpoint(work_dir / "epoch_1.pth")[0]
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_seed_is_resumed(tmp_path, config):
    """--seed need not be repeated with --resume."""
    path = config("train_cfg.update(max_epochs=2)\n")
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    train.main([path, "--work-dir", str(whole), "--seed", "5"])
    killed([path, "--work-dir", str(torn), "--seed", "5"], lambda: (torn / "last_checkpoint").exists())
    train.main([path, "--work-dir", str(torn), "--resume"])
    assert_same_end(whole, torn, epoch=2)
