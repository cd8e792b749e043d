# The windowed ViT, MAE's variant, with the heads of "Benchmarking Detection Transfer Learning"
# (arXiv 2111.11429).
_base_ = "./mask_rcnn.py"
norm_cfg = {"type": "SyncBN", "requires_grad": True}

model = {
    "backbone": {
        "type": "WindowViT",
        "size": "base",
        "input_size": 1024,
        "window": 16,
        "drop_path": 0.1,
    },
    "neck": {
        "type": "PyramidFPN",
        "in_channels": [768] * 4,
        "norm_cfg": norm_cfg,
        "pyramid_norm_cfg": {"type": "GN", "num_groups": 32},
    },
    "rpn_head": {"num_convs": 2},
    "roi_head": {"mask_head": {"norm_cfg": norm_cfg}},
    "train_cfg": {"rcnn": {"assigner": {"match_low_quality": False}}},
}
