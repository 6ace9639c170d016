"""DiMSUM-XL/2 on ImageNet at 256 px, by the recipe of DiMSUM-L/2."""

_base_ = ["./dimsum_l_2_in256.py"]

model = dict(model_name="dimsum_xl_2")
