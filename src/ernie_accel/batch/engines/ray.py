"""Render on Ray: actors that hold a pipeline each, on one machine or many; rows of an actor that dies go to others."""

from __future__ import annotations

import functools
import queue
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from ernie_accel.batch.engines.base import BatchTimeoutError, Engine, Outcome, Request, WorkerLostError
from ernie_accel.batch.engines.local import LocalEngine, Pipe
from ernie_accel.batch.engines.process import portable
from ernie_accel.batch.engines.prompts import length_class, token_ids
from ernie_accel.batch.errors import Problem
from ernie_accel.core.errors import MissingExtraError


class RayEngine(Engine):
    """Ray actors with a pipeline each; the ledger and the files stay with the process that owns the engine.

    An actor encodes the prompts of a batch with the batch, since nobody knows ahead which one will render a row. The
    lengths of prompts are counted here, with the pipeline's tokenizer: as the rows have them, before any enhancer.
    """

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
            MissingExtraError: Ray is not installed.
            WorkerLostError: The first actor died, because the pipeline could not be loaded or its machine was lost.
        """
        try:
            import ray
        except ImportError as error:
            raise MissingExtraError("ray", "ray") from error
        self._ray: Any = ray
        self._started = not ray.is_initialized()
        if self._started:
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
        # No restarts by Ray: a new actor is started here, where it is known which rows the old one had.
        remote: Any = ray.remote
        self._actor_class: Any = remote(num_gpus=num_gpus, num_cpus=num_cpus, max_restarts=0)(_Worker)
        self._load, self._given_max_batch = load, max_batch
        self.slots = actors
        self._actors = [self._new_actor() for _ in range(actors)]
        self._idle: queue.Queue[Any] = queue.Queue()
        for actor in self._actors:
            self._idle.put(actor)
        self.max_batch: int
        self._identity: dict[str, str]
        self._tokenizer: Any
        self.max_batch, self._identity, self._tokenizer = self._ask(self._actors[0].describe.remote(), None)
        self._length_class = functools.lru_cache(maxsize=4096)(self._count)  # asked for again after each batch

    def render(self, requests: Sequence[Request], timeout_s: float | None = None) -> Sequence[Outcome]:
        """Have a free actor render; see `Engine.render`."""
        actor = self._idle.get()
        try:
            outcomes: Sequence[Outcome] = self._ask(actor.render.remote(list(requests)), timeout_s)
            return outcomes
        except (WorkerLostError, BatchTimeoutError):
            self._actors.remove(actor)
            self._ray.kill(actor)  # one that is out of time is still at it
            actor = self._new_actor()
            self._actors.append(actor)
            raise
        finally:
            self._idle.put(actor)

    def bucket(self, request: Request) -> Hashable:
        """Return the request's shape and the class of its prompt's length."""
        return (request.shape(), self._length_class(request.prompt))

    def problems(self, requests: Sequence[tuple[int, Request]]) -> list[Problem]:
        """Ask an actor what its pipe cannot do."""
        found: list[Problem] = self._ask(self._actors[0].problems.remote(list(requests)), None)
        return found

    def identity(self) -> Mapping[str, str]:
        """Return the pipeline's class."""
        return self._identity

    def close(self) -> None:
        """End the actors, and the local cluster if this engine started it."""
        for actor in self._actors:
            self._ray.kill(actor)
        if self._started:
            self._ray.shutdown()

    def _count(self, prompt: str) -> int:
        return 0 if self._tokenizer is None else length_class(len(token_ids(self._tokenizer, prompt)))

    def _new_actor(self) -> Any:
        return self._actor_class.remote(self._load, self._given_max_batch)

    def _ask(self, answer: Any, timeout_s: float | None) -> Any:
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

    def describe(self) -> tuple[bool, Any]:
        return True, (self._engine.max_batch, dict(self._engine.identity()), self._engine.tokenizer)

    def problems(self, requests: Sequence[tuple[int, Request]]) -> tuple[bool, Any]:
        return True, self._engine.problems(requests)

    def render(self, requests: Sequence[Request]) -> tuple[bool, Any]:
        try:
            outcomes = self._engine.render(requests)
        # Broad on purpose: whatever a pipe raises is an answer.
        except Exception as error:
            return False, portable(error)
        return True, [portable(outcome) if isinstance(outcome, Exception) else outcome for outcome in outcomes]
