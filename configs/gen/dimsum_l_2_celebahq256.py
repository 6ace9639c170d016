"""DiMSUM-L/2 on CelebA-HQ at 256 px by its published recipe; images in `data/celebahq/{train,val}/all/`."""

_base_ = ["./dimsum_l_2_in256.py"]

model = dict(num_classes=1, label_dropout=0.0, guidance=1.0)
train_dataloader = dict(batch_size=16, dataset=dict(data_root="data/celebahq"))
val_dataloader = dict(dataset=dict(data_root="data/celebahq"))
test_dataloader = val_dataloader

train_cfg = dict(max_epochs=250, val_interval=25)
optim_wrapper = dict(clip_grad=dict(max_norm=2.0))
auto_scale_lr = dict(base_batch_size=16)
