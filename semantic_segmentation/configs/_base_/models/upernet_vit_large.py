_base_ = "./upernet_vit.py"
model = dict(
    backbone=dict(size="large", out_indices=[7, 11, 15, 23], drop_path=0.2),
    neck=dict(width=1024),
    decode_head=dict(in_channels=[1024] * 4, channels=1024),
    auxiliary_head=dict(in_channels=1024),
)
