default_scope = "mmdet"
custom_imports = {
    "imports": ["unimim.openmmlab.register", "det_ext"],
    "allow_failed_imports": False,
}
default_hooks = {
    "timer": {"type": "IterTimerHook"},
    "logger": {"type": "LoggerHook", "interval": 50},
    "param_scheduler": {"type": "ParamSchedulerHook"},
    "checkpoint": {"type": "CheckpointHook", "interval": 1, "max_keep_ckpts": 3},
    "sampler_seed": {"type": "DistSamplerSeedHook"},
}
# the last: a file, and all processes that validate, have the same statistics where batch norms are
# not synchronized
custom_hooks = [
    {"type": "SafeCheckpointHook"},
    {"type": "SeedStepHook"},
    {"type": "SyncBuffersHook"},
]
env_cfg = {
    "cudnn_benchmark": False,
    "mp_cfg": {"mp_start_method": "fork", "opencv_num_threads": 0},
    "dist_cfg": {"backend": "nccl"},
}
log_processor = {"type": "LogProcessor", "window_size": 50, "by_epoch": True}
log_level = "INFO"
load_from = None
resume = False
