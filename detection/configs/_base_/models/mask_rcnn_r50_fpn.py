# A2MIM's: synchronised batch norm everywhere, nothing frozen (specs/downstream.md 8).
_base_ = "./mask_rcnn.py"
norm_cfg = dict(type="SyncBN", requires_grad=True)

model = dict(
    backbone=dict(type="TimmBackbone", name="resnet50", sync_bn=True),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(mask_head=dict(norm_cfg=norm_cfg)),
)
