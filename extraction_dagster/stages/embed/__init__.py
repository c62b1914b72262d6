"""Frames to vectors: models, preprocessing, batching, the embedding store."""
