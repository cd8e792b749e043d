# What every configuration shares. seg_ext registers the project's classes with mmseg.
default_scope = "mmseg"
custom_imports = dict(imports=["seg_ext"])
custom_hooks = [dict(type="SafeCheckpointHook"), dict(type="SeedStepHook")]
randomness = dict(seed=0)
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
visualizer = dict(
    type="SegLocalVisualizer", vis_backends=[dict(type="LocalVisBackend")], name="visualizer"
)
log_processor = dict(by_epoch=False)
log_level = "INFO"
tta_model = dict(type="SegTTAModel")
