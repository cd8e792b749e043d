# No settings are published: MAE's, whose form the encoder has.
_base_ = "../mae/mae_upernet_base_512_160k_ade20k.py"
