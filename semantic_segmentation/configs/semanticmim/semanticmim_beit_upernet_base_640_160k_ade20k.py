# As many class tokens as the checkpoint has; float32, as published.
_base_ = "../_base_/upernet_base_640.py"
model = dict(backbone=dict(pos_embed="learned", init_values=0.1))
optim_wrapper = dict(optimizer=dict(lr=3e-5), paramwise_cfg=dict(layer_decay=0.9))
