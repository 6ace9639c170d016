"""mambairv2_car: MambaIRv2 that removes traces of JPEG compression of quality 40 from grey images, as MambaIR."""

_base_ = ["./mambair_car_jpeg40.py"]

model = dict(model_name="mambairv2_car")
