"""vfimamba_s on X-TRAIN, gaps of up to eight frames, from the weights of Vimeo90K: the curriculum's second part."""

_base_ = ["./vfimamba_s_vimeo90k.py"]

model = dict(pretrained="weights/vfimamba_s_vimeo90k.pth")
train_dataloader = dict(
    dataset=dict(data_root="data/xtrain", part="train", layout="clips", gap=(1, 8), crop=384, length=51312),
)
