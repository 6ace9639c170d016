"""terminator on CIFAR-10 by the authors' recipe: Kar3 for 100 epochs, the kernels' own loss; one process."""

_base_ = ["../_base_/runtime.py", "../_base_/cifar10.py"]

model = dict(
    type="Classifier",
    model_name="terminator",
    num_classes=10,
    loss=dict(type="LabelSmoothLoss", label_smooth_val=0.1, mode="original"),
    auxiliary=dict(slow=1.0, norms=5e-5),
)
train_dataloader = dict(
    batch_size=64,
    dataset=dict(
        pipeline=[
            dict(type="RandomCrop", crop_size=32, padding=4, padding_mode="symmetric"),
            dict(type="RandomFlip", prob=0.5),
            dict(type="PackInputs"),
        ]
    ),
)

train_cfg = dict(by_epoch=True, max_epochs=100)
optim_wrapper = dict(optimizer=dict(type="Kar3", lr=0.001215, betas=(0.5, 0.95)))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-5, end=8, convert_to_iter_based=True),
    dict(type="CosineAnnealingLR", eta_min=0, begin=8, end=100, convert_to_iter_based=True),
]
