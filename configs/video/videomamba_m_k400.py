"""VideoMamba-M on Kinetics-400, 8 frames of a clip, by its published recipe: `torchrun --nproc_per_node=8`."""

_base_ = ["./videomamba_s_k400.py"]

model = dict(model_name="videomamba_m_video", drop_path_rate=0.8, pretrained="weights/videomamba_m.pth")
