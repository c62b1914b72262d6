"""Every error that this project raises on purpose, by the room that raises it.

The caller passes facts, the class writes the sentence: the culprit, what was got, what was expected; what survives;
the fix. A class whose name a user may filter by (`extraction errors --type`) is part of the interface.
"""
