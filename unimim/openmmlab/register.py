"""Register our modules with mmengine, so that configurations of mmseg and mmdet can name them.

A configuration has `custom_imports = dict(imports=["unimim.openmmlab.register", ...])`.
"""

from mmcv.transforms import TRANSFORMS
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS, HOOKS, LOOPS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS

from unimim.openmmlab.cnn_backbone import TimmBackbone
from unimim.openmmlab.data import PositionLoop, PositionSampler, SeedSample, SeedStepHook
from unimim.openmmlab.layer_decay import LayerDecayConstructor
from unimim.openmmlab.pyramid import BeitPyramid
from unimim.openmmlab.vit_backbone import VisionTransformerBackbone


class SafeCheckpointHook(Hook):
    """Remove the history of logged values, which torch's safe loading refuses, from checkpoints.

    The best result so far is kept, because a resumed run needs it.
    """

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Reduce the checkpoint's message hub to the best results."""
        best = {}
        for name, value in checkpoint["message_hub"]["runtime_info"].items():
            if name.startswith("best_"):
                best[name] = value if isinstance(value, str) else float(value)
        checkpoint["message_hub"] = {
            "log_scalars": {},
            "runtime_info": best,
            "resumed_keys": dict.fromkeys(best, True),
        }


for _registry, _classes in {
    MODELS: (VisionTransformerBackbone, TimmBackbone, BeitPyramid),
    HOOKS: (SafeCheckpointHook, SeedStepHook),
    DATA_SAMPLERS: (PositionSampler,),
    LOOPS: (PositionLoop,),
    OPTIM_WRAPPER_CONSTRUCTORS: (LayerDecayConstructor,),
    TRANSFORMS: (SeedSample,),
}.items():
    for _class in _classes:
        _registry.register_module(module=_class)
