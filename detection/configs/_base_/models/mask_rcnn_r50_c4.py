# A2MIM's and MoCo's C4: the last stage, followed by a norm, runs on the regions.
_base_ = "./mask_rcnn.py"
norm_cfg = {"type": "SyncBN", "requires_grad": True}
pretrained_parts = ["backbone", "roi_head.shared_head"]

model = {
    "backbone": {"type": "TimmBackbone", "name": "resnet50", "sync_bn": True, "out_indices": (2,)},
    "neck": None,
    "rpn_head": {
        "in_channels": 1024,
        "feat_channels": 1024,
        "anchor_generator": {"scales": [2, 4, 8, 16, 32], "strides": [16]},
    },
    "roi_head": {
        "shared_head": {
            "type": "ResLayerExtraNorm",
            "depth": 50,
            "stage": 3,
            "stride": 2,
            "norm_cfg": norm_cfg,
            "norm_eval": False,
        },
        "bbox_roi_extractor": {
            "roi_layer": {"output_size": 14},
            "out_channels": 1024,
            "featmap_strides": [16],
        },
        "bbox_head": {
            "_delete_": True,
            "type": "BBoxHead",
            "with_avg_pool": True,
            "roi_feat_size": 7,
            "in_channels": 2048,
            "num_classes": 80,
            "bbox_coder": {
                "type": "DeltaXYWHBBoxCoder",
                "target_means": [0.0] * 4,
                "target_stds": [0.1, 0.1, 0.2, 0.2],
            },
            "reg_class_agnostic": False,
            "loss_cls": {"type": "CrossEntropyLoss", "use_sigmoid": False, "loss_weight": 1.0},
            "loss_bbox": {"type": "L1Loss", "loss_weight": 1.0},
        },
        "mask_roi_extractor": None,
        "mask_head": {"num_convs": 0, "in_channels": 2048},
    },
    "train_cfg": {
        "rpn": {"allowed_border": 0},
        "rpn_proposal": {"nms_pre": 12000, "max_per_img": 2000},
        "rcnn": {"assigner": {"match_low_quality": False}, "mask_size": 14},
    },
    "test_cfg": {"rpn": {"nms_pre": 6000, "max_per_img": 1000}},
}
