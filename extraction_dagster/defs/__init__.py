"""The Dagster room: only this folder and `definitions.py` import Dagster."""
