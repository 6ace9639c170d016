"""ViL-B after `cls/vil_b_in1k`, fine-tuned at 224 px by its published recipe: `torchrun --nproc_per_node=8`."""

_base_ = ["./vil_t_224_in1k.py"]

model = dict(model_name="vil_b", drop_path_rate=0.2, pretrained="work_dirs/vil_b_in1k/export/model.safetensors")
train_cfg = dict(max_epochs=5)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-3, end=1, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=1e-6, begin=1, end=5, convert_to_iter_based=True),
]
