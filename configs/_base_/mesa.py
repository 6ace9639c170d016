"""The averaged model as teacher from epoch 75 on; a config says with what weight in `model.mesa`."""

custom_hooks = [dict(type="MesaHook", begin=75)]
