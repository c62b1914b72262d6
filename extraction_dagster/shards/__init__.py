"""The files between the stages: frames and vectors in Parquet, under the fingerprint they were made with."""
