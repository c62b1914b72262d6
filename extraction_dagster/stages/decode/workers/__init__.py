"""Processes that decode one untrusted video each, and can be killed."""
