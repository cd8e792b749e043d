# Large-scale jitter: 0.1 to 2 times 1024, a crop of 1024; the backbone pads. 64 images on 8 GPUs.
_base_ = "./coco_instance.py"

jitter = [
    {"type": "RandomResize", "scale": (1024, 1024), "ratio_range": (0.1, 2.0), "keep_ratio": True},
    {
        "type": "RandomCrop",
        "crop_type": "absolute",
        "crop_size": (1024, 1024),
        "recompute_bbox": True,
        "allow_negative_crop": True,
    },
    {"type": "FilterAnnotations", "min_gt_bbox_wh": (1e-2, 1e-2)},
]
train_dataloader = {
    "batch_size": 8,
    "batch_sampler": None,
    "dataset": {"pipeline": [*_base_.load, *jitter, {"type": "PackDetInputs"}]},
}
test_pipeline = list(_base_.test_pipeline)
test_pipeline[1] = {"type": "Resize", "scale": (1024, 1024), "keep_ratio": True}
val_dataloader = {"dataset": {"pipeline": test_pipeline}}
test_dataloader = val_dataloader
