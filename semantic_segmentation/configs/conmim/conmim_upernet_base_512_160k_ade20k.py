# ConMIM's paper follows BEiT; these are BEiT's settings of a base model right after pre-training.
_base_ = "../_base_/upernet_base_512.py"
model = dict(backbone=dict(rel_pos_bias="per_block", init_values=0.1))
optim_wrapper = dict(optimizer=dict(lr=7e-4), paramwise_cfg=dict(layer_decay=0.65))
