# 100 epochs of AdamW, 64 images a step, half a cosine; norms, positions and tables are not decayed.
train_cfg = {"type": "EpochBasedTrainLoop", "max_epochs": 100, "val_interval": 5}
val_cfg = {"type": "ValLoop"}
test_cfg = {"type": "TestLoop"}
param_scheduler = [
    {"type": "LinearLR", "start_factor": 0.001, "by_epoch": False, "begin": 0, "end": 461},
    {
        "type": "CosineAnnealingLR",
        "begin": 0,
        "end": 100,
        "T_max": 100,
        "by_epoch": True,
        "convert_to_iter_based": True,
    },
]
optim_wrapper = {
    "type": "OptimWrapper",
    "optimizer": {"type": "AdamW", "lr": 8e-5, "betas": (0.9, 0.999), "weight_decay": 0.1},
    "paramwise_cfg": {
        "norm_decay_mult": 0.0,
        "custom_keys": {
            "pos_embed": {"decay_mult": 0.0},
            "relative_position_bias_table": {"decay_mult": 0.0},
        },
    },
}
auto_scale_lr = {"enable": False, "base_batch_size": 64}
