"""What is asked of a Dagster instance: runs, backfills, the cursor store; every use of Dagster's private parts."""
