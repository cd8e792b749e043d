_base_ = [
    "../_base_/models/mask_rcnn_vit_fpn_beit.py",
    "../_base_/datasets/coco_instance_lsj1024.py",
    "../_base_/schedules/lsj_25ep.py",
    "../_base_/runtime.py",
]

model = {"backbone": {"pos_embed": "learned"}}
