# Large-scale jitter: 0.1 to 2 times 1024, a crop of 1024; the backbone pads. 64 images on 8 GPUs.
_base_ = "./coco_instance.py"

jitter = [
    dict(type="RandomResize", scale=(1024, 1024), ratio_range=(0.1, 2.0), keep_ratio=True),
    dict(
        type="RandomCrop",
        crop_type="absolute",
        crop_size=(1024, 1024),
        recompute_bbox=True,
        allow_negative_crop=True,
    ),
    dict(type="FilterAnnotations", min_gt_bbox_wh=(1e-2, 1e-2)),
]
train_dataloader = dict(
    batch_size=8, batch_sampler=None, dataset=dict(pipeline=[*_base_.load, *jitter, dict(type="PackDetInputs")])
)
test_pipeline = list(_base_.test_pipeline)
test_pipeline[1] = dict(type="Resize", scale=(1024, 1024), keep_ratio=True)
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
