"""mambairv2_light_x4: MambaIRv2 on DIV2K; two processes, from the weights of scale 2."""

_base_ = ["../_base_/sr_250k.py", "../_base_/div2k_x4.py"]

model = dict(type="Restorer", model_name="mambairv2_light_x4", pretrained="weights/mambairv2_light_x2.pth")
