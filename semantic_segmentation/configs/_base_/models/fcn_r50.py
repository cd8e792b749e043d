# FCN on timm's plain ResNet-50 with stages 3 and 4 dilated to stride 8: the stem that was
# pre-trained, not V1c's.
_base_ = "./upernet_vit.py"
model = dict(
    backbone=dict(
        _delete_=True, type="TimmBackbone", name="resnet50", output_stride=8, sync_bn=True
    ),
    neck=None,
    decode_head=dict(
        _delete_=True,
        type="FCNHead",
        in_channels=2048,
        in_index=3,
        channels=512,
        num_convs=2,
        concat_input=True,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=dict(type="SyncBN", requires_grad=True),
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=dict(in_channels=1024),
    test_cfg=dict(_delete_=True, mode="whole"),
)
