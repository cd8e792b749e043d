"""Puts what configurations name into mmengine's registries, from where mmseg and mmdet find it.

A configuration says `custom_imports = dict(imports=["unimim.openmmlab.register", ...])`.
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
    """Leaves out of a checkpoint what torch's safe loading refuses: the history of logged values
    (spec 1.4).

    The best result so far stays, which a resumed run needs.
    """

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        known = checkpoint["message_hub"]["runtime_info"]
        best = {name: value for name, value in known.items() if name.startswith("best_")}
        best = {
            name: value if isinstance(value, str) else float(value) for name, value in best.items()
        }
        checkpoint["message_hub"] = {
            "log_scalars": {}, "runtime_info": best, "resumed_keys": dict.fromkeys(best, True),
        }  # fmt: skip


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
