"""mambair_light_x3: MambaIR on DIV2K; two processes, from the weights of scale 2."""

_base_ = ["../_base_/sr_250k.py", "../_base_/div2k_x3.py"]

model = dict(type="Restorer", model_name="mambair_light_x3", pretrained="weights/mambair_light_x2.pth")
