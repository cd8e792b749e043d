# 24 epochs, as published with several scales.
_base_ = "./1x.py"

train_cfg = {"max_epochs": 24}
param_scheduler = [
    {"type": "LinearLR", "start_factor": 0.001, "by_epoch": False, "begin": 0, "end": 1000},
    {
        "type": "MultiStepLR",
        "begin": 0,
        "end": 24,
        "by_epoch": True,
        "milestones": [16, 23],
        "gamma": 0.1,
    },
]
