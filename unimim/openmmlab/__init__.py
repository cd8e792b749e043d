"""Connect this repository to OpenMMLab's libraries, for segmentation and detection.

Pre-training never imports this package. `compat` and `doctor` work without these libraries;
`register` needs mmengine.
"""
