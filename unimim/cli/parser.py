"""A parser whose messages suggest the flag that was meant, and types of flags."""

import argparse
from collections.abc import Sequence
from typing import Any

from unimim.errors import did_you_mean

# What other projects call flags that are spelled too differently here to be found as similar.
OTHER_NAMES = {
    "accum_iter": "update_freq", "base_lr": "blr", "checkpoint": "finetune", "data": "data_path",
    "data_dir": "data_path", "image_size": "input_size", "img_size": "input_size",
    "learning_rate": "lr", "pretrained": "finetune", "save_dir": "output_dir", "wd": "weight_decay",
    "workers": "num_workers",
}  # fmt: skip


class FlagParser(argparse.ArgumentParser):
    """A parser without abbreviations that shows defaults, and suggests flags for unknown ones."""

    def __init__(self, **options: Any):
        options.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(usage="%(prog)s [flags]; --help lists them", allow_abbrev=False, **options)

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown)}")
        return values

    def format_help(self) -> str:
        """Return the help, whose first line need not say that --help exists."""
        usage = self.usage
        self.usage = "%(prog)s [flags]"
        try:
            return super().format_help()
        finally:
            self.usage = usage

    def _meant(self, unknown: Sequence[str]) -> str:
        """Return a suggestion for the first unknown word that is a flag."""
        known = self._option_string_actions
        for word in unknown:
            if word.startswith("--"):
                name = word.partition("=")[0].replace("-", "_").replace("__", "--", 1)
                other = f"--{OTHER_NAMES.get(name.removeprefix('--'))}"
                if other in known:
                    return f"; did you mean {other}?"
                return did_you_mean(name, known).removesuffix(";")
        return ""


class ImageSize(argparse.Action):
    """Reads an image size: S, H W or HxW. The value is a number for a square, else [H, W]."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any):
        options.setdefault("metavar", "SIDE")
        super().__init__(option_strings, dest, nargs="+", **options)

    def __call__(self, parser, namespace, values, option_string=None):
        sides = [side for word in values for side in word.lower().split("x")]
        if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
            raise argparse.ArgumentError(
                self, f"{' '.join(values)} is not a size; use S, H W or HxW, in pixels"
            )
        numbers = [int(side) for side in sides]
        setattr(namespace, self.dest, numbers[0] if len({*numbers}) == 1 else numbers)
