# MIMDet 48 channels wide with small heads, for images of 96 x 128 pixels, as a configuration.
_base_ = "../../detection/configs/mimdet/mimdet_base_sr0p5_3x.py"

proposals = {"nms_pre": 200, "max_per_img": 200}
model = {
    "backbone": {
        "embed_dim": 48,
        "depth": 4,
        "num_heads": 4,
        "img_size": 128,
        "decoder_dim": 48,
        "decoder_depth": 2,
        "decoder_num_heads": 4,
        "drop_path": 0.0,
        "grad_checkpointing": False,
    },
    "neck": {"in_channels": [12, 24, 48, 48], "out_channels": 64},
    "rpn_head": {"in_channels": 64, "feat_channels": 64},
    "roi_head": {
        "bbox_roi_extractor": {"out_channels": 64},
        "bbox_head": {"in_channels": 64, "conv_out_channels": 64, "fc_out_channels": 128},
        "mask_roi_extractor": {"out_channels": 64},
        "mask_head": {"in_channels": 64, "conv_out_channels": 64},
    },
    "train_cfg": {"rpn_proposal": proposals, "rcnn": {"sampler": {"num": 64}}},
    "test_cfg": {"rpn": proposals},
}

workers = {"num_workers": 0, "persistent_workers": False}
resize = {"type": "RandomChoiceResize", "scales": [(160, 96), (170, 112)], "keep_ratio": True}
train_dataloader = {
    "batch_size": 2,
    "dataset": {"pipeline": [*_base_.load, resize, {"type": "PackDetInputs"}]},
    **workers,
}
test_pipeline = list(_base_.test_pipeline)
test_pipeline[1] = {"type": "Resize", "scale": (160, 96), "keep_ratio": True}
val_dataloader = {"dataset": {"pipeline": test_pipeline}, **workers}
test_dataloader = val_dataloader

train_cfg = {"max_epochs": 48, "val_interval": 48}
param_scheduler = [
    {"type": "LinearLR", "start_factor": 0.01, "by_epoch": False, "begin": 0, "end": 10},
    {"type": "MultiStepLR", "by_epoch": True, "milestones": [42, 46], "gamma": 0.1},
]
optim_wrapper = {"optimizer": {"lr": 1e-3}}
default_hooks = {"logger": {"interval": 1}, "checkpoint": {"interval": 48}}
auto_scale_lr = {"base_batch_size": 2}
