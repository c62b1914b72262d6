"""Notices to people: what is said when a run has failed, and how it reaches them."""
