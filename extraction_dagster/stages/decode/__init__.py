"""Video to frames: decoders, sampling, worker processes, the frame store."""
