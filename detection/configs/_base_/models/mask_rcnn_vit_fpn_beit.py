# The same in BEiT's form: no absolute positions, layer scale, keys without a bias.
_base_ = "./mask_rcnn_vit_fpn.py"

model = {"backbone": {"pos_embed": "none", "init_values": 0.1, "k_bias": False}}
