"""`extraction backfill FIRST-LAST`: process a span of ids, range by range, through Dagster's queue."""

import logging
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from extraction_dagster.cli import console
from extraction_dagster.errors.base import PartitionKeyError
from extraction_dagster.errors.catalog import EmptyRangeError
from extraction_dagster.errors.runs import BackfillFailedError, DaemonMissingError
from extraction_dagster.records import IdRange
from extraction_dagster.settings import Settings, load_settings
from extraction_dagster.stages.catalog.catalog import open_catalog

if TYPE_CHECKING:
    from extraction_dagster.defs.instance.backfills import BackfillPlan, BackfillProgress, Backfills

_log = logging.getLogger(__name__)
_POLL_SECONDS = 2.0
_MOST_SHOWN = 5
_NO_DAEMON = (
    "No Dagster daemon is running, which would start the runs: backfills wait for one. Start it in the folder of "
    "workspace.yaml with 'dagster dev -w workspace.yaml', or process the ranges in this process with --here."
)
_NEGATIVE = re.compile(r"-\d.*")


class TakesNegativeIds(TyperCommand):
    """A command whose argument may begin with a minus: no option of it begins with a digit."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]  # Typer's own click
        """Put `-5--1` where it is taken for what it is."""
        spans = [] if "--" in args else [argument for argument in args if _NEGATIVE.fullmatch(argument)]
        rest = [argument for argument in args if argument not in spans]
        return super().parse_args(ctx, [*rest, "--", *spans] if spans else rest)


def command(  # noqa: PLR0913 - each is an option that a person may type
    span: Annotated[
        str | None, typer.Argument(metavar="[FIRST-LAST]", help="Span of ids, both ends included: 1-50000.")
    ] = None,
    *,
    everything: Annotated[bool, typer.Option("--all", help="From the first eligible row to the last.")] = False,
    only: Annotated[
        str | None,
        typer.Option("--only", "--assets", help="Only these, separated by commas: frame_embeddings,qdrant_points."),
    ] = None,
    stale_only: Annotated[
        bool,
        typer.Option(
            "--stale-only",
            help="Only ranges of which an asset is missing, or was made by other code, settings or inputs.",
        ),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be launched, and launch nothing.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Show the progress until it is over.")] = False,
    here: Annotated[
        bool, typer.Option("--here", help="Process the ranges one by one in this process; needs no daemon.")
    ] = False,
    watch: Annotated[str | None, typer.Option(metavar="ID", help="Show the progress of this backfill.")] = None,
    cancel: Annotated[str | None, typer.Option(metavar="ID", help="Cancel this backfill and its runs.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Process a span of ids, range by range: a backfill that Dagster's daemon works off and the UI shows.

    Ranges that are there are used as they are; where there is none, new ones are cut at the batch size. A range on
    which a run is working is left out. Records that are done already are skipped.
    """
    if sum((span is not None, everything, watch is not None, cancel is not None)) != 1:
        message = "give FIRST-LAST, or --all, or --watch ID, or --cancel ID: exactly one of them"
        raise typer.BadParameter(message)
    if here and wait:
        message = "--here waits anyway; --wait is for a backfill that a daemon works off"
        raise typer.BadParameter(message)
    wanted, assets = _span(span), _assets(only)
    from extraction_dagster.defs.instance.backfills import Backfills
    from extraction_dagster.defs.instance.launching import open_instance

    settings = load_settings()
    with open_instance(settings) as instance:
        backfills = Backfills(instance)
        if cancel is not None:
            _cancel(backfills, cancel)
        elif watch is not None:
            _watch(backfills, watch, as_json=as_json)
        else:
            plan = _plan(backfills, settings, wanted, assets=assets, stale_only=stale_only)
            document = {**_document(plan), "daemon_running": backfills.has_daemons()}
            if not as_json:
                _tell(plan, dry_run=dry_run)
            if not (document["daemon_running"] or dry_run or here or wait):
                console.err.print(_NO_DAEMON, markup=False)
            if dry_run or not plan.ranges:
                _show({**document, "state": "dry run" if dry_run else "nothing to do"}, as_json=as_json)
            elif here:
                _process_here(backfills, plan, document, as_json=as_json)
            else:
                _launch(backfills, settings, plan, document, wait=wait, as_json=as_json)


def _span(text: str | None) -> IdRange | None:
    try:
        return None if text is None else IdRange.parse(text)
    except PartitionKeyError as error:
        raise typer.BadParameter(str(error)) from None


def _assets(only: str | None) -> tuple[str, ...]:
    from extraction_dagster.defs.instance.runs import ASSETS

    names = ASSETS if only is None else tuple(name.strip() for name in only.split(",") if name.strip())
    unknown = sorted(set(names) - set(ASSETS))
    if unknown or not names:
        message = f"{', '.join(unknown) or 'nothing'} is no asset: choose from {', '.join(ASSETS)}"
        raise typer.BadParameter(message)
    return names


def _plan(
    backfills: "Backfills", settings: Settings, wanted: IdRange | None, *, assets: tuple[str, ...], stale_only: bool
) -> "BackfillPlan":
    with open_catalog(settings) as catalog:
        extent = catalog.source.extent()
        span = wanted or (IdRange(*extent) if extent else None)
        if span is None or not any(catalog.source.counts([span], at_most=1)):
            raise EmptyRangeError(str(span or "--all"), catalog.source.name, extent)
        return backfills.plan(catalog, span, assets=assets, stale_only=stale_only)


def _document(plan: "BackfillPlan") -> dict[str, Any]:
    """The plan for programs; the keys are stable."""
    return {
        "backfill_id": None,
        "state": None,
        "span": str(plan.span),
        "assets": list(plan.assets),
        "ranges": [str(id_range) for id_range in plan.ranges],
        "new_ranges": [str(id_range) for id_range in plan.new],
        "busy_ranges": {str(id_range): by for id_range, by in plan.busy.items()},
        "fresh_ranges": [str(id_range) for id_range in plan.fresh],
        "finished": 0,
        "failed_ranges": [],
    }


def _show(document: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        console.print_json(document)


def _tell(plan: "BackfillPlan", *, dry_run: bool) -> None:
    old = len(plan.ranges) - len(plan.new)
    count = f"{len(plan.ranges)} ranges, {old} of them there already and {len(plan.new)} new"
    console.out.print(f"Backfill of {plan.span}, {', '.join(plan.assets)}: {count}.")
    if plan.fresh:
        console.out.print(f"Left out, nothing is stale: {_named([str(item) for item in plan.fresh])}.")
    if plan.busy:
        console.out.print(f"Left out, at work: {_named([f'{item} ({by})' for item, by in plan.busy.items()])}.")
    if dry_run and plan.ranges:
        console.out.print(f"Would launch: {_named([str(item) for item in plan.ranges])}.")
    elif not plan.ranges:
        console.out.print("Nothing to launch.")


def _named(items: list[str]) -> str:
    more = f" and {len(items) - _MOST_SHOWN} more" if len(items) > _MOST_SHOWN else ""
    return f"{', '.join(items[:_MOST_SHOWN])}{more}"


def _how_to(backfill_id: str) -> str:
    watch = f"Watch it with 'extraction backfill --watch {backfill_id}'"
    return f"{watch}, cancel it with 'extraction backfill --cancel {backfill_id}'."


def _launch(  # noqa: PLR0913 - a plan, and how it is told
    backfills: "Backfills",
    settings: Settings,
    plan: "BackfillPlan",
    document: dict[str, Any],
    *,
    wait: bool,
    as_json: bool,
) -> None:
    if wait and not document["daemon_running"]:
        raise DaemonMissingError
    backfill_id = backfills.start(plan, settings)
    if not as_json:
        console.out.print(f"Launched backfill {backfill_id}: Runs > Backfills in the UI shows it.")
    if wait:
        _watch(backfills, backfill_id, document=document, as_json=as_json)
        return
    _show({**document, "backfill_id": backfill_id, "state": "launched"}, as_json=as_json)
    if not as_json:
        console.out.print(_how_to(backfill_id), markup=False)


def _cancel(backfills: "Backfills", backfill_id: str) -> None:
    if backfills.cancel(backfill_id):
        console.out.print(f"Backfill {backfill_id} is being cancelled, with its runs. What was finished is kept.")
    else:
        console.out.print(f"Backfill {backfill_id} was over already.")


def _watch(backfills: "Backfills", backfill_id: str, *, document: dict[str, Any] | None = None, as_json: bool) -> None:
    """Show the progress until it is over; Ctrl+C ends the watching alone."""
    try:
        with console.long_work(), console.counting("ranges") as show:
            seen = _until_over(backfills, backfill_id, show)
    except KeyboardInterrupt:
        console.err.print(f"Stopped watching; backfill {backfill_id} goes on. {_how_to(backfill_id)}", markup=False)
        raise typer.Exit(130) from None
    failed = [str(id_range) for id_range in seen.failed]
    outcome = {"backfill_id": backfill_id, "state": seen.state, "finished": seen.finished, "failed_ranges": failed}
    _show({**(document or {}), **outcome}, as_json=as_json)
    if seen.state != "done":
        what, reason = f"Backfill {backfill_id} {seen.state}", seen.error.partition("\n")[0]
        raise BackfillFailedError(what, failed, total=seen.total, finished=seen.finished, reason=reason)
    if not as_json:
        console.out.print(f"Backfill {backfill_id} is done: {seen.finished} ranges.")


def _until_over(backfills: "Backfills", backfill_id: str, show: Callable[..., None]) -> "BackfillProgress":
    said, warned = "", False
    while True:
        seen = backfills.progress(backfill_id)
        more = f"{seen.started} at work, {seen.queued} queued, {len(seen.failed)} failed"
        show(seen.finished + len(seen.failed), seen.total, f"({more})")
        line = f"Backfill {backfill_id}: {seen.finished} of {seen.total} ranges finished, {more}"
        if line != said:
            _log.info("%s", line)  # a terminal has its bar
        said = line
        if seen.is_over:
            return seen
        if not warned and not backfills.has_daemons():
            warned = True
            _log.warning("No Dagster daemon is running: the backfill goes on once there is one")
        time.sleep(_POLL_SECONDS)


def _process_here(backfills: "Backfills", plan: "BackfillPlan", document: dict[str, Any], *, as_json: bool) -> None:
    from extraction_dagster.defs.instance.backfills import process_here

    with console.long_work():
        done = process_here(backfills.instance, plan)
    failed = [str(id_range) for id_range in done.failed]
    state = "failed" if failed else "done"
    _show({**document, "state": state, "finished": done.finished, "failed_ranges": failed}, as_json=as_json)
    if failed:
        what = f"Backfill of {plan.span} failed"
        raise BackfillFailedError(what, failed, total=len(plan.ranges), finished=done.finished, reason=done.reason)
    if not as_json:
        console.out.print(f"Backfill of {plan.span} is done: {done.finished} ranges.")
