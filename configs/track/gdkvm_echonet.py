"""gdkvm on EchoNet-Dynamic: ten frames from one outlined frame to the other, 128 px; otherwise as on CAMUS."""

_base_ = ["./gdkvm_camus.py"]

layout = dict(data_root="data/echonet", layout="echonet", size=128)
train_dataloader = dict(dataset=dict(**layout, part="TRAIN"))
val_dataloader = dict(dataset=dict(**layout, part="VAL"))
test_dataloader = dict(dataset=dict(**layout, part="TEST"))
