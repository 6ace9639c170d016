"""mambair_light_x2: MambaIR on DIV2K; two processes."""

_base_ = ["../_base_/sr_500k.py", "../_base_/div2k_x2.py"]

model = dict(type="Restorer", model_name="mambair_light_x2")
