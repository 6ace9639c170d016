"""vfimamba_s on Vimeo90K's triplets, the first part of the curriculum: as vfimamba."""

_base_ = ["./vfimamba_vimeo90k.py"]

model = dict(model_name="vfimamba_s")
