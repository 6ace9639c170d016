"""Training on pairs of images: reading, crops, losses, metrics, tiles, the tools, resumption, bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from test_bad_input import refused
from torch.nn import functional as F

import linzoo.backbones  # noqa: F401
from linzoo.tools import denoise, predict, test, train
from linzoo.tools.engine import InputError, PairedImages, RestorationMetric, Restorer
from linzoo.tools.engine.config import load_config
from linzoo.tools.engine.restorer import charbonnier_loss, read_image, restore_tiled

ROOT = Path(__file__).resolve().parents[2]
SMALL = dict(dim=8, depths=(1, 1, 1, 1), refinement=1)


@pytest.fixture
def data(tmp_path):
    """Folder of pairs of smooth 40 x 56 images and the same with noise, of 8 bits, 16 bits and float32."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3)):
        for kind in ("input", "target"):
            (tmp_path / "data" / part / kind).mkdir(parents=True)
        for i in range(count):
            y, x = np.mgrid[:40, :56] / 40
            clean = (0.5 + 0.4 * np.sin(3 * y + i) * np.cos(4 * x)).astype(np.float32)
            noisy = (clean + rng.normal(0, 0.1, clean.shape)).clip(0, 1).astype(np.float32)
            for kind, pixels in (("input", noisy), ("target", clean)):
                folder = tmp_path / "data" / part / kind
                if i % 3 == 0:
                    Image.fromarray((pixels * 255).round().astype(np.uint8)).save(folder / f"{i}.png")
                elif i % 3 == 1:
                    Image.fromarray((pixels * 65535).round().astype(np.uint16)).save(folder / f"{i}.png")
                else:
                    Image.fromarray(pixels).save(folder / f"{i}.tif")
    return tmp_path / "data"


@pytest.fixture
def config(tmp_path, data):
    text = f"""
_base_ = [{str(ROOT / "configs/restore/restore_rwkv_light_noisy.py")!r}]
model = dict(dim=8, depths=(1, 1, 1, 1), refinement=1)
train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False,
    dataset=dict(data_root={str(data)!r}, crop=16, noise=None, length=12),
)
val_dataloader = dict(batch_size=1, dataset=dict(data_root={str(data)!r}))
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=2)
param_scheduler = []
"""
    path = tmp_path / "config.py"
    path.write_text(text)
    return path


def test_values_of_every_kind_of_file(data):
    images = [read_image(data / "val" / "target" / name, 1) for name in ("0.png", "1.png", "2.tif")]
    y, x = np.mgrid[:40, :56] / 40
    for i, (image, step) in enumerate(zip(images, (1 / 255, 1 / 65535, 1e-6), strict=True)):
        clean = torch.tensor(0.5 + 0.4 * np.sin(3 * y + i) * np.cos(4 * x)).float()[None]
        assert image.dtype == torch.float32 and image.shape == (1, 40, 56)
        assert (image - clean).abs().max() <= step
    assert read_image(data / "val" / "target" / "0.png", 3).shape == (3, 40, 56)


def test_colour_files(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "rgb.png")
    Image.fromarray(np.dstack([pixels, pixels[..., :1]])).save(tmp_path / "rgba.png")
    expected = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    assert torch.equal(read_image(tmp_path / "rgb.png", 3), expected)
    assert torch.equal(read_image(tmp_path / "rgba.png", 3), expected)
    grey = read_image(tmp_path / "rgb.png", 1)
    assert grey.shape == (1, 6, 7)
    assert (grey[0] - (expected * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)).abs().max() < 0.01


def test_crops_of_a_pair_show_the_same_place(data):
    dataset = PairedImages(str(data), "train", crop=16, length=18)
    assert len(dataset) == 18
    torch.manual_seed(0)
    seen = set()
    for i in range(18):
        item = dataset[i]
        assert item["inputs"].shape == item["targets"].shape == (1, 16, 16)
        assert (item["inputs"] - item["targets"]).std() < 0.15, "only the noise differs"
        seen.add(item["targets"].sum().item())
    assert len(seen) == 18


def test_fresh_noise(data):
    dataset = PairedImages(str(data), "train", noise=0.2)
    first, second = dataset[0], dataset[0]
    assert torch.equal(first["targets"], second["targets"])
    assert not torch.equal(first["inputs"], second["inputs"])
    assert abs((first["inputs"] - first["targets"]).std() - 0.2) < 0.02


def test_jpeg(data):
    """Inputs are the targets, compressed; no input folder is needed."""
    (data / "train/input").rename(data / "away")
    mild, strong = (PairedImages(str(data), "train", jpeg=quality)[1] for quality in (95, 5))
    assert mild["inputs"].shape == mild["targets"].shape == (1, 40, 56)
    errors = [(item["inputs"] - item["targets"]).abs().mean().item() for item in (mild, strong)]
    assert 0 < errors[0] < errors[1] < 0.2


@pytest.fixture
def div2k(tmp_path):
    """Colour images of 51 x 34 in DIV2K's layout, and those shrunk to 25 x 17."""
    for part in ("train", "valid"):
        for name in ("HR", "LR_bicubic/X2"):
            (tmp_path / f"div2k/DIV2K_{part}_{name}").mkdir(parents=True)
        for i in range(2):
            y, x = np.mgrid[:34, :51] / 30
            colours = [0.5 + 0.4 * np.sin(5 * y + i + c) * np.cos(7 * x - c) for c in range(3)]
            image = Image.fromarray((np.dstack(colours) * 255).round().astype(np.uint8))
            image.save(tmp_path / f"div2k/DIV2K_{part}_HR/000{i}.png")
            small = image.crop((0, 0, 50, 34)).resize((25, 17), Image.BICUBIC)
            small.save(tmp_path / f"div2k/DIV2K_{part}_LR_bicubic/X2/000{i}x2.png")
    return tmp_path / "div2k"


def test_super_resolution(div2k, tmp_path, capsys):
    """DIV2K's layout, crops that show the same place, training, metrics on Y, tiles."""
    folders = ("DIV2K_train_LR_bicubic/X2", "DIV2K_train_HR")
    settings = dict(channels=3, scale=2, folders=folders, suffix="x2")
    whole = PairedImages(str(div2k), **settings)[1]
    assert whole["inputs"].shape == (3, 17, 25) and whole["targets"].shape == (3, 34, 50)
    torch.manual_seed(0)
    for item in (PairedImages(str(div2k), crop=8, rotate=True, length=12, **settings)[i] for i in range(12)):
        assert item["inputs"].shape == (3, 8, 8) and item["targets"].shape == (3, 16, 16)
        shrunk = F.avg_pool2d(item["targets"], 2)
        assert (shrunk - item["inputs"]).abs().mean() < 0.03
        assert (shrunk.flip(1) - item["inputs"]).abs().mean() > 0.03

    config = tmp_path / "config.py"
    config.write_text(f"""
_base_ = [{str(ROOT / "configs/restore/mambair_light_x2_div2k.py")!r}]
model = dict(dim=30, depths=(1,), d_state=2)
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False,
    dataset=dict(data_root={str(div2k)!r}, crop=8, length=4))
val_dataloader = dict(num_workers=0, dataset=dict(data_root={str(div2k)!r}))
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=1, val_interval=1)
""")
    train.main([str(config), "--work-dir", str(tmp_path / "run")])
    weights = str(tmp_path / "run/export/model.safetensors")
    capsys.readouterr()
    test.main([str(config), weights])
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["restore/PSNR"] > 5
    images, out = div2k / "DIV2K_valid_LR_bicubic/X2", tmp_path / "out"
    predict.main([str(config), weights, str(images), "--out", str(out), "--tile", "12", "--overlap", "4"])
    assert Image.open(out / "restored/0000x2.png").size == (50, 34)

    (images / "0000x2.png").rename(images / "0000x3.png")
    line = refused(capsys, test.main, config, weights)
    assert "is alone (1 such); expected a file named" in line
    Image.new("RGB", (20, 17)).save(images / "0000x2.png")
    (images / "0000x3.png").unlink()
    assert "is 20 x 17; expected 1/2 of its target" in refused(capsys, test.main, config, weights)


def test_bicubic_on_the_fly(data):
    """Inputs are Pillow's antialiased bicubic of the targets; the metric enlarges them."""
    dataset = PairedImages(str(data), "train", bicubic=True, scale=3)
    item = dataset[0]
    assert item["inputs"].shape == (1, *(n // 3 for n in read_image(item["path"], 1).shape[1:]))
    assert item["targets"].shape == (1, *(3 * n for n in item["inputs"].shape[1:]))
    pixels = Image.fromarray((item["targets"][0] * 255).round().byte().numpy())
    small = pixels.resize([n // 3 for n in pixels.size], Image.Resampling.BICUBIC)
    assert (item["inputs"][0] * 255 - torch.from_numpy(np.asarray(small).astype(np.float32))).abs().max() <= 1.01
    metric = RestorationMetric(against_bicubic=True)
    metric.process({"inputs": [item["inputs"]]}, [(item["targets"], item["targets"])])
    found = metric.compute_metrics(metric.results)
    assert found["PSNR"] > 100 > found["bicubic_PSNR"] > 5 and found["bicubic_SSIM"] < found["SSIM"]


def test_tiles_of_a_larger_result():
    image = torch.rand(3, 21, 30)

    def double(x):
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    found = restore_tiled(double, image, tile=8, overlap=3, scale=2)
    torch.testing.assert_close(found, double(image[None])[0])


def test_luma_metrics_are_scikit_images():
    """Y of BT.601, borders left out, eight bits."""
    generator = torch.Generator().manual_seed(0)
    target = F.interpolate(torch.rand(1, 3, 8, 8, generator=generator), 48, mode="bicubic").clamp(0, 1)[0]
    restored = target + 0.05 * torch.randn(target.shape, generator=generator)
    found = RestorationMetric(levels=255, luma=True, border=2).measure(restored, target)
    pixels = [x.clamp(0, 1).permute(1, 2, 0).double().numpy() for x in (restored, target)]
    pixels[0] = (pixels[0] * 255).round() / 255
    a, b = (rgb2ycbcr(x)[2:-2, 2:-2, 0] for x in pixels)
    assert abs(found["PSNR"] - peak_signal_noise_ratio(b, a, data_range=255)) < 1e-3
    gaussian = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    assert abs(found["SSIM"] - structural_similarity(b, a, data_range=255, **gaussian)) < 0.02  # borders differ


def test_losses():
    restored, target = torch.rand(2, 1, 4, 4), torch.rand(2, 1, 4, 4)
    model = Restorer("restore_rwkv_light", **SMALL)
    model.model = torch.nn.Identity()
    assert model(restored, target, mode="loss") == {"loss_l1": F.l1_loss(restored, target)}
    expected = np.sqrt((restored - target).numpy() ** 2 + 1e-6).mean()
    assert abs(charbonnier_loss(restored, target) - expected) < 1e-6
    with pytest.raises(InputError, match="loss='l3'; expected one of l1, charbonnier"):
        Restorer("restore_rwkv_light", loss="l3")


def test_metrics_are_scikit_images():
    generator = torch.Generator().manual_seed(0)
    target = F.interpolate(torch.rand(1, 1, 8, 8, generator=generator), 48, mode="bicubic").clamp(0, 1)[0]
    restored = target + 0.1 * torch.randn(target.shape, generator=generator)
    metric = RestorationMetric(scale=255)
    metric.process({}, [(restored, target), (target, target + 0.01)])
    first = metric.results[0]
    a, b = restored[0].clamp(0, 1).numpy(), target[0].numpy()
    gaussian = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    assert abs(first["PSNR"] - peak_signal_noise_ratio(b, a, data_range=1)) < 1e-3
    assert abs(first["SSIM"] - structural_similarity(b, a, data_range=1, **gaussian)) < 0.02  # borders differ
    assert abs(first["RMSE"] - 255 * np.sqrt(((a - b) ** 2).mean())) < 1e-3
    means = metric.compute_metrics(metric.results)
    assert means["PSNR"] == pytest.approx((first["PSNR"] + metric.results[1]["PSNR"]) / 2)


@pytest.mark.parametrize("size", [(16, 16), (40, 23), (33, 70)])
def test_tiles_join_without_seams(size):
    """A local model gives the same in tiles as at once; every pixel is covered."""
    image = torch.rand(1, *size)
    conv = torch.nn.Conv2d(1, 1, 1)
    with torch.inference_mode():
        torch.testing.assert_close(restore_tiled(conv, image, tile=16, overlap=5), conv(image[None])[0])
    with pytest.raises(InputError, match="overlap=16"):
        restore_tiled(conv, image, tile=16, overlap=16)


def test_train_test_predict(config, data, tmp_path, capsys):
    """The tools, one after the other; kinds of files are kept, and an interrupted run ends like a whole one."""
    train.main([str(config), "--work-dir", str(tmp_path / "run")])
    export = tmp_path / "run/export"
    assert "PSNR" in json.loads((export / "config.json").read_text())
    capsys.readouterr()
    test.main([str(config), str(export / "model.safetensors")])
    metrics = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert set(metrics) == {"restore/PSNR", "restore/SSIM", "restore/RMSE"}
    assert (tmp_path / "run/curves.png").stat().st_size > 1000

    images, out = data / "val/input", tmp_path / "out"
    tiles = ["--tile", "32", "--overlap", "8"]
    predict.main([str(config), str(export / "model.safetensors"), str(images), "--out", str(out), *tiles])
    kinds = {path.name: np.asarray(Image.open(path)).dtype.name for path in (out / "restored").iterdir()}
    assert kinds == {"0.png": "uint8", "1.png": "uint16", "2.tiff": "float32"}
    assert (out / "predictions.png").stat().st_size > 1000
    model = timm.create_model(f"local-dir:{export}", pretrained=True, **SMALL).eval()
    with torch.inference_mode():
        expected = restore_tiled(model, read_image(images / "2.tif", 1), 32, 8)
    assert (read_image(out / "restored/2.tiff", 1) - expected).abs().max() < 1e-5

    train.main([str(config), "--work-dir", str(tmp_path / "part"), "--cfg-options", "train_cfg.max_epochs=1"])
    train.main([str(config), "--work-dir", str(tmp_path / "part"), "--resume"])
    ends = [torch.load(tmp_path / run / "epoch_2.pth", weights_only=False)["state_dict"] for run in ("run", "part")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_denoise_compares_with_classical_methods(data):
    dataset = PairedImages(str(data), "val")
    pairs = [dataset[i] for i in range(len(dataset))]
    scores, images = denoise.compare([pair["targets"] for pair in pairs], pairs)
    assert list(scores) == ["noisy", "Restore-RWKV, light", "total variation", "non-local means"]
    assert all(len(outputs) == 3 for outputs in images.values())
    assert scores["noisy"]["PSNR"] < min(scores[name]["PSNR"] for name in ("total variation", "non-local means"))


def test_bad_pairs(data, config):
    (data / "train/input/0.png").rename(data / "train/input/9.png")
    with pytest.raises(
        InputError, match=r"input '.*9.png' is alone \(1 such\); expected a file named '9' in '.*target'"
    ):
        PairedImages(str(data), "train")
    (data / "train/input/9.png").rename(data / "train/input/0.png")
    Image.new("L", (9, 9)).save(data / "train/input/0.png")
    with pytest.raises(InputError, match=r"0.png' is 9 x 9; expected 56 x 40 as its target"):
        PairedImages(str(data), "train")[0]
    with pytest.raises(InputError, match=r"is 56 x 40; expected sides of 64 at least, as the crop"):
        PairedImages(str(data), "train", crop=64)[1]
    (data / "train/target/0.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"cannot read image '.*0.png'"):
        PairedImages(str(data), "train")[0]


def test_missing_folder_says_how_to_make_it(capsys, tmp_path):
    config = str(ROOT / "configs/restore/restore_rwkv_paired.py")
    options = ["--cfg-options", "train_dataloader.dataset.data_root=no"]
    line = refused(capsys, train.main, config, "--work-dir", tmp_path, *options)
    assert "expected input/ and target/ with files of equal names" in line


def test_published_recipe_builds():
    cfg = load_config(str(ROOT / "configs/restore/restore_rwkv_paired.py"), None)
    assert cfg.train_cfg.max_epochs * cfg.train_dataloader.dataset.length == 300_000 * cfg.train_dataloader.batch_size
