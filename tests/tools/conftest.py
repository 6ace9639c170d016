"""A tiny image folder and a training config for it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CONFIG = """
_base_ = [{runtime!r}]

model = dict(type="Classifier", model_name="test_byobnet", num_classes=3, drop_path_rate=0.3)
data_preprocessor = dict(num_classes=3, mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True)
pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="NumpyToPIL"),
    dict(type="torchvision/RandomAffine", degrees=10),
    dict(type="PILToNumpy"),
    dict(type="RandomErasing", erase_prob=0.5),
    dict(type="PackInputs"),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    dataset=dict(type="ImageFolder", data_root={data!r}, data_prefix="train", pipeline=pipeline),
    sampler=dict(type="DefaultSampler", shuffle=True),
)
val_dataloader = dict(
    batch_size=4,
    num_workers=0,
    dataset=dict(
        type="ImageFolder",
        data_root={data!r},
        data_prefix="val",
        test_mode=True,
        pipeline=[dict(type="LoadImageFromFile"), dict(type="PackInputs")],
    ),
    sampler=dict(type="DefaultSampler", shuffle=False),
)
val_evaluator = dict(type="Accuracy", topk=(1,))
test_dataloader = val_dataloader
test_evaluator = val_evaluator
train_cfg = dict(by_epoch=True, max_epochs=3)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(constructor="TimmWeightDecay", optimizer=dict(type="AdamW", lr=1e-3))
"""

RUNTIME = str(Path(__file__).resolve().parents[2] / "configs/_base_/runtime.py")


@pytest.fixture
def data(tmp_path):
    """Folder with train and val parts of three classes of 32 px images: dark, middling, bright."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 5), ("val", 2)):
        for level, name in ((40, "dark"), (120, "grey"), (200, "light")):
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(level, level + 50, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "data"


@pytest.fixture
def config(tmp_path, data):
    """Function that writes the tiny config with further lines at its end, and returns its path."""

    def write(more: str = "", name: str = "tiny.py") -> str:
        path = tmp_path / name
        path.write_text(CONFIG.format(runtime=RUNTIME, data=str(data)) + more)
        return str(path)

    return write
