"""A model's network, compiled once for this machine and kept."""
