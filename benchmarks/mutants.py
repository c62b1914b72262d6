"""Plant mistakes, one at a time, and see that the tests named for each fail.

    python benchmarks/mutants.py [WORDS…]      only mutants whose name has these words; exit code 1 when one survives

Each mistake is planted in a temporary copy of the package, where only its tests run: first, without any mistake, all of
them must pass. A text is looked for in the whole package and a test by the beginning of its name, so that files may
move; a text that is not there once, or a test that is not there, is reported as such and counts as a survivor.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, TESTS = "extraction_dagster", "extraction_dagster_tests"
_MOST_SECONDS = 600  # of the tests of one mistake
_MOST_SECONDS_OF_ALL = 3600  # of all of them, without any, on a machine with other work


@dataclass(frozen=True)
class Mutant:
    """A mistake.

    Attributes:
        name: What it does wrong.
        edits: Texts and what is put in the place of each; each text stands in one file only.
        tests: How the names of the tests begin of which at least one must fail.
    """

    name: str
    edits: tuple[tuple[str, str], ...]
    tests: tuple[str, ...]


def mutant(name: str, text: str, replacement: str, *tests: str) -> Mutant:
    """A mistake in one place."""
    return Mutant(name, ((text, replacement),), tests)


MUTANTS = (
    # Marks and the ledger
    mutant(
        "a cleared mark is ignored",
        '    if marked_done is False:\n        return "again"\n',
        "",
        "test_the_status_of_a_row_follows_from_its_marks",
        "test_a_cleared_mark_gives_the_row_a_new_revision",
    ),
    mutant(
        "the source is never marked",
        "stamped = mark(connection, won) if self.one_database else {}",
        "stamped: dict[int, tuple[str, str]] = {}",
        "test_marking_writes_the_ledger_and_the_marks",
    ),
    mutant(
        "a record that is brought back stays done",
        'return replace(entry, state="todo", attempts=0, not_before=None, claim=entry.claim + 1, claimed_by=None)',
        'return replace(entry, state="done", attempts=0, not_before=None, claim=entry.claim + 1, claimed_by=None)',
        "test_lost_points_are_found_and_their_records_alone",
    ),
    mutant(
        "a record is never parked",
        "parked = failure.permanent or tries >= max_attempts",
        "parked = failure.permanent",
        "test_a_failing_record_is_tried_three_times_then_parked",
    ),
    mutant(
        "a permanent failure is tried again",
        "parked = failure.permanent or tries >= max_attempts",
        "parked = tries >= max_attempts",
        "test_a_permanent_failure_parks_at_once",
    ),
    mutant(
        "tries are not counted",
        "tries = _tries(before[key], failure, address) + 1",
        "tries = 1",
        "test_a_failing_record_is_tried_three_times_then_parked",
    ),
    mutant(
        "the ledger of another source is used",
        "    is_own = source.with_former(_former(kept)) == kept.get(_SOURCE)\n",
        "    is_own = kept.get(_SOURCE) is not None\n",
        "test_state_tables_of_another_source_are_refused",
    ),
    mutant(
        "the source is marked before the ledger when they are two databases",
        '        what = f"mark rows of {self.source.name!r}" if self.one_database else "write the ledger"\n',
        '        what = "write the ledger"\n        if not self.one_database:\n'
        '            with writing(self.source_engine, what="early") as early:\n                mark(early, claims)\n',
        "test_a_crash_between_the_marks_of_two_databases",
        "test_a_row_is_marked_only_once_the_ledger_knows_it",
    ),
    # Claims: who claimed a row last writes it
    mutant(
        "a mark is written whatever the claim",
        "held = {key for key, claim in there.items() if claim == claims[key]}",
        "held = set(there)",
        "test_a_run_in_flight_can_not_undo_a_command",
        "test_a_frozen_writer_that_returns_undoes_nothing",
    ),
    mutant(
        "a run that begins claims nothing that the ledger knows",
        "taken = replace(before, claim=before.claim + 1, claimed_by=run_id or None)",
        "taken = before",
        "test_a_run_that_begins_claims_what_it_will_do",
        "test_an_older_version_does_not_come_over_a_newer_one",
    ),
    mutant(
        "the later steps of a run take rows that another has claimed",
        "planned.entry.claimed_by in {None, self.run_id}",
        "planned.entry.claimed_by != self",
        "test_the_later_steps_of_a_run_leave_rows_alone",
    ),
    mutant(
        "a retry is undone by the run in flight",
        "connection.execute(update.values(claim=table.claim + 1, claimed_by=None, **change))",
        "connection.execute(update.values(**change))",
        "test_a_run_in_flight_can_not_undo_a_command",
    ),
    mutant(
        "reprocessing is undone by the run in flight",
        '            "claim": table.claim + 1,\n',
        "",
        "test_a_run_in_flight_can_not_undo_a_command",
    ),
    mutant(
        "a repair is undone by the run in flight",
        "not_before=None, claim=entry.claim + 1, claimed_by=None)",
        "not_before=None)",
        "test_a_run_in_flight_can_not_undo_a_command",
    ),
    mutant(
        "claims of a forgotten record begin again",
        "            raise_claim_base(connection, highest)\n",
        "            pass\n",
        "test_a_row_that_comes_back_after_it_was_forgotten",
    ),
    mutant(
        "an entry that is gone is made again by a late mark",
        "if claim == 0 and key not in there]",
        "if key not in there]",
        "test_a_run_in_flight_can_not_undo_a_command",
    ),
    mutant(
        "marks in the other database are set without looking at the claim once more",
        "stamped = touch(source, held)",
        "stamped = touch(source, claims)",
        "test_a_frozen_writer_that_returns_undoes_nothing",
    ),
    mutant(
        "rows of the source are locked before the ledger's",
        "            won = self.ledger.hold(connection, claims)\n            stamped",
        "            if self.one_database:\n                self.source.mark(connection, versions, step=step)\n"
        "            won = self.ledger.hold(connection, claims)\n            stamped",
        "test_a_reconciliation_and_a_mark_at_once",
        "test_a_mark_and_a_command_at_once",
    ),
    mutant(
        "who has lost a row says nothing",
        "            self._lost.update(lost)\n            _log.warning(",
        "            self._lost.update(lost)\n            _log.debug(",
        "test_a_run_in_flight_can_not_undo_a_command",
    ),
    # Addresses
    mutant(
        "a done row keeps the old file's frames when its address is corrected",
        "has_moved = bool(address) and entry.address not in {None, address}",
        "has_moved = False",
        "test_a_done_row_whose_address_was_corrected_is_due",
        "test_a_row_that_failed_is_due_at_once_when_its_address_is_corrected",
    ),
    mutant(
        "rows that are only to be told of are decoded again",
        "if has_moved and not keeps_moved:",
        "if has_moved:",
        "test_a_done_row_whose_address_was_corrected_is_due",
    ),
    mutant(
        "the first root is no part of an address",
        'path if path.startswith("/") else f"{root}/{path}"',
        'path if path.startswith("/") else f"/{path}"',
        "test_two_spellings_of_one_address_have_one_hash",
        "test_another_column_template_or_first_root_is_another_address",
    ),
    mutant(
        "a URL that is signed once more is another address",
        '_SIGNATURE.sub("", _USER.sub("", address)).rstrip("?&")',
        "address",
        "test_two_spellings_of_one_address_have_one_hash",
    ),
    mutant(
        "entries without an address take a new one at each look",
        "LEDGER_TABLE).where(table.record_id.in_(chunk), table.address.is_(None))",
        "LEDGER_TABLE).where(table.record_id.in_(chunk))",
        "test_entries_of_an_earlier_release_take_the_present_addresses_once",
    ),
    # Force, stamps, counts, rows that can't be read
    mutant(
        "force leaves rows that are half done as they are",
        'if planned.status == "todo" or (force and revises):',
        'if planned.status == "todo" or (force and revises and planned.entry):',
        "test_a_forced_beginning_gives_every_row_a_new_revision",
    ),
    mutant(
        "force keeps the revision of rows that are to be processed anyway",
        'if revises and (is_forced or planned.status == "again" or has_moved):',
        'if revises and ((is_forced and planned.status != "todo") or planned.status == "again" or has_moved):',
        "test_a_forced_beginning_gives_every_row_a_new_revision",
    ),
    mutant(
        "a trigger makes a row look new when its mark is cleared",
        "                self.ledger.restamp(connection, self.source.unmark(connection, record_ids))\n",
        "                self.source.unmark(connection, record_ids)\n",
        "test_a_trigger_that_stamps_our_clearing_of_a_mark",
    ),
    mutant(
        "frames that are kept leave the number of those before",
        "    return (entry.num_frames, entry.frames_fingerprint, entry.address) != (",
        "    return False and (entry.num_frames,) != (",
        "test_the_number_of_frames_is_that_of_the_frames_that_are_kept",
    ),
    mutant(
        "a row that can't be read is processed",
        'if planned.status == "todo" and planned.row.problem is None',
        'if planned.status == "todo"',
        "test_a_row_that_can_not_be_read_fails_alone",
    ),
    mutant(
        "one undecodable text stops the page it is read with",
        "_UNREADABLE = (ValueError, TypeError,",
        "_UNREADABLE = (TypeError,",
        "test_a_bad_value_in_sqlite_fails_its_row_alone",
    ),
    # Stored frames and vectors
    mutant(
        "another source's folders are taken",
        "owner.identity != self._source.identity:",
        "owner.identity is None:",
        "test_the_first_writer_claims_a_root_and_another_source_is_refused",
    ),
    mutant(
        "the copy of the latest name counts, not that of the latest claim",
        "if known is None or copy.order > known.order:",
        "if known is None or copy.shard.name > known.shard.name:",
        "test_a_copy_that_a_frozen_writer_writes_late_does_not_count",
    ),
    mutant(
        "stored frames are kept whatever the row's address is",
        "return record.address == planned.address if record.address else",
        "return record.address != '' if record.address else",
        "test_a_copy_is_kept_when_it_is_of_the_rows_version_and_address",
    ),
    mutant(
        "a store that stumbles is a store that is empty",
        "            if is_missing or isinstance(error, ShardStoreError):\n                raise\n",
        "            if not writing:\n                raise FileNotFoundError from None\n",
        "test_whatever_goes_wrong_while_bytes_are_fetched_is_the_stores_error",
    ),
    mutant(
        "a damaged shard stays where it is",
        "        held = {record.record_id for record in shard.records}\n        kept = set() if records",
        "        return\n        kept = set() if records",
        "test_a_damaged_shard_is_set_aside_under_a_name",
    ),
    mutant(
        "a footer of another shape is believed",
        "if not all(record.is_sound() for record in shard.records):",
        "if shard.records is None:",
        "test_a_footer_of_another_shape_is_left_out_with_a_note",
    ),
    mutant(
        "only the folder of the range itself is looked at",
        "        if not lacking:\n            return found\n",
        "        if lacking is not None:\n            return found\n",
        "test_after_ranges_were_cut_differently_nothing_is_decoded",
    ),
    mutant(
        "lost points are decoded again although their vectors are stored",
        "vectors = work.stored(work.embedding_store, pending)",
        "vectors = work.stored(work.embedding_store, {})",
        "test_lost_points_come_back_from_their_vectors_without_frames",
    ),
    mutant(
        "frames of former settings stay for ever",
        "former = [name for name in store.fingerprints() if",
        "former = [name for name in () if",
        "test_frames_of_former_settings_go_once_their_records_are_done",
    ),
    # The replace protocol
    mutant(
        "stale points are never deleted",
        "    store.delete(PointFilter(generations=generations, stale=True))\n",
        "",
        "test_the_records_in_the_batch_hold_exactly_their_new_points",
    ),
    mutant(
        "old points are deleted first",
        "    store.upsert(batch)\n    current =",
        "    store.delete(PointFilter(record_ids=tuple(expected)))\n    store.upsert(batch)\n    current =",
        "test_a_fault_at_any_call_loses_nothing",
        "test_a_searcher_during_a_replacement_never_misses",
    ),
    mutant(
        "what was written is not counted before the old is deleted",
        "    if not found.issuperset(batch.ids):",
        "    if found is None:",
        "test_nothing_is_removed_when_written_points_are_missing",
    ),
    mutant(
        "points are counted and their ids not compared",
        "if (found := store.point_ids(filters)) != set(batch.ids):",
        "if len(found := store.point_ids(filters)) != len(batch.ids):",
        "test_a_right_number_of_wrong_points_is_noticed",
    ),
    mutant(
        "surplus points of the same generation stay",
        "    if surplus:\n        store.delete(PointFilter(point_ids=surplus))\n",
        "",
        "test_fewer_frames_of_the_same_generation_leave_no_surplus",
    ),
    mutant(
        "a generation ignores the file's version",
        '"frames": frames_fingerprint, "content": content_version}',
        '"frames": frames_fingerprint, "content": ""}',
        "test_a_generation_follows_from_what_the_points_are_made_from",
    ),
    # The cursor and the planner
    mutant(
        "the watermark moves when a range is handed out",
        "            self._move(frontier_id=last)\n            self._patience",
        "            self._move(frontier_id=last, last_processed_id=last)\n            self._patience",
        "test_a_range_handed_out_moves_the_frontier_and_not_the_watermark",
        "test_no_order_of_events_loses_a_row",
    ),
    mutant(
        "rows below the watermark are never looked at",
        "swept=[] if found else [*changed, *looks.moved(), *looks.sweep()],",
        "swept=[] if found else [*changed, *looks.moved()],",
        "test_a_row_that_commits_late_is_found_below_the_watermark",
    ),
    mutant(
        "the marks of the cursor may go back",
        "if name in changes and old is not None and changes[name] <= old:",
        "if name not in changes and old is not None and changes[name] <= old:",
        "test_the_watermark_never_goes_back",
        "test_no_order_of_events_loses_a_row",
    ),
    mutant(
        "active runs are not looked at",
        "merge([*seen.active, *self._backfilled])",
        "merge([*self._backfilled])",
        "test_a_row_that_an_active_run_covers_is_not_asked_for_again",
    ),
    mutant(
        "backfills are not looked at",
        "merge([*seen.active, *self._backfilled])",
        "merge([*seen.active])",
        "test_late_rows_that_a_backfill_takes_care_of_wait",
    ),
    mutant(
        "the watermark passes an unfinished row",
        "return not self.unfinished and self.reached_id is None",
        "return True",
        "test_the_watermark_stays_below_the_frontier_while_something_there_is_unfinished",
        "test_no_order_of_events_loses_a_row",
    ),
    mutant(
        "runs in flight are not counted",
        "self.free = rules.max_in_flight - num_active",
        "self.free = rules.max_in_flight",
        "test_no_more_ranges_are_in_flight_than_allowed",
    ),
    mutant(
        "a run key is used twice",
        "self._move(seq=self.cursor.seq + 1)",
        "self._move(seq=self.cursor.seq)",
        "test_a_late_row_sends_its_range_to_a_new_run_with_a_key_of_its_own",
        "test_no_order_of_events_loses_a_row",
    ),
    # Nobody blocks others
    mutant(
        "a range that fails keeps its place whatever others do",
        "others_succeed = outcomes.succeeded_at is not None and outcomes.succeeded_at > history.ended_at",
        "others_succeed = False",
        "test_a_range_that_backs_off_keeps_its_place_until_another_one_has_succeeded",
    ),
    mutant(
        "while everything fails nothing else is tried",
        "return is_time and self.free > 0",
        "return False",
        "test_while_everything_fails_another_range_is_tried_each_time_after_twice_as_long",
    ),
    mutant(
        "while everything fails another range is tried in each tick",
        'delay = max((tried - since["kept"]).total_seconds(), self._rules.retry_delay_seconds)',
        "delay = 0.0",
        "test_while_everything_fails_another_range_is_tried_each_time_after_twice_as_long",
    ),
    mutant(
        "a backlog keeps ranges that failed from their next try",
        "elif not waits and others_succeed and min(self._failing_first, self.free - self._kept) > 0:",
        "elif not waits and others_succeed and self.free < 0:",
        "test_a_backlog_without_an_end_keeps_no_range_that_failed_from_its_next_try",
    ),
    mutant(
        "what became of a range is never read again",
        "        self._patience.failing.pop(id_range, None)  # its run may end before the next tick\n",
        "",
        "test_while_everything_fails_another_range_is_tried",
        "test_what_became_of_failing_ranges_is_read_once",
    ),
    mutant(
        "rows behind a range on which somebody works wait for it",
        "while pending and (within := within_any(self._taken, pending[0])):",
        "while pending and (within := within_any(self._backfilled, pending[0])):",
        "test_a_range_above_the_frontier_on_which_somebody_works_for_ever_stops_nothing",
    ),
    mutant(
        "the look at the window begins at the watermark each time",
        "after = max(after, memory.window_after_id)",
        "after = max(after, cursor.frontier_id)",
        "test_rows_that_wait_hide_no_due_row_above_them",
    ),
    mutant(
        "the look above the frontier begins at the frontier each time",
        "after = max(after, memory.ahead_after_id)",
        "after = max(after, found.reached_id)",
        "test_rows_that_wait_above_the_frontier_hide_no_due_row",
    ),
    mutant(
        "a whole sweep ends at the end of the table wherever it began",
        "whole.is_over = whole.is_second_half or whole.began_at is None",
        "whole.is_over = True",
        "test_a_whole_sweep_that_was_stopped_goes_on_and_comes_to_where_it_began",
    ),
    mutant(
        "a look that takes long keeps no place",
        "if time.monotonic() - self._kept_at > _KEEP_EVERY_SECONDS:",
        "if time.monotonic() < self._kept_at:",
        "test_a_command_that_was_stopped_within_its_look_at_the_whole_goes_on_there",
    ),
    mutant(
        "entries of rows that are gone end a look for good",
        "return found, found[-1] if len(found) >= most else None",
        "return found, None",
        "test_entries_of_rows_that_are_not_eligible_any_more_are_looked_at_in_parts",
    ),
    mutant(
        "a version that can't be read ends the tick",
        "with suppress(ValueError, TypeError, ArithmeticError):",
        "with suppress(KeyError):",
        "test_a_version_that_can_not_be_read_makes_its_row_alone_pending",
    ),
    mutant(
        "the floor is lost with the cursor",
        "first = requests.restore(CursorState.first(source, now=now), now=now)",
        "first = CursorState.first(source, now=now)",
        "test_the_floor_of_a_consumed_request_outlives_the_cursor",
    ),
    mutant(
        "corrected addresses that find no place are forgotten",
        "            catalog.make_pending(found)  # so that none is forgotten that finds no place in this tick\n",
        "",
        "test_corrected_addresses_that_find_no_place_are_not_forgotten",
    ),
    mutant(
        "a command asks for a range that failed once more",
        "return [*others, *self._failed]",
        "return [*others]",
        "test_a_range_that_fails_stops_no_other_and_is_what_the_command_ends_with",
    ),
    mutant(
        "a backfill that nobody works off keeps its ranges",
        "if served and _is_going_on(self._instance, backfill)]",
        "if served]",
        "test_a_backfill_that_nobody_works_off_keeps_its_ranges_for_an_hour",
    ),
    mutant(
        "one odd run ends every tick",
        "    except Exception as error:  # noqa: BLE001 - whatever Dagster and people write of runs\n",
        "    except KeyError as error:\n",
        "test_a_run_with_odd_tags_stops_no_tick",
    ),
    # Sampling and decoding
    mutant(
        "the frame after the target is taken",
        'targets + _TOLERANCE_SECONDS, side="right") - 1',
        'targets + _TOLERANCE_SECONDS, side="right")',
        "test_a_target_selects_the_frame_that_is_shown_then",
    ),
    mutant(
        "a rounding error past the target counts",
        "np.searchsorted(pts_seconds, targets + _TOLERANCE_SECONDS,",
        "np.searchsorted(pts_seconds, targets,",
        "test_a_rounding_error_past_the_target_does_not_count",
    ),
    mutant(
        "more frames than the cap are kept",
        'if "max_frames" in sampler.uses and len(selection) > sampling.max_frames:',
        'if "max_frames" not in sampler.uses and len(selection) > sampling.max_frames:',
        "test_the_cap_thins_evenly_and_keeps_the_first_frame",
    ),
    mutant(
        "a picture is turned the other way",
        "return True, c < 0, b < 0",
        "return True, b < 0, c < 0",
        "test_a_display_matrix_turns_and_mirrors",
    ),
    Mutant(
        "`is_corrupt` is ignored",
        (("if frame.is_corrupt:", "if frame is None:"), ("damaged += frame.is_corrupt", "damaged += 0")),
        ("test_a_frame_that_the_codec_calls_damaged",),
    ),
    mutant(
        "side data that PyAV can't name still hides the turning of a frame",
        '            frame = cast("VideoFrame", sink.pull())\n',
        "            return []\n",
        "test_a_turn_is_kept_where_pyav_can_not_name",
    ),
    # The network guard
    mutant(
        "a private address is let through",
        "if not is_public(address) and not any(address in network for network in networks):",
        "if address is None:",
        "test_one_private_address_among_public_ones_is_enough",
        "test_what_is_not_the_public_internet_is_refused",
    ),
    mutant(
        "a redirect may give up encryption",
        'if parts.scheme == "http" and (redirected_from and redirected_from.scheme == "https"):',
        'if parts.scheme == "" and (redirected_from and redirected_from.scheme == "https"):',
        "test_a_redirect_never_gives_up_encryption",
    ),
    mutant(
        "an IPv4 address behind a translator is not looked at",
        "    if address in _NAT64:\n        return is_public(last_four)\n",
        "    if address in _NAT64:\n        return True\n",
        "test_what_is_not_the_public_internet_is_refused",
    ),
    # Vectors
    mutant(
        "vectors are not normalised",
        "np.divide(raw, lengths[:, None],",
        "np.divide(raw, 1.0,",
        "test_vectors_are_scaled_to_length_one",
    ),
    mutant(
        "a vector that is not finite is kept",
        "good = finite & (lengths > _SHORTEST)",
        "good = ~(lengths <= _SHORTEST)",
        "test_each_bad_vector_is_named_and_the_good_ones",
    ),
    # Reconciling
    mutant(
        "lost points are not found",
        "lost = {**found.lost, **not_in_use}",
        "lost = not_in_use",
        "test_lost_points_are_found_and_their_records_alone",
    ),
    mutant(
        "points of deleted rows stay",
        "removed = delete_records(store, record_ids) if store is not None else 0",
        "removed = 0",
        "test_points_of_deleted_rows_are_removed_and_the_ledger_forgets",
    ),
    mutant(
        "a difference is believed at the first look",
        "found = found.seen_again(view.compare(store, seen))",
        "pass",
        "test_a_difference_that_is_gone_at_the_second_look",
    ),
    mutant(
        "only the second look counts",
        "found = found.seen_again(view.compare(store, seen))",
        "found = view.compare(store, seen)",
        "test_a_row_that_blinks_between_two_looks",
    ),
    # Whose points, which names
    mutant(
        "another source's collection is taken",
        "        if self._source and found.source and found.source != self._source:\n",
        "        if False:\n",
        "test_another_sources_collection_is_refused",
    ),
    mutant(
        "nobody's collection is never claimed",
        "if self._source and not spec.source and self._note_source(self._source):",
        "if False:",
        "test_a_collection_of_nobody_is_claimed",
    ),
    mutant(
        "a neighbour's collection is taken for a fingerprint",
        "for item in names if self._belongs(item, name)}",
        "for item in names}",
        "test_a_collection_whose_name_begins_alike",
        "test_a_neighbour_whose_name_begins_alike",
    ),
    mutant(
        "any text is a fingerprint",
        "return _FINGERPRINT.fullmatch(fingerprint) is not None",
        "return True",
        "test_without_metadata_only_a_whole_fingerprint",
    ),
    mutant(
        "points of an earlier release are written again",
        "made_from = entry.generation or former_generation(",
        "made_from = entry.generation or generation(source='', address='', ",
        "test_points_that_an_earlier_release_wrote",
    ),
    # The brake
    mutant(
        "what is gone does not wait",
        "removable=tuple(sorted(record_id for record_id, moment in first_seen.items() if moment <= seen_before)),",
        "removable=tuple(sorted(first_seen)),",
        "test_what_is_gone_is_removed_when_a_later",
    ),
    mutant(
        "a record that is back stays on the list",
        "            _take_off(connection, back)\n",
        "",
        "test_a_record_that_comes_back_has_to_be_gone",
    ),
    mutant(
        "an empty table empties the collection",
        "    if catalog.source.newest_id() is None:\n",
        "    if False:\n",
        "test_a_table_without_an_eligible_row",
    ),
    mutant(
        "any share is removed",
        "if number > _allowed(settings.purge_share, known) and not force:",
        "if False:",
        "test_more_than_the_share_is_held_back",
    ),
    mutant(
        "force shortens the wait",
        "wait = timedelta(seconds=settings.purge_after_seconds)",
        "wait = timedelta(seconds=0 if force else settings.purge_after_seconds)",
        "test_force_does_not_shorten_the_wait",
    ),
    mutant(
        "a row that is back is removed when its turn comes",
        "gone = [key for key in chunk if key not in back and now.get(key, 0) == claims[key]]",
        "gone = list(chunk)",
        "test_a_row_that_is_back_or_claimed",
    ),
    # Who may write points
    mutant(
        "claimed rows are written all the same",
        "others = [key for key in records if claims.get(key, 0) != self.work.plan[key].claim]",
        "others = []",
        "test_a_row_that_was_claimed_since_it_was_planned",
    ),
    mutant(
        "a loser leaves its points in place of newer ones",
        "            self.work.catalog.make_pending(overwritten)\n",
        "",
        "test_a_loser_that_may_have_written_over",
        "test_a_frozen_writer_that_returns",
    ),
    mutant(
        "a loser takes the row from whoever is at it",
        'if key in entries and entries[key].state == "done" and entries[key].generation != generations[key]',
        "if key in entries",
        "test_a_loser_whose_winner_is_not_done",
    ),
    mutant(
        "a damaged shard of vectors stays",
        '                work.embedding_store.set_aside(shard, "it is damaged")\n',
        "                pass\n",
        "test_a_damaged_shard_is_set_aside",
    ),
    # Files
    mutant(
        "a file is published without being renamed",
        "    made.replace(path)\n    sync_folder",
        "    path.write_bytes(made.read_bytes())\n    made.unlink()\n    sync_folder",
        "test_a_link_is_replaced_and_what_it_points_at_stays",
    ),
)


class Planted:
    """A copy of package and tests, in which mistakes are planted."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name in (PACKAGE, TESTS):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "dagster.yaml", "workspace.yaml"):
            shutil.copy(ROOT / name, folder)
        self._sources = {path: path.read_text() for path in sorted((folder / PACKAGE).rglob("*.py"))}
        self._tests = {path: path.read_text() for path in sorted((folder / TESTS).rglob("test_*.py"))}

    def find(self, tests: tuple[str, ...]) -> list[str]:
        """The node ids of the tests whose names begin so."""
        beginning = re.compile(rf"^def ((?:{'|'.join(tests)})\w*)\(", re.MULTILINE)
        return [f"{path}::{name}" for path, text in self._tests.items() for name in beginning.findall(text)]

    def fails(self, nodes: list[str], *, most_seconds: float = _MOST_SECONDS) -> bool:
        """Whether one of the tests fails, or none can be run."""
        options = ["-x", "-q", "-p", "no:cacheprovider", "-k", "not postgresql"]  # one database shows a mistake
        command = [sys.executable, "-m", "pytest", *options, *nodes]
        environment = {**os.environ, "PYTHONPATH": str(self._folder), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            command, cwd=self._folder, env=environment, capture_output=True, check=False, timeout=most_seconds
        )
        return done.returncode != 0

    def plant(self, mutant: Mutant) -> str:
        """Make the mistake. Returns why it can't be made, or nothing."""
        for text, replacement in mutant.edits:
            places = [path for path, source in self._sources.items() if text in source]
            if len(places) != 1:
                return f"its text stands in {len(places)} files: {text.strip().splitlines()[0]}"
            places[0].write_text(places[0].read_text().replace(text, replacement))
        return ""

    def restore(self) -> None:
        """Take the mistake back."""
        for path, source in self._sources.items():
            if path.read_text() != source:
                path.write_text(source)


def judge(planted: Planted, mutant: Mutant) -> str:
    """What became of a mutant: `caught`, or why not."""
    nodes = planted.find(mutant.tests)
    if not nodes:
        return "SURVIVES: none of its tests is there"
    try:
        if problem := planted.plant(mutant):
            return f"SURVIVES: {problem}"
        return "caught" if planted.fails(nodes) else "SURVIVES"
    finally:
        planted.restore()


def main() -> None:
    """Plant what was asked for; print a line for each, and how many were caught."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*", help="only mutants whose name has all of these")
    words = parser.parse_args().words
    chosen = [mutant for mutant in MUTANTS if all(word in mutant.name for word in words)]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        planted = Planted(Path(folder))
        nodes = sorted({node for mutant in chosen for node in planted.find(mutant.tests)})
        if nodes and planted.fails(nodes, most_seconds=_MOST_SECONDS_OF_ALL):
            sys.exit("The tests fail without any mistake.")
        verdicts = {}
        for mutant in chosen:
            verdicts[mutant.name] = judge(planted, mutant)
            print(f"{verdicts[mutant.name]:8} {mutant.name}", flush=True)
    caught = sum(verdict == "caught" for verdict in verdicts.values())
    print(f"{caught} of {len(chosen)} caught in {time.monotonic() - began:.0f} s")
    sys.exit(caught != len(chosen))


if __name__ == "__main__":
    main()
