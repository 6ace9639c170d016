"""Training on masks that points and boxes ask for: COCO files, losses, metric, the tools, resumption, bad input."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from mmengine.config import Config
from PIL import Image
from pycocotools import mask as coco_mask
from test_bad_input import refused
from torch.nn import functional as F

import linzoo.backbones  # noqa: F401
from linzoo.tools import predict, test, train
from linzoo.tools.engine import InputError, PromptedMasks, PromptMetric, PromptSegmenter, Runner
from linzoo.tools.engine.config import load_config
from linzoo.tools.engine.promptable import mask_box, mask_iou, sample, uncertain_points

ROOT = Path(__file__).resolve().parents[2]
SMALL = dict(
    backbone_name="rwkvsam_backbone_t", img_size=64, dim=32, backbone_args=dict(dims=(8, 16, 32), depths=(1, 1, 1, 1))
)


def write_coco(folder, part, count):
    """Images of 60 x 44 with a bright rectangle (a polygon), a bright disc (run lengths) and a crowd on dark ground."""
    rng = np.random.default_rng(len(part))
    (folder / part).mkdir(parents=True)
    images, annotations = [], []
    y, x = np.mgrid[:44, :60]
    for i in range(count):
        pixels = rng.integers(0, 60, (44, 60, 3))
        left, top = int(rng.integers(2, 12)), int(rng.integers(2, 16))
        width, height = int(rng.integers(12, 18)), int(rng.integers(12, 24))
        rectangle = (x >= left) & (x < left + width) & (y >= top) & (y < top + height)
        disc = (x - 46) ** 2 + (y - int(rng.integers(14, 30))) ** 2 < 100
        pixels[rectangle], pixels[disc] = (230, 180, 40), (40, 200, 230)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / part / f"{i}.png")
        images.append(dict(id=i + 1, file_name=f"{i}.png", height=44, width=60))
        run_lengths = coco_mask.encode(np.asfortranarray(disc.astype(np.uint8)))
        right, bottom = left + width, top + height
        for segmentation, crowd in (
            ([[left, top, right, top, right, bottom, left, bottom]], 0),
            (dict(size=[44, 60], counts=run_lengths["counts"].decode()), 0),
            (dict(size=[44, 60], counts=run_lengths["counts"].decode()), 1),
        ):
            ids = dict(id=len(annotations) + 1, image_id=i + 1, category_id=1)
            annotations.append(dict(ids, segmentation=segmentation, iscrowd=crowd, area=1, bbox=[0, 0, 1, 1]))
    images.append(dict(id=99, file_name="not_there.png", height=44, width=60))  # nothing on it: not read
    file = folder / f"{part}.json"
    file.write_text(json.dumps(dict(images=images, annotations=annotations, categories=[dict(id=1, name="thing")])))


@pytest.fixture
def data(tmp_path):
    write_coco(tmp_path / "data", "train", 8)
    write_coco(tmp_path / "data", "val", 3)
    return tmp_path / "data"


@pytest.fixture
def config(tmp_path, data):
    text = f"""
_base_ = [{str(ROOT / "configs/sam/rwkvsam_coco.py")!r}]
model = dict(num_points=256, **{SMALL!r})
train_dataloader = dict(
    batch_size=4, num_workers=0,
    dataset=dict(data_root={str(data)!r}, ann_file="train.json", data_prefix="train"),
)
val_dataloader = dict(
    batch_size=2, num_workers=0, dataset=dict(data_root={str(data)!r}, ann_file="val.json", data_prefix="val")
)
test_dataloader = val_dataloader
train_cfg = dict(max_epochs=2)
param_scheduler = []
optim_wrapper = dict(optimizer=dict(lr=3e-3))
"""
    path = tmp_path / "config.py"
    path.write_text(text)
    return path


def test_objects(data):
    """Every mask lies over its object; the point is in it, the box around it; crowds and empty images are left out."""
    dataset = PromptedMasks(str(data), "val.json", "val")
    assert len(dataset) == 3
    for item in (dataset[i] for i in range(3)):
        assert item["inputs"].shape == (3, 44, 60)
        assert item["inputs"].dtype == torch.uint8
        assert item["masks"].shape == (2, 44, 60)
        colours = [item["inputs"][:, mask].float().mean(1) for mask in item["masks"]]
        torch.testing.assert_close(colours[0], torch.tensor([230.0, 180, 40]))
        torch.testing.assert_close(colours[1], torch.tensor([40.0, 200, 230]))
        for mask, (point,), box in zip(item["masks"], item["points"], item["boxes"], strict=True):
            x, y = point.int().tolist()
            assert mask[y, x]
            x0, y0, x1, y1 = box.int().tolist()
            assert mask[y0:y1, x0:x1].sum() == mask.sum()
            assert mask[y0, :].any() and mask[y1 - 1, :].any() and mask[:, x0].any() and mask[:, x1 - 1].any()
    x, y = dataset[0]["points"][1, 0]
    assert abs(x - 46) <= 1 and dataset[0]["masks"][1][int(y)].sum() >= 17, "a disc is thickest at its centre"


def test_augmentation_keeps_image_and_masks_together(data):
    dataset = PromptedMasks(str(data), "train.json", "train", most=1, augment=True)
    items = [dataset[i % 8] for i in range(48)]
    places = set()
    for item in items:
        assert item["masks"].shape == (1, 44, 60)
        assert item["inputs"][:, item["masks"][0]].float().std(1).max() == 0
        x, y = item["points"][0, 0].int().tolist()
        assert item["masks"][0, y, x]
        places.add((x, y))
    assert len(places) > 30
    assert any(item["boxes"][0, 2] > 40 for item in items) and any(item["boxes"][0, 0] < 20 for item in items)


def test_sample_is_exact_at_the_centres_of_pixels():
    maps = torch.rand(2, 5, 7)
    y, x = torch.meshgrid((torch.arange(5) + 0.5) / 5, (torch.arange(7) + 0.5) / 7, indexing="ij")
    at = torch.stack([x, y], -1).flatten(0, 1).expand(2, -1, -1)
    torch.testing.assert_close(sample(maps, at), maps.flatten(1))


def test_points_are_drawn_where_the_mask_is_uncertain():
    logits = (torch.arange(40.0) - 20).expand(3, 40, 40)  # uncertain around x = 0.5
    at = uncertain_points(logits, 400)
    assert at.shape == (3, 400, 2)
    assert at.min() >= 0 and at.max() <= 1
    near = (at[..., 0] - 0.5).abs() < 0.13
    assert (near.float().mean(1) > 0.75).all()
    assert (near.float().mean(1) < 0.95).all(), "a quarter is drawn anywhere"


def test_iou_and_box():
    a, b = torch.zeros(3, 8, 8, dtype=torch.bool), torch.zeros(3, 8, 8, dtype=torch.bool)
    a[0, 2:6, 2:6] = b[0, 2:6, 4:8] = a[1, :2] = b[1, :2] = True
    torch.testing.assert_close(mask_iou(a, b), torch.tensor([8 / 24, 1, 0]))
    assert mask_box(a[0]).tolist() == [2, 2, 6, 6]


def test_losses_of_a_known_mask():
    """Of logits that are the mask's own the losses are 0, of the opposite ones large; the score's is its own error."""
    segmenter = PromptSegmenter("rwkvsam", num_points=512, **SMALL)
    masks = torch.zeros(1, 60, 120, dtype=torch.bool)  # twice the size of the image's part of the square
    masks[:, 16:40, 24:64] = True
    logits = torch.full((1, 16, 16), -50.0)
    logits[:, 2:5, 3:8] = 50
    bce, dice, score = segmenter.compare(logits, torch.tensor([0.25]), masks, (30, 60))
    assert bce.item() < 8, "differs along the edge alone"
    assert dice.item() < 0.2
    iou = mask_iou(F.interpolate(logits[None], 64, mode="bilinear")[0, :, :30, :60] > 0, masks[:, ::2, ::2])
    assert iou > 0.8
    torch.testing.assert_close(score, (0.25 - iou).square(), atol=0.02, rtol=0.05)
    worse = segmenter.compare(-logits, torch.tensor([0.25]), masks, (30, 60))
    assert worse[0] > 30 and worse[1] > 0.8 and abs(worse[2] - 0.25**2) < 1e-2


def test_prompts_are_scaled_with_the_image():
    """What the loss asks for is what `predict` asks for: the IoU of both agree."""
    segmenter = PromptSegmenter("rwkvsam", **SMALL).eval()
    image, masks = torch.randint(0, 256, (3, 100, 50), dtype=torch.uint8), torch.zeros(2, 100, 50, dtype=torch.bool)
    masks[0, 10:40, 5:30] = masks[1, 50:90, 20:45] = True
    points, boxes = torch.tensor([[[12.0, 20]], [[30, 70]]]), torch.stack([mask_box(m) for m in masks])
    asked, decode = [], segmenter.model.decode
    segmenter.model.decode = lambda maps, *args, **kwargs: asked.append(args) or decode(maps, *args, **kwargs)
    with torch.no_grad():
        segmenter([image], [masks], [points], [boxes], mode="loss")
        segmenter([image], [masks], [points], [boxes], mode="predict")
    for loss, predicted in zip(asked[:2], asked[2:], strict=True):
        for ours, theirs in zip(loss, predicted, strict=False):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs)


def test_images_without_objects(data):
    segmenter = PromptSegmenter("rwkvsam", num_points=64, **SMALL)
    empty = torch.zeros(3, 20, 30, dtype=torch.uint8), torch.zeros(0, 20, 30, dtype=torch.bool)
    nothing = ([empty[0]], [empty[1]], [torch.zeros(0, 1, 2)], [torch.zeros(0, 4)])
    losses = segmenter(*nothing, mode="loss")
    assert [loss.item() for loss in losses.values()] == [0]
    sum(losses.values()).backward()
    assert segmenter(*nothing, mode="predict") == []
    item = PromptedMasks(str(data), "val.json", "val")[0]
    mixed = [[first, item[key]] for (first,), key in zip(nothing, ("inputs", "masks", "points", "boxes"), strict=True)]
    losses = segmenter(*mixed, mode="loss")
    assert len(losses) == 6 and all(loss.isfinite() for loss in losses.values())


def test_metric():
    metric = PromptMetric()
    metric.process({}, [{"point": 0.5, "box": 1.0}, {"point": 0.0, "box": 0.5}])
    metric.process({}, [{"point": 1.0, "box": 0.75}])
    assert metric.evaluate(3) == {"prompt/point_mIoU": pytest.approx(50), "prompt/box_mIoU": pytest.approx(75)}


@pytest.mark.slow
def test_learns(config, tmp_path):
    """160 steps on eight images: the loss falls, and in new images the object that is asked for is found, not both."""
    options = {"train_cfg.max_epochs": 80, "train_cfg.val_interval": 80, "default_hooks.checkpoint.interval": 80}
    cfg = load_config(str(config), options)
    cfg.experiment_name = cfg.work_dir = str(tmp_path / "run")
    runner = Runner.from_cfg(cfg)
    runner.train()
    history = runner.message_hub.get_scalar("train/loss").data[0]
    assert np.mean(history[-4:]) < 0.2 * np.mean(history[:4]), history
    scores = {
        name: runner.message_hub.get_scalar(f"val/prompt/{name}").current() for name in ("box_mIoU", "point_mIoU")
    }
    assert min(scores.values()) > 90, scores


def test_artifacts(config, tmp_path, capsys):
    """Training leaves log, curves, checkpoints and an export that timm and test.py read alike; resumption is exact."""
    work_dir = tmp_path / "run"
    train.main([str(config), "--work-dir", str(work_dir)])
    assert (work_dir / "curves.png").stat().st_size > 1000
    facts = json.loads((work_dir / "export/config.json").read_text())
    assert facts["architecture"] == "rwkvsam" and facts["pretrained_cfg"]["input_size"] == [3, 64, 64]
    assert facts["pretrained_cfg"]["mean"] == [0.485, 0.456, 0.406]
    model = timm.create_model(f"local-dir:{work_dir / 'export'}", pretrained=True).eval()
    image = torch.rand(3, 44, 60)
    assert model.predict(image, boxes=[[1, 1, 20, 20]]).masks.shape == (1, 44, 60)
    metrics = []
    for checkpoint in (work_dir / "export/model.safetensors", next(work_dir.glob("best_prompt_box_mIoU_*.pth"))):
        capsys.readouterr()
        test.main([str(config), str(checkpoint)])
        metrics.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert metrics[0] == metrics[1]
    assert metrics[0]["prompt/box_mIoU"] == pytest.approx(facts["box_mIoU"])

    train.main([str(config), "--work-dir", str(tmp_path / "part"), "--cfg-options", "train_cfg.max_epochs=1"])
    train.main([str(config), "--work-dir", str(tmp_path / "part"), "--resume"])
    ends = [torch.load(tmp_path / run / "epoch_2.pth", weights_only=False)["state_dict"] for run in ("run", "part")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])

    asked = config, work_dir / "export/model.safetensors", tmp_path / "data/val", "--out", tmp_path / "out"
    assert "model_name='rwkvsam' needs points or boxes" in refused(capsys, predict.main, *asked)
    prompts = ["--point", "10", "30", "--box", "2", "2", "30", "40"]
    predict.main([str(a) for a in (*asked, *prompts)])
    results = json.loads((tmp_path / "out/predictions.json").read_text())
    assert len(results) == 3 and (tmp_path / "out/predictions.png").is_file()
    for result in results:
        by_point, by_box = result["masks"]
        assert by_point["point"] == [10, 30] and by_box["box"] == [2, 2, 30, 40]
        mask = np.asarray(Image.open(by_box["mask"]))
        assert mask.shape == (44, 60) and (mask > 0).mean() == pytest.approx(by_box["share"])
    prompts = ["--box", "200", "2", "230", "40"]
    assert "expected x0 < x1, y0 < y1 and a part of the image of 60 x 44" in refused(
        capsys, predict.main, *asked, *prompts
    )


def test_bad_files(data, config, capsys, tmp_path):
    line = refused(
        capsys, train.main, config, "--work-dir", tmp_path / "w", "--cfg-options", "train_dataloader.dataset.ann_file=n"
    )
    assert "annotations" in line and "not found; expected a COCO file" in line and not (tmp_path / "w").exists()
    with pytest.raises(InputError, match="data folder .*elsewhere' not found; expected the images of"):
        PromptedMasks(str(data), "val.json", "elsewhere")
    for text, message in (
        ("{", "cannot be read .* expected COCO's images and annotations"),
        ("[]", "cannot be read .* expected COCO's images and annotations"),
        ('{"images": [], "annotations": []}', "hold no mask; expected objects with a segmentation"),
    ):
        (data / "bad.json").write_text(text)
        with pytest.raises(InputError, match=message):
            PromptedMasks(str(data), "bad.json", "val")
    Image.new("RGB", (9, 9)).save(data / "val/0.png")
    with pytest.raises(InputError, match="0.png' is 9 x 9; expected 60 x 44 as its annotations"):
        PromptedMasks(str(data), "val.json", "val")[0]
    (data / "val/1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match="cannot read image .*1.png'"):
        PromptedMasks(str(data), "val.json", "val")[1]
    (data / "val/2.png").unlink()
    with pytest.raises(InputError, match="image .*2.png' not found .*val.json' names it"):
        PromptedMasks(str(data), "val.json", "val")
    with pytest.raises(
        InputError, match="model_name='vrwkv_t' is of kind 'backbone'; expected a model of kind promptable"
    ):
        PromptSegmenter("vrwkv_t")


def test_shipped_config_builds():
    cfg = load_config(str(ROOT / "configs/sam/rwkvsam_coco.py"))
    assert isinstance(cfg, Config) and cfg.train_dataloader.dataset.most == 8
