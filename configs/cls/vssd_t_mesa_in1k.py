"""VSSD-T on ImageNet-1k by its published recipe with MESA: `torchrun --nproc_per_node=8`."""

_base_ = ["./vssd_t_in1k.py", "../_base_/mesa.py"]

model = dict(mesa=1.0)
