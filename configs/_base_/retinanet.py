"""RetinaNet (arXiv 1708.02002) with FPN, as mmdet has it."""

_base_ = ["mmdet::_base_/models/retinanet_r50_fpn.py", "./runtime_dense.py"]

default_scope = "mmdet"
model = dict(backbone=dict(_delete_=True, type="LinZooBackbone"))
