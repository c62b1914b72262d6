"""How far things are and how fast they go: one account for the command, the UI and Prometheus."""
