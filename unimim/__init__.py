"""What the scripts at the top of the repository rely on."""

__version__ = "0.1.0.dev0"
