# UPerNet on the generated scenes (make_shapes.py), for compare_transfer.py: the encoder of
# compare_methods.py, crops of 64 px, objects against ground.
_base_ = [
    "../_base_/models/upernet_vit.py",
    "../_base_/datasets/ade20k_512.py",
    "../_base_/schedules/160k.py",
    "../_base_/runtime.py",
]
data_root = "data/shapes"
iterations, crop_size = 100, (64, 64)
classes, palette = ["ground", "object"], [[0, 0, 0], [230, 25, 75]]
dataset = dict(
    type="BaseSegDataset",
    data_root=data_root,
    metainfo=dict(classes=classes, palette=palette),
    img_suffix=".png",
    reduce_zero_label=False,
)
train_pipeline = [
    dict(type="SeedSample"),
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="MergeObjects"),
    dict(type="RandomCrop", crop_size=crop_size),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="MergeObjects"),
    dict(type="PackSegInputs"),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        _delete_=True,
        data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
        pipeline=train_pipeline,
        **dataset,
    ),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        _delete_=True,
        indices=200,
        data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
        pipeline=test_pipeline,
        **dataset,
    ),
)
test_dataloader = val_dataloader
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        embed_dim=192, depth=6, num_heads=3, input_size=64, patch_size=8, k_bias=True,
        pos_embed="sincos_trainable", out_indices=[2, 3, 4, 5], drop_path=0.0,
    ),
    neck=dict(width=192, patch_size=8),
    decode_head=dict(in_channels=[192] * 4, channels=64, num_classes=len(classes)),
    auxiliary_head=dict(in_channels=192, channels=32, num_classes=len(classes)),
    test_cfg=dict(crop_size=crop_size, stride=(42, 42), window_batch=16),
)  # fmt: skip
optim_wrapper = dict(optimizer=dict(lr=1e-3), paramwise_cfg=dict(layer_decay=1.0))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, begin=0, end=10, by_epoch=False),
    dict(type="PolyLR", power=1.0, eta_min=0.0, begin=10, end=iterations, by_epoch=False),
]
auto_scale_lr = dict(base_batch_size=8)
train_cfg = dict(max_iters=iterations, val_interval=iterations)
default_hooks = dict(checkpoint=dict(interval=iterations))
