# FCN on ResNet-50, 4 GPUs x 4 images, SGD without warm-up.
_base_ = [
    "../_base_/models/fcn_r50.py",
    "../_base_/datasets/ade20k_512.py",
    "../_base_/schedules/160k.py",
    "../_base_/runtime.py",
]
model = dict(data_preprocessor=dict(size=(512, 512)))
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.01, momentum=0.9, weight_decay=5e-4),
)
param_scheduler = [
    dict(type="PolyLR", power=0.9, eta_min=1e-4, begin=0, end=160000, by_epoch=False)
]
