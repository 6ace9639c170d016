"""S5-PTD on CIFAR-10 as sequences of 1,024 pixels, by the authors' recipe."""

_base_ = ["../_base_/cifar10.py", "../_base_/s5_250e.py"]

model = dict(model_name="s5_pixel_s_ptd")
