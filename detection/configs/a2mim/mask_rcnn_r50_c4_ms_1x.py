_base_ = [
    "../_base_/models/mask_rcnn_r50_c4.py",
    "../_base_/datasets/coco_instance_ms.py",
    "../_base_/schedules/1x.py",
    "../_base_/runtime.py",
]
