"""Decide which rows go together, and how many: alike rows in buckets, each with the batch size found to be best."""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from ernie_accel.batch.input.task import Task

_V = TypeVar("_V")

_WORTH = 0.97  # a doubled batch must take no more than this part of the time per picture to be kept
_MOST_REMEMBERED = 4096  # buckets whose batch size is known
_GROW_AFTER = 8  # batches without trouble, after which a size that ran out of memory is tried again; then 16, 32, ...


@dataclass
class BatchSizer:
    """Finds the batch size of one bucket: doubled while that pays, halved when memory runs out, later grown again.

    Attributes:
        limit: The largest size allowed.
        size: The size to use now.
    """

    limit: int
    size: int = 1
    _settled: bool = False
    _ran_out: bool = False  # of memory, at a size above this one
    _since_trouble: int = 0
    _patience: int = _GROW_AFTER
    _seconds: dict[int, float] = field(default_factory=dict)  # the best time per picture of each size
    _calls: dict[int, int] = field(default_factory=dict)

    @property
    def fresh(self) -> bool:
        """Whether nothing is known of this bucket."""
        return not self._calls and not self._ran_out

    @property
    def settled(self) -> bool:
        """Whether `size` stays as it is for the time being, and so no batch needs to be measured."""
        nothing_to_compare = self.size == self.limit and self.size // 2 not in self._seconds
        return self._settled or self._ran_out or nothing_to_compare

    def succeeded(self, count: int, seconds: float | None) -> None:
        """Note that a batch of `count` pictures took `seconds`; None: nobody waited for it."""
        if count != self.size:
            return  # the rest of a bucket says nothing about the size
        self._calls[count] = self._calls.get(count, 0) + 1
        if seconds is not None:
            each = seconds / count
            self._seconds[count] = min(each, self._seconds.get(count, each))
        self._since_trouble += 1
        if self._ran_out:
            if self._since_trouble >= self._patience:
                self._ran_out, self._settled, self._patience = False, False, 2 * self._patience
                self.size = min(2 * self.size, self.limit)
            return
        first = self._calls[count] == 1  # it may compile or tune kernels
        if seconds is not None and not self._settled and not first:
            self._probe()

    def out_of_memory(self, count: int) -> None:
        """Note that a batch of `count` pictures did not fit."""
        self._ran_out = True
        self.size = max(1, min(self.size, count // 2))
        self._since_trouble = 0

    def _probe(self) -> None:
        half = self._seconds.get(self.size // 2)
        if half is not None and self._seconds[self.size] > _WORTH * half:
            self.size //= 2
            self._settled = True
        elif self.size * 2 <= self.limit:
            self.size *= 2
        else:
            self._settled = True


class _Recent(OrderedDict[Hashable, _V]):
    """What was set last, by key: a service sees new sizes and settings for years, and must not keep all of them."""

    def __setitem__(self, key: Hashable, value: _V) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        if len(self) > _MOST_REMEMBERED:
            self.popitem(last=False)


class Schedule:
    """The rows that wait, in buckets.

    One bucket is emptied before the next, so that nothing recompiles in turn; in a service, where rows never stop
    coming, that would leave rows of another bucket waiting forever, and the bucket with the oldest row is next.
    """

    def __init__(
        self,
        bucket_of: Callable[[Task], Hashable],
        *,
        limit: int,
        start: int = 1,
        probe: bool = True,
        similar_key_of: Callable[[Task], Hashable] | None = None,
        oldest_first: bool = False,
        begin: Callable[[Task], bool] | None = None,
    ) -> None:
        """Start empty.

        Args:
            bucket_of: A task's bucket; called when the task is added.
            limit: The largest batch.
            start: The batch size to begin with.
            probe: Whether to look for a better size; otherwise `start` is kept while memory allows.
            similar_key_of: A key shared by buckets that suit about the same batch size: a new bucket begins with the
                size found for the one before it. None: every bucket begins with `start`.
            oldest_first: Whether the bucket with the oldest row is next, full or not; otherwise one is emptied first.
            begin: Asked of each row as it is taken whether to make it; False: it is forgotten. None: all are made.
        """
        self._begin = begin
        self._oldest_first, self._arrivals = oldest_first, itertools.count()
        self._similar_key_of = similar_key_of
        self._similar_keys = _Recent[Hashable]()  # of each bucket
        self._latest = _Recent[BatchSizer]()  # of each similar key, the one that made the last batch
        self._bucket_of = bucket_of
        self._limit, self._start, self._probe = limit, min(start, limit), probe
        # Ordered dicts: taking the first of a dict whose first ones were deleted looks at all of those again.
        self._buckets: OrderedDict[Hashable, deque[Task]] = OrderedDict()  # none is empty
        self._maybe_full: OrderedDict[Hashable, None] = OrderedDict()  # buckets that got rows since they were looked at
        self._sizers = _Recent[BatchSizer]()
        self._alone: deque[Task] = deque()
        self._waiting = 0

    def __len__(self) -> int:
        """Return how many tasks wait."""
        return self._waiting

    def add(self, tasks: Iterable[Task], *, first: bool = False) -> None:
        """Add tasks, behind the others of their bucket or in front of them."""
        for task in reversed(list(tasks)) if first else tasks:
            self._waiting += 1
            if task.arrival is None:
                task.arrival = next(self._arrivals)
            queue = self._alone if task.alone else self._bucket(task)
            if first:
                queue.appendleft(task)
            else:
                queue.append(task)

    def next_batch(self, *, only_full: bool = False) -> list[Task]:
        """Remove and return the next batch; empty if nothing waits, or only part of one and `only_full`."""
        if alone := self._taken(self._alone, 1):
            return alone
        if self._oldest_first:
            tasks: list[Task] = []
            while self._buckets and not tasks:
                tasks = self._take(min(self._buckets, key=self._age))
            return tasks
        # Each bucket is looked at once after it got rows, not at every batch: a job may have thousands of sizes.
        candidates = self._maybe_full if only_full else self._buckets
        while candidates:
            key = next(iter(candidates))
            if not only_full or len(self._buckets[key]) >= self._size(key):
                return self._take(key)
            del self._maybe_full[key]
        return []

    def drain(self) -> list[Task]:
        """Remove and return everything that waits."""
        waiting = list(itertools.chain(self._alone, *self._buckets.values()))
        self._alone.clear()
        self._buckets.clear()
        self._maybe_full.clear()
        self._waiting = 0
        return waiting

    def _bucket(self, task: Task) -> deque[Task]:
        key = self._bucket_of(task)
        if self._similar_key_of is not None and key not in self._similar_keys:
            self._similar_keys[key] = self._similar_key_of(task)
        self._maybe_full[key] = None
        return self._buckets.setdefault(key, deque())

    def _age(self, key: Hashable) -> int:
        return self._buckets[key][0].arrival or 0

    def _take(self, key: Hashable) -> list[Task]:
        queue = self._buckets[key]
        tasks = self._taken(queue, self._size(key))
        if key in self._similar_keys:
            self._latest[self._similar_keys[key]] = self.sizer(key)
        if not queue:
            del self._buckets[key]
            self._maybe_full.pop(key, None)
        return tasks

    def _taken(self, queue: deque[Task], most: int) -> list[Task]:
        tasks: list[Task] = []
        while queue and len(tasks) < most:
            task = queue.popleft()
            self._waiting -= 1
            if self._begin is None or self._begin(task):
                tasks.append(task)
        return tasks

    def _size(self, key: Hashable) -> int:
        sizer = self.sizer(key)
        latest = self._latest.get(self._similar_keys[key]) if key in self._similar_keys else None
        if sizer.fresh and latest is not None:
            sizer.size = latest.size
        return sizer.size

    def sizer(self, key: Hashable) -> BatchSizer:
        """Return the batch sizer of a bucket."""
        known = self._sizers.get(key)
        if known is None:
            limit = self._limit if self._probe else self._start
            known = BatchSizer(limit=limit, size=self._start)
        self._sizers[key] = known  # the latest now
        return known

    def sizer_of(self, task: Task) -> BatchSizer:
        """Return the batch sizer of a task's bucket."""
        return self.sizer(self._bucket_of(task))
