"""Render on Ray: actors that hold a pipeline each, on one machine or many; rows of an actor that dies go to others."""

from __future__ import annotations

import functools
import logging
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

from ernie_accel.batch.engines.base import (
    PREPARE_BATCH,
    BatchTimeoutError,
    Engine,
    EngineLostError,
    Outcome,
    Request,
    WorkerLostError,
    in_batches,
)
from ernie_accel.batch.engines.local import CallSignature, LocalEngine, Pipe
from ernie_accel.batch.engines.process import portable
from ernie_accel.batch.engines.prompts import length_class, token_ids
from ernie_accel.batch.errors import Problem
from ernie_accel.core.errors import ErnieAccelError, MissingExtraError

if TYPE_CHECKING:
    from ray.actor import ActorClass, ActorHandle

    from ernie_accel.core.components import Tokenizer

_log = logging.getLogger(__name__)

#: A handle of an actor, and a reference to what is in Ray's store.
_Actor: TypeAlias = "ActorHandle"
_Reference: TypeAlias = object
#: The largest batch, the identity, the tokenizer and the call of an actor's engine.
_Description: TypeAlias = "tuple[int, dict[str, str], Tokenizer | None, CallSignature]"

#: What sets an actor's share of each resource, here and in the command.
_SHARES = {"GPU": "num_gpus, in the command --ray-gpus", "CPU": "num_cpus"}
_TELL_S = 60.0  # seconds of waiting for an actor after which that is logged, and logged again


@dataclass
class _Encoded:
    """What was made ahead for a request: its bucket, and Ray's reference to its embeddings; None: they were used."""

    bucket: Hashable
    packed: _Reference | None


class RayEngine(Engine):
    """Ray actors with a pipeline each; the ledger and the files stay with the process that owns the engine.

    Whichever actor is free enhances and encodes some of the next prompts, before the rows at hand are rendered. What it
    made waits in Ray's object store for the actor that renders the row, and never comes through this process. What is
    lost with an actor or its machine is encoded again with its batch.
    """

    edits = adapts = True

    prepares_aside = True

    def __init__(
        self,
        load: Callable[[], Pipe],
        *,
        actors: int = 1,
        num_gpus: float = 1.0,
        num_cpus: float = 1.0,
        max_batch: int | None = None,
        address: str | None = None,
    ) -> None:
        """Start the actors, on the cluster this process is connected to, or a new local one.

        Args:
            load: Returns the pipeline; called in each actor.
            actors: How many.
            num_gpus: GPUs of each; Ray sets CUDA_VISIBLE_DEVICES accordingly.
            num_cpus: CPU shares of each.
            max_batch: As for `LocalEngine`.
            address: Of a cluster to connect to, if not connected yet; None: a new local one.

        Raises:
            ErnieAccelError: `actors` is less than 1, or `num_gpus` less than 0.
            MissingExtraError: Ray is not installed.
            EngineLostError: A cluster that was started for this has too few GPUs or CPUs for the actors. Others may
                grow: there an actor without a place is waited for, and the log says so every minute.
            WorkerLostError: All actors died, because the pipeline could not be loaded or their machines were lost.
        """
        if actors < 1:
            raise ErnieAccelError(f"actors is {actors}; expected 1 or more")
        if not num_gpus >= 0:
            raise ErnieAccelError(f"num_gpus is {num_gpus}; expected 0 or more")
        try:
            import ray
        except ImportError as error:
            raise MissingExtraError("ray", "ray") from error
        self._ray: ModuleType = ray
        self._started = not ray.is_initialized()
        if self._started:
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
        self._needs = {"GPU": num_gpus, "CPU": num_cpus}
        if self._started and address is None and "RAY_ADDRESS" not in os.environ:
            self._refuse_more_than_there_is(actors)
        # No restarts by Ray: a new actor is started here, where it is known which rows the old one had.
        self._actor_class: ActorClass = self._ray.remote(num_gpus=num_gpus, num_cpus=num_cpus, max_restarts=0)(_Worker)
        self._load, self._given_max_batch = load, max_batch
        self.slots = actors
        self.ahead = self.ahead * actors
        self._closed, self._changing = False, threading.Lock()
        self._loaded: set[_Actor] = set()
        self._actors = [self._new_actor() for _ in range(actors)]
        self._idle: queue.Queue[_Actor] = queue.Queue()
        self.max_batch: int
        self._identity: dict[str, str]
        self._tokenizer: Tokenizer | None
        self._signature: CallSignature
        # Of whichever is the first to be ready: there may be no place for the others yet.
        first, description = self._first_described(self._actors)
        self.max_batch, self._identity, self._tokenizer, self._signature = description
        self._loaded.add(first)
        for actor in sorted(self._actors, key=lambda actor: actor is not first):
            self._idle.put(actor)
        self._length_class = functools.lru_cache(maxsize=4096)(self._count)  # asked for again after each batch
        # Threads for all that is prepared at once: each waits for a free actor, in front of what is rendered next.
        self._threads = ThreadPoolExecutor(2 * self.ahead // PREPARE_BATCH, "ernie-accel-encode")
        self._encoding: OrderedDict[Request, Future[dict[Request, _Encoded]]] = OrderedDict()

    def render(self, requests: Sequence[Request], timeout_s: float | None = None) -> Sequence[Outcome]:
        """Have a free actor render; see `Engine.render`."""
        packed = [encoded.packed for encoded in map(self._encoded, requests) if encoded is not None]
        with self._actor() as actor:
            outcomes: Sequence[Outcome] = self._ask(actor.render.remote(list(requests), packed), timeout_s)
        for encoded in map(self._encoded, requests):
            if encoded is not None:
                encoded.packed = None  # Ray may drop it; the bucket will be asked for again
        return outcomes

    def prepare(self, requests: Sequence[Request], timeout_s: float | None = None) -> None:
        """Have actors enhance and encode the prompts as they are free, and do not wait; see `Engine.prepare`."""
        size = min(PREPARE_BATCH, -(-len(requests) // self.slots))  # few rows are shared, too
        for some in in_batches(requests, size):
            future = self._threads.submit(self._encode, some, timeout_s)
            self._encoding.update(dict.fromkeys(some, future))
        while len(self._encoding) > 4 * self.ahead:
            self._encoding.popitem(last=False)

    def bucket(self, request: Request) -> Hashable:
        """Return the request's shape and the class of its prompt's length: as enhanced, where it was prepared."""
        encoded = self._encoded(request)
        return (request.shape(), self._length_class(request.prompt)) if encoded is None else encoded.bucket

    def problems(self, requests: Sequence[tuple[int, Request]]) -> list[Problem]:
        """Return what the actors' pipe has no argument for; no actor, which may be rendering or lost, is asked."""
        return self._signature.problems(requests)

    def identity(self) -> Mapping[str, str]:
        """Return the pipeline's class."""
        return self._identity

    def close(self) -> None:
        """End the actors, and the local cluster if this engine started it."""
        with self._changing:
            self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        for actor in self._actors:
            self._ray.kill(actor)
        if self._started:
            self._ray.shutdown()

    def _encode(self, requests: Sequence[Request], timeout_s: float | None) -> dict[Request, _Encoded]:
        with self._actor() as actor:
            # A row's embeddings are an object each, so that a batch of others need not carry them along.
            answer, *packed = actor.encode.options(num_returns=1 + len(requests)).remote(list(requests))
            buckets = self._ask(answer, timeout_s)
        return dict(zip(requests, map(_Encoded, buckets, packed), strict=True))

    def _encoded(self, request: Request) -> _Encoded | None:
        """Return what was made ahead for a request, once it is there; None if that is nothing."""
        future = self._encoding.get(request)
        try:
            return None if future is None else future.result()[request]
        # Broad on purpose: whatever went wrong with one of them, its actor included, shows when it is rendered.
        except Exception:
            _log.debug("prompts were not encoded ahead", exc_info=True)
            return None

    @contextmanager
    def _actor(self) -> Iterator[_Actor]:
        """Wait for a free actor, and lend it; one that dies or is out of time meanwhile is replaced."""
        actor = self._idle.get()
        try:
            if self._closed:
                raise WorkerLostError("the engine was closed")
            if actor not in self._loaded:
                self._first_described([actor])  # now, or loading would be a batch's time
                self._loaded.add(actor)
            yield actor
        except (WorkerLostError, BatchTimeoutError):
            actor = self._in_place_of(actor)
            raise
        finally:
            self._idle.put(actor)

    def _count(self, prompt: str) -> int:
        return 0 if self._tokenizer is None else length_class(len(token_ids(self._tokenizer, prompt)))

    def _new_actor(self) -> _Actor:
        return self._actor_class.remote(self._load, self._given_max_batch)

    def _in_place_of(self, lost: _Actor) -> _Actor:
        """Return a new actor, or the lost one if the engine is closed and none is needed."""
        with self._changing:
            if self._closed:
                return lost
            self._actors.remove(lost)
            self._loaded.discard(lost)
            self._ray.kill(lost)  # one that is out of time is still at it
            new = self._new_actor()
            self._actors.append(new)
            return new

    def _first_described(self, actors: Sequence[_Actor]) -> tuple[_Actor, _Description]:
        """Wait until one of some actors has its pipeline, and return it and what it says of it.

        Raises:
            WorkerLostError: The last of them has died, too.
        """
        answers = {actor.describe.remote(): actor for actor in actors}
        while True:
            ready, _ = self._ray.wait(list(answers), timeout=_TELL_S)
            if ready:
                actor = answers.pop(ready[0])
                try:
                    description: _Description = self._ask(ready[0], None)
                except WorkerLostError:
                    if not answers:
                        raise
                    continue
                return actor, description
            free = self._ray.available_resources()
            needs = ", ".join(f"{need:g} {kind} ({free.get(kind, 0):g} free)" for kind, need in self._needs.items())
            _log.warning(
                "Waiting for a Ray actor: it loads its pipeline, or the cluster has no place for it. It needs %s", needs
            )

    def _refuse_more_than_there_is(self, actors: int) -> None:
        total = self._ray.cluster_resources()
        for kind, need in self._needs.items():
            if actors * need > total.get(kind, 0) + 1e-6:  # shares such as 0.1
                self._ray.shutdown()
                raise EngineLostError(
                    f"The Ray actors need {actors} x {need:g} {kind}, and this machine has {total.get(kind, 0):g}: "
                    f"take fewer, or give each less ({_SHARES[kind]})"
                )

    def _ask(self, answer: _Reference, timeout_s: float | None) -> Any:
        exceptions = self._ray.exceptions
        try:
            good, value = self._ray.get(answer, timeout=timeout_s)
        except exceptions.GetTimeoutError:
            raise BatchTimeoutError(timeout_s or 0.0) from None
        except exceptions.RayActorError as error:
            raise WorkerLostError(f"the Ray actor that rendered it died ({_reason(error)})") from error
        if not good:
            raise value
        return value


def _reason(error: Exception) -> str:
    """Return the last line of what Ray says, which is the cause where an actor's start failed."""
    return str(error).strip().splitlines()[-1].strip()


class _Worker:
    """What runs in an actor: a pipeline, and answers that can be pickled."""

    def __init__(self, load: Callable[[], Pipe], max_batch: int | None) -> None:
        self._engine = LocalEngine(load(), max_batch=max_batch)

    def describe(self) -> tuple[bool, _Description]:
        engine = self._engine
        return True, (engine.max_batch, dict(engine.identity()), engine.tokenizer, engine.signature)

    def encode(self, requests: Sequence[Request]) -> tuple[object, ...]:
        """Return the answer, the buckets of the requests, and what was made for each."""
        try:
            buckets = self._engine.encode(requests)
            return (True, buckets), *map(self._engine.pack, requests)
        # Broad on purpose: whatever a pipe raises is an answer.
        except Exception as error:
            return (False, portable(error)), *[None] * len(requests)

    def render(self, requests: Sequence[Request], packed: Sequence[_Reference | None]) -> tuple[bool, object]:
        try:
            self._take_in(packed)
            outcomes = self._engine.render(requests)
        # Broad on purpose: whatever a pipe raises is an answer.
        except Exception as error:
            return False, portable(error)
        return True, [portable(outcome) if isinstance(outcome, Exception) else outcome for outcome in outcomes]

    def _take_in(self, packed: Sequence[_Reference | None]) -> None:
        import ray

        for reference in packed:
            try:
                if reference is not None:
                    self._engine.unpack(ray.get(reference))
            except ray.exceptions.RayError:  # lost with its machine, or its actor before it had answered
                _log.debug("embeddings were lost", exc_info=True)
