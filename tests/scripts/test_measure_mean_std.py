"""scripts/tools/measure_mean_std.py on images whose statistics are known."""

import numpy as np
import pytest
from PIL import Image

from scripts.tools.measure_mean_std import main


def test_mean_and_std_of_each_channel(tmp_path, capsys, caplog):
    for number, level in enumerate((0, 255, 0, 255)):
        pixels = np.full((8, 12, 3), (level, 51, 102), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    main(["--data_path", str(tmp_path), "--size", "4"])
    said = capsys.readouterr().out
    assert "1 of 5 images cannot be read and are left out, such as" in caplog.text
    assert said == "--mean 0.5000 0.2000 0.4000 --std 0.5000 0.0000 0.0000\n"
    main(["--data_path", str(tmp_path), "--images", "1"])
    assert "--mean 0.0000 0.2000 0.4000" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--data_path", str(tmp_path), "--in_chans", "5"])
    assert "0.png: it has 3 channels, --in_chans is 5" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--data_path", str(tmp_path / "none")])
    assert "does not exist" in capsys.readouterr().err
