_base_ = [
    "../_base_/models/mask_rcnn_mimdet.py",
    "../_base_/datasets/coco_instance_mimdet.py",
    "../_base_/schedules/3x_mimdet.py",
    "../_base_/runtime.py",
]

# the stem has the optimizer's rate, the encoder a share of it, what starts afresh or is narrow a
# multiple
optim_wrapper = {
    "paramwise_cfg": {
        "rates": {"backbone.encoder.patch_embed.": 1.0, "backbone.encoder.": 1 / 2.0, "": 2.0}
    }
}
