"""The picture of the front page: its photographs and masks; the networks are trained by hand."""

import numpy as np
import pytest
import torch
from PIL import Image

from scripts.experiments import overview
from unimim.engine.samples import MASKED_GRAY


def test_photographs_are_cut_into_squares(tmp_path, monkeypatch):
    monkeypatch.setattr(overview, "CROPS", 2)
    overview.write_photographs(tmp_path)
    shown = sorted(tmp_path.glob("val/*/0.png"))
    assert [file.parent.name for file in shown] == sorted(overview.SQUARES)
    assert len(list(tmp_path.glob("train/*/*.png"))) == 2 * len(overview.SQUARES)
    for file in shown:
        pixels = np.asarray(Image.open(file))
        assert pixels.shape == (overview.SHOWN, overview.SHOWN, 3) and pixels.std() > 20


def test_masks_hide_blocks_random_patches_and_whole_parts():
    white = np.full((overview.SHOWN, overview.SHOWN, 3), 255, dtype=np.uint8)
    # the last two columns of patches are a part of their own
    parts = torch.zeros(1, *overview.GRID, dtype=torch.long)
    parts[..., 8:] = 1
    columns = overview.mask_columns([white], parts)
    hidden = {name: (pictures[0] == MASKED_GRAY).mean() for name, pictures in columns.items()}
    assert 0.3 < hidden["mask: block"] <= 75 / 196
    # 22.4 pixels a patch: some are a pixel larger
    assert hidden["mask: random"] == pytest.approx(0.75, abs=0.01)
    assert hidden["mask: parts"] == pytest.approx(0.75, abs=0.01)
    small_part = columns["mask: parts"][0][:, -40:]
    assert len(np.unique(small_part)) == 1  # as a whole hidden, or as a whole seen


def test_a_figure_has_a_row_for_each_photograph(tmp_path):
    picture = np.zeros((overview.SHOWN, overview.SHOWN, 3), dtype=np.uint8)
    for rows in (1, 3):
        overview.draw_figure({"a": [picture] * rows, "b": [picture] * rows}, tmp_path / "a.jpg")
        width, height = Image.open(tmp_path / "a.jpg").size
        assert abs(height / width - (1.5 * rows + 0.3) / 3) < 0.01
