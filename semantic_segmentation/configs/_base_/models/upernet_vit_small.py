_base_ = "./upernet_vit.py"
model = dict(
    backbone=dict(size="small"),
    neck=dict(width=384),
    decode_head=dict(in_channels=[384] * 4, channels=384),
    auxiliary_head=dict(in_channels=384),
)
