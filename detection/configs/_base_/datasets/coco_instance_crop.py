# DETR's: short side 480 to 800 in steps of 32, half of the images cropped before (A2MIM's ViT).
_base_ = "./coco_instance.py"

resize = {
    "type": "RandomChoiceResize",
    "scales": [(1333, side) for side in range(480, 801, 32)],
    "keep_ratio": True,
}
crop = [
    {
        "type": "RandomChoiceResize",
        "scales": [(4200, side) for side in (400, 500, 600)],
        "keep_ratio": True,
    },
    {
        "type": "RandomCrop",
        "crop_type": "absolute_range",
        "crop_size": (384, 600),
        "allow_negative_crop": True,
    },
]
choice = {"type": "RandomChoice", "transforms": [[resize], [*crop, resize]]}
train_dataloader = {"dataset": {"pipeline": [*_base_.load, choice, {"type": "PackDetInputs"}]}}
