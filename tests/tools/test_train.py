"""Training: random streams, teacher, export, progress, several processes."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmpretrain.registry import MODELS
from mmpretrain.structures import DataSample
from torch.nn import functional as F

from linzoo.backbones.layers.isotropic import Isotropic
from linzoo.tools import predict, test, train
from linzoo.tools.engine import Classifier, InputError, Runner
from linzoo.tools.engine.classifier import distillation_loss
from linzoo.tools.engine.config import load_config

ROOT = Path(__file__).resolve().parents[2]
STUDENT = {
    "type": "Classifier",
    "model_name": "deit_tiny_distilled_patch16_224",
    "img_size": 32,
    "embed_dim": 24,
    "depth": 2,
    "num_classes": 3,
    "data_preprocessor": {"num_classes": 3, "to_onehot": True},
}
TEACHER = {"model_name": "test_byobnet", "num_classes": 3}


@pytest.mark.parametrize("workers", [0, 2])
def test_random_stream(config, tmp_path, workers):
    """An epoch's images depend on the seed and the epoch, not on what was drawn before; epochs and workers differ."""
    cfg = Config.fromfile(config(f"train_dataloader.update(num_workers={workers}, persistent_workers={workers > 0})\n"))
    cfg.experiment_name = cfg.work_dir = str(tmp_path)
    runner = Runner.from_cfg(cfg)
    loop = runner.train_loop

    def epoch(n):
        loop._epoch = n
        torch.rand(n + 1)
        runner.call_hook("before_train_epoch")
        return torch.cat([torch.stack(batch["inputs"]).flatten(1) for batch in loop.dataloader])

    first, second, again = epoch(0), epoch(1), epoch(0)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first.sort(dim=0).values, second.sort(dim=0).values), (
        "another order alone is no augmentation"
    )


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_distillation_loss(kind):
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    tau = 2.0
    if kind == "hard":
        rows = range(4)
        want = -sum(student[i].log_softmax(0)[teacher[i].argmax()] for i in rows) / 4
    else:
        p, q = (teacher / tau).softmax(1), (student / tau).softmax(1)
        want = tau**2 * (p * (p / q).log()).sum() / 20
    assert torch.allclose(distillation_loss(student, teacher, kind, tau).double(), want, rtol=1e-5)


@pytest.mark.parametrize("kind", ["hard", "soft", "none"])
def test_classifier_loss(kind):
    """(1 - alpha) soft cross-entropy on mixed labels + alpha teacher's term; no parameter of the teacher."""
    teacher = {"teacher": TEACHER, "alpha": 0.3, "tau": 1.5} if kind != "none" else {}
    with DefaultScope.overwrite_default_scope("mmpretrain"):
        classifier = MODELS.build({**STUDENT, "distillation": kind, **teacher}).train()
    assert all("stages" not in name for name in classifier.state_dict())
    images = torch.randn(4, 3, 32, 32)
    labels = torch.rand(4, 3).softmax(1)
    losses = classifier.loss(images, [DataSample().set_gt_score(label) for label in labels])
    logits = classifier.model(images)
    if kind == "none":
        want = -(labels * logits.log_softmax(1)).sum(1).mean()
        assert torch.allclose(losses["loss"], want, atol=1e-6)
        return
    logits, dist_logits = logits
    soft = -(labels * logits.log_softmax(1)).sum(1).mean()
    assert torch.allclose(losses["loss_label"], 0.7 * soft, atol=1e-6)
    taught = classifier.ask_teacher(images)
    assert not taught.requires_grad
    want = 0.3 * distillation_loss(dist_logits, taught, kind, 1.5)
    assert torch.allclose(losses["loss_teacher"], want, atol=1e-6)
    if kind == "hard":
        assert torch.allclose(want, 0.3 * F.cross_entropy(dist_logits, taught.argmax(1)))


def test_distilled_run(config, tmp_path):
    """A student learns from a teacher under mixup and averaging, resumes, and its export has the student alone."""
    path = config(
        f"model = {STUDENT | {'distillation': 'hard', 'teacher': TEACHER}}\n"
        "model.update(train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]))\n"
        "model.pop('data_preprocessor')\n"
        "data_preprocessor.update(to_onehot=True)\n"
        "default_hooks = dict(ema=dict(type='EMAHook', momentum=0.1, update_buffers=True))\n"
        "train_cfg.update(max_epochs=1)\n"
    )
    train.main([path, "--work-dir", str(tmp_path / "w")])
    kwargs = json.loads((tmp_path / "w/export/config.json").read_text())["model_args"]
    assert kwargs["embed_dim"] == 24
    model = timm.create_model(f"local-dir:{tmp_path / 'w/export'}", pretrained=True)
    assert model.num_classes == 3 and sum(p.numel() for p in model.parameters()) < 50_000


def test_mesa(config, tmp_path):
    """From its epoch on the average teaches the model that it averages; resuming changes nothing."""
    path = config(
        f"model = {STUDENT | {'mesa': 2.0}}\n"
        "model.update(train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]))\n"
        "model.pop('data_preprocessor')\n"
        "data_preprocessor.update(to_onehot=True)\n"
        "default_hooks = dict(ema=dict(type='EMAHook', momentum=0.1, update_buffers=True))\n"
        "custom_hooks = [dict(type='MesaHook', begin=1)]\n"
        "train_cfg.update(max_epochs=2)\n"
    )
    train.main([path, "--work-dir", str(tmp_path / "whole")])
    train.main([path, "--work-dir", str(tmp_path / "part"), "--cfg-options", "train_cfg.max_epochs=1"])
    train.main([path, "--work-dir", str(tmp_path / "part"), "--resume"])
    runs = [torch.load(tmp_path / run / "epoch_2.pth", weights_only=False) for run in ("whole", "part")]
    for key in ("state_dict", "ema_state_dict"):
        assert all(torch.equal(runs[0][key][name], runs[1][key][name]) for name in runs[0][key])
    scalars = runs[0]["message_hub"]["log_scalars"]
    steps = {name: len(scalars[f"train/{name}"].data[0]) for name in ("loss", "loss_mesa")}
    assert steps["loss"] == 2 * steps["loss_mesa"] > 0

    with DefaultScope.overwrite_default_scope("mmpretrain"):
        classifier, average = (MODELS.build({**STUDENT, "mesa": 2.0}).eval() for _ in range(2))
    images, samples = torch.randn(4, 3, 32, 32), [DataSample().set_gt_score(torch.eye(3)[i % 3]) for i in range(4)]
    classifier.ask_average = lambda x: average.model(x).detach()
    p = average.model(images).softmax(1)
    expected = -2.0 * (p * classifier.model(images).log_softmax(1)).sum(1).mean()
    assert torch.allclose(classifier.loss(images, samples)["loss_mesa"], expected, atol=1e-6)


def test_mesa_needs_an_average_and_no_teacher(config, tmp_path):
    cfg = Config.fromfile(config("custom_hooks = [dict(type='MesaHook', begin=0)]\n"))
    cfg.experiment_name = cfg.work_dir = str(tmp_path)
    with pytest.raises(InputError, match="expected an EMAHook"):
        Runner.from_cfg(cfg).call_hook("before_train_epoch")
    with DefaultScope.overwrite_default_scope("mmpretrain"), pytest.raises(InputError, match="mesa=1.0 with distill"):
        MODELS.build({**STUDENT, "mesa": 1.0, "distillation": "hard", "teacher": TEACHER})


def test_weight_decay_groups(config, tmp_path):
    cfg = Config.fromfile(config("model.update(model_name='deit_tiny_distilled_patch16_224', img_size=32)\n"))
    cfg.optim_wrapper.optimizer.weight_decay = 0.05
    cfg.model.pop("drop_path_rate")
    cfg.experiment_name = cfg.work_dir = str(tmp_path)
    runner = Runner.from_cfg(cfg)
    wrapper = runner.build_optim_wrapper(cfg.optim_wrapper)
    names = {id(p): name for name, p in runner.model.model.named_parameters()}
    decayed, undecayed = set(), set()
    for group in wrapper.optimizer.param_groups:
        (decayed if group["weight_decay"] else undecayed).update(names[id(p)] for p in group["params"])
    assert decayed | undecayed == set(names.values())
    assert {"pos_embed", "cls_token", "dist_token", "norm.weight", "head.bias"} <= undecayed
    assert "blocks.0.attn.qkv.weight" in decayed


def test_artifacts(config, tmp_path, data, capsys):
    """Training leaves log, curves, checkpoints and an export that timm, test.py and predict.py read alike."""
    path, work_dir = config(), tmp_path / "w"
    train.main([path, "--work-dir", str(work_dir)])
    assert (work_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    log = next(work_dir.glob("*/*.log")).read_text()
    assert "images_per_s" in log and "lr:" in log and "eta:" in log and "accuracy/top1" in log
    facts = json.loads((work_dir / "export/config.json").read_text())
    assert facts["architecture"] == "test_byobnet"
    assert facts["label_names"] == ["dark", "grey", "light"]
    assert facts["config"] == "tiny.py"
    assert facts["pretrained_cfg"]["input_size"] == [3, 32, 32]
    weights = work_dir / "export/model.safetensors"
    best = next(work_dir.glob("best_*.pth"))
    overlay = {"file": str(weights), "num_classes": 3}
    model = timm.create_model("test_byobnet", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
    state = torch.load(best, weights_only=False)["state_dict"]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    metrics = []
    for checkpoint in (weights, best):
        capsys.readouterr()
        test.main([path, str(checkpoint)])
        metrics.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert metrics[0] == metrics[1] == {"accuracy/top1": pytest.approx(facts["top1"])}

    predict.main([path, str(weights), str(data / "val"), "--out", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [Path(r["path"]).parent.name for r in results] == ["dark"] * 2 + ["grey"] * 2 + ["light"] * 2
    right = sum(Path(r["path"]).parent.name == r["label"] for r in results)
    assert 100 * right / 6 == pytest.approx(facts["top1"], abs=0.01)
    for r in results:
        assert r["confidence"] == r["top5"][0]["confidence"] == max(t["confidence"] for t in r["top5"])
        assert sum(t["confidence"] for t in r["top5"]) == pytest.approx(1, abs=1e-4)
    assert (tmp_path / "out/predictions.png").read_bytes().startswith(b"\x89PNG")
    one = results[3]["path"]
    predict.main([path, str(best), one, "--out", str(tmp_path / "one")])
    (result,) = json.loads((tmp_path / "one/predictions.json").read_text())
    assert result["label"] == results[3]["label"]
    assert result["confidence"] == pytest.approx(results[3]["confidence"], abs=1e-5)


def test_amp(config, tmp_path, monkeypatch):
    """--amp runs the model in bfloat16 and keeps float32 weights."""
    seen = []
    monkeypatch.setattr(
        timm.models.byobnet.ByobNet,
        "forward_head",
        lambda self, x, pre_logits=False: seen.append(x.dtype) or self.head(x),
    )
    train.main([config("train_cfg.update(max_epochs=1)\n"), "--work-dir", str(tmp_path / "w"), "--amp"])
    assert seen[0] == torch.bfloat16 and seen[-1] == torch.float32
    state = torch.load(tmp_path / "w/epoch_1.pth", weights_only=False)["state_dict"]
    assert all(v.dtype != torch.bfloat16 for v in state.values())


def test_bar_on_a_terminal(config, tmp_path, monkeypatch, capsys):
    """On a terminal: a line per epoch, no log lines, which the log file has all the same."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    train.main([config("train_cfg.update(max_epochs=2)\n"), "--work-dir", str(tmp_path / "w")])
    out = capsys.readouterr().out
    assert "epoch 2/2" in out and "top1" in out and "images/s" in out
    assert "Epoch(train)" not in out
    assert "Epoch(train)" in next(tmp_path.glob("w/*/*.log")).read_text()
    logging.shutdown()


def test_options_and_seed(config, tmp_path):
    """--cfg-options reach the run; the seed decides the weights."""
    states = []
    for i, seed in enumerate(("1", "1", "2")):
        work_dir = tmp_path / str(i)
        options = ["--seed", seed, "--cfg-options", "train_cfg.max_epochs=1", "model.drop_path_rate=0"]
        train.main([config(), "--work-dir", str(work_dir), *options])
        states.append(torch.load(work_dir / "epoch_1.pth", weights_only=False)["state_dict"])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_config_that_a_run_wrote(config, tmp_path):
    """Trained again in another folder within the same second, it shares nothing with the first run."""
    path = config("train_cfg.update(max_epochs=1)\n")
    for name in ("first", "second"):
        train.main([path, "--work-dir", str(tmp_path / name)])
        path = str(tmp_path / name / "tiny.py")
        assert Config.fromfile(path).experiment_name == str(tmp_path / name)


@pytest.mark.slow
def test_two_processes(config, tmp_path):
    """torchrun with two processes on CPU: one set of files, whole and resumable."""
    path, work_dir = config("train_cfg.update(max_epochs=2)\n"), tmp_path / "w"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command = [*torchrun, str(ROOT / "tools/train.py"), path, "--work-dir", str(work_dir), "--launcher", "pytorch"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    first = [*command, "--cfg-options", "train_cfg.max_epochs=1"]
    for argv in (first, [*command, "--resume"]):
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    whole = tmp_path / "whole"
    done = subprocess.run(
        [*command[:-4], "--work-dir", str(whole), "--launcher", "pytorch"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    states = [torch.load(d / "epoch_2.pth", weights_only=False)["state_dict"] for d in (work_dir, whole)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert len(list(work_dir.glob("best_*.pth"))) == 1 and (work_dir / "export/config.json").exists()


@pytest.mark.slow
def test_imagenet_recipe(data, tmp_path):
    """The published recipe runs end to end on three classes: augmentations, mixing, teacher, averaging, export."""
    options = [
        *(f"{part}_dataloader.{key}" for part in ("train", "val", "test") for key in ("num_workers=0", "batch_size=2")),
        *(f"{part}_dataloader.dataset.data_root={data}" for part in ("train", "val", "test")),
        *("model.num_classes=3", "data_preprocessor.num_classes=3", "train_cfg.max_epochs=1", "val_evaluator.topk=1"),
        *("model.teacher.model_name=test_byobnet", "model.teacher.pretrained=False", "model.teacher.num_classes=3"),
    ]
    config = ROOT / "configs/cls/groupmamba_t_in1k.py"
    train.main([str(config), "--work-dir", str(tmp_path / "w"), "--cfg-options", *options])
    checkpoint = torch.load(tmp_path / "w/epoch_1.pth", weights_only=False)
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    assert checkpoint["ema_state_dict"]["steps"] == 7
    facts = json.loads((tmp_path / "w/export/config.json").read_text())
    assert facts["pretrained_cfg"]["input_size"] == [3, 224, 224]
    assert facts["pretrained_cfg"]["crop_pct"] == pytest.approx(0.875)


def test_activation_checkpointing(monkeypatch):
    """As a key of the model, in Python and on the command line."""
    arguments = dict(num_classes=3, depth=2, dim=64, img_size=64)
    model = Classifier("plain_ss2d_t", **arguments, grad_checkpointing=True).model
    plain = Classifier("plain_ss2d_t", **arguments).model
    plain.load_state_dict(model.state_dict())
    assert model.grad_checkpointing and not plain.grad_checkpointing
    x = torch.randn(2, 3, 64, 64)
    for with_, without in zip(
        *(torch.autograd.grad(m(x).sum(), list(m.parameters())) for m in (model, plain)), strict=True
    ):
        torch.testing.assert_close(with_, without)
    cfg = load_config("cls/vmamba_t_digits.py", {"model.grad_checkpointing": True})
    assert cfg.model.grad_checkpointing is True
    monkeypatch.delattr(Isotropic, "set_grad_checkpointing")
    with pytest.raises(InputError, match="grad_checkpointing=True: expected a model that has it, got 'plain_ss2d_t'"):
        Classifier("plain_ss2d_t", **arguments, grad_checkpointing=True)
