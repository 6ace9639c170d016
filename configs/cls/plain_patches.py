"""A plain ViT of two blocks on crops of photographs (`make_data.py patches`), which are harder than digits."""

_base_ = ["./plain_digits.py"]

patches = dict(data_root="data/patches", make="patches")
train_dataloader = dict(dataset=patches)
val_dataloader = dict(batch_size=250, dataset=patches)
test_dataloader = val_dataloader
