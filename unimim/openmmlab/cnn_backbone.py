"""Use timm's ResNet, ConvNeXt and Swin as multi-scale backbones, under timm's names."""

from collections.abc import Sequence

from timm.layers import LayerNorm2d
from timm.models.resnet import ResNet
from torch import Tensor, nn

from modeling_backbones import TIMM_BACKBONES, timm_network
from optim_factory import layers_of
from unimim.openmmlab.checkpoint import load_backbone


class TimmBackbone(nn.Module):
    """Map images [B, 3, H, W] to contiguous feature maps [B, C, h, w] after some stages.

    Args:
        name: one of `TIMM_BACKBONES`, or any network of timm that lists its stages.
        out_indices: stages (from 0) whose maps are returned; later stages are removed.
        out_norm: whether each map gets a layer norm, as Swin and ConvNeXt need.
        sync_bn: whether batch statistics are those of all processes.
        options: options of timm's network (ResNet: output_stride).
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
            TIMM_BACKBONES.get(name, name),
            tuple(input_size),
            num_classes=0,
            drop_path=drop_path,
            grad_checkpointing=grad_checkpointing,
            **options,
        )
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
        """Load the pre-trained weights; mmengine calls this after construction."""
        if self.pretrained:
            load_backbone(self.network, self.pretrained)

    @property
    def num_layers(self) -> int:
        """The number of the layer after the backbone, minus 1."""
        return layers_of([name for name, _ in self.network.named_parameters()])[1] - 1

    def get_layer_id(self, name: str) -> int:
        """Return the layer of a parameter; the norms of the maps belong to the last one."""
        layers, last = layers_of([name for name, _ in self.network.named_parameters()])
        return layers.get(name.removeprefix("network."), last)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the maps of the stages `out_indices`."""
        maps = self.network.forward_intermediates(
            images, self.indices, stop_early=True, intermediates_only=True
        )
        return tuple(norm(x).contiguous() for norm, x in zip(self.norms, maps, strict=True))
