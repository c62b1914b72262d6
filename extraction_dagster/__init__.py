"""Keep a Qdrant collection of video frames in step with a growing table of videos."""

__version__ = "0.1.0"
