"""The cursor: a watermark derived from the rows, what a tick plans from it, and its mirrors."""
