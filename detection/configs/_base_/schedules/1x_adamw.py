# 12 epochs of AdamW, 16 images a step (A2MIM's ViT). Biases, norms and positions are not decayed:
# the released rule has a typing error.
_base_ = "./1x.py"

param_scheduler = [
    {"type": "LinearLR", "start_factor": 0.001, "by_epoch": False, "begin": 0, "end": 500},
    {
        "type": "MultiStepLR",
        "begin": 0,
        "end": 12,
        "by_epoch": True,
        "milestones": [9, 11],
        "gamma": 0.1,
    },
]
optim_wrapper = {
    "optimizer": {
        "_delete_": True,
        "type": "AdamW",
        "lr": 3e-4,
        "betas": (0.9, 0.999),
        "weight_decay": 0.05,
    },
    "paramwise_cfg": {
        "norm_decay_mult": 0.0,
        "bias_decay_mult": 0.0,
        "custom_keys": {
            "pos_embed": {"decay_mult": 0.0},
            "relative_position_bias_table": {"decay_mult": 0.0},
        },
    },
}
