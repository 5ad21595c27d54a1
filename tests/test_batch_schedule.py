"""The batch size of a bucket: doubled while that pays, halved when memory runs out, tried again later."""

from __future__ import annotations

import pytest

from ernie_accel.batch.engines import Request
from ernie_accel.batch.input.task import Task
from ernie_accel.batch.line.schedule import BatchSizer, Schedule
from tests.stub_engine import make_rows


def measured(sizer, *each_s):
    """Let two batches of the current size take `each_s` a picture: the first one does not count."""
    for seconds in each_s:
        for _ in range(2):
            sizer.succeeded(sizer.size, seconds * sizer.size)
    return sizer.size


def test_nothing_is_known_at_first():
    sizer = BatchSizer(limit=4)
    assert (sizer.size, sizer.fresh, sizer.settled) == (1, True, False)


def test_a_size_is_doubled_while_that_pays():
    sizer = BatchSizer(limit=8)
    assert measured(sizer, 1.0) == 2
    assert measured(sizer, 0.6) == 4
    assert measured(sizer, 0.4) == 8
    assert not sizer.settled
    assert measured(sizer, 0.3) == 8
    assert sizer.settled


@pytest.mark.parametrize(("seconds", "size"), [(0.96, 4), (0.98, 1), (1.0, 1), (2.0, 1)])
def test_a_doubled_batch_must_save_three_percent(seconds, size):
    sizer = BatchSizer(limit=8)
    measured(sizer, 1.0)
    assert measured(sizer, seconds) == size
    assert sizer.settled == (size == 1)


def test_the_best_of_several_times_is_compared():
    sizer = BatchSizer(limit=4)
    sizer.succeeded(1, 1.0)
    sizer.succeeded(1, 5.0)  # a busy moment
    sizer.succeeded(2, 2.4)
    sizer.succeeded(2, 2.4)
    assert sizer.size == 1, "1.2 s a picture is worse than the best of the smaller size, 1.0"


def test_the_first_batch_of_a_size_may_compile_and_decides_nothing():
    sizer = BatchSizer(limit=4)
    sizer.succeeded(1, 100.0)
    assert sizer.size == 1
    sizer.succeeded(1, 1.0)
    assert sizer.size == 2
    sizer.succeeded(2, 200.0)
    assert (sizer.size, sizer.settled) == (2, False)


def test_a_batch_that_nobody_waited_for_is_not_measured():
    sizer = BatchSizer(limit=4)
    for _ in range(5):
        sizer.succeeded(1, None)
    assert (sizer.size, sizer.fresh) == (1, False)


def test_the_rest_of_a_bucket_says_nothing_about_the_size():
    sizer = BatchSizer(limit=4, size=4)
    for count in (1, 1, 1, 3, 3):
        sizer.succeeded(count, 0.001)
    assert (sizer.size, sizer.fresh, sizer.settled) == (4, True, True)
    sizer.out_of_memory(4)
    for _ in range(20):
        sizer.succeeded(1, 0.001)  # smaller than the size: it proves nothing about the memory of larger ones
    assert sizer.size == 2


def test_a_limit_of_one_needs_no_measuring():
    sizer = BatchSizer(limit=1)
    assert sizer.settled
    assert measured(sizer, 1.0, 1.0) == 1


@pytest.mark.parametrize(("size", "count", "left"), [(8, 8, 4), (8, 3, 1), (2, 8, 2), (1, 1, 1)])
def test_a_batch_that_did_not_fit_is_halved(size, count, left):
    sizer = BatchSizer(limit=8, size=size)
    sizer.out_of_memory(count)
    assert (sizer.size, sizer.fresh, sizer.settled) == (left, False, True)


def test_a_size_that_did_not_fit_is_tried_again_after_8_batches_then_after_16():
    sizer = BatchSizer(limit=4, size=4)
    for patience in (8, 16, 32):
        sizer.out_of_memory(4)
        for _ in range(patience - 1):
            sizer.succeeded(2, 1.0)
        assert (sizer.size, sizer.settled) == (2, True)
        sizer.succeeded(2, 1.0)
        assert (sizer.size, sizer.settled) == (4, False)


def test_trouble_starts_the_count_again():
    sizer = BatchSizer(limit=8, size=8)
    sizer.out_of_memory(8)
    for _ in range(7):
        sizer.succeeded(4, 1.0)
    sizer.out_of_memory(4)
    for _ in range(7):
        sizer.succeeded(2, 1.0)
    assert sizer.size == 2
    sizer.succeeded(2, 1.0)
    assert sizer.size == 4


def test_growing_again_stays_within_the_limit():
    sizer = BatchSizer(limit=3, size=2)
    sizer.out_of_memory(3)
    for _ in range(8):
        sizer.succeeded(sizer.size, 1.0)
    assert sizer.size == 2
    sizer = BatchSizer(limit=3, size=3)
    sizer.out_of_memory(4)
    for _ in range(8):
        sizer.succeeded(2, 1.0)
    assert sizer.size == 3


# ---- the schedule ---------------------------------------------------------------------------------------------------


def tasks(count, steps=8, start=0, alone=False):
    rows = make_rows(start + count)[start:]
    return [Task(row, Request(prompt="x", seed=row.index, steps=steps), alone=alone) for row in rows]


def numbers(batch):
    return [task.row.index for task in batch]


def schedule(**options):
    return Schedule(lambda task: task.request.steps, **({"limit": 4, "start": 2, "probe": False} | options))


def test_one_bucket_is_emptied_before_the_next():
    waiting = schedule()
    mixed = [task for pair in zip(tasks(3, 8), tasks(3, 20, start=3), strict=True) for task in pair]
    waiting.add(mixed)
    assert len(waiting) == 6
    assert [numbers(waiting.next_batch()) for _ in range(5)] == [[0, 1], [2], [3, 4], [5], []]
    assert len(waiting) == 0


def test_in_a_service_the_bucket_with_the_oldest_row_is_next():
    waiting = schedule(oldest_first=True)
    waiting.add([*tasks(1, 8), *tasks(1, 20, start=1), *tasks(4, 8, start=2)])
    batches = []
    for more in (tasks(2, 8, start=6), tasks(1, 30, start=8), tasks(2, 8, start=9), []):  # rows never stop coming
        waiting.add(more)
        batches.append(numbers(waiting.next_batch(only_full=True)))
    assert batches == [[0, 2], [1], [3, 4], [5, 6]]
    assert [numbers(waiting.next_batch()) for _ in range(4)] == [[7, 9], [8], [10], []]


def test_rows_put_back_keep_their_place_among_the_oldest():
    waiting = schedule(oldest_first=True)
    waiting.add([*tasks(2, 8), *tasks(2, 20, start=2)])
    first = waiting.next_batch()
    waiting.add(first, first=True)
    assert [numbers(waiting.next_batch()) for _ in range(2)] == [[0, 1], [2, 3]]


def test_rows_that_shall_not_be_made_leave_their_places_in_the_batch_to_others():
    waiting = schedule(oldest_first=True, begin=lambda task: task.row.index not in (0, 3, 5, 6))
    waiting.add([*tasks(5, 8), *tasks(1, 20, start=5), *tasks(2, 30, start=6, alone=True)])
    assert [numbers(waiting.next_batch()) for _ in range(4)] == [[7], [1, 2], [4], []]
    assert len(waiting) == 0


def test_what_is_known_of_buckets_is_bounded(monkeypatch):
    monkeypatch.setattr("ernie_accel.batch.line.schedule._MOST_REMEMBERED", 3)
    waiting = schedule(similar_key_of=lambda task: task.request.steps)
    for steps in (1, 2, 1, 3, 4):
        waiting.add(tasks(1, steps))
        assert len(waiting.next_batch()) == 1
    assert list(waiting._sizers) == [1, 3, 4]
    assert [len(each) for each in (waiting._sizers, waiting._similar_keys, waiting._latest)] == [3, 3, 3]


def test_rows_put_back_come_first_and_in_their_order():
    waiting = schedule()
    waiting.add(tasks(2, start=2))
    waiting.add(tasks(2), first=True)
    assert [numbers(waiting.next_batch()) for _ in range(2)] == [[0, 1], [2, 3]]


def test_part_of_a_batch_waits_where_only_full_ones_are_asked_for():
    waiting = schedule()
    waiting.add(tasks(1))
    assert waiting.next_batch(only_full=True) == []
    waiting.add(tasks(2, start=1))
    assert numbers(waiting.next_batch(only_full=True)) == [0, 1]
    assert waiting.next_batch(only_full=True) == []
    assert numbers(waiting.next_batch()) == [2]


def test_a_full_batch_is_found_behind_part_of_one():
    waiting = schedule()
    waiting.add([*tasks(1, 8), *tasks(2, 20, start=1)])
    assert numbers(waiting.next_batch(only_full=True)) == [1, 2]


def test_a_bucket_that_was_emptied_is_not_looked_at_again():
    waiting = schedule()
    waiting.add(tasks(2))
    assert numbers(waiting.next_batch()) == [0, 1]
    assert waiting.next_batch(only_full=True) == []


def test_what_must_be_alone_is_alone_and_first():
    waiting = schedule()
    waiting.add(tasks(2))
    waiting.add(tasks(2, start=2, alone=True))
    assert [numbers(waiting.next_batch(only_full=True)) for _ in range(3)] == [[2], [3], [0, 1]]


def test_all_that_waits_can_be_taken_out():
    waiting = schedule()
    waiting.add([*tasks(3), *tasks(2, 20, start=3), *tasks(1, start=5, alone=True)])
    assert sorted(numbers(waiting.drain())) == list(range(6))
    assert (len(waiting), waiting.next_batch(), waiting.next_batch(only_full=True)) == (0, [], [])


@pytest.mark.parametrize(("probe", "start", "limit"), [(False, 2, 2), (True, 2, 4), (True, 9, 4), (False, 9, 4)])
def test_a_size_is_looked_for_between_the_start_and_the_limit(probe, start, limit):
    sizer = schedule(start=start, probe=probe).sizer("any")
    assert (sizer.size, sizer.limit) == (min(start, 4), limit)


def test_a_new_bucket_begins_with_the_size_of_the_latest_similar_one_and_an_old_one_keeps_its_own():
    waiting = Schedule(lambda task: task.request.steps, limit=8, similar_key_of=lambda task: task.request.steps < 20)
    waiting.add(tasks(2, 8))
    assert len(waiting.next_batch()) == 1
    sizer = waiting.sizer(8)
    measured(sizer, 1.0, 0.5)
    assert sizer.size == 4
    waiting.next_batch()
    waiting.add([*tasks(5, 9), *tasks(5, 30, start=5)])
    assert numbers(waiting.next_batch()) == [0, 1, 2, 3], "9 steps are similar to 8"
    waiting.next_batch()
    assert numbers(waiting.next_batch()) == [5], "30 steps are not"
    assert waiting.sizer_of(tasks(1, 9)[0]) is waiting.sizer(9)
    waiting.drain()
    waiting.sizer(9).out_of_memory(4)
    waiting.add(tasks(3, 9))
    assert len(waiting.next_batch()) == 2
    waiting.drain()
    waiting.add(tasks(5, 8))
    assert len(waiting.next_batch()) == 4, "what is known of a bucket counts more than a similar one"
    assert waiting.sizer(8).size == 4
