"""timm's ResNet, ConvNeXt and Swin as backbones of several maps, under timm's names
(specs/downstream.md 8)."""

from collections.abc import Sequence

from timm.layers import LayerNorm2d
from timm.models.resnet import ResNet
from torch import Tensor, nn

from modeling_backbones import TIMM_BACKBONES, timm_network
from optim_factory import layers_of
from unimim.openmmlab.checkpoint import load_backbone


class TimmBackbone(nn.Module):
    """Images [B, 3, H, W] to the maps [B, C, h, w] behind the stages `out_indices` (from 0),
    contiguous.

    name: one of `TIMM_BACKBONES`, or any other network of timm that lists its stages; `options` are
    its own (ResNet: output_stride). sync_bn: batch statistics of all processes. out_norm: each map
    gets a layer norm of its own, as Swin and ConvNeXt need. Stages behind the last map are left
    out.
    """

    def __init__(
        self,
        *,
        name: str,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        input_size: tuple[int, int] = (224, 224),
        drop_path: float = 0.0,
        out_norm: bool = False,
        sync_bn: bool = False,
        grad_checkpointing: bool = False,
        pretrained: str | None = None,
        **options,
    ):
        super().__init__()
        if name.startswith("swin_"):
            options = {"window_size": 7, "strict_img_size": False} | options
        network = timm_network(
            TIMM_BACKBONES.get(name, name), tuple(input_size), num_classes=0, drop_path=drop_path,
            grad_checkpointing=grad_checkpointing, **options,
        )  # fmt: skip
        self.first = 1 if isinstance(network, ResNet) else 0  # timm counts ResNet's stem as a stage
        self.indices = [index + self.first for index in out_indices]
        network.prune_intermediate_layers(self.indices, prune_norm=True)
        if hasattr(network, "head"):
            network.head = nn.Identity()  # ConvNeXt's has a norm
        self.network = nn.SyncBatchNorm.convert_sync_batchnorm(network) if sync_bn else network
        widths = [network.feature_info[index]["num_chs"] for index in self.indices]
        self.norms = nn.ModuleList(
            LayerNorm2d(width) if out_norm else nn.Identity() for width in widths
        )
        self.pretrained = pretrained

    def init_weights(self) -> None:
        """mmengine's call after construction."""
        if self.pretrained:
            load_backbone(self.network, self.pretrained)

    @property
    def num_layers(self) -> int:
        return layers_of([name for name, _ in self.network.named_parameters()])[1] - 1

    def get_layer_id(self, name: str) -> int:
        """Layer of one of its parameters; the norms of the maps come behind the last."""
        layers, last = layers_of([name for name, _ in self.network.named_parameters()])
        return layers.get(name.removeprefix("network."), last)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.network.forward_intermediates(
            images, self.indices, stop_early=True, intermediates_only=True
        )
        return tuple(norm(x).contiguous() for norm, x in zip(self.norms, maps, strict=True))
