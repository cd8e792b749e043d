_base_ = "./mimdet_base_sr0p5_3x.py"

model = {
    "backbone": {"size": "large", "drop_path": 0.4},
    "neck": {"in_channels": [256, 512, 512, 512]},
}
optim_wrapper = {
    "paramwise_cfg": {
        "rates": {"backbone.encoder.patch_embed.": 1.0, "backbone.encoder.": 1 / 3.5, "": 3.5}
    }
}
