"""A service's producer takes rows from many threads, answers each, and says clearly when it cannot."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

import ernie_accel
from ernie_accel import CheckFinite
from ernie_accel.batch import (
    BatchInputError,
    BatchOutputError,
    Producer,
    Progress,
    QueueFullError,
    WaitedTooLongError,
    aproduce,
    produce,
)
from ernie_accel.batch.engines import EngineLostError, LocalEngine
from ernie_accel.core.errors import ErnieAccelError
from tests.full_disk import disk_full_when
from tests.own_newbie import tiny_own_newbie
from tests.pipelines import tiny_ernie
from tests.stub_engine import StubEngine, make_rows, picture_of
from tests.stub_pipes import StepPipe


def test_rows_from_many_threads_are_batched_and_each_is_answered(tmp_path):
    engine = StubEngine(seconds=0.01, max_batch=8)
    with Producer(engine, tmp_path, batch_size=8) as producer, ThreadPoolExecutor(8) as threads:
        results = [future.result(30) for future in threads.map(producer.submit, make_rows(60))]
    assert [result.row.index for result in results] == list(range(60))
    assert all(result.path.is_file() for result in results)
    assert len(engine.batches) < 60
    assert producer.snapshot().done == 60
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{i:03d}.png" for i in range(60)]


def test_a_picture_is_answered_while_the_next_batch_is_rendered(tmp_path):
    begun, hold = threading.Event(), threading.Event()

    def before(requests, call):
        if call == 2:
            begun.set()
            assert hold.wait(30)

    with Producer(StubEngine(before), tmp_path, batch_size=1) as producer:
        first, second = (producer.submit(row) for row in make_rows(2))
        try:
            assert begun.wait(30)
            assert first.result(10).path.is_file()
            assert not second.done()
        finally:
            hold.set()
        assert second.result(30).path.is_file()


def test_everything_an_engine_does_is_done_in_one_thread(tmp_path):
    threads = set()

    class Engine(StubEngine):
        def prepare(self, requests, timeout_s=None):
            threads.add(threading.get_ident())

    with Producer(Engine(lambda *_: threads.add(threading.get_ident())), tmp_path) as producer:
        futures = [producer.submit(row) for row in make_rows(9)]
        assert all(future.result(30).error is None for future in futures)
    assert len(threads) == 1


def test_a_failure_answers_its_own_row_only(tmp_path):
    def before(requests, call):
        if any(request.seed == 1 for request in requests):
            raise ValueError("bad prompt")

    with Producer(StubEngine(before), tmp_path) as producer:
        futures = [producer.submit(row) for row in make_rows(3)]
    assert [future.result().error for future in futures] == [None, "ValueError: bad prompt", None]


def test_what_cannot_be_made_is_refused_at_once(tmp_path):
    with Producer(LocalEngine(StepPipe()), tmp_path) as producer:
        (row,) = make_rows(1)
        with pytest.raises(BatchInputError, match="which StepPipe does not take"):
            producer.submit(replace(row, negative_prompt="blurry"))
        producer.submit(row).result(30)
        with pytest.raises(BatchOutputError, match="exists; allow overwriting or choose another name"):
            producer.submit(row)
    with pytest.raises(ErnieAccelError, match="the producer is closed"):
        producer.submit(make_rows(2)[1])


@pytest.mark.parametrize(("first", "second"), [("A.png", "a.png"), ("\u00e9.png", "e\u0301.png"), ("a.png", "a.PNG")])
def test_two_names_that_some_file_system_holds_for_one_are_not_made_together(tmp_path, first, second):
    hold = threading.Event()
    with Producer(StubEngine(lambda requests, call: hold.wait(30)), tmp_path) as producer:
        one, two = (replace(row, file_name=name) for row, name in zip(make_rows(2), (first, second), strict=True))
        future = producer.submit(one)
        with pytest.raises(BatchOutputError, match="is being made; choose another name"):
            producer.submit(two)
        hold.set()
        assert future.result(30).path == tmp_path / first


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_name_given_again_is_refused_or_replaces_the_picture_as_asked(tmp_path, overwrite):
    (row,) = make_rows(1)
    with Producer(StubEngine(), tmp_path, overwrite=overwrite) as producer:
        first = producer.submit(row).result(30)
        before = first.path.read_bytes()
        again = replace(row, prompt="another", seed=77)
        if overwrite:
            second = producer.submit(again).result(30)
            assert (second.path, second.seed, second.error) == (first.path, 77, None)
        else:
            with pytest.raises(BatchOutputError, match="exists; allow overwriting or choose another name"):
                producer.submit(again)
    assert (first.path.read_bytes() == before) is not overwrite


def test_a_name_whose_picture_failed_can_be_given_again(tmp_path):
    failing = [True]

    def before(requests, call):
        if failing:
            raise ValueError("bad prompt")

    (row,) = make_rows(1)
    with Producer(StubEngine(before), tmp_path) as producer:
        assert producer.submit(row).result(30).error == "ValueError: bad prompt"
        failing.clear()
        assert producer.submit(row).result(30).path == tmp_path / row.path


def test_a_producer_remembers_no_name_longer_than_its_picture_takes(tmp_path):
    with Producer(StubEngine(), tmp_path) as producer:
        for row in make_rows(5):
            producer.submit(row).result(30)
        assert len(producer._orders) == 0


def test_a_picture_that_cannot_be_written_answers_its_row_while_the_producer_is_open(tmp_path):
    producer = Producer(StubEngine(), tmp_path, writers=1)
    with disk_full_when(lambda file: file == 2):
        first, second = (producer.submit(row) for row in make_rows(2))
        assert first.result(30).error is None
        with pytest.raises(BatchOutputError, match="No space left on device"):
            second.result(30)
    producer.close()


def test_a_lost_engine_answers_everybody_and_closes(tmp_path):
    submitted = threading.Event()

    def before(requests, call):
        submitted.wait(30)  # a producer that is closed already takes no more
        raise EngineLostError("the pipe hangs")

    producer = Producer(StubEngine(before), tmp_path, batch_size=1)
    futures = [producer.submit(row) for row in make_rows(3)]
    submitted.set()
    outcomes = [future.exception(30) or future.result().error for future in futures]
    assert "the pipe hangs" in {str(outcome) for outcome in outcomes}
    producer.close()


class LostEngine(StubEngine):
    """Begins a batch once it may go on, whose pictures are at work until it is lost with the second batch."""

    def __init__(self, error):
        super().__init__()
        self.error, self.begun, self.go_on, self.lost = error, *(threading.Event() for _ in range(3))

    def begin(self, requests, timeout_s=None):
        if self.begun.is_set():
            self.lost.set()
            raise self.error
        self.begun.set()
        assert self.go_on.wait(30)
        return [functools.partial(self._finish, request) for request in requests]

    def _finish(self, request):
        assert self.lost.wait(30)
        return picture_of(request)


@pytest.mark.parametrize("error", [EngineLostError("the pipe hangs"), SystemExit("the service ends")])
def test_rows_are_answered_with_what_ended_the_producer_and_what_was_at_work_is_finished(tmp_path, error):
    engine, rows = LostEngine(error), make_rows(6)
    producer = Producer(engine, tmp_path, batch_size=2)
    made = producer.submit(rows[0])
    assert engine.begun.wait(30)
    dropped, *lost = [producer.submit(row) for row in rows[1:4]]
    producer._arrivals.put(None)  # as if closed meanwhile
    dropped_too, late = [producer.submit(row) for row in rows[4:]]
    assert dropped.cancel()
    assert dropped_too.cancel()
    engine.go_on.set()
    assert late.exception(30) is error
    with pytest.raises(ErnieAccelError, match="the producer is closed"):
        producer.submit(rows[0])
    producer.close()
    assert made.result(30).error is None
    assert [future.exception(30) for future in (*lost, late)] == [error] * 3
    assert concurrent.futures.wait([dropped, dropped_too], 30).not_done == set()


def test_aproduce_returns_all_results_and_passes_each_on(tmp_path):
    passed_on = []

    async def main():
        return await aproduce(StubEngine(), make_rows(5), tmp_path, on_result=passed_on.append, progress=False)

    results = asyncio.run(main())
    assert sorted(result.row.index for result in results) == list(range(5))
    assert passed_on == results


@pytest.mark.parametrize("count", [1, 200])
def test_what_on_result_raises_stops_the_job_and_is_passed_on(tmp_path, count):
    engine = StubEngine(seconds=0.01)

    async def refuse(result):
        raise LookupError("no room for it")

    async def job():
        options = {"on_result": refuse, "batch_size": 1, "progress": False}
        await asyncio.wait_for(aproduce(engine, make_rows(count), tmp_path, **options), 60)

    with pytest.raises(LookupError, match="no room for it"):
        asyncio.run(job())
    assert 1 <= len(engine.batches) < 100
    assert len(list(tmp_path.glob("*.png"))) == len(engine.batches)


def test_cancelling_aproduce_finishes_the_batch_and_stops(tmp_path):
    engine = StubEngine(seconds=0.02)

    async def main():
        work = asyncio.create_task(aproduce(engine, make_rows(200), tmp_path, batch_size=1, progress=False))
        while not engine.batches:
            await asyncio.sleep(0.01)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(main())
    made = len(list(tmp_path.glob("*.png")))
    assert 0 < made == len(engine.batches) < 200


@pytest.fixture
def closed(monkeypatch):
    """Return the list of engines that are closed."""
    found = []
    for cls in (LocalEngine, StubEngine):
        close = cls.close
        monkeypatch.setattr(cls, "close", lambda self, close=close: (found.append(self), close(self))[1])
    return found


def test_an_engine_is_closed_by_whoever_made_it(tmp_path, closed):
    engine, (row,) = StubEngine(), make_rows(1)
    with Producer(engine, tmp_path / "given") as producer:
        producer.submit(row)
    assert len(list(produce(engine, [row], tmp_path / "given too", progress=False))) == 1
    assert closed == []
    with Producer(StepPipe(), tmp_path / "own") as producer:
        producer.submit(row)
    assert [type(each) for each in closed] == [LocalEngine]
    assert len(list(produce(StepPipe(), [row], tmp_path / "own too", progress=False))) == 1
    assert [type(each) for each in closed] == [LocalEngine] * 2


def test_a_row_that_is_cancelled_before_its_turn_is_not_made_and_its_name_is_free(tmp_path):
    hold, begun = threading.Event(), threading.Event()
    engine = StubEngine(lambda requests, call: (begun.set(), hold.wait(30)))
    with Producer(engine, tmp_path, batch_size=1) as producer:
        first, second = make_rows(2)
        made = producer.submit(first)
        assert begun.wait(30)
        dropped = producer.submit(second)
        assert dropped.cancel()
        hold.set()
        assert made.result(30).error is None
        while producer._orders:
            time.sleep(0.001)
        assert producer.submit(second).result(30).error is None
    assert dropped.cancelled()
    assert producer.snapshot().total == len(engine.batches) == 2


def test_rows_that_give_no_seed_get_those_of_the_producer(tmp_path):
    engine = StubEngine()
    with Producer(engine, tmp_path, seed=100) as producer:
        for row in make_rows(3):
            producer.submit(row)
    assert sorted(request.seed for batch in engine.batches for request in batch) == [100, 101, 102]


def test_what_a_closed_producer_still_holds_is_answered(tmp_path):
    """A picture is rendered while `close` waits; what came before it is made, and nothing is left open."""
    engine = StubEngine(seconds=0.01)
    producer = Producer(engine, tmp_path)
    futures = [producer.submit(row) for row in make_rows(12)]
    producer.close()
    producer.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(producer._folder._descriptor)
    assert [future.done() and future.result().error for future in futures] == [None] * 12


def test_a_metrics_server_shows_a_producer(tmp_path):
    shown = []
    with Producer(StubEngine(), tmp_path, metrics=SimpleNamespace(show=shown.append)) as producer:
        producer.submit(make_rows(1)[0]).result(30)
    (snapshot,) = shown
    assert snapshot().done == 1


def test_pictures_of_a_producer_say_which_engine_made_them(tmp_path):
    with Producer(StubEngine(), tmp_path, facts={"preset": "turbo-fp8", "pipeline": "of a caller"}) as producer:
        path = producer.submit(make_rows(1)[0]).result(30).path
    with Image.open(path) as picture:
        settings = " ".join(map(str, picture.info.values()))
    assert "turbo-fp8" in settings
    assert "StubEngine" in settings
    assert "of a caller" not in settings


class Held:
    """An engine that stands still in its first batch until `release` is set."""

    def __init__(self, **options):
        self.begun, self.release = threading.Event(), threading.Event()
        self.engine = StubEngine(lambda requests, call: (self.begun.set(), self.release.wait(30)), **options)

    def seeds(self):
        return [[request.seed for request in batch] for batch in self.engine.batches]


def test_rows_are_made_in_the_order_of_the_oldest_and_those_alike_come_along(tmp_path):
    held = Held(max_batch=2)
    large = {"width": 64, "height": 64}
    with Producer(held.engine, tmp_path, batch_size=2) as producer:
        first, *rows = make_rows(7)
        producer.submit(first)
        assert held.begun.wait(30)
        for number, row in enumerate(rows, 1):
            producer.submit(replace(row, **(large if number in (2, 6) else {})))
        held.release.set()
    assert held.seeds() == [[0], [1, 3], [2, 6], [4, 5]]


def test_a_row_can_be_cancelled_until_its_batch_begins_also_after_it_was_looked_at(tmp_path):
    prepared = []
    hold = {1: threading.Event(), 2: threading.Event()}
    begun = {1: threading.Event(), 2: threading.Event()}
    engine = StubEngine(lambda requests, call: call in hold and (begun[call].set(), hold[call].wait(30)))
    engine.prepare = lambda requests, timeout_s: prepared.extend(request.seed for request in requests)
    with Producer(engine, tmp_path, batch_size=1) as producer:
        first, second, third, fourth = make_rows(4)
        made = [producer.submit(first)]
        assert begun[1].wait(30)
        made.append(producer.submit(second))
        late, early = producer.submit(third), producer.submit(fourth)
        assert early.cancel()  # before it was looked at
        hold[1].set()
        assert begun[2].wait(30)
        assert not made[1].cancel()
        assert late.cancel()  # its prompt is encoded by now
        hold[2].set()
    assert [future.result().error for future in made] == [None, None]
    assert prepared == [0, 1, 2]
    assert [[request.seed for request in batch] for batch in engine.batches] == [[0], [1]]
    assert (producer.snapshot().total, producer.snapshot().done) == (2, 2)
    assert len(producer._orders) == 0


def test_no_more_than_max_queue_rows_wait_and_a_cancelled_one_makes_room_at_once(tmp_path):
    held = Held()
    with Producer(held.engine, tmp_path, batch_size=1, max_queue=2) as producer:
        rows = make_rows(6)
        producer.submit(rows[0])
        assert held.begun.wait(30)
        waiting = [producer.submit(row) for row in rows[1:3]]
        with pytest.raises(QueueFullError, match="2 rows wait, and max_queue is 2; submit it again later") as caught:
            producer.submit(rows[3])
        assert (caught.value.waiting, caught.value.max_queue, producer.waiting) == (2, 2, 2)
        assert waiting[0].cancel()
        assert producer.waiting == 1
        again = producer.submit(rows[3])
        held.release.set()
        assert again.result(30).error is None
        assert producer.submit(rows[1]).result(30).error is None
    assert held.seeds() == [[0], [2], [3], [1]]


@pytest.mark.parametrize(("option", "value"), [("max_queue", 0), ("max_queue", True), ("max_queue", "9")])
def test_a_queue_of_another_size_is_refused(tmp_path, option, value):
    with pytest.raises(ErnieAccelError, match=f"{option} is {value!r}; expected 1 or more"):
        Producer(StubEngine(), tmp_path, **{option: value})


def test_a_row_that_has_waited_too_long_is_not_made(tmp_path):
    held = Held()
    with Producer(held.engine, tmp_path, batch_size=1) as producer:
        first, second, third = make_rows(3)
        made = producer.submit(first, wait_s=0.2)  # begun at once: what comes after takes as long as it takes
        assert held.begun.wait(30)
        late, patient = producer.submit(second, wait_s=0.01), producer.submit(third, wait_s=30)
        time.sleep(0.25)
        held.release.set()
        with pytest.raises(WaitedTooLongError, match=r"not begun within 0.01 s \(wait_s\)"):
            late.result(30)
        assert (made.result(30).error, patient.result(30).error) == (None, None)
        assert producer.submit(second).result(30).error is None  # its name is free
        with pytest.raises(ErnieAccelError, match="wait_s is -1; expected seconds, 0 or more"):
            producer.submit(first, wait_s=-1)
    assert held.seeds() == [[0], [2], [1]]


@pytest.mark.parametrize("timeout_s", [None, 30.0])
def test_whoever_waits_can_see_the_steps(tmp_path, timeout_s):
    seen = []
    with Producer(LocalEngine(StepPipe()), tmp_path, timeout_s=timeout_s) as producer:
        first, second = make_rows(2)
        producer.submit(first, on_progress=seen.append).result(30)
        producer.submit(second).result(30)
    assert seen == [Progress(step, None, 1) for step in (0, 1, 2)]


def test_the_steps_of_a_pipeline_are_known_and_the_picture_is_the_same(tmp_path):
    seen = []
    rows = make_rows(2, width=64, height=64, steps=3, seed=5)
    with Producer(tiny_ernie(), tmp_path) as producer:
        watched = producer.submit(rows[0], on_progress=seen.append).result(60)
        plain = producer.submit(replace(rows[1], prompt=rows[0].prompt)).result(60)
    assert seen == [Progress(0, None, 1), *(Progress(step, 3, 1) for step in (1, 2, 3))]
    with Image.open(watched.path) as one, Image.open(plain.path) as other:
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("transforms", [(), (CheckFinite(),)], ids=["stock", "checked"])
def test_the_steps_of_a_pipeline_without_a_callback_are_seen_at_its_scheduler(tmp_path, transforms):
    seen, pipe = [], tiny_own_newbie()
    (row,) = make_rows(1, width=64, height=64, steps=3, seed=5)
    if transforms:
        ernie_accel.optimize(pipe, *transforms)
    with Producer(pipe, tmp_path) as producer:
        assert producer.submit(row, on_progress=seen.append).result(60).error is None
    assert seen == [Progress(0, None, 1), *(Progress(step, 3, 1) for step in (1, 2, 3))]
    assert "step" not in vars(pipe.scheduler)


def test_what_a_watcher_raises_fails_its_own_row(tmp_path):
    held = Held()

    def refuse(progress):
        raise LookupError("nobody there")

    with Producer(held.engine, tmp_path, batch_size=2) as producer:
        rows = make_rows(3)
        producer.submit(rows[0])
        assert held.begun.wait(30)
        futures = [producer.submit(rows[1], on_progress=refuse), producer.submit(rows[2])]
        held.release.set()
        assert [future.result(30).error for future in futures] == ["LookupError: nobody there", None]
