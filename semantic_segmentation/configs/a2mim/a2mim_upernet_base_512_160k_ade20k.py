# A2MIM's BEiT-type settings, with the positions and tables of its pre-training.
_base_ = "../_base_/upernet_base_512.py"
model = dict(backbone=dict(rel_pos_bias="per_block", pos_embed="learned", init_values=0.1))
optim_wrapper = dict(optimizer=dict(lr=4e-4), paramwise_cfg=dict(layer_decay=0.65))
