"""Training on masks: loss, metrics, augmentation, schedule, start from a classifier, tools, resumption, bad input."""

import json
from pathlib import Path

import mmengine.registry
import numpy as np
import pytest
import timm
import torch
from mmengine.config import Config
from mmseg.structures import SegDataSample
from PIL import Image
from safetensors.torch import save_file
from test_bad_input import refused
from test_resume import assert_same_end, killed
from torch.nn import functional as F
from torchmetrics.classification import BinaryAccuracy, BinaryF1Score, BinaryJaccardIndex, BinaryRecall

import linzoo.backbones  # noqa: F401
from linzoo.tools import predict, test, train
from linzoo.tools.engine import MaskMetric, Segmenter
from linzoo.tools.engine.config import load_config
from linzoo.tools.engine.data import prepare_data

ROOT = Path(__file__).resolve().parents[2]
SMALL = dict(dims=(8, 16, 32, 64), depths=(1, 1, 1, 1), depths_decoder=(1, 1, 1, 1))
CONFIG = """
_base_ = [{base!r}]

model = dict(type="Segmenter", model_name="vm_unet", **{small!r})
data_preprocessor = dict(type="ImgDataPreprocessor", mean=[127.5] * 3, std=[127.5] * 3, bgr_to_rgb=True)
test_pipeline = [
    dict(type="LoadImageFromFile", to_float32=True),
    dict(type="LoadMask"),
    dict(type="Rerange"),
    dict(type="PackSegInputs"),
]
train_pipeline = test_pipeline[:3] + [
    dict(type="RandomFlip", prob=0.5, direction="vertical"),
    dict(type="RandomRotate", prob=0.5, degree=(0, 360), pad_val=0, seg_pad_val=0),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=3,
    num_workers=0,
    dataset=dict(type="MaskedImages", data_root={data!r}, data_prefix="train", pipeline=train_pipeline),
    sampler=dict(type="DefaultSampler", shuffle=True),
)
val_dataloader = dict(
    batch_size=3,
    num_workers=0,
    dataset=dict(type="MaskedImages", data_root={data!r}, data_prefix="val", pipeline=test_pipeline, test_mode=True),
    sampler=dict(type="DefaultSampler", shuffle=False),
)
test_dataloader = val_dataloader
train_cfg = dict(by_epoch=True, max_epochs=2)
optim_wrapper = dict(optimizer=dict(type="AdamW", lr=1e-3))
"""


@pytest.fixture
def data(tmp_path):
    """Folder of 32 x 48 images of noise with a bright square, and the square as mask; one has the values 0 and 1."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 4)):
        for name in ("images", "masks"):
            (tmp_path / "data" / part / name).mkdir(parents=True)
        for i in range(count):
            y, x = rng.integers(0, 16, 2)
            pixels = rng.integers(0, 100, (32, 48, 3), dtype=np.uint8)
            mask = np.zeros((32, 48), dtype=np.uint8)
            pixels[y : y + 16, x : x + 16] += 150
            mask[y : y + 16, x : x + 16] = 1 if i == 0 else 255
            Image.fromarray(pixels).save(tmp_path / "data" / part / "images" / f"{i}.{'png' if i else 'bmp'}")
            Image.fromarray(mask).save(tmp_path / "data" / part / "masks" / f"{i}.png")
    return tmp_path / "data"


@pytest.fixture
def config(tmp_path, data):
    """Function that writes the config with further lines at its end, and returns its path."""

    def write(more: str = "") -> str:
        path = tmp_path / "tiny.py"
        base = str(ROOT / "configs/_base_/masks.py")
        path.write_text(CONFIG.format(base=base, small=SMALL, data=str(data)) + more)
        return str(path)

    return write


def sample(mask):
    return SegDataSample(gt_sem_seg=mmengine.structures.PixelData(data=mask))


def test_loss():
    """BCE over all pixels and 1 - mean over the images of (2 sum pt + 1) / (sum p + sum t + 1)."""
    segmenter = Segmenter("vm_unet", **SMALL).eval()
    images, masks = torch.randn(3, 3, 32, 32), (torch.rand(3, 1, 32, 32) > 0.7).long()
    losses = segmenter(images, [sample(mask) for mask in masks], mode="loss")
    p = segmenter(images).sigmoid().double()
    torch.testing.assert_close(losses["loss_bce"].double(), F.binary_cross_entropy(p, masks.double()))
    dice = [(2 * (a * b).sum() + 1) / (a.sum() + b.sum() + 1) for a, b in zip(p, masks, strict=True)]
    torch.testing.assert_close(losses["loss_dice"].double(), 1 - sum(dice) / 3)


def test_state_dict_has_the_models_own_names():
    segmenter = Segmenter("vm_unet", **SMALL)
    state = segmenter.state_dict()
    assert state.keys() == segmenter.model.state_dict().keys()
    assert not any(segmenter.load_state_dict(state))


def test_metric_is_over_all_pixels():
    """As torchmetrics counts them over everything at once, not a mean over images."""
    predicted, true = (torch.rand(5, 1, 8, 9) ** 2 > 0.5).long(), (torch.rand(5, 1, 8, 9) > 0.8).long()
    metric = MaskMetric()
    for part in (slice(0, 3), slice(3, 5)):
        pairs = zip(predicted[part], true[part], strict=True)
        metric.process(None, [{"pred_sem_seg": {"data": p}, "gt_sem_seg": {"data": t}} for p, t in pairs])
    ours = metric.evaluate(5)
    theirs = {
        "mIoU": BinaryJaccardIndex()(predicted, true),
        "DSC": BinaryF1Score()(predicted, true),
        "accuracy": BinaryAccuracy()(predicted, true),
        "specificity": BinaryRecall()(1 - predicted, 1 - true),
        "sensitivity": BinaryRecall()(predicted, true),
    }
    assert ours == {f"mask/{name}": pytest.approx(100 * value.item(), abs=1e-4) for name, value in theirs.items()}


def test_metric_of_nothing():
    """No foreground anywhere, none found: no division by zero."""
    metric, nothing = MaskMetric(), {"data": torch.zeros(1, 4, 4, dtype=torch.long)}
    metric.process(None, [{"pred_sem_seg": nothing, "gt_sem_seg": nothing}])
    values = metric.evaluate(1)
    assert values["mask/accuracy"] == values["mask/specificity"] == 100 and values["mask/mIoU"] == 0


def test_augmentation_keeps_image_and_mask_together(config):
    """The bright square lies under its mask after flips and rotation, whatever the draw; masks stay zeros and ones."""
    with mmengine.registry.DefaultScope.overwrite_default_scope("mmseg"):
        dataset = mmengine.registry.DATASETS.build(load_config(config()).train_dataloader.dataset)
    for i in range(len(dataset)):
        item = dataset[i]
        image, mask = item["inputs"].mean(0), item["data_samples"].gt_sem_seg.data[0]
        assert set(mask.unique().tolist()) <= {0, 1} and image.max() <= 255
        assert image[mask == 1].mean() > 2 * image[mask == 0].mean()


def test_authors_normalisation_changes_nothing():
    """What `Rerange` does after (image - mean) / std is what it does without."""
    rerange = mmengine.registry.TRANSFORMS.build(dict(type="mmseg.Rerange"))
    image = np.random.default_rng(0).integers(20, 230, (8, 8, 3)).astype(np.float32)
    plain, normalised = (rerange(dict(img=x))["img"] for x in (image, (image - 157.561) / 26.706))
    assert plain.min() == 0 and plain.max() == 255
    np.testing.assert_allclose(plain, normalised, atol=1e-3)


def test_published_schedule():
    """The rate falls for 50 epochs and rises for 50, as torch's cosine does past its T_max."""
    cfg = load_config(str(ROOT / "configs/seg/mhs_vm_unet_isic18.py"))
    optimizers = [torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3) for _ in range(2)]
    ours = mmengine.registry.PARAM_SCHEDULERS.build(dict(cfg.param_scheduler[0], optimizer=optimizers[0]))
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[1], T_max=50, eta_min=1e-5)
    rates = []
    for _ in range(300):
        rates.append([optimizer.param_groups[0]["lr"] for optimizer in optimizers])
        for optimizer, scheduler in zip(optimizers, (ours, theirs), strict=True):
            optimizer.step()
            scheduler.step()
    np.testing.assert_allclose(*np.transpose(rates), rtol=1e-9)
    assert rates[50][0] == pytest.approx(1e-5) and rates[100][0] == pytest.approx(1e-3)


def test_start_from_a_classifier(tmp_path):
    """`init_from` is what `timm.create_model` takes, a file included; the runner initialises nothing anew."""
    kwargs = dict(dims=SMALL["dims"], depths=(1, 1, 1, 1))
    classifier = timm.create_model("vmamba_s_v0", **kwargs)
    save_file(classifier.state_dict(), tmp_path / "classifier.safetensors")
    overlay = dict(file=str(tmp_path / "classifier.safetensors"))
    init_from = dict(model_name="vmamba_s_v0", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    segmenter = Segmenter("vm_unet", init_from=init_from, **SMALL)
    segmenter.init_weights()
    ours, theirs = segmenter.model.stages[2].blocks[0], classifier.stages[2].blocks[0]
    assert torch.equal(ours.mixer.s6.x_proj, theirs.mixer.s6.x_proj)
    assert torch.equal(segmenter.model.decoder[1].blocks[0].mixer.s6.x_proj, theirs.mixer.s6.x_proj)


def test_artifacts(config, tmp_path, data, capsys):
    """Training leaves log, curves, checkpoints and an export that timm, test.py and predict.py read alike."""
    path, work_dir = config(), tmp_path / "w"
    train.main([path, "--work-dir", str(work_dir)])
    assert (work_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    log = next(work_dir.glob("*/*.log")).read_text()
    assert all(word in log for word in ("images_per_s", "loss_bce", "loss_dice", "mask/DSC", "mask/sensitivity"))
    facts = json.loads((work_dir / "export/config.json").read_text())
    assert facts["architecture"] == "vm_unet" and facts["pretrained_cfg"]["mean"] == [0.5] * 3
    weights, best = work_dir / "export/model.safetensors", next(work_dir.glob("best_mask_mIoU_*.pth"))
    model = timm.create_model(f"local-dir:{work_dir / 'export'}", pretrained=True)
    state = torch.load(best, weights_only=False)["state_dict"]
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    metrics = []
    for checkpoint in (weights, best):
        capsys.readouterr()
        test.main([path, str(checkpoint)])
        metrics.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert metrics[0] == metrics[1] and metrics[0]["mask/mIoU"] == pytest.approx(facts["mIoU"])

    predict.main([path, str(weights), str(data / "val/images"), "--out", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [Path(result["mask"]).name for result in results] == [f"{i}.png" for i in range(4)]
    found, true = [], []
    for result in results:
        found.append(np.asarray(Image.open(result["mask"])))
        true.append(np.asarray(Image.open(data / "val/masks" / Path(result["mask"]).name)) > 0)
        assert found[-1].shape == (32, 48) and set(np.unique(found[-1])) <= {0, 255}
        assert result["share"] == (found[-1] > 0).mean()
    agreed = (np.stack(found) > 0) == np.stack(true)
    assert 100 * agreed.mean() == pytest.approx(metrics[0]["mask/accuracy"], abs=1e-3)
    assert (tmp_path / "out/predictions.png").read_bytes().startswith(b"\x89PNG")

    Image.open(data / "val/images/1.png").resize((96, 64)).save(tmp_path / "large.png")
    predict.main([path, str(best), str(tmp_path / "large.png"), "--out", str(tmp_path / "one")])
    assert Image.open(tmp_path / "one/masks/large.png").size == (96, 64)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_run_resumes_bit_equal(config, tmp_path, workers):
    path = config(f"train_dataloader.update(num_workers={workers})\n")
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    train.main([path, "--work-dir", str(whole)])
    killed([path, "--work-dir", str(torn)], lambda: (torn / "epoch_1.pth").exists())
    train.main([path, "--work-dir", str(torn), "--resume"])
    assert_same_end(whole, torn, epoch=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vm_unet_isic18", "mhs_vm_unet_isic18"])
def test_published_recipe(name, data, tmp_path):
    """Runs end to end at 256 px: augmentation, start from a classifier where there is one, metrics, export."""
    parts = ("train", "val", "test")
    options = [
        *(f"{part}_dataloader.{key}" for part in parts for key in ("num_workers=0", "batch_size=2")),
        *(f"{part}_dataloader.dataset.data_root={data}" for part in parts),
        *("train_cfg.max_epochs=1", f"model.dims={SMALL['dims']}", f"model.depths={SMALL['depths']}"),
    ]
    if name == "vm_unet_isic18":
        options += ["model.init_from.pretrained=False", f"model.init_from.dims={SMALL['dims']}"]
    config = ROOT / f"configs/seg/{name}.py"
    train.main([str(config), "--work-dir", str(tmp_path / "w"), "--cfg-options", *options])
    checkpoint = torch.load(tmp_path / "w/epoch_1.pth", weights_only=False)
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    facts = json.loads((tmp_path / "w/export/config.json").read_text())["pretrained_cfg"]
    assert facts["input_size"] == [3, 256, 256] and facts["mean"] == [0] * 3
    assert facts["std"] == pytest.approx([1 / 255] * 3)


@pytest.mark.slow
def test_inked_digits_are_found(tmp_path):
    """The quick config learns: two epochs are enough for more than chance."""
    options = [f"{part}_dataloader.dataset.data_root={tmp_path / 'inked'}" for part in ("train", "val", "test")]
    config = str(ROOT / "configs/seg/mhs_vm_unet_inked.py")
    options += ["train_cfg.max_epochs=2"]
    train.main([config, "--work-dir", str(tmp_path / "w"), "--cfg-options", *options])
    assert json.loads((tmp_path / "w/export/config.json").read_text())["mIoU"] > 20


def test_missing_folders(capsys, config, data, tmp_path):
    (data / "train/masks").rename(data / "train/mask")
    line = refused(capsys, train.main, config(), "--work-dir", tmp_path / "w")
    assert str(data / "train/masks") in line and "not found" in line and "expected images/ and masks/" in line
    data.rename(data.with_name("elsewhere"))
    line = refused(capsys, train.main, config(), "--work-dir", tmp_path / "w")
    assert str(data / "train/images") in line and "not found" in line
    assert not (tmp_path / "w").exists()


def test_empty_folder(capsys, config, data, tmp_path):
    for file in (data / "val/masks").iterdir():
        file.unlink()
    line = refused(capsys, train.main, config(), "--work-dir", tmp_path / "w")
    assert f"{str(data / 'val/masks')!r} holds no image" in line and not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("what", "file", "where"), [("image", "masks/2.png", "masks"), ("mask", "images/2.png", "images")]
)
def test_alone(capsys, config, data, tmp_path, what, file, where):
    (data / "train" / file).unlink()
    line = refused(capsys, train.main, config(), "--work-dir", tmp_path / "w")
    other = data / "train" / ("images" if where == "masks" else "masks") / "2.png"
    assert f"{what} {str(other)!r} is alone" in line and f"named '2' in {str(data / 'train' / where)!r}" in line
    assert not (tmp_path / "w").exists()


def test_two_images_of_one_name(capsys, config, data, tmp_path):
    Image.new("RGB", (48, 32)).save(data / "train/images/2.jpg")
    line = refused(capsys, train.main, config(), "--work-dir", tmp_path / "w")
    assert "2.jpg" in line and "2.png" in line and "one file a name" in line


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (Image.new("L", (32, 48)), "is 32 x 48; expected 48 x 32 as its image"),
        (Image.new("L", (48, 32), 128), "holds the value 128; expected 0 and 255, or 0 and 1"),
        (Image.fromarray(np.arange(48 * 32, dtype=np.uint8).reshape(32, 48) % 3), "holds the value 1"),
        (None, "expected a whole image file"),
    ],
    ids=["size", "grey", "three values", "torn"],
)
def test_wrong_mask(capsys, config, data, tmp_path, mask, said):
    file = data / "train/masks/3.png"
    file.write_bytes(b"\x89PNG torn") if mask is None else mask.save(file)
    line = refused(capsys, train.main, config(), "--work-dir", tmp_path / "w")
    assert f"mask {str(file)!r}" in line and said in line


def test_wrong_images(capsys, config, data, tmp_path):
    """Unreadable in training; in prediction also blank. Nothing is written then."""
    weights, out = tmp_path / "w.safetensors", tmp_path / "out"
    save_file(timm.create_model("vm_unet", **SMALL).state_dict(), weights)
    Image.new("RGB", (48, 32), "white").save(data / "val/images/blank.png")
    line = refused(capsys, predict.main, config(), weights, data / "val/images/blank.png", "--out", out)
    assert "blank.png" in line and "not blank" in line
    (data / "val/images/blank.png").unlink()
    Image.open(data / "val/images/2.png").save(data / "val/images/2.jpg")
    (data / "val/images/2.png").write_bytes(b"no image")
    assert "2.png" in refused(capsys, predict.main, config(), weights, data / "val/images", "--out", out)
    assert not out.exists()
    (data / "val/images/2.jpg").unlink()
    (data / "train/images/3.png").write_bytes(b"no image")
    line = refused(capsys, train.main, config(), "--work-dir", tmp_path / "w")
    assert f"cannot read image {str(data / 'train/images/3.png')!r}" in line


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("model.update(model_name='vm_unett')", "no such model in timm or LinZoo (did you mean 'vm_unet'?)"),
        ("model.update(dimss=(8, 16, 32, 64))", "dimss"),
        ("model.update(model_name='test_byobnet')\nfor k in ('dims', 'depths', 'depths_decoder'): model.pop(k)",
         "num_classes=1000; expected one mask"),
        ("model.update(init_from=dict(model_name='vmamba_s_v'))", "model.init_from.model_name='vmamba_s_v': no such"),
        ("model.update(init_from=dict(model_nam='vmamba_s_v0'))", "did you mean 'model_name'?"),
        ("model.update(init_from=dict(model_name='vmamba_t'))", "cannot start from it: state_dict: expected 'stem."),
        ("train_dataloader['dataset'].update(data_prefx='x')", "did you mean 'data_prefix'?"),
        ("test_pipeline.append(dict(type='LoadMasks'))", "did you mean 'LoadMask'?"),
        ("val_evaluator = dict(type='MaskMetrics')", "did you mean 'MaskMetric'?"),
        ("data_preprocessor.update(men=[0, 0, 0])", "did you mean 'mean'?"),
    ],
)  # fmt: skip
def test_wrong_key(capsys, config, tmp_path, more, said):
    assert said in refused(capsys, train.main, config(more + "\n"), "--work-dir", tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_checkpoint_of_the_other_model(capsys, config, tmp_path):
    save_file(
        timm.create_model("mhs_vm_unet", device="meta").to_empty(device="cpu").state_dict(), tmp_path / "o.safetensors"
    )
    line = refused(capsys, test.main, config(), tmp_path / "o.safetensors")
    assert "does not fit model 'vm_unet'" in line and "it fits 'mhs_vm_unet' with num_classes=1" in line


def test_data_is_made_on_first_use(tmp_path):
    cfg = Config.fromfile(ROOT / "configs/seg/mhs_vm_unet_inked.py")
    for part in ("train", "val", "test"):
        cfg[f"{part}_dataloader"].dataset.data_root = str(tmp_path / "inked")
    prepare_data(cfg)
    assert len(list((tmp_path / "inked").rglob("*.png"))) == 1200
