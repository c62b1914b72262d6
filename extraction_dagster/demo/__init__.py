"""The demo's source table and videos."""
