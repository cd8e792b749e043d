# ConMIM's paper follows BEiT; these are BEiT's settings of a large model.
_base_ = "../beit/beit_upernet_large_512_160k_ade20k.py"
