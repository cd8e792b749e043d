# Short side 640 to 800 in steps of 32 (A2MIM's ResNets).
_base_ = "./coco_instance.py"

resize = {
    "type": "RandomChoiceResize",
    "scales": [(1333, side) for side in range(640, 801, 32)],
    "keep_ratio": True,
}
train_dataloader = {"dataset": {"pipeline": [*_base_.load, resize, {"type": "PackDetInputs"}]}}
