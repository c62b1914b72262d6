"""What is asked of a Dagster instance: runs, backfills, the cursor store; every use of Dagster's private parts."""

SENSOR_NAME = "extraction_sensor"
LOCATION_NAME = "extraction_dagster"  # as in workspace.yaml
