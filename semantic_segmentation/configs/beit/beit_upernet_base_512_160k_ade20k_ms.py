# The same at several scales and flipped.
_base_ = "./beit_upernet_base_512_160k_ade20k.py"
tta = True
