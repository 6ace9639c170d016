"""State tuning by a config: the states and the classifier alone learn, and are written to a file of their own."""

import json
import os
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file
from test_bad_input import refused

import linzoo.backbones  # noqa: F401
from linzoo.tools import state_tuning, test, train
from linzoo.tools.engine.weights import read_checkpoint

MODEL = 'model_name="vrwkv6_t", img_size=32, patch_size=8, dim=64, depth=2'
TINY = dict(img_size=32, patch_size=8, dim=64, depth=2, num_classes=3)


@pytest.fixture
def tuned(config, tmp_path):
    """The config, the weights that it starts from, and its work dir after training."""
    torch.manual_seed(1)
    base = timm.create_model("vrwkv6_t", **TINY).state_dict()
    torch.save(base, tmp_path / "base.pth")
    path = config(
        f'model = dict(type="Classifier", {MODEL}, num_classes=3, state_tuning=True,'
        f" pretrained={str(tmp_path / 'base.pth')!r})\n"
        'optim_wrapper = dict(optimizer=dict(type="AdamW", lr=1e-2),'
        " paramwise_cfg=dict(custom_keys=dict(time_state=dict(lr_mult=10.0))))\n"
    )
    return path, base, tmp_path / "w"


def test_states_alone_learn(tuned, capsys):
    path, base, work_dir = tuned
    found = state_tuning.run(path, work_dir)
    state = load_file(work_dir / "export/model.safetensors")
    learnt = {key for key in state if key not in base or not torch.equal(state[key], base[key])}
    states = {f"blocks.{i}.mixer.time_state" for i in range(2)}
    assert states <= learnt <= states | {"head.weight", "head.bias"}
    assert all(state[key].abs().max() > 0 for key in states)
    alone = load_file(work_dir / "export/states.safetensors")
    assert alone.keys() == states | {"head.weight", "head.bias"}
    model = timm.create_model("vrwkv6_t", **TINY)
    model.load_state_dict(base)
    model.load_states(work_dir / "export/states.safetensors")
    x, again = torch.randn(1, 3, 32, 32), timm.create_model("vrwkv6_t", state_tuning=True, **TINY)
    again.load_state_dict(state)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), again.eval()(x))
    capsys.readouterr()
    test.main([path, str(work_dir / "export/model.safetensors")])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["accuracy/top1"] == pytest.approx(found[0])


def test_a_killed_run_goes_on_exactly(tuned, tmp_path):
    """States of a run that lost its last epoch and was resumed equal those of the whole run, bit by bit."""
    path, _, work_dir = tuned
    train.main([path, "--work-dir", str(work_dir)])
    whole = read_checkpoint(work_dir / "epoch_3.pth").state
    again = tmp_path / "again"
    shutil.copytree(work_dir, again)
    os.truncate(again / "epoch_3.pth", 1000)
    train.main([path, "--work-dir", str(again), "--resume"])
    resumed = read_checkpoint(again / "epoch_3.pth").state
    assert all(torch.equal(value, whole[key]) for key, value in resumed.items())


def test_seconds_of_a_whole_run(tuned):
    """They are those of the run that was not cut off; of one that was there are none."""
    path, _, work_dir = tuned
    accuracy, seconds = state_tuning.run(path, work_dir)
    assert seconds > 0 and state_tuning.run(path, work_dir) == (accuracy, seconds)
    (work_dir / "seconds.json").unlink()
    assert state_tuning.run(path, work_dir) == (accuracy, None)


def test_how_many_numbers_learn():
    head, state = 5 * 192 + 5, 4 * 2 * 3 * 64 * 64
    whole = sum(
        p.numel() for p in timm.create_model("vrwkv6_t", num_classes=5, patch_size=4, img_size=32, depth=4).parameters()
    )
    found = {ending: state_tuning.learning(f"cls/vrwkv6_t_digits_{ending}") for ending in state_tuning.RUNS.values()}
    assert found == {"probe": head, "states": head + state, "full": whole}


def test_a_model_without_states(config, capsys, tmp_path):
    path = config('model.update(model_name="vrwkv_t", state_tuning=True)\nmodel.pop("drop_path_rate")\n')
    line = refused(capsys, train.main, path, "--work-dir", tmp_path / "w")
    assert "VRWKV has no matrix states to tune; expected mixers of RWKV-6 or 7" in line
    assert not (tmp_path / "w").exists()
