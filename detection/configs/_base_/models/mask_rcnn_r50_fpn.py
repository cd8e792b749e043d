# A2MIM's Mask R-CNN: synchronized batch norm everywhere, nothing frozen.
_base_ = "./mask_rcnn.py"
norm_cfg = {"type": "SyncBN", "requires_grad": True}

model = {
    "backbone": {"type": "TimmBackbone", "name": "resnet50", "sync_bn": True},
    "neck": {"norm_cfg": norm_cfg},
    "roi_head": {"mask_head": {"norm_cfg": norm_cfg}},
}
