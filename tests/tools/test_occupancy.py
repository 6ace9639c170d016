"""Training on voxels: SemanticKITTI's files, labels, losses, metrics, the tools, resumption, bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from test_bad_input import refused
from torch.nn import functional as F

import linzoo.backbones  # noqa: F401
from linzoo.tools import predict, test, train
from linzoo.tools.engine import InputError, OccupancyMetric, Runner, SceneCompleter, VoxelScenes
from linzoo.tools.engine.config import load_config
from linzoo.tools.engine.occupancy import CLASSES, coarse_labels, learning_map, occupancy_loss

ROOT = Path(__file__).resolve().parents[2]
GRID = (32, 32, 8)
SMALL = dict(height=8, dims=(16, 32, 32, 32, 32), voxel_dim=16, drop_rate=0.0)
ROAD, CAR, MOVING_CAR, BUILDING, OTHER = 40, 10, 252, 50, 99


def street(rng):
    """Labels of a street between two buildings with two cars, and which voxels a sweep from above the street hits."""
    labels = np.zeros(GRID, np.uint16)
    labels[:, :, 0] = ROAD
    left, right = int(rng.integers(3, 7)), int(rng.integers(25, 29))
    labels[:, :left, :7] = labels[:, right:, :7] = BUILDING
    for label, y in ((CAR, 10), (MOVING_CAR, 19)):
        x = int(rng.integers(2, 24))
        labels[x : x + 6, y : y + 3, 1:3] = label
    labels[30, 15, 1:4] = OTHER
    surface = np.zeros(GRID, bool)
    surface[:, :, :-1] = (labels[:, :, :-1] > 0) & (labels[:, :, 1:] == 0)  # what is seen from above
    surface[:, left - 1], surface[:, right] = labels[:, left - 1] > 0, labels[:, right] > 0  # and the walls
    invalid = np.zeros(GRID, bool)
    invalid[:, :2] = invalid[:, -2:] = True  # inside the buildings
    return labels, surface & (rng.random(GRID) < 0.8), invalid


def write_scenes(root, sequence, count):
    folder = root / "sequences" / sequence / "voxels"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(int(sequence))
    for i in range(count):
        labels, hit, invalid = street(rng)
        labels.tofile(folder / f"{5 * i:06}.label")
        np.packbits(hit).tofile(folder / f"{5 * i:06}.bin")
        np.packbits(invalid).tofile(folder / f"{5 * i:06}.invalid")


@pytest.fixture
def data(tmp_path):
    write_scenes(tmp_path / "kitti", "00", 4)
    write_scenes(tmp_path / "kitti", "08", 2)
    return tmp_path / "kitti"


@pytest.fixture
def config(tmp_path, data):
    text = f"""
_base_ = [{str(ROOT / "configs/occ/occrwkv_semantickitti.py")!r}]
model = dict(**{SMALL!r})
train_dataloader = dict(
    num_workers=0, dataset=dict(data_root={str(data)!r}, grid={GRID}, sequences=["00"])
)
val_dataloader = dict(num_workers=0, dataset=dict(data_root={str(data)!r}, grid={GRID}))
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=2)
"""
    path = tmp_path / "config.py"
    path.write_text(text)
    return path


def test_scenes(data):
    dataset = VoxelScenes(str(data), ["00", "08"], GRID)
    assert len(dataset) == 6
    rng = np.random.default_rng(8)
    for item in (dataset[4], dataset[5]):
        labels, hit, invalid = street(rng)
        assert np.array_equal(item["inputs"][0].numpy() == 1, hit)
        targets = item["targets"].numpy()
        names = np.array(["empty", *CLASSES])
        assert (targets[invalid] == 255).all()
        for label, name in ((0, "empty"), (ROAD, "road"), (CAR, "car"), (MOVING_CAR, "car"), (BUILDING, "building")):
            assert set(names[targets[(labels == label) & ~invalid]]) == {name}
        assert (targets[labels == OTHER] == 255).all()
    assert "targets" not in VoxelScenes(str(data), ["08"], GRID, labelled=False)[0]


def test_learning_map():
    """Every class has its labels, each label one class; all else is refused."""
    table = learning_map()
    assert table.shape == (65536,)
    assert [int(table[label]) for label in (0, 1, 10, 81, 252, 259)] == [0, 255, 1, 19, 1, 5]
    assert sorted(set(table.tolist())) == [-1, *range(20), 255]
    assert (table >= 0).sum() == 1 + 3 + sum(len(labels) for labels in CLASSES.values()) == 34


def test_coarse_labels():
    targets = torch.randint(0, 4, (2, 4, 8, 4))
    targets[targets == 3] = 255
    targets[0, :2, :2, :2] = 255
    targets[1, :2, :2, :2] = torch.tensor([0, 0, 0, 0, 0, 0, 255, 2]).view(2, 2, 2)
    ours = coarse_labels(targets.to(torch.uint8), 2, 3)
    assert ours.shape == (2, 2, 4, 2)
    assert ours[0, 0, 0, 0] == 255
    assert ours[1, 0, 0, 0] == 2, "one occupied voxel makes a cell occupied"
    for b, x, y, z in np.ndindex(2, 2, 4, 2):
        cell = targets[b, 2 * x : 2 * x + 2, 2 * y : 2 * y + 2, 2 * z : 2 * z + 2].flatten()
        votes = [(cell == label).sum().item() for label in (1, 2)]
        expected = 1 + int(votes[1] > votes[0]) if any(votes) else 0 if (cell == 0).any() else 255
        assert ours[b, x, y, z] == expected


def test_loss():
    """Cross-entropy by hand; the Lovasz loss of two classes by its definition on sorted errors; 255 counts nowhere."""
    logits, labels = torch.randn(40, 3, dtype=torch.float64), torch.randint(0, 3, (40,))
    labels[::7] = 255
    weights = torch.tensor([0.5, 1.0, 2.0])
    entropy, lovasz = occupancy_loss(logits, labels, weights)
    known = labels != 255
    p, truth = logits[known].softmax(1), labels[known]
    picked = -p[torch.arange(len(truth)), truth].log()
    torch.testing.assert_close(
        entropy.double(), (weights[truth] * picked).sum() / weights[truth].sum(), rtol=1e-5, atol=0
    )
    expected = []
    for label in range(3):
        is_label = (truth == label).double()
        errors, order = (is_label - p[:, label]).abs().sort(descending=True)
        true = is_label[order]
        jaccard = 1 - (true.sum() - true.cumsum(0)) / (true.sum() + (1 - true).cumsum(0))
        expected.append((errors * torch.cat([jaccard[:1], jaccard.diff()])).sum())
    torch.testing.assert_close(lovasz.double(), torch.stack(expected).mean(), rtol=1e-5, atol=0)
    nothing = occupancy_loss(logits, torch.full((40,), 255))
    assert [x.item() for x in nothing] == [0, 0]


def test_losses_of_the_branches(data):
    """Seven losses; the auxiliary ones fall to nothing for logits that say the coarse labels."""
    item = VoxelScenes(str(data), ["08"], GRID)[0]
    completer = SceneCompleter("occrwkv", class_counts=[10.0] * 20, **SMALL)
    voxels, targets = item["inputs"][None], item["targets"][None]
    logits, semantic, completion = completer.model.branches(voxels)
    random = completer.losses(logits, semantic, completion, targets)
    assert list(random) == [
        "loss_voxels",
        *(f"loss_{kind}{s}" for s in (2, 4, 8) for kind in ("semantic", "completion")),
    ]
    known = targets.long().where(targets < 20, 0)
    logits = 50 * F.one_hot(known, 20).movedim(-1, 1).float()
    right_cells, right_grid = [], []
    for i, (_, where) in enumerate(semantic):
        labels = coarse_labels(targets, 2 ** (i + 1), 20)
        right_cells.append((50 * F.one_hot((labels[tuple(where.t())] - 1).clamp(0, 18), 19).float(), where))
        right_grid.append(50 * F.one_hot((labels > 0).long(), 2).movedim(-1, 1).float())
    right = completer.losses(logits, right_cells, right_grid, targets)
    assert all(right[name] < 1e-3 < 0.5 < random[name] for name in random)


def test_metric():
    """By hand on a confusion of three classes; unknown voxels do not count, a class that nothing has counts as 0."""
    true = torch.tensor([0, 0, 1, 1, 2, 255]).view(1, 2, 3)
    predicted = torch.tensor([0, 1, 1, 2, 0, 2]).view(1, 2, 3)
    metric = OccupancyMetric(num_classes=4)
    metric.process(None, [(predicted, true.to(torch.uint8))])
    values = metric.evaluate(1)
    assert values["occupancy/IoU"] == pytest.approx(50)  # 2 of 4
    assert values["occupancy/precision"] == values["occupancy/recall"] == pytest.approx(200 / 3)
    assert values["occupancy/mIoU"] == pytest.approx(100 / 9)  # 1/3, 0, 0


@pytest.mark.slow
def test_learns(config, tmp_path):
    """60 steps on four streets: the loss falls, and streets not seen before are completed and their classes told."""
    options = {"train_cfg.max_epochs": 30, "train_cfg.val_interval": 30, "default_hooks.checkpoint.interval": 30}
    cfg = load_config(str(config), {**options, "optim_wrapper.optimizer.lr": 5e-3})
    cfg.experiment_name = cfg.work_dir = str(tmp_path / "run")
    runner = Runner.from_cfg(cfg)
    runner.train()
    history = runner.message_hub.get_scalar("train/loss").data[0]
    assert np.mean(history[-4:]) < 0.3 * np.mean(history[:4]), history
    scores = {name: runner.message_hub.get_scalar(f"val/occupancy/{name}").current() for name in ("IoU", "mIoU")}
    assert scores["IoU"] > 90, scores
    assert scores["mIoU"] > 0.9 * 100 * 3 / 19, "three of the classes are there"
    metric = OccupancyMetric()  # of what the sweep hit alone
    for item in VoxelScenes(str(tmp_path / "kitti"), ["08"], GRID):
        metric.process(None, [(item["inputs"][0].long(), item["targets"])])
    assert scores["IoU"] > metric.evaluate(2)["occupancy/IoU"] + 30, scores


def test_artifacts(config, tmp_path, capsys):
    """Training leaves log, curves and checkpoints that test.py reads; resumption is exact."""
    work_dir = tmp_path / "run"
    train.main([str(config), "--work-dir", str(work_dir)])
    assert (work_dir / "curves.png").stat().st_size > 1000
    log = next(work_dir.glob("*/*.log")).read_text()
    assert all(word in log for word in ("loss_voxels", "loss_semantic8", "loss_completion2", "occupancy/precision"))
    capsys.readouterr()
    test.main([str(config), str(work_dir / "epoch_2.pth")])
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 <= metrics["occupancy/mIoU"] <= 100 and metrics["occupancy/IoU"] > 0

    train.main([str(config), "--work-dir", str(tmp_path / "part"), "--cfg-options", "train_cfg.max_epochs=1"])
    train.main([str(config), "--work-dir", str(tmp_path / "part"), "--resume"])
    ends = [torch.load(tmp_path / run / "epoch_2.pth", weights_only=False)["state_dict"] for run in ("run", "part")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    model = timm.create_model("occrwkv", **SMALL)
    model.load_state_dict(ends[0])

    scenes, out = tmp_path / "kitti/sequences/08/voxels", tmp_path / "out"
    predict.main([str(config), str(work_dir / "export/model.safetensors"), str(scenes), "--out", str(out)])
    first, _ = json.loads((out / "predictions.json").read_text())
    labels = np.fromfile(out / "labels/000000.label", np.uint16).reshape(GRID)
    assert sum(first["voxels"].values()) == labels.size and first["voxels"]["road"] == (labels == ROAD).sum()
    model = timm.create_model("occrwkv", **SMALL).eval()
    model.load_state_dict(load_file(work_dir / "export/model.safetensors"))
    with torch.no_grad():
        classes = model(VoxelScenes(str(tmp_path / "kitti"), ["08"], GRID)[0]["inputs"][None]).argmax(1)[0]
    assert (learning_map()[labels] == classes.numpy()).all()
    (tmp_path / "image.png").write_bytes(b"")
    line = refused(
        capsys, predict.main, config, work_dir / "epoch_2.pth", tmp_path / "image.png", "--out", tmp_path / "out"
    )
    assert "image.png' holds no voxel file; expected files ending in .bin" in line


def test_bad_files(data, config, capsys, tmp_path):
    option = "val_dataloader.dataset.sequences=[09]"
    line = refused(capsys, train.main, config, "--work-dir", tmp_path / "w", "--cfg-options", option)
    assert "voxel folder" in line and "not found or empty" in line and not (tmp_path / "w").exists()
    folder = data / "sequences/08/voxels"

    def scene(i):
        return VoxelScenes(str(data), ["08"], GRID)[i]

    labels = np.fromfile(folder / "000000.label", np.uint16)
    np.where(np.arange(labels.size) == 5, 77, labels).astype(np.uint16).tofile(folder / "000000.label")
    with pytest.raises(InputError, match="000000.label' hold 77; expected labels of SemanticKITTI"):
        scene(0)
    (folder / "000000.bin").write_bytes(bytes(1024))
    with pytest.raises(InputError, match="000000.bin' are all empty"):
        scene(0)
    (folder / "000005.bin").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"000005.bin' have 4 bytes; expected 1024 of \(32, 32, 8\) voxels"):
        scene(1)
    (folder / "000005.invalid").unlink()
    with pytest.raises(InputError, match="000005.bin' are alone; expected '000005.invalid' beside them"):
        scene(1)
    with pytest.raises(
        InputError,
        match="model_name='vrwkv_t' is of kind 'backbone'; expected a model of kind occupancy, such as 'occrwkv'",
    ):
        SceneCompleter("vrwkv_t")
    with pytest.raises(InputError, match="class_counts=.*; expected 20 numbers above 1"):
        SceneCompleter("occrwkv", class_counts=[5.0, 5.0], **SMALL)


def test_published_config():
    cfg = load_config(str(ROOT / "configs/occ/occrwkv_semantickitti.py"))
    assert len(cfg.model.class_counts) == 20
    assert "08" not in cfg.train_dataloader.dataset.sequences
