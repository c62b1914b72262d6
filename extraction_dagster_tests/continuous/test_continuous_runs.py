"""Rows stream in, whatever can be killed is killed, and no row is lost.

Eight writers commit out of order, roll back and hold transactions open, while run workers and the daemon get SIGKILL.
Afterwards the database's own log says when each row was marked, the writers say when each row was committed, and a
sampler says what the watermark was at each moment; the three must fit.
"""

import bisect
import collections
import contextlib
import itertools
import random
import threading
import time
from dataclasses import dataclass

import psutil
import pytest

from extraction_dagster.settings import load_settings
from extraction_dagster.stages.catalog.database import make_engine

NUM_WRITERS = 8
_LONGEST_JOIN_SECONDS = 300
_LONGEST_STANDSTILL_SECONDS = 300
_FEWEST_MOVES = 3  # of the watermark; fewer show nothing


@dataclass(frozen=True)
class Scale:
    """How many rows are written in how many seconds, and what is killed meanwhile.

    Attributes:
        rows: As many are written, and a few more.
        most_rows: Of one transaction.
        seconds: In which they are written.
        poisoned: Records that always fail; after some ranges without, so that the watermark moves under fire.
        kills: The fewest.
        weights: How often which kind is killed; each at least once, a worker first.
        trickle_seconds: Between two rows of a writer, once all are written and the watermark has not moved enough.
    """

    rows: int
    most_rows: int
    seconds: float
    poisoned: tuple[int, ...]
    kills: int
    weights: dict[str, int]
    trickle_seconds: float


SMALL = Scale(400, 20, seconds=3, poisoned=(301,), kills=2, weights={"worker": 1, "everything": 0}, trickle_seconds=15)
LARGE = Scale(
    20_000,
    120,
    seconds=45,
    poisoned=(1_201, 1_701),
    kills=10,
    weights={"worker": 7, "daemon": 2, "everything": 1},
    trickle_seconds=3,
)


class Writers:
    """Eight threads that insert rows with ids taken beforehand, so that ids commit out of order on every database.

    They end when the scale's rows are written and the sampler is done; rows trickle in until it is.
    """

    def __init__(self, site, seed, scale, sampler):
        self._site, self._seed, self._scale, self._sampler = site, seed, scale, sampler
        self._ids, self._lock = itertools.count(1), threading.Lock()
        self.committed_at, self.rolled_back, self.num_late, self.errors = {}, set(), 0, []
        self._greatest = 0
        self._started = time.monotonic()
        self._threads = [
            threading.Thread(target=self._write, args=(number,), daemon=True) for number in range(NUM_WRITERS)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def are_writing(self):
        return any(thread.is_alive() for thread in self._threads)

    @property
    def have_written(self):
        return len(self.committed_at) >= self._scale.rows

    def join(self):
        end = time.monotonic() + _LONGEST_JOIN_SECONDS
        for thread in self._threads:
            thread.join(max(end - time.monotonic(), 0))
        assert not self.errors, self.errors
        assert not self.are_writing, f"{len(self.committed_at)} rows are written, and a writer hangs"

    def _write(self, number):
        chance = random.Random(f"{self._seed}-{number}")
        engine = make_engine(load_settings().resolved_source_url, setting="EXTRACTION_SOURCE_URL")
        try:
            while ids := self._take(chance.randint(5, self._scale.most_rows)):
                self._transaction(engine, ids, chance)
                ahead = len(self.committed_at) / self._scale.rows * self._scale.seconds - (
                    time.monotonic() - self._started
                )
                if self.have_written:
                    self._wait(self._scale.trickle_seconds * chance.uniform(0.7, 1.3))
                else:
                    time.sleep(max(ahead, 0))
        except Exception as error:
            self.errors.append(error)
            raise
        finally:
            engine.dispose()

    def _wait(self, seconds):
        """Until the next rows trickle in, or until none need to."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not self._sampler.is_done:
            time.sleep(0.5)

    def _take(self, number):
        with self._lock:
            if self.have_written:
                number = 0 if self._sampler.is_done else 2
            return [next(self._ids) for _ in range(number)]

    def _transaction(self, engine, ids, chance):
        """One in eight is long, one in twelve rolls back."""
        pause = chance.uniform(1, 5) if chance.random() < 1 / 8 else 0
        rolls_back = chance.random() < 1 / 12 and not set(ids) & set(self._scale.poisoned)
        if not self._site.is_postgresql:
            time.sleep(pause)  # one writer at a time: a pause inside would only make everybody wait
            pause = pause and 0.1
        with engine.connect().execution_options(writes=True) as connection, connection.begin() as transaction:
            self._site.insert(connection, ids)
            time.sleep(pause)
            if rolls_back:
                transaction.rollback()
        now = time.time()
        with self._lock:
            if rolls_back:
                self.rolled_back.update(ids)
                return
            self.num_late += min(ids) < self._greatest
            self._greatest = max(self._greatest, *ids)
            self.committed_at.update(dict.fromkeys(ids, now))


class Sampler:
    """Reads the cursor over and over: (moment after the read, epoch, watermark, when it was moved there)."""

    def __init__(self, site):
        self._site, self.samples, self._stop, self.errors = site, [], threading.Event(), []
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self):
        try:
            with self._site.cursors() as read:
                while not self._stop.wait(0.2):
                    if cursor := read():
                        self.samples.append((time.time(), cursor))
        except Exception as error:
            self.errors.append(error)
            raise

    @property
    def num_moves(self):
        watermarks = {cursor.last_processed_id for _, cursor in self.samples.copy()}
        return len(watermarks - {None})

    @property
    def is_done(self):
        """Whether it saw moves enough, or is over."""
        return self.num_moves >= _FEWEST_MOVES or not self._thread.is_alive()

    def end(self):
        self._stop.set()
        self._thread.join(_LONGEST_JOIN_SECONDS)
        assert not self.errors, self.errors
        assert not self._thread.is_alive(), "the sampler hangs"


class Killer:
    """SIGKILLs run workers, the daemon, or all at once; starts the daemon again each time."""

    def __init__(self, site, seed, scale):
        self._site, self._chance, self._scale = site, random.Random(seed), scale
        self.killed = collections.Counter()
        self._daemon = site.start_daemon()

    @property
    def is_done(self):
        return self.killed.total() >= self._scale.kills and self.killed.keys() == self._scale.weights.keys()

    def strike(self):
        weights = self._scale.weights
        kind = self._chance.choices(list(weights), list(weights.values()))[0]
        if self.killed["worker"] >= 0.4 * self._scale.kills:  # what has not been killed yet comes first
            kind = next((name for name in weights if name not in self.killed), kind)
        if kind == "worker":
            workers = self._wait_for_workers()
            if not workers:
                return
            with contextlib.suppress(psutil.NoSuchProcess):
                self._chance.choice(workers).kill()
        else:
            if kind == "daemon":
                self._site.kill_daemon(self._daemon)
            else:
                self._site.kill_everything()
            self._daemon = self._site.start_daemon()
        self.killed[kind] += 1

    def _wait_for_workers(self):
        """The run workers; a daemon that was just started has none for a while."""
        end = time.monotonic() + 60
        while not (workers := self._site.run_workers()) and time.monotonic() < end:
            time.sleep(0.2)
        if workers:
            time.sleep(self._chance.uniform(0, 8))  # they are killed at any point of their work
        return self._site.run_workers()


@pytest.mark.soak
def test_no_row_is_lost_or_marked_twice_while_workers_and_daemons_are_killed(site, capsys):
    _run_under_fire(site, LARGE, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("site", ["sqlite"], indirect=True)
def test_no_row_of_a_small_table_is_lost_while_workers_and_daemons_are_killed(site, capsys, monkeypatch):
    monkeypatch.setenv("EXTRACTION_BATCH_SIZE", "200")
    _run_under_fire(site, SMALL, capsys)


def _run_under_fire(site, scale, capsys):
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    site.poison(*scale.poisoned)
    sampler, killer = Sampler(site), Killer(site, seed, scale)
    writers = Writers(site, seed, scale, sampler)
    end = time.monotonic() + scale.seconds + 100 * scale.kills + 150  # a busy machine is no failure
    try:
        while writers.are_writing or not killer.is_done:
            assert time.monotonic() < end, f"too slow: killed {killer.killed}, {sampler.num_moves} moves were seen"
            time.sleep(chance.uniform(2, 6))
            if not (writers.have_written and killer.is_done):
                killer.strike()
            if _num_finished(site) == len(writers.committed_at) and not writers.are_writing:
                break
        writers.join()
        site.wait(
            lambda: _num_finished(site) == len(writers.committed_at),
            seconds=_LONGEST_STANDSTILL_SECONDS,
            what="every row is done or parked",
            progress=lambda: _num_finished(site),
        )
        site.wait(
            lambda: site.cursor().last_processed_id == max(writers.committed_at),
            seconds=60,
            what="the watermark is at the last row",
        )
    finally:
        sampler.end()
        site.stop()
        writers.join()

    marks = site.rows("SELECT record_id, what, at FROM marks")
    figures = {
        "seed": seed,
        "committed": len(writers.committed_at),
        "rolled back": len(writers.rolled_back),
        "transactions that committed late": writers.num_late,
        "killed": dict(killer.killed),
        "ranges": len(site.partitions()),
        "runs": site.num_runs(),
        "watermark samples": len(sampler.samples),
        "watermark moves": sampler.num_moves,
        "lost": len(writers.committed_at.keys() - {record_id for record_id, what, _ in marks if what != "embedded"}),
        "marked twice": sum(number > 1 for number in _per_record(marks, "embedded").values()),
        "finished twice": sum(number > 1 for number in _per_record(marks, "done", "parked").values()),
        **site.states(),
    }
    with capsys.disabled():
        counts = ", ".join(f"{name} {value}" for name, value in figures.items())
        print(f"\n{site.engine.dialect.name}: {counts}")
    assert killer.killed["worker"] >= 0.3 * scale.kills, "too few kills: the killer did not find the workers"
    assert writers.num_late > scale.rows / 2000, "too few late commits to show anything"
    _check_rows(site, writers, marks, scale.poisoned)
    _check_watermark(sampler.samples, writers.committed_at, marks)


def _num_finished(site):
    return sum(number for state, number in site.states().items() if state in {"done", "parked"})


def _per_record(marks, *wanted):
    return collections.Counter(record_id for record_id, what, _ in marks if what in wanted)


def _check_rows(site, writers, marks, poisoned):
    """Every committed row, and no other, is done or parked once; the store holds one point for each that is done."""
    committed = writers.committed_at.keys()
    good = committed - set(poisoned)
    assert {record_id for (record_id,) in site.rows("SELECT id FROM insta_content")} == committed
    assert _per_record(marks, "done") == dict.fromkeys(good, 1)
    assert _per_record(marks, "embedded") == dict.fromkeys(good, 1)
    assert _per_record(marks, "parked") == dict.fromkeys(poisoned, 1)
    assert site.rows("SELECT record_id, state, attempts FROM extraction_ledger WHERE state <> 'done' ORDER BY 1") == [
        (record_id, "parked", 3) for record_id in poisoned
    ]
    assert site.points_by_record() == dict.fromkeys(good, 1)


def _check_watermark(samples, committed_at, marks):
    """Within an epoch it never goes back, and it never passes a row that its tick could see unfinished.

    A row that was committed before the tick began was there for the tick to see; if it was marked only after the
    moved watermark had been read back, it was unfinished when the tick looked.
    """
    finished_at = {record_id: at for record_id, what, at in marks if what != "embedded"}
    ids = sorted(committed_at)
    assert len({cursor.reset_epoch for _, cursor in samples}) == 1
    watermark, checked = None, 0
    for read_at, cursor in samples:
        reached = cursor.last_processed_id
        if reached == watermark or reached is None:
            assert reached is not None or watermark is None, "the watermark went back to nothing"
            continue
        assert watermark is None or reached > watermark, f"the watermark went back from {watermark} to {reached}"
        began_at = cursor.updated_at.timestamp()  # in whole seconds, rounded down
        passed = [
            record_id
            for record_id in ids[: bisect.bisect_right(ids, reached)]
            if committed_at[record_id] < began_at and finished_at[record_id] > read_at
        ]
        assert not passed, f"the watermark {reached} passed {passed[:10]}"
        watermark, checked = reached, checked + 1
    assert checked >= _FEWEST_MOVES, "too few moves of the watermark were seen to show anything"
