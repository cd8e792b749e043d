_base_ = "./lsj_100ep.py"

train_cfg = dict(max_epochs=25)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=461),
    dict(type="CosineAnnealingLR", begin=0, end=25, T_max=25, by_epoch=True, convert_to_iter_based=True),
]
