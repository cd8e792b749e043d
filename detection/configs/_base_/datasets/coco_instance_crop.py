# DETR's: short side 480 to 800 in steps of 32, half of the images cropped before (A2MIM's ViT).
_base_ = "./coco_instance.py"

resize = dict(type="RandomChoiceResize", scales=[(1333, side) for side in range(480, 801, 32)], keep_ratio=True)
crop = [
    dict(type="RandomChoiceResize", scales=[(4200, side) for side in (400, 500, 600)], keep_ratio=True),
    dict(type="RandomCrop", crop_type="absolute_range", crop_size=(384, 600), allow_negative_crop=True),
]
choice = dict(type="RandomChoice", transforms=[[resize], [*crop, resize]])
train_dataloader = dict(dataset=dict(pipeline=[*_base_.load, choice, dict(type="PackDetInputs")]))
