"""The way of the data, in alphabetical order: catalog, decode, embed, index. Plain Python; no Dagster here."""
