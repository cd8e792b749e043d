# 36 epochs of AdamW, 64 images per step; the model's file sets the lr of its parts.
train_cfg = {"type": "EpochBasedTrainLoop", "max_epochs": 36, "val_interval": 1}
val_cfg = {"type": "ValLoop"}
test_cfg = {"type": "TestLoop"}
param_scheduler = [
    {"type": "LinearLR", "start_factor": 1e-6, "by_epoch": False, "begin": 0, "end": 468},
    {
        "type": "MultiStepLR",
        "begin": 0,
        "end": 36,
        "by_epoch": True,
        "milestones": [27, 33],
        "gamma": 0.1,
    },
]
optim_wrapper = {
    "type": "OptimWrapper",
    "constructor": "PrefixRates",
    "optimizer": {"type": "AdamW", "lr": 8e-5, "betas": (0.9, 0.999), "weight_decay": 0.1},
}
auto_scale_lr = {"enable": False, "base_batch_size": 64}
