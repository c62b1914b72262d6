"""The ranges that several commands take."""

from typing import Annotated

import typer

from extraction_dagster.records import IdRange

Range = Annotated[
    IdRange,
    typer.Argument(metavar="FIRST-LAST", parser=IdRange.parse, help="Range of ids, both ends included: 1-1000."),
]
AnyRange = Annotated[
    IdRange | None,
    typer.Argument(
        metavar="[FIRST-LAST]", parser=IdRange.parse, help="Range of ids, both ends included; all when left out."
    ),
]
