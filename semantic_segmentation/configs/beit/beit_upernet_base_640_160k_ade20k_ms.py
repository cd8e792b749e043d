# The same at several scales and flipped.
_base_ = "./beit_upernet_base_640_160k_ade20k.py"
tta = True
