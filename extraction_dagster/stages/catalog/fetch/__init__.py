"""From a row's address to a local file that may be read."""
