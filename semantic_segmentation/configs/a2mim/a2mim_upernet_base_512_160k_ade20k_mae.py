# A2MIM's MAE-type settings.
_base_ = "./a2mim_upernet_base_512_160k_ade20k.py"
model = dict(backbone=dict(init_values=1.0))
optim_wrapper = dict(optimizer=dict(lr=1e-4))
