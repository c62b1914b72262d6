"""The cursor's state and its mirrors."""
