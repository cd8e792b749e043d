"""What the scripts at the top of the repository rely on."""
