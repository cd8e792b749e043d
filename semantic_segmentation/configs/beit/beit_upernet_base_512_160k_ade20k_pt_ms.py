# The same at several scales and flipped.
_base_ = "./beit_upernet_base_512_160k_ade20k_pt.py"
tta = True
