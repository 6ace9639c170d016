"""A tiny model, config and data of every task that the tools train, for tests of what is common to all."""

import argparse
import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from PIL import Image
from test_forecasting import write_series
from test_occupancy import write_scenes
from test_promptable import write_coco
from test_volumes import write_volumes

ROOT = Path(__file__).resolve().parents[2]
LOADERS = """
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False, dataset={train})
val_dataloader = dict(batch_size=2, num_workers=0, dataset={val})
test_dataloader = val_dataloader
train_cfg = dict(by_epoch=True, max_epochs=1, val_interval=1)
param_scheduler = []
"""
PIPELINE = '[dict(type="LoadImageFromFile"), dict(type="Load{kind}"), dict(type="PackSegInputs")]'
JUDGED = 'val_evaluator = dict(judge="{data}/train")\ntest_evaluator = val_evaluator\n'
OF_CLASSES = ("classification", "mmpretrain", "flow", "next scale", "tokenizer")
CONFIGS = {
    "classification": (
        '["{configs}/_base_/runtime.py", "{configs}/_base_/digits.py"]',
        'model = dict(type="Classifier", model_name="test_byobnet", num_classes=3)\n'
        'data_preprocessor = dict(num_classes=3)\noptim_wrapper = dict(optimizer=dict(type="AdamW", lr=1e-3))\n',
        'dict(data_root="{data}", data_prefix="{part}", make=None)',
    ),
    "mmpretrain": (
        '["{configs}/_base_/runtime.py", "{configs}/_base_/digits.py"]',
        'backbone = dict(type="LinZooBackbone", model_name="test_convnext", pretrained=False)\n'
        'head = dict(type="LinearClsHead", num_classes=3, in_channels=64)\n'
        'model = dict(type="ImageClassifier", backbone=backbone, neck=dict(type="GlobalAveragePooling"), head=head)\n'
        'data_preprocessor = dict(num_classes=3)\noptim_wrapper = dict(optimizer=dict(type="AdamW", lr=1e-3))\n',
        'dict(data_root="{data}", data_prefix="{part}", make=None)',
    ),
    "segmentation": (
        '["{configs}/seg/mhs_vm_unet_inked.py"]',
        "model = dict(dims=(8, 16, 32, 64))\n",
        f'dict(data_root="{{data}}/pairs", data_prefix="{{part}}", make=None, pipeline={PIPELINE.format(kind="Mask")})',
    ),
    "label maps": (
        '["{configs}/seg/upernet_groupmamba_t_scenes.py"]',
        "head = dict(num_classes=3, channels=8)\n"
        'backbone = dict(model_name="test_convnext", pretrained=False)\n'
        "model = dict(data_preprocessor=dict(size=(32, 48)), backbone=backbone,"
        "    decode_head=dict(in_channels=[24, 32, 48, 64], **head), auxiliary_head=dict(in_channels=48, **head))\n",
        'dict(data_root="{data}/maps", data_prefix=dict(img_path="images/{part}", seg_map_path="maps/{part}"),'
        ' make=None, reduce_zero_label=False, metainfo=dict(classes=("a", "b", "c"), palette=[[0] * 3] * 3),'
        f" pipeline={PIPELINE.format(kind='Annotations')})",
    ),
    "restoration": (
        '["{configs}/restore/restore_rwkv_light_noisy.py"]',
        "model = dict(dim=8, depths=(1, 1, 1, 1), refinement=1)\n",
        'dict(data_root="{data}/restore", data_prefix="{part}", make=None, noise=None, crop=32, length=4)',
    ),
    "promptable": (
        '["{configs}/sam/rwkvsam_coco.py"]',
        'model = dict(num_points=64, backbone_name="rwkvsam_backbone_t", img_size=64, dim=32,'
        " backbone_args=dict(dims=(8, 16, 32), depths=(1, 1, 1, 1)))\n",
        'dict(data_root="{data}/coco", ann_file="{part}.json", data_prefix="{part}")',
    ),
    "detection": (
        '["{configs}/det/mask-rcnn_groupmamba_t_scenes.py"]',
        "channels = 8\n"
        'backbone = dict(model_name="test_convnext", pretrained=False)\n'
        "model = dict(backbone=backbone, neck=dict(in_channels=[24, 32, 48, 64], out_channels=8),"
        " rpn_head=dict(in_channels=8, feat_channels=8), roi_head=dict(bbox_roi_extractor=dict(out_channels=8),"
        "    bbox_head=dict(in_channels=8, fc_out_channels=16, num_classes=1), mask_roi_extractor=dict(out_channels=8),"
        "    mask_head=dict(in_channels=8, conv_out_channels=8, num_classes=1)))\n"
        'val_evaluator = dict(ann_file="{data}/coco/val.json")\n',
        'dict(data_root="{data}/coco", ann_file="{part}.json", data_prefix=dict(img="{part}"), make=None,'
        ' metainfo=dict(classes=("thing",)))',
    ),
    "occupancy": (
        '["{configs}/occ/occrwkv_semantickitti.py"]',
        "model = dict(height=8, dims=(16, 32, 32, 32, 32), voxel_dim=16, drop_rate=0.0)\n",
        'dict(data_root="{data}/kitti", grid=(32, 32, 8), sequences=["{part}"])',
    ),
    "video": (
        '["{configs}/video/convs5_bouncing.py"]',
        "model = dict(dims=(8, 8, 8), dim=8, depth=2, d_state=8, num_groups=2, context=3)\n",
        'dict(data_root="{data}/clips", part="{part}", make=None)',
    ),
}
if importlib.util.find_spec("monai"):
    CONFIGS["volume"] = (
        '["{configs}/vol/umamba_bot_3d_lumps.py"]',
        "model = dict(features=(4, 4), strides=((2, 2, 2),), patch_size=(8, 16, 16), window=(8, 16, 16))\n",
        'dict(data_root="{data}/lumps", data_prefix="{part}", make=None, crop=(8, 16, 16), length=2)',
    )
    CONFIGS["tracking"] = (
        '["{configs}/track/gdkvm_small_r18_beating.py"]',
        "resnet = 'test_resnet'\n"
        "model = dict(encoder=resnet, mask_encoder=resnet, decoder_dims=(32, 16, 16), num_points=64)\n",
        'dict(data_root="{data}/masked", part="{part}", make=None, num_frames=2, size=32, length=None)',
    )
CONFIGS["clips"] = (
    '["{configs}/video/videomamba_t_k400.py"]',
    "model = dict(num_classes=3, num_frames=2, img_size=32, dim=16, depth=1, pretrained=False)\n"
    "val_evaluator = dict(topk=(1,))\ntest_evaluator = dict(topk=(1,))\n",
    'dict(data_root="{data}/actions", data_prefix="{part}", num_frames=2, size=32)',
)
CONFIGS["interpolation"] = (
    '["{configs}/interp/vfimamba_s_moving.py"]',
    "model = dict(dim=4, depth=1)\n",
    'dict(data_root="{data}/triplets", part="{part}", make=None, crop=None, length=None)',
)
CONFIGS["forecasting"] = (
    '["{configs}/forecast/tsm2_etth1.py"]',
    "model = dict(context=16, horizon=4, patch_size=4, stride=2, dim=8, depth=1)\n",
    'dict(data_root="{data}/ett", file="series.csv", part="{part}", context=16, horizon=4, rows=(60, 30, 30))',
)
if importlib.util.find_spec("torchdiffeq"):
    CONFIGS["flow"] = (
        '["{configs}/gen/dimsum_mini_digits.py"]',
        "model = dict(hidden_size=32, depth=1, num_classes=3, steps=1)\n" + JUDGED,
        'dict(data_root="{data}", data_prefix="{part}", make=None, indices=None)',
    )
    CONFIGS["next scale"] = (
        '["{configs}/gen/mvar_mini_digits.py"]',
        "model = dict(depth=1, num_classes=3, V=16, Cvae=4, patch_nums=(1, 4), "
        'tokenizer=dict(pretrained="{data}/weights/tokenizer.pth", ch_mult=(1, 1)))\n' + JUDGED,
        'dict(data_root="{data}", data_prefix="{part}", make=None, indices=None)',
    )
    CONFIGS["tokenizer"] = (
        '["{configs}/gen/mvar_tokenizer_digits.py"]',
        "model = dict(V=16, Cvae=4, ch_mult=(1, 1), patch_nums=(1, 4))\n",
        'dict(data_root="{data}", data_prefix="{part}", make=None, indices=None)',
    )
OF_IMAGES = ("classification", "mmpretrain", "segmentation", "label maps", "restoration", "promptable", "detection")
# Options of predict.
ASKED = {"detection": ["--threshold", "0"], "promptable": ["--point", "20", "20"], "video": ["--frames", "2"]}
ASKED |= dict.fromkeys(("flow", "next scale"), ["--count", "1"])


class Tiny(NamedTuple):
    """What a test of a task needs.

    Attributes:
        config: path of the training config.
        inputs: what `predict` is given.
        images: folder of the images to train on, with what stands beside each in `others`.
        others: folder of the masks, label maps or targets of these images; None where there are none.
        options: options that `predict` needs.
    """

    config: str
    inputs: Path
    images: Path
    others: Path | None
    options: list[str]


def write_task(task: str, folder: Path) -> Tiny:
    """Writes the data and the config of a task."""
    data, rng = folder / "data", np.random.default_rng(0)
    parts = {"occupancy": ("00", "08")}.get(task, ("train", "val"))
    for part in parts:
        places = {
            **dict.fromkeys(OF_CLASSES, [data / part / name for name in "abc"]),
            "segmentation": [data / "pairs" / part / name for name in ("images", "masks")],
            "label maps": [data / "maps" / name / part for name in ("images", "maps")],
            "restoration": [data / "restore" / part / name for name in ("input", "target")],
        }.get(task, [])
        for place in places:
            place.mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 255, (32, 48, 3), dtype=np.uint8)
            mask = np.zeros((32, 48), np.uint8)
            mask[5:20, 5 + i : 30] = 1
            if task in OF_CLASSES:
                for place in places:
                    Image.fromarray(pixels).save(place / f"{i}.png")
            elif task == "restoration":
                for place in places:
                    Image.fromarray(pixels).convert("L").resize((64, 48)).save(place / f"{i}.png")
            elif places:
                Image.fromarray(pixels).save(places[0] / f"{i}.png")
                Image.fromarray(mask * (255 if task == "segmentation" else 1)).save(places[1] / f"{i}.png")
        if task in ("promptable", "detection"):
            write_coco(data / "coco", part, 4)
            if task == "detection":  # which is tested on images without any object, too
                Image.new("RGB", (60, 44)).save(data / "coco" / part / "not_there.png")
        elif task == "clips":
            for name in "abcabc":
                clip = data / "actions" / part / name
                clip = clip / str(len(list(clip.iterdir())) if clip.is_dir() else 0)
                clip.mkdir(parents=True)
                for t in range(3):
                    Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(clip / f"{t}.png")
        elif task == "interpolation":
            names = [f"{part}/{i}" for i in range(4)]
            for name in names:
                (data / "triplets/sequences" / name).mkdir(parents=True)
                for i in (1, 2, 3):
                    pixels = rng.integers(0, 255, (32, 48, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(data / "triplets/sequences" / name / f"im{i}.png")
            (data / f"triplets/tri_{part}list.txt").write_text("\n".join(names))
        elif task == "tracking":
            for kind in ("frames", "masks"):
                for name in "ab":
                    clip = data / "masked" / part / kind / name
                    clip.mkdir(parents=True)
                    for t in range(3):
                        grey = rng.integers(0, 255, (40, 48), dtype=np.uint8)
                        grey = grey if kind == "frames" else (grey * 0 + np.tri(40, 48, 3 * t, np.uint8) * 255)
                        Image.fromarray(grey).save(clip / f"{t}.png")
        elif task == "forecasting":
            write_series(data / "ett/series.csv", 120)
        elif task == "next scale":
            import linzoo.backbones  # noqa: F401

            torch.manual_seed(2)
            tokenizer = timm.create_model("mvar_tokenizer", V=16, Cvae=4, ch=32, ch_mult=(1, 1), patch_nums=(1, 4))
            (data / "weights").mkdir(exist_ok=True)
            torch.save(tokenizer.state_dict(), data / "weights/tokenizer.pth")
        elif task == "occupancy":
            write_scenes(data / "kitti", part, 2)
        elif task == "volume":
            write_volumes(data / "lumps" / part, 2)
        elif task == "video":
            (data / "clips").mkdir(parents=True, exist_ok=True)
            np.save(data / "clips" / f"{part}.npy", rng.integers(0, 255, (4, 6, 16, 16), dtype=np.uint8))
    base, model, dataset = (text.replace("{configs}", str(ROOT / "configs")) for text in CONFIGS[task])
    train, val = (dataset.format(data=data, part=part) if "{part}" in dataset else dataset for part in parts)
    config = folder / "config.py"
    model = model.replace("{data}", str(data))
    config.write_text(f"_base_ = {base}\n{model}{LOADERS.format(train=train, val=val)}")
    images = {
        "classification": data / "train/a",
        "mmpretrain": data / "train/a",
        "promptable": data / "coco/train",
        "detection": data / "coco/train",
    }
    images = places[0] if task in CONFIGS and task not in images and places else images.get(task, data)
    inputs = {
        "occupancy": data / "kitti/sequences/08/voxels",
        "video": data / "clips/val.npy",
        "volume": data / "lumps/val/images",
        "clips": data / "actions/val",
        "tracking": data / "masked/val/frames",
        "interpolation": data / "triplets/sequences/val",
        "forecasting": data / "ett",
    }
    inputs |= dict.fromkeys(("flow", "next scale"), data)  # which they do not read
    if task in (*OF_IMAGES, "tokenizer"):
        inputs[task] = folder / "inputs"
        inputs[task].mkdir()
        mode = "L" if task == "restoration" else "RGB"
        for i in range(2):
            Image.fromarray(rng.integers(0, 255, (32, 48, 3), dtype=np.uint8)).convert(mode).save(
                inputs[task] / f"{i}.png"
            )
    others = places[1] if len(places) == 2 else None
    return Tiny(str(config), inputs[task], images, others, ASKED.get(task, []))


def write_weights(config: str, file: Path, wrap=lambda state: {"state_dict": state}) -> Path:
    """What a trainer writes for a config: random weights, wrapped as it does."""
    from linzoo.tools.engine.config import load_config, task_of
    from linzoo.tools.engine.task import build

    cfg = load_config(config)
    torch.manual_seed(1)
    torch.save(wrap(task_of(cfg).weights(build(cfg)).state_dict()), file)
    return file


WRAPPERS = {
    "bare": lambda s: s,
    "DDP": lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
    "DDP of compiled": lambda s: {"model": {f"module._orig_mod.{k}": v for k, v in s.items()}},
    "Lightning": lambda s: {
        "state_dict": {**{f"model.{k}": v for k, v in s.items()}, "loss.weight": torch.ones(3)},
        "pytorch-lightning_version": "2.4.0",
        "hyper_parameters": {"lr": 1e-3},
    },
    "timm's": lambda s: {"arch": "x", "state_dict": s, "args": argparse.Namespace(model="x", lr=1e-3)},
    "averaged": lambda s: {"model": {k: v * 0 for k, v in s.items()}, "model_ema": s},
    "half": lambda s: {"state_dict": {k: v.half() if v.is_floating_point() else v for k, v in s.items()}},
}
