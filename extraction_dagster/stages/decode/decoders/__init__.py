"""Libraries that turn a video into frames, behind one interface."""
