"""Segmenters of mmseg and detectors of mmdet: every config, a step of every family, the tools, bad input."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mmengine.registry
import numpy as np
import pytest
import timm
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample
from PIL import Image
from safetensors.torch import save_file
from test_bad_input import refused

import linzoo.backbones  # noqa: F401
from linzoo.backbones.layers.without_memory import without_memory
from linzoo.tools import make_data, predict, scenes, test, train
from linzoo.tools.engine import InputError
from linzoo.tools.engine.config import load_config
from linzoo.tools.engine.task import without_start
from linzoo.tools.engine.weights import load_weights

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests/backbones"))
from test_contract import few_blocks  # noqa: E402

CONFIGS = sorted(p.relative_to(ROOT) for p in (ROOT / "configs").glob("*/*.py") if p.parent.name != "_base_")


def named(path):
    return pytest.param(path, id=str(path))


def load(path):
    """A config with nothing to start from: no test may need a download."""
    path = str(ROOT / path)
    starts = "backbone=dict" in Path(path).read_text()
    return load_config(path, {"model.backbone.pretrained": False} if starts else None)


def build(cfg):
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        preprocessor = {"data_preprocessor": cfg.data_preprocessor} if "data_preprocessor" in cfg else {}
        return mmengine.registry.MODELS.build({**preprocessor, **without_start(cfg.model)})


# --- configs --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("path", [named(path) for path in CONFIGS])
def test_every_config_builds(path, monkeypatch):
    """Every shipped config reads, its keys are known; model, optimizer and pipelines can be made without data."""
    monkeypatch.chdir(ROOT)
    cfg = load(path)
    if cfg.model.type == "Classifier":  # whose preprocessor makes vectors of the labels
        assert cfg.model.num_classes == cfg.data_preprocessor.num_classes
    cfg.model.get("tokenizer", {}).pop("pretrained", None)
    with without_memory():
        model = build(cfg)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    held = {id(p) for group in wrapper.optimizer.param_groups for p in group["params"]}
    assert held >= {id(p) for p in model.parameters() if p.requires_grad}
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        for key in ("train_dataloader", "val_dataloader", "test_dataloader"):
            if pipeline := cfg[key].dataset.get("pipeline"):
                assert len(Compose(pipeline).transforms) == len(pipeline)


def first_config_of_each_family(pattern):
    """{family: its first config}, the smallest variants' names taken first."""
    families = {}
    for path in sorted(
        (ROOT / "configs").glob(pattern), key=lambda p: (any(size in p.name for size in ("_l_", "_b_", "_s_")), p.name)
    ):
        name = Config.fromfile(path, import_custom_modules=False).model.backbone.model_name
        families.setdefault(timm.model_entrypoint(name).__module__, path.relative_to(ROOT))
    return [named(path) for path in families.values()]


def small_model(path):
    """The config's model with few blocks and narrow heads."""
    cfg = load(path)
    backbone = cfg.model.backbone
    name = backbone.model_name
    if name.startswith("efficientvim"):
        backbone.model_kwargs = dict(depths=(1, 1, 1))
    else:
        backbone.model_kwargs = dict(depth=4) if "adapter" in name else few_blocks(name)
    if cfg.default_scope == "mmseg":
        cfg.model.data_preprocessor.size = (64, 96)
        for head in (cfg.model.decode_head, cfg.model.auxiliary_head):
            head.channels = 16
    torch.manual_seed(0)
    model = build(cfg).train()
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    return model, wrapper


def assert_one_step(model, wrapper, data):
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    loss, _ = model.parse_losses(model(**model.data_preprocessor(data, True), mode="loss"))
    assert loss.isfinite() and loss > 0
    loss.backward()
    missing = [name for name in before if model.get_parameter(name).grad is None]
    assert missing == [], "DDP asks for a gradient of every parameter"
    wrapper.step()
    moved = [name for name, p in model.named_parameters() if name in before and not p.equal(before[name])]
    assert len(moved) > 0.8 * len(before)  # behind a gain of 0 nothing moves yet


@pytest.mark.slow
@pytest.mark.parametrize("path", first_config_of_each_family("seg/upernet_*_ade20k.py"))
def test_step_of_upernet(path):
    model, wrapper = small_model(path)
    label_map = torch.randint(150, (1, 64, 96))
    samples = [SegDataSample(gt_sem_seg=PixelData(data=label_map), metainfo=dict(img_shape=(64, 96))) for _ in range(2)]
    images = [torch.randint(256, (3, 64, 96), dtype=torch.uint8) for _ in samples]
    assert_one_step(model, wrapper, dict(inputs=images, data_samples=samples))


@pytest.mark.slow
@pytest.mark.parametrize("path", first_config_of_each_family("det/mask-rcnn_*_1x_coco.py"))
def test_step_of_mask_rcnn(path):
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    model, wrapper = small_model(path)
    mask = np.zeros((2, 96, 128), np.uint8)
    mask[0, 8:40, 8:40] = mask[1, 48:88, 60:120] = 1
    found = InstanceData(
        bboxes=torch.tensor([[8.0, 8, 40, 40], [60, 48, 120, 88]]),
        labels=torch.tensor([3, 70]),
        masks=BitmapMasks(mask, 96, 128),
    )
    meta = dict(img_shape=(96, 128), ori_shape=(96, 128), scale_factor=(1.0, 1.0))
    samples = [DetDataSample(gt_instances=found, ignored_instances=InstanceData(bboxes=torch.empty(0, 4)),
                             metainfo=meta) for _ in range(2)]  # fmt: skip
    images = [torch.randint(256, (3, 96, 128), dtype=torch.uint8) for _ in samples]
    assert_one_step(model, wrapper, dict(inputs=images, data_samples=samples))


# --- the authors' checkpoints ---------------------------------------------------------------------------------------


def published(name):
    """Shapes of the authors' own state dict of a classifier, by key."""
    case = json.loads((ROOT / f"tests/parity/cases/{name}.json").read_text())
    return {key: shape for key, shape, *_ in case["state_dict"]}


@pytest.mark.parametrize("task", ["seg", "det"])
@pytest.mark.parametrize("name", ["vmamba_t", "groupmamba_t"])
def test_authors_checkpoint_loads(task, name, tmp_path):
    """Backbone in the authors' keys, norms of the maps as VMamba has them, neck and heads in the toolkits' keys."""
    path = {"seg": "configs/seg/upernet_{}_ade20k.py", "det": "configs/det/mask-rcnn_{}_1x_coco.py"}[task].format(name)
    model = build(load(path))
    generator = torch.Generator().manual_seed(1)
    dropped = ("classifier.", "norm.", "head", "dist_head", "post_network")
    state = {
        f"backbone.{key}": torch.randn(shape, generator=generator)
        for key, shape in published(name).items()
        if not key.startswith(dropped)
    }
    if name == "vmamba_t":
        for i, dim in enumerate(model.backbone.channels):
            state |= {
                f"backbone.outnorm{i}.{part}": torch.randn(dim, generator=generator) for part in ("weight", "bias")
            }
    heads = {key: value for key, value in model.state_dict().items() if not key.startswith("backbone.")}
    state |= {key: torch.randn(v.shape, generator=generator) if v.ndim else v for key, v in heads.items()}
    torch.save({"state_dict": state}, tmp_path / "published.pth")
    load_weights(model, tmp_path / "published.pth")
    loaded = model.state_dict()
    for key in heads:
        assert loaded[key].equal(state[key]), key
    if name == "vmamba_t":
        assert loaded["backbone.norms.2.bias"].equal(state["backbone.outnorm2.bias"])
        key = "layers.2.blocks.7.op.A_logs"
        assert (
            loaded["backbone.model.stages.2.blocks.7.mixer.s6.A_log"]
            .flatten()
            .equal(state[f"backbone.{key}"].flatten())
        )
    else:
        assert loaded["backbone.model.norm.weight"].equal(state["backbone.norm4.weight"])
        assert loaded["backbone.model.stages.1.norm.bias"].equal(state["backbone.norm2.bias"])
    del state[next(key for key in state if key.endswith("A_logs"))]
    torch.save({"state_dict": state}, tmp_path / "published.pth")
    with pytest.raises(InputError, match="published.pth' does not fit"):
        load_weights(model, tmp_path / "published.pth")


# --- tools ----------------------------------------------------------------------------------------------------------

TINY = """
_base_ = [{base!r}]
model = dict(backbone=dict(pretrained=False, model_kwargs=dict(depths=(1, 1, 1, 1))))
train_dataloader = dict(batch_size=4, num_workers=0, dataset=dict(data_root={data!r}))
val_dataloader = dict(batch_size=4, num_workers=0, dataset=dict(data_root={data!r}))
test_dataloader = val_dataloader
max_epochs = 1
train_cfg = dict(by_epoch=True, max_epochs=1, val_interval=1)
"""
COCO = """
val_evaluator = dict(ann_file={data!r} + "/validation.json")
test_evaluator = val_evaluator
"""
BASES = {"seg": "upernet_groupmamba_t_scenes.py", "det": "mask-rcnn_groupmamba_t_scenes.py"}


@pytest.fixture(scope="module")
def few_scenes(tmp_path_factory):
    """The first 8 and 4 images of the scenes."""
    folder = tmp_path_factory.mktemp("data") / "scenes"
    make_data.scenes(folder)
    for part, count in (("training", 8), ("validation", 4)):
        for kind in ("images", "annotations"):
            for file in sorted((folder / kind / part).iterdir())[count:]:
                file.unlink()
        coco = json.loads((folder / f"{part}.json").read_text())
        coco["images"] = coco["images"][:count]
        coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] < count]
        (folder / f"{part}.json").write_text(json.dumps(coco))
    return folder


@pytest.fixture
def data(few_scenes, tmp_path):
    """A copy of the few scenes, to be spoilt."""
    subprocess.run(["cp", "-r", str(few_scenes), str(tmp_path / "scenes")], check=True)
    return tmp_path / "scenes"


@pytest.fixture
def config(tmp_path, data):
    """Function that writes a tiny config of segmentation ("seg") or detection ("det"), and returns its path."""

    def write(task="seg", more=""):
        path = tmp_path / f"tiny_{task}.py"
        text = TINY + (COCO if task == "det" else "")
        path.write_text(text.format(base=str(ROOT / "configs" / task / BASES[task]), data=str(data)) + more)
        return str(path)

    return write


@pytest.mark.slow
@pytest.mark.parametrize("task", ["seg", "det"])
def test_train_test_predict(task, config, data, tmp_path, capsys):
    """A run is written whole, its checkpoint evaluates to what validation found, and predictions are drawn."""
    path, work_dir, out = config(task), tmp_path / "w", tmp_path / "out"
    train.main([path, "--work-dir", str(work_dir)])
    assert (work_dir / "epoch_1.pth").is_file() and (work_dir / "curves.png").is_file()
    metric = {"seg": "mIoU", "det": "coco/bbox_mAP_50"}[task]
    [log] = work_dir.glob("*/vis_data/scalars.json")
    [validated] = [entry for entry in map(json.loads, log.open()) if metric in entry]
    checkpoint, scores = scenes.best(work_dir, metric)
    assert checkpoint.name == f"best_{metric.replace('/', '_')}_epoch_1.pth" and scores == validated
    capsys.readouterr()
    test.main([path, str(work_dir / "epoch_1.pth")])
    printed = capsys.readouterr()
    metrics = json.loads(printed.out.strip().splitlines()[-1])
    assert metrics[metric] == pytest.approx(validated[metric], abs=0.01)
    table = printed.out + printed.err
    assert ("| photograph" in table and "IoU" in table) if task == "seg" else "Average Precision" in table

    options = ["--threshold", "0.0"]
    predict.main([path, str(work_dir / "epoch_1.pth"), str(data / "images/validation"), "--out", str(out), *options])
    results = json.loads((out / "predictions.json").read_text())
    assert len(results) == 4 and (out / "predictions.png").is_file()
    for result in results:
        with Image.open(result["drawn"]) as drawn:
            assert drawn.size == (128, 128)
        if task == "seg":
            labels = np.asarray(Image.open(result["labels"]))
            assert labels.shape == (128, 128) and labels.max() <= 10
            assert sum(result["shares"].values()) == pytest.approx(1)
        else:
            for found in result["objects"]:
                assert found["label"] in "0123456789" and 0 <= found["score"] <= 1 and found["area"] >= 0
                x1, y1, x2, y2 = found["box"]
                assert 0 <= x1 <= x2 <= 128 and 0 <= y1 <= y2 <= 128


@pytest.mark.slow
def test_scenes_command(config, data, tmp_path, monkeypatch, capsys):
    """One command scores the runs from the classifier and from random weights; run again, it only predicts."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    Path("data/scenes").symlink_to(data)
    classifier = tmp_path / "classifier.safetensors"
    save_file(timm.create_model("groupmamba_t", num_classes=10, depths=(1, 1, 1, 1)).state_dict(), classifier)
    path = config("seg", f"\nmodel['backbone']['pretrained'] = {str(classifier)!r}\n")
    monkeypatch.setitem(scenes.TASKS, "segmentation", (path, {"mIoU": "mIoU (%)"}))
    monkeypatch.setattr(scenes, "CLASSIFIER", classifier)

    scenes.main(["segmentation"])
    printed = re.findall(r"from (.*?):.* mIoU \(%\) (\d+\.\d+)", capsys.readouterr().out)
    assert [start for start, _ in printed] == ["the classifier's weights", "random weights"]
    for work_dir, (_, score) in zip(["segmentation", "segmentation_from_random"], printed, strict=True):
        _, scores = scenes.best(Path("work_dirs", work_dir), "mIoU")
        assert scores["mIoU"] == pytest.approx(float(score), abs=1e-3)
    picture = Path("work_dirs/segmentation/predictions/predictions.png")
    checkpoint = Path("work_dirs/segmentation/epoch_1.pth")
    written = checkpoint.stat().st_mtime_ns
    picture.unlink()
    scenes.main(["segmentation"])
    assert picture.is_file() and checkpoint.stat().st_mtime_ns == written


@pytest.mark.slow
def test_two_processes(config, tmp_path):
    """torchrun with gloo: five iterations of an iteration-based run, every parameter with a gradient in both."""
    more = (
        "train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=5, val_interval=5)\n"
        "param_scheduler = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=5)]\n"
        "train_dataloader = dict(batch_size=2, num_workers=0, dataset=dict(data_root={data!r}),\n"
        "    sampler=dict(type='InfiniteSampler', shuffle=True))\n"
        "default_hooks = dict(checkpoint=dict(by_epoch=False, interval=5), logger=dict(log_metric_by_epoch=False))\n"
    ).format(data=str(tmp_path / "scenes"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command = [*torchrun, str(ROOT / "tools/train.py"), config(more=more), "--launcher", "pytorch"]
    command += ["--work-dir", str(tmp_path / "w"), "--cfg-options", "find_unused_parameters=False"]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "w/iter_5.pth").is_file() and len(list((tmp_path / "w").glob("*.pth"))) >= 1
    assert "unused" not in done.stderr


# --- bad input ------------------------------------------------------------------------------------------------------


def test_missing_folders(capsys, config, data, tmp_path):
    """Where it was looked, and how to prepare what is missing."""
    (data / "annotations/validation").rename(data / "annotations/elsewhere")
    line = refused(capsys, train.main, config(), "--work-dir", tmp_path / "w")
    assert f"data folder {str(data / 'annotations/validation')!r} not found (looked in" in line
    assert "python tools/make_data.py scenes" in line
    assert not (tmp_path / "w").exists()


def test_label_maps(capsys, config, data, tmp_path):
    (data / "annotations/training/0003.png").unlink()
    line = refused(capsys, train.main, config(), "--work-dir", tmp_path / "w")
    assert "0003.png' has no label map (1 such)" in line and not (tmp_path / "w").exists()
    Image.fromarray(np.full((128, 128), 12, np.uint8)).save(data / "annotations/training/0003.png")
    line = refused(capsys, train.main, config(), "--work-dir", tmp_path / "w")
    assert "0003.png' holds the label 12; expected 0 to 11 or 255, as the data set has 11 classes" in line
    (data / "images/training/0003.png").write_bytes(b"no image")
    line = refused(capsys, train.main, config(), "--work-dir", tmp_path / "w")
    assert f"cannot read image {str(data / 'images/training/0003.png')!r}" in line


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("model['backbone'].update(out_indices=(0, 1, 2, 4))", "out_indices: expected different levels from 0 to 3"),
        ("model['backbone'].update(model_name='groupmamba')", "no such model in timm or LinZoo (did you mean 'groupma"),
        ("model['backbone'].update(frozen_stage=1)", "did you mean 'frozen_stages'?"),
        ("model['backbone'].update(pretrained='absent.pth')", "pretrained: checkpoint 'absent.pth': no such file"),
        ("model['backbone']['model_kwargs'].update(depth=3)", "depth"),
        ("optim_wrapper = dict(paramwise_cfg=dict(layer_decay=2.0))", "layer_decay"),
    ],
)
def test_wrong_key(capsys, config, tmp_path, more, said):
    assert said in refused(capsys, train.main, config(more=more + "\n"), "--work-dir", tmp_path / "w")


def test_checkpoint_of_another_model(capsys, config, tmp_path):
    """To start from, and to evaluate."""
    state = timm.create_model("vssd_m", **few_blocks("vssd_m")).state_dict()
    torch.save({"state_dict": state}, tmp_path / "vssd.pth")
    start = f"model['backbone'].update(pretrained={str(tmp_path / 'vssd.pth')!r})\n"
    line = refused(capsys, train.main, config(more=start), "--work-dir", tmp_path / "w")
    assert "vssd.pth' does not fit 'groupmamba_t'" in line
    line = refused(capsys, test.main, config(), tmp_path / "vssd.pth")
    assert "does not fit the config's EncoderDecoder with 'groupmamba_t'" in line


def test_detection_without_mmdet(capsys, config, tmp_path, monkeypatch):
    path = config("det")
    for module in [name for name in sys.modules if name.partition(".")[0] == "mmdet"]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, "mmdet", None)
    monkeypatch.delitem(sys.modules, "linzoo.tools.engine.detection", raising=False)
    line = refused(capsys, train.main, path, "--work-dir", tmp_path / "w")
    assert "linzoo[det]" in line and not (tmp_path / "w").exists()


def test_coco_annotations(capsys, config, data, tmp_path):
    """A missing file, none at all, no annotation, unknown and missing categories."""
    file = data / "training.json"
    coco = json.loads(file.read_text())

    def said(**changes):
        file.write_text(json.dumps({**coco, **changes}))
        return refused(capsys, train.main, config("det"), "--work-dir", tmp_path / "w")

    odd = [{**coco["annotations"][0], "category_id": 77}, *coco["annotations"][1:]]
    assert "annotation 1 has the unknown category 77; expected one of ('0'" in said(annotations=odd)
    more = [*coco["categories"], {"id": 77, "name": "zebra"}]
    assert "has the unknown category 77 ('zebra')" in said(annotations=odd, categories=more)
    assert "have 9 of the data set's 10 classes" in said(categories=coco["categories"][1:], annotations=[])
    assert "hold no annotated image" in said(annotations=[])
    file.write_text("{")
    assert "cannot be read" in refused(capsys, train.main, config("det"), "--work-dir", tmp_path / "w")
    file.unlink()
    line = refused(capsys, train.main, config("det"), "--work-dir", tmp_path / "w")
    assert "training.json' not found" in line
