_base_ = [
    "./models/upernet_vit.py",
    "./datasets/ade20k_512.py",
    "./schedules/160k.py",
    "./runtime.py",
]
model = dict(
    data_preprocessor=dict(size=(512, 512)),
    backbone=dict(input_size=512),
    test_cfg=dict(crop_size=(512, 512), stride=(341, 341)),
)
