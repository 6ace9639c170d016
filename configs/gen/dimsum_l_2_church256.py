"""DiMSUM-L/2 on LSUN Church at 256 px by its published recipe; images in `data/church/{train,val}/all/`.

The authors' script names XL/2; the weights that they publish are L/2.
"""

_base_ = ["./dimsum_l_2_celebahq256.py"]

train_dataloader = dict(batch_size=128, dataset=dict(data_root="data/church"))
val_dataloader = dict(dataset=dict(data_root="data/church"))
test_dataloader = val_dataloader

train_cfg = dict(max_epochs=400, val_interval=40)
optim_wrapper = dict(optimizer=dict(lr=5e-5))
auto_scale_lr = dict(base_batch_size=128)
