"""Mask R-CNN (arXiv 1703.06870) with FPN, as mmdet has it."""

_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "./runtime_dense.py"]

default_scope = "mmdet"
model = dict(backbone=dict(_delete_=True, type="LinZooBackbone"))
