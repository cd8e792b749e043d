# MIMDet's: DETR's without the sides 672 and 704, as released; 64 images on 8 GPUs.
_base_ = "./coco_instance_crop.py"

sides = (480, 512, 544, 576, 608, 640, 736, 768, 800)
resize = {
    "type": "RandomChoiceResize",
    "scales": [(1333, side) for side in sides],
    "keep_ratio": True,
}
choice = {"type": "RandomChoice", "transforms": [[resize], [*_base_.crop, resize]]}
train_dataloader = {
    "batch_size": 8,
    "dataset": {"pipeline": [*_base_.load, choice, {"type": "PackDetInputs"}]},
}
