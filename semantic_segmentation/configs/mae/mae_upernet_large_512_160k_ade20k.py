# Settings of MAE-L are not published: those of the base model, with a layer decay of 0.75 for twice
# the depth.
_base_ = "../_base_/upernet_large_512.py"
model = dict(
    backbone=dict(
        k_bias=True,
        pos_embed="sincos_trainable",
        rel_pos_bias="per_block",
        init_values=1.0,
        may_be_new=["relative_position_bias_table", "gamma_"],
    )
)
optim_wrapper = dict(optimizer=dict(lr=1e-4), paramwise_cfg=dict(layer_decay=0.75))
