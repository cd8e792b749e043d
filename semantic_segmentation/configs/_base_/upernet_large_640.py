_base_ = [
    "./models/upernet_vit_large.py",
    "./datasets/ade20k_640.py",
    "./schedules/160k.py",
    "./runtime.py",
]
model = dict(
    data_preprocessor=dict(size=(640, 640)),
    backbone=dict(input_size=640),
    test_cfg=dict(crop_size=(640, 640), stride=(426, 426)),
)
