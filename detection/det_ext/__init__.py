"""Register detection's modules with mmdet: `custom_imports = dict(imports=["det_ext"])`."""

from unimim.openmmlab import compat

compat.prepare("mmdet")

from det_ext.lr_groups import PrefixRates  # noqa: E402
from det_ext.mimdet import MIMDet, SizedMaskRCNN  # noqa: E402
from det_ext.pyramid_fpn import PyramidFPN  # noqa: E402
from det_ext.res_layer_extra_norm import ResLayerExtraNorm  # noqa: E402
from det_ext.window_vit import WindowViT  # noqa: E402

__all__ = ["MIMDet", "PrefixRates", "PyramidFPN", "ResLayerExtraNorm", "SizedMaskRCNN", "WindowViT"]
