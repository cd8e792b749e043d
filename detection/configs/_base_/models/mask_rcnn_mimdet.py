# MIMDet with the heads of the windowed ViT.
_base_ = "./mask_rcnn_vit_fpn.py"

model = {
    "type": "SizedMaskRCNN",
    "backbone": {
        "_delete_": True,
        "type": "MIMDet",
        "size": "base",
        "train_sample_ratio": 0.5,
        "test_sample_ratio": 1.0,
        "drop_path": 0.1,
        "grad_checkpointing": True,
    },
    "neck": {
        "_delete_": True,
        "type": "FPN",
        "in_channels": [192, 384, 512, 512],
        "out_channels": 256,
        "num_outs": 5,
        "norm_cfg": {"type": "SyncBN", "requires_grad": True},
    },
}
