"""A VMamba of five narrow blocks on crops of photographs (`make_data.py patches`), which are harder than digits."""

_base_ = ["./vmamba_t_digits.py"]

patches = dict(data_root="data/patches", make="patches")
train_dataloader = dict(dataset=patches)
val_dataloader = dict(batch_size=250, dataset=patches)
test_dataloader = val_dataloader
