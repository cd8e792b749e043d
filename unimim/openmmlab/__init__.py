"""What segmentation and detection share: everything between this repository and OpenMMLab's
libraries.

Pre-training never imports this package. `compat` and `doctor` need none of these libraries;
`register` needs mmengine.
"""
