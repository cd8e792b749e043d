_base_ = "../_base_/upernet_base_640.py"
model = dict(backbone=dict(rel_pos_bias="per_block", pos_embed="learned", init_values=0.1))
optim_wrapper = dict(optimizer=dict(lr=3e-5), paramwise_cfg=dict(layer_decay=0.9))
