"""Reference cases: what they are, and one module of adapters for each family of methods."""
