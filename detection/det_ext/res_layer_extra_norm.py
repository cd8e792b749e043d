"""C4's shared head: a ResNet's last stage on regions, followed by a norm."""

from mmcv.cnn import build_norm_layer
from mmdet.models.roi_heads.shared_heads import ResLayer
from mmdet.registry import MODELS
from torch import Tensor

from unimim.openmmlab.checkpoint import load_backbone


@MODELS.register_module()
class ResLayerExtraNorm(ResLayer):
    """Map regions [K, 1024, 14, 14] to [K, 2048, 7, 7].

    `pretrained` is the backbone's file, whose last stage is loaded here under timm's names.
    """

    def __init__(self, *, norm_cfg: dict, pretrained: str = "", **layer):
        super().__init__(norm_cfg=norm_cfg, **layer)
        self.norm = build_norm_layer(norm_cfg, self.layer4[-1].conv3.out_channels)[1]
        self.file = pretrained

    def init_weights(self) -> None:
        super().init_weights()
        if self.file:
            load_backbone(self, self.file)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))
