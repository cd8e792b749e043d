# 160,000 updates of 16 images, AdamW, warm-up from 1e-6 of the lr, then linear decay to 0.
# A method's configuration sets the lr and the layer decay.
iterations = 160000
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", betas=(0.9, 0.999), weight_decay=0.05),
    constructor="LayerDecayConstructor",
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, begin=0, end=1500, by_epoch=False),
    dict(type="PolyLR", power=1.0, eta_min=0.0, begin=1500, end=iterations, by_epoch=False),
]
auto_scale_lr = dict(enable=False, base_batch_size=16)
train_cfg = dict(type="PositionLoop", max_iters=iterations, val_interval=16000)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=16000, max_keep_ckpts=3),
    sampler_seed=dict(type="DistSamplerSeedHook"),
)
