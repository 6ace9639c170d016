"""Segmentation of volumes: NIfTI in and out, spacing, windows, loss, Dice and HD95, the tools, bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_bad_input import refused
from torch.nn import functional as F

from linzoo.tools import make_data, predict, test, train
from linzoo.tools.engine import InputError, VolumeMetric, Volumes, VolumeSegmenter
from linzoo.tools.engine import volumes as engine
from linzoo.tools.engine.config import load_config
from linzoo.tools.engine.volumes import read_case, read_file

ROOT = Path(__file__).resolve().parents[2]
TINY = dict(features=(4, 4), strides=((2, 2, 2),), patch_size=(8, 16, 16), window=(8, 16, 16))


def save(path, values, spacing=(1.0, 1.0, 2.0)):
    """A NIfTI file of values in its own axes; spacing along these."""
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(values, np.diag([*spacing, *([1.0] * (4 - len(spacing)))]))
    image.header.set_zooms([*spacing[: values.ndim], *([1.0] * (values.ndim - len(spacing)))])
    nibabel.save(image, path)


def write_volumes(folder, count):
    """Cases of 12 slices of 20 x 18 voxels, a bright and a dark box in noise."""
    rng = np.random.default_rng(0)
    for i in range(count):
        label = np.zeros((18, 20, 12), np.uint8)
        label[3:9, 4:12, 2:8], label[11:16, 5 + i : 12, 4:9] = 1, 2
        image = rng.normal(0, 0.3, label.shape) + np.choose(label, [0.0, 2.0, -2.0])
        save(folder / "images" / f"{i}.nii.gz", image.astype(np.float32))
        save(folder / "labels" / f"{i}.nii.gz", label)


monai = pytest.importorskip("monai")
nibabel = pytest.importorskip("nibabel")


@pytest.fixture
def data(tmp_path):
    for part in ("train", "val"):
        write_volumes(tmp_path / "data" / part, 2)
    return tmp_path / "data"


@pytest.fixture
def config(tmp_path, data):
    path = tmp_path / "config.py"
    sizes = ", ".join(f"{key}={value}" for key, value in TINY.items())
    path.write_text(f"""
_base_ = [{str(ROOT / "configs/vol/umamba_bot_3d_lumps.py")!r}]
model = dict({sizes})
train_dataloader = dict(num_workers=0, persistent_workers=False,
    dataset=dict(data_root={str(data)!r}, crop=(8, 16, 16), length=4))
val_dataloader = dict(dataset=dict(data_root={str(data)!r}))
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=1)
param_scheduler = []
""")
    return path


def test_axes_and_spacing(tmp_path):
    """Slices first; four axes hold channels last; one slice is an image; channels may be files."""
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    save(tmp_path / "a.nii.gz", values, (0.5, 0.7, 3.0))
    found = read_file(tmp_path / "a.nii.gz")
    assert found.values.shape == (1, 4, 3, 2) and found.spacing == pytest.approx((3.0, 0.7, 0.5))
    assert found.values[0, 3, 2, 1] == values[1, 2, 3]
    save(tmp_path / "b.nii", np.stack([values, -values], -1), (1.0, 1.0, 2.0))
    assert torch.equal(torch.from_numpy(read_case(tmp_path / "b.nii").values[1]), -torch.from_numpy(found.values[0]))
    save(tmp_path / "c.nii.gz", values[..., :1])
    assert read_case(tmp_path / "c.nii.gz").values.shape == (1, 3, 2)
    for i in range(2):
        save(tmp_path / f"d_000{i}.nii.gz", values + i)
    case = read_case(tmp_path / "d_0000.nii.gz")
    assert case.values.shape == (2, 4, 3, 2) and (case.values[1] - case.values[0] == 1).all()
    save(tmp_path / "d_0001.nii.gz", values[:1])
    with pytest.raises(InputError, match=r"d_0001.nii.gz' is \(4, 3, 1\) .* as its first channel"):
        read_case(tmp_path / "d_0000.nii.gz")


def test_items(data):
    """Normalised, cropped, with labels where the volumes are; resampled to another spacing."""
    whole = Volumes(str(data), "train", num_classes=3)[0]
    assert whole["inputs"].shape == (1, 12, 20, 18) and whole["targets"].shape == (1, 12, 20, 18)
    assert abs(whole["inputs"].mean()) < 1e-4 and abs(whole["inputs"].std() - 1) < 1e-3
    assert whole["spacing"].tolist() == [2.0, 1.0, 1.0]
    torch.manual_seed(0)
    crops = Volumes(str(data), "train", num_classes=3, crop=(8, 24, 16), foreground=1.0, length=6)
    for item in (crops[i] for i in range(6)):
        assert item["inputs"].shape == (1, 8, 24, 16) and item["targets"].dtype == torch.uint8
        means = [item["inputs"][item["targets"] == k].mean().item() for k in (1, 2) if (item["targets"] == k).any()]
        assert (item["targets"] > 0).any() and all(abs(m) > 0.8 for m in means)
    iso = Volumes(str(data), "train", num_classes=3, spacing=(1.0, 1.0, 1.0))[0]
    assert iso["inputs"].shape[2:] == (20, 18) and iso["inputs"].shape[1] in (23, 24)
    assert set(iso["targets"].unique().tolist()) == {0, 1, 2}


def test_loss_is_monais():
    """One head: Dice and cross-entropy; several: weights that halve, the last one 0."""
    logits, targets = torch.randn(2, 3, 4, 8, 8), torch.randint(0, 3, (2, 1, 4, 8, 8))
    one = VolumeSegmenter.loss([logits], targets)
    p, t = logits.softmax(1)[:, 1:], F.one_hot(targets[:, 0], 3).movedim(-1, 1)[:, 1:]
    axes = (0, 2, 3, 4)
    dice = 1 - (2 * (p * t).sum(axes) + 1e-5) / (p.sum(axes) + t.sum(axes) + 1e-5)
    torch.testing.assert_close(one, dice.mean() + F.cross_entropy(logits, targets[:, 0]))
    half, last = torch.randn(2, 3, 2, 4, 4), torch.randn(2, 3, 1, 2, 2)
    deep = VolumeSegmenter.loss([logits, half, last], targets)
    small = F.interpolate(targets.float(), (2, 4, 4), mode="nearest-exact").long()
    torch.testing.assert_close(deep, (one + 0.5 * VolumeSegmenter.loss([half], small)) / 1.5)


def test_metrics_by_hand():
    """Dice of boxes that overlap by half; HD95 in millimetres of a shift along the slices."""
    true, found = torch.zeros(1, 12, 12, 12, dtype=torch.uint8), torch.zeros(1, 12, 12, 12, dtype=torch.long)
    true[0, 2:6, 2:10, 2:10], found[0, 4:8, 2:10, 2:10] = 1, 1
    metric = VolumeMetric(num_classes=3)
    metric.process({}, [(found, true, torch.tensor([3.0, 1.0, 1.0]))])
    means = metric.compute_metrics(metric.results)
    assert means["Dice"] == pytest.approx(50) and means["found"] == 100
    assert means["HD95"] == pytest.approx(6.0)
    true[0, 0, 0, 0] = 2  # which is not found: Dice 0, no distance
    metric.process({}, [(found, true, torch.tensor([3.0, 1.0, 1.0]))])
    means = metric.compute_metrics(metric.results)
    assert means["Dice"] == pytest.approx(100 / 3) and means["HD95"] == pytest.approx(6.0)
    assert means["found"] == pytest.approx(200 / 3)


def test_train_test_predict(config, data, tmp_path, capsys):
    """The tools one after the other; predictions lie on the grid of their volume."""
    train.main([str(config), "--work-dir", str(tmp_path / "run")])
    weights = str(tmp_path / "run/export/model.safetensors")
    capsys.readouterr()
    test.main([str(config), weights])
    metrics = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert set(metrics) == {"volume/Dice", "volume/HD95", "volume/found"}
    out, affine = tmp_path / "out", np.array([[0, -0.9, 0, 7], [1.1, 0, 0, -3], [0, 0, 2.5, 1], [0, 0, 0, 1.0]])
    image = nibabel.Nifti1Image(np.random.default_rng(0).normal(size=(30, 17, 9)).astype(np.float32), affine)
    nibabel.save(image, tmp_path / "turned.nii.gz")
    spacing = ["--cfg-options", "test_dataloader.dataset.spacing=[2.0,1.0,1.0]"]
    predict.main([str(config), weights, str(tmp_path / "turned.nii.gz"), "--out", str(out), *spacing])
    found = nibabel.load(out / "labels/turned.nii.gz")
    np.testing.assert_allclose(found.affine, affine, atol=1e-5)
    assert found.shape == (30, 17, 9) and found.get_data_dtype() == np.uint8
    np.testing.assert_allclose(found.header.get_zooms(), image.header.get_zooms(), rtol=1e-5)
    [said] = json.loads((out / "predictions.json").read_text())
    values = np.asarray(found.dataobj)
    assert said["ml"] == pytest.approx([(values == k).sum() * 1.1 * 0.9 * 2.5 / 1000 for k in (1, 2)], rel=1e-4)
    assert (out / "predictions.png").stat().st_size > 1000


def test_windows_cover_a_volume():
    """A segmenter whose model looks at each voxel alone gives the same in windows."""
    model = VolumeSegmenter("umamba_bot_3d", num_classes=3, **TINY)
    model.model = torch.nn.Conv3d(1, 3, 1)
    x = torch.randn(1, 1, 12, 20, 37)
    with torch.inference_mode():
        torch.testing.assert_close(model.segment(x), model.model(x), rtol=1e-4, atol=1e-5)


def test_images_in_two_dimensions(tmp_path):
    """Swin-UMamba on files of one slice."""
    for name in ("images", "labels"):
        save(tmp_path / name / "a.nii.gz", np.ones((40, 50), np.uint8 if name == "labels" else np.float32), (0.5, 0.5))
    item = Volumes(str(tmp_path), crop=(32, 32), flip=(0, 1))[0]
    assert item["inputs"].shape == (1, 32, 32)
    model = VolumeSegmenter("swin_umamba", in_chans=1, dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), window=(32, 32),
                            deep_supervision=True)  # fmt: skip
    assert model(item["inputs"][None].repeat(2, 1, 1, 1), item["targets"][None].repeat(2, 1, 1, 1), mode="loss")


def test_bad_volumes(data, config, tmp_path, capsys):
    weights, out = tmp_path / "w.pth", tmp_path / "out"
    torch.save(
        VolumeSegmenter("umamba_bot_3d", num_classes=3, deep_supervision=True, **TINY).model.state_dict(), weights
    )

    def line(path):
        return refused(capsys, predict.main, str(config), str(weights), str(path), "--out", str(out))

    raw = tmp_path / "no_spacing.nii"
    save(raw, np.zeros((9, 9, 9), np.float32), (1.0, 1.0, 1.0))
    content = bytearray(raw.read_bytes())
    content[88:92] = bytes(4)  # pixdim[3]
    raw.write_bytes(content)
    assert "no_spacing.nii': its header gives no voxel spacing (pixdim 1, 1, 0); expected positive" in line(raw)
    (tmp_path / "torn.nii.gz").write_bytes((data / "val/images/0.nii.gz").read_bytes()[:200])
    assert "torn.nii.gz'; expected a whole NIfTI file" in line(tmp_path / "torn.nii.gz")
    save(tmp_path / "two.nii.gz", np.zeros((9, 9, 9, 2), np.float32))
    assert "two.nii.gz' has 2 channels; expected 1" in line(tmp_path / "two.nii.gz")
    save(tmp_path / "flat.nii.gz", np.zeros((9, 9), np.float32), (1.0, 1.0))
    assert "flat.nii.gz' has 2 axes; expected 3" in line(tmp_path / "flat.nii.gz")
    save(tmp_path / "nan.nii.gz", np.full((9, 9, 9), np.nan, np.float32))
    assert "nan.nii.gz' holds values that are not finite" in line(tmp_path / "nan.nii.gz")
    assert not list(out.glob("labels/*"))

    work = ["--work-dir", str(tmp_path / "w")]
    label = data / "train/labels/0.nii.gz"
    kept = label.read_bytes()
    for values, spacing, said in (
        (np.full((18, 20, 12), 3, np.uint8), (1.0, 1.0, 2.0), "holds 3; expected classes from 0 to 2"),
        (np.zeros((18, 20, 11), np.uint8), (1.0, 1.0, 2.0), "is (11, 20, 18); expected (12, 20, 18) as its volume"),
        (np.zeros((18, 20, 12), np.uint8), (1.0, 1.0, 5.0), "has spacing (5.0, 1.0, 1.0); expected (2.0, 1.0, 1.0)"),
    ):
        save(label, values, spacing)
        assert said in refused(capsys, train.main, str(config), *work)
    label.write_bytes(kept)
    (data / "train/labels/1.nii.gz").unlink()
    assert "1.nii.gz' is alone; expected a file named '1' in" in refused(capsys, train.main, str(config), *work)
    assert not (tmp_path / "w").exists()


def test_bad_settings(monkeypatch):
    with pytest.raises(InputError, match=r"window=\(8, 16\); expected 3 sides for 'umamba_bot_3d'"):
        VolumeSegmenter("umamba_bot_3d", **dict(TINY, window=(8, 16)))
    with pytest.raises(InputError, match="overlap=1.0; expected a share from 0 to below 1"):
        VolumeSegmenter("umamba_bot_3d", overlap=1.0, **TINY)
    model = VolumeSegmenter("segmamba", window=(8, 8, 8), dims=(4, 4, 4, 4), dim_bottom=8, depths=(1, 1, 1, 1))
    with pytest.raises(
        InputError, match=r"x: sides \(8, 8, 8\) are below the model's strides; expected \(16, 16, 16\)"
    ):
        model.segment(torch.randn(1, 1, 8, 8, 8))
    with pytest.raises(InputError, match=r"init_from=.* 'umamba_bot_3d' cannot start from it"):
        VolumeSegmenter("umamba_bot_3d", init_from=dict(model_name="vmamba_t_v0"), **TINY)

    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(engine.importlib, "import_module", absent)
    with pytest.raises(InputError, match=r'monai.losses cannot be imported .* `pip install "linzoo\[medical\]"`'):
        VolumeSegmenter.loss([torch.zeros(1, 2, 4, 4, 4)], torch.zeros(1, 1, 4, 4, 4))


def test_published_recipes_build():
    for name in ("umamba_bot_3d_abdomen", "umamba_enc_3d_abdomen", "segmamba_brats23", "swin_umamba_endoscopy"):
        cfg = load_config(str(ROOT / f"configs/vol/{name}.py"))
        steps = cfg.train_dataloader.dataset.length // cfg.train_dataloader.batch_size
        assert steps == 250 and cfg.train_cfg.max_epochs == (350 if "swin" in name else 1000)


def test_lumps(tmp_path):
    make_data.lumps(tmp_path / "lumps")
    dataset = Volumes(str(tmp_path / "lumps"), "val", num_classes=3)
    assert len(dataset) == 8
    item = dataset[0]
    assert item["inputs"].shape == (1, 32, 48, 48) and item["spacing"].tolist() == [2.0, 1.0, 1.0]
    assert item["targets"].unique().tolist() == [0, 1, 2]
