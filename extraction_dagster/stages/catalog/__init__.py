"""Which rows: the source table, the ledger, ranges, and the file behind a row."""
