"""mambairv2_dn: MambaIRv2 that removes Gaussian noise of sigma 15 (of 255) from colour images, as MambaIR."""

_base_ = ["./mambair_dn_sigma15.py"]

model = dict(model_name="mambairv2_dn")
