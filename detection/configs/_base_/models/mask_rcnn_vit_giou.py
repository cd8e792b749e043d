# A2MIM's ViT-B "giou 4conv1f" with positions and a pyramid before the FPN, which the released one
# lacks (detection/README.md). It trains on 2000 proposals, as the released one.
_base_ = "./mask_rcnn.py"

model = {
    "backbone": {
        "type": "VisionTransformerBackbone",
        "size": "base",
        "out_indices": (3, 5, 7, 11),
        "pos_embed": "learned",
        "rel_pos_bias": "per_block",
        "init_values": 0.1,
        "drop_path": 0.2,
    },
    "neck": {
        "type": "PyramidFPN",
        "in_channels": [768] * 4,
        "pyramid_norm_cfg": {"type": "SyncBN", "requires_grad": True},
    },
    "roi_head": {
        "bbox_head": {
            "reg_decoded_bbox": True,
            "loss_bbox": {"_delete_": True, "type": "GIoULoss", "loss_weight": 10.0},
        }
    },
    "train_cfg": {"rpn_proposal": {"max_per_img": 2000}},
}
