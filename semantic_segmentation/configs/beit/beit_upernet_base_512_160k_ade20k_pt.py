# BEiT-B right after pre-training.
_base_ = "./beit_upernet_base_512_160k_ade20k.py"
optim_wrapper = dict(optimizer=dict(lr=7e-4), paramwise_cfg=dict(layer_decay=0.65))
