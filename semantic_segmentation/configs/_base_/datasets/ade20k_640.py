# ADE20K, crops of 640 px from images of 2560 x 640.
_base_ = "./ade20k_512.py"
crop_size, scale = (640, 640), (2560, 640)
train_pipeline, test_pipeline, tta_pipeline = (
    _base_.train_pipeline,
    _base_.test_pipeline,
    _base_.tta_pipeline,
)
train_pipeline[3].scale, train_pipeline[4].crop_size = scale, crop_size
test_pipeline[1].scale = scale
tta_pipeline[1].transforms[0] = [
    dict(type="ResizeShortestAtLeast", scale=scale, ratio=ratio, min_short=min(crop_size))
    for ratio in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
