# BEiT-L, fine-tuned on ImageNet-22k before; 8 GPUs x 1 image x 2 accumulated, so twice as many
# iterations.
_base_ = "../_base_/upernet_large_640.py"
model = dict(backbone=dict(rel_pos_bias="per_block", init_values=1e-6))
optim_wrapper = dict(
    accumulative_counts=2, optimizer=dict(lr=2e-5), paramwise_cfg=dict(layer_decay=0.95)
)
train_dataloader = dict(batch_size=1)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, begin=0, end=3000, by_epoch=False),
    dict(type="PolyLR", power=1.0, eta_min=0.0, begin=3000, end=320000, by_epoch=False),
]
train_cfg = dict(max_iters=320000, val_interval=32000)
default_hooks = dict(checkpoint=dict(interval=32000))
