# Keys with a bias, no layer scale, a norm behind the last block; 8 GPUs x 1 image, float32, as
# published.
_base_ = "../_base_/upernet_base_640.py"
model = dict(backbone=dict(pos_embed="learned", k_bias=True, final_norm=True))
optim_wrapper = dict(optimizer=dict(lr=3e-5), paramwise_cfg=dict(layer_decay=0.9))
train_dataloader = dict(batch_size=1)
auto_scale_lr = dict(base_batch_size=8)
