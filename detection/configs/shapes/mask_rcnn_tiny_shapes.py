# Mask R-CNN on the generated scenes (make_shapes.py): a ViT of width 96 with patches of 8 pixels,
# a pyramid and small heads.
_base_ = [
    "../_base_/models/mask_rcnn_vit_giou.py",
    "../_base_/datasets/coco_instance.py",
    "../_base_/schedules/1x_adamw.py",
    "../_base_/runtime.py",
]
data_root = "data/shapes"
epochs = 2
classes = (
    "disc", "ring", "square", "triangle", "star", "cross", "hexagon", "crescent", "half_disc",
    "arrow",
)  # fmt: skip
metainfo = {"classes": classes}
width, channels = 96, 48
norm_cfg = {"type": "BN", "requires_grad": True}
proposals = {"nms_pre": 100, "max_per_img": 50}
roi_extractor = {"out_channels": channels, "roi_layer": {"sampling_ratio": 2}}

model = {
    "backbone": {
        "embed_dim": width,
        "depth": 4,
        "num_heads": 3,
        "input_size": 64,
        "patch_size": 8,
        "k_bias": True,
        "pos_embed": "sincos_trainable",
        "rel_pos_bias": "none",
        "init_values": None,
        "out_indices": (0, 1, 2, 3),
        "drop_path": 0.0,
    },
    "neck": {
        "in_channels": [width] * 4,
        "out_channels": channels,
        "patch_size": 8,
        "pyramid_norm_cfg": norm_cfg,
    },
    # the smallest anchors have sides of about 16 pixels, the size of the smaller objects
    "rpn_head": {
        "in_channels": channels,
        "feat_channels": channels,
        "anchor_generator": {"scales": [4]},
    },
    "roi_head": {
        "bbox_roi_extractor": roi_extractor,
        "bbox_head": {
            "type": "Shared2FCBBoxHead",
            "num_classes": len(classes),
            "in_channels": channels,
            "fc_out_channels": 128,
            "norm_cfg": None,
        },
        "mask_roi_extractor": roi_extractor,
        "mask_head": {
            "num_classes": len(classes),
            "num_convs": 1,
            "in_channels": channels,
            "conv_out_channels": channels,
        },
    },
    "train_cfg": {
        "rpn": {"sampler": {"num": 64}},
        "rpn_proposal": proposals,
        "rcnn": {"sampler": {"num": 16}},
    },
    "test_cfg": {"rpn": proposals, "rcnn": {"max_per_img": 20}},
}

workers = {"num_workers": 0, "persistent_workers": False}
train_dataloader = {
    "batch_size": 8,
    "dataset": {
        "data_root": data_root,
        "ann_file": "instances_train.json",
        "data_prefix": {"img": "images/"},
        "metainfo": metainfo,
        "filter_cfg": {"min_size": 16},
        "pipeline": [*_base_.load, {"type": "PackDetInputs"}],
    },
    **workers,
}
test_pipeline = list(_base_.test_pipeline)
test_pipeline[1] = {"type": "Resize", "scale": (64, 64), "keep_ratio": True}
val_dataloader = {
    "batch_size": 16,
    "dataset": {
        "data_root": data_root,
        "ann_file": "instances_val.json",
        "data_prefix": {"img": "images/"},
        "metainfo": metainfo,
        "pipeline": test_pipeline,
    },
    **workers,
}
test_dataloader = val_dataloader
val_evaluator = {"ann_file": data_root + "/instances_val.json"}
test_evaluator = val_evaluator

train_cfg = {"max_epochs": epochs, "val_interval": epochs}
param_scheduler = [
    {"type": "LinearLR", "start_factor": 0.01, "by_epoch": False, "begin": 0, "end": 50},
    {
        "type": "CosineAnnealingLR",
        "begin": 0,
        "end": epochs,
        "T_max": epochs,
        "by_epoch": True,
        "convert_to_iter_based": True,
    },
]
optim_wrapper = {"optimizer": {"lr": 1e-3}}
auto_scale_lr = {"base_batch_size": 8}
