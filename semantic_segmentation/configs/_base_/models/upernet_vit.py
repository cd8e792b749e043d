# UPerNet with an auxiliary FCN head on a ViT-B. The data set's file sets the sizes of images.
norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    type="WindowedEncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
    ),
    backbone=dict(
        type="VisionTransformerBackbone", size="base", out_indices=[3, 5, 7, 11], drop_path=0.1
    ),
    neck=dict(type="BeitPyramid", width=768, norm_cfg=norm_cfg),
    decode_head=dict(
        type="UPerHead",
        in_channels=[768] * 4,
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=768,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
    ),
    auxiliary_head=dict(
        type="FCNHead",
        in_channels=768,
        in_index=2,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=0.4),
    ),
    test_cfg=dict(mode="slide", window_batch=4),
)
