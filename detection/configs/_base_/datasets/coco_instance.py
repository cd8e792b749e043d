# COCO 2017 in data/coco: annotations/instances_{train,val}2017.json, train2017/, val2017/.
data_root = "data/coco"

# every random number of a sample depends on the seed and its position in the run
load = [
    {"type": "SeedSample"},
    {"type": "LoadImageFromFile"},
    {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
    {"type": "RandomFlip", "prob": 0.5},
]
test_pipeline = [
    {"type": "LoadImageFromFile"},
    {"type": "Resize", "scale": (1333, 800), "keep_ratio": True},
    {"type": "LoadAnnotations", "with_bbox": True, "with_mask": True},
    {
        "type": "PackDetInputs",
        "meta_keys": ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"),
    },
]
train_dataloader = {
    "batch_size": 2,
    "num_workers": 4,
    "persistent_workers": True,
    "sampler": {"type": "PositionSampler", "endless": False},
    "batch_sampler": {"type": "AspectRatioBatchSampler"},
    "dataset": {
        "type": "CocoDataset",
        "data_root": data_root,
        "ann_file": "annotations/instances_train2017.json",
        "data_prefix": {"img": "train2017/"},
        "filter_cfg": {"filter_empty_gt": True, "min_size": 32},
        "pipeline": [
            *load,
            {"type": "Resize", "scale": (1333, 800), "keep_ratio": True},
            {"type": "PackDetInputs"},
        ],
    },
}
val_dataloader = {
    "batch_size": 1,
    "num_workers": 4,
    "persistent_workers": True,
    "drop_last": False,
    "sampler": {"type": "DefaultSampler", "shuffle": False},
    "dataset": {
        "type": "CocoDataset",
        "data_root": data_root,
        "ann_file": "annotations/instances_val2017.json",
        "data_prefix": {"img": "val2017/"},
        "test_mode": True,
        "pipeline": test_pipeline,
    },
}
test_dataloader = val_dataloader
val_evaluator = {
    "type": "CocoMetric",
    "ann_file": data_root + "/annotations/instances_val2017.json",
    "metric": ["bbox", "segm"],
}
test_evaluator = val_evaluator
