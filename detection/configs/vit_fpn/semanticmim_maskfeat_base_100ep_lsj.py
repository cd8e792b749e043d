_base_ = [
    "../_base_/models/mask_rcnn_vit_fpn.py",
    "../_base_/datasets/coco_instance_lsj1024.py",
    "../_base_/schedules/lsj_100ep.py",
    "../_base_/runtime.py",
]

model = {"backbone": {"pos_embed": "sincos_trainable"}}
