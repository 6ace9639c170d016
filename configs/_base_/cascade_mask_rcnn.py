"""Cascade Mask R-CNN (arXiv 1906.09756) with FPN; boxes by class from four convolutions, trained with GIoU."""

_base_ = ["mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py", "./runtime_dense.py"]

default_scope = "mmdet"
box_head = dict(
    type="ConvFCBBoxHead",
    num_shared_convs=4,
    num_shared_fcs=1,
    in_channels=256,
    conv_out_channels=256,
    fc_out_channels=1024,
    roi_feat_size=7,
    num_classes=80,
    reg_class_agnostic=False,
    reg_decoded_bbox=True,
    norm_cfg=dict(type="BN"),
    loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    loss_bbox=dict(type="GIoULoss", loss_weight=10.0),
)
stds = [[0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]]
coder = dict(type="DeltaXYWHBBoxCoder", target_means=[0.0, 0.0, 0.0, 0.0])
model = dict(
    backbone=dict(_delete_=True, type="LinZooBackbone"),
    roi_head=dict(bbox_head=[dict(**box_head, bbox_coder=dict(**coder, target_stds=std)) for std in stds]),
)
