"""MHS-VM with four heads on ISIC18, from scratch."""

_base_ = ["../_base_/isic18.py"]

model = dict(type="Segmenter", model_name="mhs_vm_unet", num_heads=4, gfu_t=0.5)
