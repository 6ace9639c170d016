"""VM-UNet on ISIC18, from the ImageNet weights of the first VMamba-S.

A file of them that is already here: `--cfg-options model.init_from.pretrained_cfg_overlay.file=FILE`.
"""

_base_ = ["../_base_/isic18.py"]

model = dict(type="Segmenter", model_name="vm_unet", init_from=dict(model_name="vmamba_s_v0", pretrained=True))
