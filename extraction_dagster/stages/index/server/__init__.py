"""A Qdrant server, through qdrant-client."""
