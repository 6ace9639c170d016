"""ViL-S after `cls/vil_s_in1k`, fine-tuned at 224 px by its published recipe: `torchrun --nproc_per_node=8`."""

_base_ = ["./vil_t_224_in1k.py"]

model = dict(model_name="vil_s", drop_path_rate=0.05, pretrained="work_dirs/vil_s_in1k/export/model.safetensors")
