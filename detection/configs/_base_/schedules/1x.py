# 12 epochs of SGD, 16 images a step (A2MIM's ResNets).
train_cfg = {"type": "EpochBasedTrainLoop", "max_epochs": 12, "val_interval": 1}
val_cfg = {"type": "ValLoop"}
test_cfg = {"type": "TestLoop"}
param_scheduler = [
    {"type": "LinearLR", "start_factor": 0.001, "by_epoch": False, "begin": 0, "end": 500},
    {
        "type": "MultiStepLR",
        "begin": 0,
        "end": 12,
        "by_epoch": True,
        "milestones": [8, 11],
        "gamma": 0.1,
    },
]
optim_wrapper = {
    "type": "OptimWrapper",
    "optimizer": {"type": "SGD", "lr": 0.02, "momentum": 0.9, "weight_decay": 1e-4},
}
auto_scale_lr = {"enable": False, "base_batch_size": 16}
