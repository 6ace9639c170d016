"""mmdet's detectors as mmdet configures them, on our backbones: a training step, then a prediction."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.hub import get_config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData

import linzoo.tools.engine.detection  # noqa: F401

sys.path.append(str(Path(__file__).resolve().parents[1] / "backbones"))
from mmdet.registry import MODELS  # noqa: E402
from mmdet.structures import DetDataSample  # noqa: E402
from mmdet.structures.mask import BitmapMasks  # noqa: E402
from test_contract import few_blocks  # noqa: E402

SIZE = (96, 128)
DETECTORS = [
    ("retinanet/retinanet_r50_fpn_1x_coco", "groupmamba_t"),
    ("faster_rcnn/faster-rcnn_r50_fpn_1x_coco", "vmamba_t"),
    ("mask_rcnn/mask-rcnn_r50_fpn_1x_coco", "vim_t"),
    ("cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco", "vssd_m"),
    ("rtmdet/rtmdet_tiny_8xb32-300e_coco", "spatialmamba_t"),
    ("rtmdet/rtmdet-ins_tiny_8xb32-300e_coco", "efficientvmamba_t"),
    ("vfnet/vfnet_r50-mdconv-c3-c5_fpn_ms-2x_coco", "groupmamba_t"),  # deformable convolutions
    ("dino/dino-4scale_r50_8xb2-12e_coco", "vmamba_t"),
]


def detector(config, name):
    """mmdet's model with its backbone's maps from ours, of few blocks."""
    model = get_config(f"mmdet::{config}.py").model
    if "num_queries" in model:
        model.num_queries = 30  # more than a small image has places
    levels = (0, 1, 2, 3)[-len(model.neck.in_channels) :]
    model.backbone = dict(
        type="LinZooBackbone", model_name=name, out_indices=levels, model_kwargs=few_blocks(name), out_norm=True
    )
    with DefaultScope.overwrite_default_scope("mmdet"):
        model.neck.in_channels = MODELS.build(model.backbone).channels
        built = revert_sync_batchnorm(MODELS.build(model))
    built.init_weights()  # some of mmdet's parameters have no values before
    return built


def batch(with_masks):
    """Two random images with two objects each."""
    masks = np.zeros((2, *SIZE), np.uint8)
    masks[0, 8:40, 8:40] = masks[1, 48:88, 60:120] = 1
    objects = InstanceData(
        bboxes=torch.tensor([[8.0, 8, 40, 40], [60, 48, 120, 88]]),
        labels=torch.tensor([3, 70]),
        **(dict(masks=BitmapMasks(masks, *SIZE)) if with_masks else {}),
    )
    meta = dict(img_shape=SIZE, ori_shape=SIZE, scale_factor=(1.0, 1.0))
    nothing = InstanceData(bboxes=torch.empty(0, 4))
    samples = [DetDataSample(gt_instances=objects, ignored_instances=nothing, metainfo=meta) for _ in range(2)]
    return dict(inputs=[torch.randint(256, (3, *SIZE), dtype=torch.uint8) for _ in samples], data_samples=samples)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "name"), DETECTORS)
def test_step_and_prediction(config, name):
    model = detector(config, name).train()
    data = batch("mask" in config or "-ins" in config)
    loss, parts = model.parse_losses(model(**model.data_preprocessor(data, True), mode="loss"))
    assert loss.isfinite() and loss > 0, parts
    loss.backward()
    grads = [p.grad for p in model.backbone.model.parameters() if p.requires_grad]
    assert all(grad is not None and grad.isfinite().all() for grad in grads) and any(grad.any() for grad in grads)
    torch.optim.SGD(model.parameters(), 1e-4).step()
    with torch.no_grad():
        predictions = model.eval().test_step(data)
    assert len(predictions) == 2
    for sample in predictions:
        found = sample.pred_instances
        assert found.bboxes.shape == (len(found.scores), 4) and found.bboxes.isfinite().all()
        assert found.scores.equal(found.scores.sort(descending=True).values)
        if "masks" in found:
            assert found.masks.shape == (len(found.scores), *SIZE)
