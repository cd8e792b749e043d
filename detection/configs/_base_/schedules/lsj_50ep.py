_base_ = "./lsj_100ep.py"

train_cfg = {"max_epochs": 50}
param_scheduler = [
    {"type": "LinearLR", "start_factor": 0.001, "by_epoch": False, "begin": 0, "end": 461},
    {
        "type": "CosineAnnealingLR",
        "begin": 0,
        "end": 50,
        "T_max": 50,
        "by_epoch": True,
        "convert_to_iter_based": True,
    },
]
