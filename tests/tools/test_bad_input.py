"""Wrong input ends a tool with one line that names the argument and what was expected, and status 2."""

import pytest
import torch
from mmengine.config import Config
from safetensors.torch import save_file

from linzoo.tools import predict, test, train


def refused(capsys, main, *argv) -> str:
    """The line on stderr of a tool that must end with status 2."""
    with pytest.raises(SystemExit) as exit_:
        main([str(a) for a in argv])
    assert exit_.value.code == 2
    errors = capsys.readouterr().err
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, errors
    assert "Traceback" not in errors
    return lines[0]


@pytest.fixture
def work_dir(tmp_path):
    """A work dir that a refused run must leave unmade."""
    path = tmp_path / "work"
    yield path
    assert not path.exists()


def test_no_config(capsys, work_dir):
    line = refused(capsys, train.main, "configs/nothing.py", "--work-dir", work_dir)
    assert "config 'configs/nothing.py': no such file" in line


def test_broken_config(capsys, config, work_dir):
    line = refused(capsys, train.main, config("model.update(type=\n"), "--work-dir", work_dir)
    assert "tiny.py" in line and "SyntaxError" in line


def test_non_commercial_weights(capsys, config, work_dir, tmp_path):
    """Refused where they are the published ones; a file may be one's own."""
    more = "commercial = True\nmodel.update(model_name='mambavision_t', pretrained={})"
    for start in (True, "https://example.org/mambavision.pth"):
        line = refused(capsys, train.main, config(more.format(repr(start))), "--work-dir", work_dir)
        assert f"model.pretrained={start!r}: the weights of 'mambavision_t' have the licence nvidia" in line
        assert "expected others where commercial=True" in line
    with pytest.raises(SystemExit):
        train.main([config(more.format(repr(str(tmp_path / "own.pth")))), "--work-dir", str(work_dir)])
    errors = capsys.readouterr().err
    assert "own.pth' your own?" in errors and "own.pth" in errors.rpartition("error: ")[2]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("optim_wraper = dict()", "unknown key 'optim_wraper' (did you mean 'optim_wrapper'?)"),
        (
            "model.update(model_name='test_byobnett')",
            "model_name='test_byobnett': no such model in timm or LinZoo",
        ),
        ("model.update(model_name='test_byobnett')", "did you mean 'test_byobnet'?"),
        ("model.update(drop_pathrate=0.1)", "drop_pathrate"),
        ("model.update(type='Clasifier')", "model.type='Clasifier': nothing is registered under it"),
        ("train_dataloader.update(batchsize=8)", "train_dataloader.batchsize=8: unknown (did you mean 'batch_size'?)"),
        ("train_dataloader['dataset'].update(data_rot='x')", "did you mean 'data_root'?"),
        ("pipeline.append(dict(type='PackInput'))", "did you mean 'PackInputs'?"),
        ("optim_wrapper['optimizer'].update(weightdecay=0)", "did you mean 'weight_decay'?"),
        ("default_hooks = dict(checkpoint=dict(intervall=1))", "did you mean 'interval'?"),
        ("randomness = dict(sed=1)", "did you mean 'seed'?"),
        ("model.update(distillation='firm', teacher=dict(model_name='test_resnet'))", "distillation='firm'; expected"),
        ("model.update(distillation='hard', teacher=dict(model_name='test_resnet'))", "has no distillation head"),
        ("model.update(distillation='hard')", "teacher=None"),
    ],
)
def test_wrong_key(capsys, config, work_dir, more, said):
    assert said in refused(capsys, train.main, config(more + "\n"), "--work-dir", work_dir)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("train_cfg.max_epoch=1", "did you mean 'max_epochs'?"),
        ("trian_cfg.max_epochs=1", "the config has no 'trian_cfg' (did you mean 'train_cfg'?)"),
        ("optim_wrapper.optimizer.lrr=1", "did you mean 'lr'?"),
        ("model.modelname=test_resnet", "modelname"),
    ],
)
def test_wrong_option(capsys, config, work_dir, option, said):
    assert said in refused(capsys, train.main, config(), "--work-dir", work_dir, "--cfg-options", option)


def test_no_data(capsys, config, data, work_dir):
    data.rename(data.with_name("elsewhere"))
    line = refused(capsys, train.main, config(), "--work-dir", work_dir)
    assert str(data / "train") in line and "not found" in line and "expected one folder of images per class" in line


def test_empty_class_folder(capsys, config, data, work_dir):
    (data / "train" / "violet").mkdir()
    line = refused(capsys, train.main, config(), "--work-dir", work_dir)
    assert str(data / "train" / "violet") in line and "holds no image" in line


def test_validation_classes_differ(capsys, config, data, work_dir):
    (data / "val" / "grey").rename(data / "val" / "gray")
    line = refused(capsys, train.main, config(), "--work-dir", work_dir)
    assert "gray, grey" in line


def test_number_of_classes_differs(capsys, config, work_dir):
    line = refused(capsys, train.main, config("model.update(num_classes=2)\n"), "--work-dir", work_dir)
    assert "num_classes=2" in line and "3" in line


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_in_training(capsys, config, data, tmp_path, workers):
    (data / "train" / "grey" / "3.png").write_bytes(b"no image")
    path = config(f"train_dataloader.update(num_workers={workers})\n")
    line = refused(capsys, train.main, path, "--work-dir", tmp_path / "w")
    assert f"cannot read image '{data / 'train' / 'grey' / '3.png'}'" in line


def test_no_checkpoint(capsys, config, tmp_path):
    assert "checkpoint 'nothing.pth': no such file" in refused(capsys, test.main, config(), "nothing.pth")
    line = refused(capsys, predict.main, config(), "nothing.pth", tmp_path, "--out", tmp_path / "out")
    assert "checkpoint 'nothing.pth'" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["torn.pth", "torn.safetensors"])
def test_torn_checkpoint(capsys, config, tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04 cut off")
    line = refused(capsys, test.main, config(), tmp_path / name)
    assert name in line and "cannot be read" in line


def test_checkpoint_of_another_variant(capsys, config, tmp_path):
    import timm

    save_file(timm.create_model("test_mambaout", num_classes=3).state_dict(), tmp_path / "other.safetensors")
    path = config("model.update(model_name='mambaout_femto', drop_path_rate=0.0)\n")
    line = refused(capsys, test.main, path, tmp_path / "other.safetensors")
    assert "does not fit model 'mambaout_femto'" in line
    assert "it fits 'test_mambaout' with num_classes=3" in line


def test_checkpoint_with_other_classes(capsys, config, tmp_path):
    import timm

    save_file(timm.create_model("test_byobnet", num_classes=7).state_dict(), tmp_path / "other.safetensors")
    line = refused(capsys, test.main, config(), tmp_path / "other.safetensors")
    assert "it fits 'test_byobnet' with num_classes=7" in line


def test_foreign_checkpoint(capsys, config, tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    assert "no registered variant" in refused(capsys, test.main, config(), tmp_path / "other.safetensors")


def test_predict_input(capsys, config, data, tmp_path):
    import timm

    weights = tmp_path / "w.safetensors"
    save_file(timm.create_model("test_byobnet", num_classes=3).state_dict(), weights)
    out = tmp_path / "out"
    assert "image 'none.png': no such file" in refused(
        capsys, predict.main, config(), weights, "none.png", "--out", out
    )
    (tmp_path / "empty").mkdir()
    assert "holds no image" in refused(capsys, predict.main, config(), weights, tmp_path / "empty", "--out", out)
    (data / "val" / "grey" / "bad.png").write_bytes(b"no image")
    assert "bad.png" in refused(capsys, predict.main, config(), weights, data / "val", "--out", out)
    assert not out.exists()


def test_resume_with_another_model(capsys, config, tmp_path):
    one = config("model.update(model_name='test_mambaout')\ntrain_cfg.update(max_epochs=1)\n", "one.py")
    train.main([one, "--work-dir", str(tmp_path / "w")])
    capsys.readouterr()
    two = config("model.update(model_name='mambaout_femto')\n", "two.py")
    line = refused(capsys, train.main, two, "--work-dir", tmp_path / "w", "--resume")
    assert "does not fit model 'mambaout_femto'" in line and "it fits 'test_mambaout'" in line


def test_launcher_without_its_environment(capsys, config, work_dir, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    line = refused(capsys, train.main, config(), "--work-dir", work_dir, "--launcher", "pytorch")
    assert "--launcher 'pytorch'" in line and "torchrun" in line


def test_config_is_left_alone(config):
    path = config()
    assert Config.fromfile(path).model.model_name == "test_byobnet"
