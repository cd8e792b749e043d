# A2MIM's: synchronized batch norm everywhere, nothing frozen (specs/downstream.md 8).
_base_ = "./mask_rcnn.py"
norm_cfg = {"type": "SyncBN", "requires_grad": True}

model = {
    "backbone": {"type": "TimmBackbone", "name": "resnet50", "sync_bn": True},
    "neck": {"norm_cfg": norm_cfg},
    "roi_head": {"mask_head": {"norm_cfg": norm_cfg}},
}
