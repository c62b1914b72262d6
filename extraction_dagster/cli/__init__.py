"""The `extraction` command."""
