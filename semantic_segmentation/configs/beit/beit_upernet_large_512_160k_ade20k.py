# BEiT-L, fine-tuned on ImageNet-22k before.
_base_ = "../_base_/upernet_large_512.py"
model = dict(backbone=dict(rel_pos_bias="per_block", init_values=1e-6))
optim_wrapper = dict(optimizer=dict(lr=2e-5), paramwise_cfg=dict(layer_decay=0.95))
