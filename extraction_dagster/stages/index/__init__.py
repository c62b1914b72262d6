"""Vectors to points: the collection, the writer, verification, search."""
