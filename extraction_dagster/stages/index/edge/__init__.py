"""Qdrant's engine embedded in this process."""
