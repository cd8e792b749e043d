_base_ = [
    "../_base_/models/mask_rcnn_vit_giou.py",
    "../_base_/datasets/coco_instance_crop.py",
    "../_base_/schedules/1x_adamw.py",
    "../_base_/runtime.py",
]
