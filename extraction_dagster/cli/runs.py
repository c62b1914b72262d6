"""The commands that process rows: `run` what is due, `launch` one range, `backfill` a span of ranges."""

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from extraction_dagster.cli import console
from extraction_dagster.cli.arguments import Range
from extraction_dagster.errors import PartitionKeyError
from extraction_dagster.errors.catalog import EmptyRangeError
from extraction_dagster.errors.runs import BackfillFailedError, DaemonMissingError, RunFailedError
from extraction_dagster.records import IdRange
from extraction_dagster.settings import Settings, load_settings
from extraction_dagster.stages.catalog.catalog import open_catalog
from extraction_dagster.stages.catalog.rights import require_rights

if TYPE_CHECKING:
    from extraction_dagster.defs.instance.backfills import BackfillPlan, BackfillProgress, Backfills

_log = logging.getLogger(__name__)
_POLL_SECONDS = 2.0
_MOST_SHOWN = 5
_NO_DAEMON = (
    "No Dagster daemon is running, which would start the runs: backfills wait for one. Start it in the folder of "
    "workspace.yaml with 'dagster dev -w workspace.yaml', or process the ranges in this process with --here."
)


def run(
    *,
    follow: Annotated[bool, typer.Option("--follow", help="Wait for new rows instead of ending.")] = False,
    as_json: console.AsJson = False,
) -> None:
    """Process every row that is due, range by range, until none is left; Ctrl+C stops, the next call resumes.

    The same as the sensor under a daemon, with the same cursor: use one or the other.

    For example: extraction run --follow
    """
    from extraction_dagster.defs.instance.draining import drain

    settings = load_settings()
    require_rights(settings)
    with open_catalog(settings):
        pass  # refuses a table that can't be used before anything is started
    with console.long_work():
        drained = drain(None, settings, follow=follow)
    if as_json:
        waiting = {"failed": drained.num_waiting, "busy_ranges": drained.num_active}
        console.print_json({"done": drained.num_done, "parked": drained.num_parked, **waiting})
        return
    console.out.print(f"Processed {drained.num_processed} records; no row is due.")
    if drained.num_processed or drained.num_waiting:
        console.out.print(f"{drained.num_done} done, {drained.num_waiting} failed, {drained.num_parked} parked.")
    if drained.num_waiting:
        _tell_waiting(settings, drained.num_waiting)
    if drained.num_active:
        console.out.print(f"On {drained.num_active} ranges other runs are working.")


def _tell_waiting(settings: Settings, number: int) -> None:
    """Say which failed records wait until when."""
    with open_catalog(settings) as catalog:
        waiting = catalog.ledger.waiting(_MOST_SHOWN)
    console.out.print(f"{number} failed records wait for their next try:")
    for entry in waiting:
        when = f"{entry.not_before:%Y-%m-%d %H:%M:%S} UTC" if entry.not_before else "now"
        kind = (entry.last_error or "").partition(":")[0]
        console.out.print(
            f"  record {entry.record_id} until {when}, after {entry.attempts} tries ({kind})", markup=False
        )
    if number > len(waiting):
        console.out.print(f"  and {number - len(waiting)} more: 'extraction errors' lists them")


def launch(wanted: Range, *, as_json: console.AsJson = False) -> None:
    """Process one range of ids now: video_frames, frame_embeddings, qdrant_points.

    The run is in Dagster's run history like any other. Records that are done already are skipped.

    For example: extraction launch 1-1000
    """
    from extraction_dagster.defs.instance.launching import launch as process
    from extraction_dagster.defs.instance.launching import open_instance

    settings = load_settings()
    require_rights(settings)
    with open_catalog(settings) as catalog:  # refuses a table that can't be used before a run is made of it
        if not catalog.source.count(wanted):
            raise EmptyRangeError(wanted.partition_key, catalog.source.name, catalog.source.extent())
    with open_instance(settings) as instance, console.long_work():
        done = process(instance, wanted)
    if not done.success:
        raise RunFailedError(wanted.partition_key, done.run_id, done.error)
    with open_catalog(settings) as catalog:
        states = catalog.summary(wanted)
    if as_json:
        by_state = {name: int(number) for number, name in (part.split() for part in states.split(", "))}
        console.print_json({"range": str(wanted), "run_id": done.run_id, **by_state})
        return
    console.out.print(f"Range {wanted} (run {done.run_id}): {states}")


def backfill(  # noqa: PLR0913 - each is an option that a person may type
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
    as_json: console.AsJson = False,
) -> None:
    """Process a span of ids, range by range: a backfill that Dagster's daemon works off and the UI shows.

    Ranges that exist are used as they are; where there is none, new ones are cut at the batch size. A range on
    which a run is working is left out. Records that are done already are skipped.

    For example: extraction backfill 1-50000 --wait
    """
    if sum((span is not None, everything, watch is not None, cancel is not None)) != 1:
        raise typer.BadParameter("give FIRST-LAST, or --all, or --watch ID, or --cancel ID: exactly one of them")
    if here and wait:
        raise typer.BadParameter("--here waits anyway; --wait is for a backfill that a daemon works off")
    wanted, assets, say = _span(span), _assets(only), console.Answer(as_json)
    from extraction_dagster.defs.instance.backfills import Backfills
    from extraction_dagster.defs.instance.launching import open_instance

    settings = load_settings()
    with open_instance(settings) as instance:
        backfills = Backfills(instance)
        if cancel is not None:
            _cancel(backfills, cancel, say)
        elif watch is not None:
            _watch(backfills, watch, {}, say)
        else:
            plan = _plan(backfills, settings, wanted, assets=assets, stale_only=stale_only)
            document = {**_document(plan), "daemon_running": backfills.has_daemons()}
            _tell(plan, say, dry_run=dry_run)
            if not (document["daemon_running"] or dry_run or here or wait):
                console.err.print(_NO_DAEMON, markup=False)
            if dry_run or not plan.ranges:
                say.document({**document, "state": "dry run" if dry_run else "nothing to do"})
            elif here:
                _process_here(backfills, plan, document, say)
            else:
                _launch(backfills, settings, plan, document, say, wait=wait)


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
        raise typer.BadParameter(f"{', '.join(unknown) or 'nothing'} is not an asset: choose from {', '.join(ASSETS)}")
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


def _tell(plan: "BackfillPlan", say: console.Answer, *, dry_run: bool) -> None:
    old = len(plan.ranges) - len(plan.new)
    count = f"{len(plan.ranges)} ranges, {old} of them there already and {len(plan.new)} new"
    say.text(f"Backfill of {plan.span}, {', '.join(plan.assets)}: {count}.")
    if plan.fresh:
        say.text(f"Left out, nothing is stale: {_named([str(item) for item in plan.fresh])}.")
    if plan.busy:
        say.text(f"Left out, at work: {_named([f'{item} ({by})' for item, by in plan.busy.items()])}.")
    if dry_run and plan.ranges:
        say.text(f"Would launch: {_named([str(item) for item in plan.ranges])}.")
    elif not plan.ranges:
        say.text("Nothing to launch.")


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
    say: console.Answer,
    *,
    wait: bool,
) -> None:
    if wait and not document["daemon_running"]:
        raise DaemonMissingError
    backfill_id = backfills.start(plan, settings)
    say.text(f"Launched backfill {backfill_id}: Runs > Backfills in the UI shows it.")
    if wait:
        _watch(backfills, backfill_id, document, say)
        return
    say.document({**document, "backfill_id": backfill_id, "state": "launched"})
    say.text(_how_to(backfill_id))


def _cancel(backfills: "Backfills", backfill_id: str, say: console.Answer) -> None:
    is_cancelled = backfills.cancel(backfill_id)
    what = "is being cancelled, with its runs. What was finished is kept." if is_cancelled else "was over already."
    say.text(f"Backfill {backfill_id} {what}")
    say.document({"backfill_id": backfill_id, "state": "cancelling" if is_cancelled else "over"})


def _watch(backfills: "Backfills", backfill_id: str, document: dict[str, Any], say: console.Answer) -> None:
    """Show the progress until it is over; Ctrl+C ends the watching alone."""
    try:
        with console.long_work(), console.counting("ranges") as show:
            seen = _until_over(backfills, backfill_id, show)
    except KeyboardInterrupt:
        console.err.print(f"Stopped watching; backfill {backfill_id} goes on. {_how_to(backfill_id)}", markup=False)
        raise typer.Exit(130) from None
    failed = [str(id_range) for id_range in seen.failed]
    outcome = {"backfill_id": backfill_id, "state": seen.state, "finished": seen.finished, "failed_ranges": failed}
    say.document({**document, **outcome})
    if seen.state != "done":
        what, reason = f"Backfill {backfill_id} {seen.state}", seen.error.partition("\n")[0]
        raise BackfillFailedError(what, failed, total=seen.total, finished=seen.finished, reason=reason)
    say.text(f"Backfill {backfill_id} is done: {seen.finished} ranges.")


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


def _process_here(backfills: "Backfills", plan: "BackfillPlan", document: dict[str, Any], say: console.Answer) -> None:
    from extraction_dagster.defs.instance.backfills import process_here

    with console.long_work():
        done = process_here(backfills.instance, plan)
    failed = [str(id_range) for id_range in done.failed]
    state = "failed" if failed else "done"
    say.document({**document, "state": state, "finished": done.finished, "failed_ranges": failed})
    if failed:
        what = f"Backfill of {plan.span} failed"
        raise BackfillFailedError(what, failed, total=len(plan.ranges), finished=done.finished, reason=done.reason)
    say.text(f"Backfill of {plan.span} is done: {done.finished} ranges.")
