"""One cell of the matrix: the same actions on an optimized pipe and on a stock one, compared."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import ernie_accel
from ernie_accel import Effect, ErnieAccelError, Plan, RestoreError, RestoreWarning, Transform
from ernie_accel.core.transform import ROUNDING_REL
from tests.examples import differences, snapshot
from tests.lifecycle.actions import ACTIONS, Action, Case, denoiser
from tests.lifecycle.subjects import Row, stock

EQUAL, WITHIN, REFUSED, ABSENT, FAULT = "equal", "within", "refused", "n/a", "fault"
LEFT = "left"  # of `restore`: a warning names what it left, because a script had put it there

#: Faults that are known and not fixed yet: (part of the row's name, action) -> what is wrong.
KNOWN: dict[tuple[str, str], str] = {}


def is_known(found: Cell) -> bool:
    """Return whether a fault is one of those that are known."""
    return any(row in found.row and found.actions == (action,) for row, action in KNOWN)


@dataclass(frozen=True)
class Cell:
    """What came out.

    Attributes:
        row: The name of the row.
        family: The tiny pipe.
        actions: The names of the actions, one after the other.
        verdict: "equal", "within", "refused", "n/a" or "fault".
        reason: Why it is refused, not applicable or a fault.
        restored: What `restore` gives afterwards, compared with stock after the same actions: "equal", "within" (what
            the script brought came in the pipe's dtype), "refused", "left" (a warning names what), "n/a" or "fault".
        restored_reason: Why.
    """

    row: str
    family: str
    actions: tuple[str, ...]
    verdict: str
    reason: str = ""
    restored: str = ABSENT
    restored_reason: str = ""


def not_applicable(row: Row, family: str) -> str | None:
    """Return why a row does nothing to a family's pipe; None if it does something."""
    return _applicable(row, family)[0]


@functools.cache
def _applicable(row: Row, family: str) -> tuple[str | None, Bound]:
    """Return why a row does nothing to a pipe, or the effect it has, and its bound in dB."""
    pipe = stock(family, row)
    with row.simulated():
        plan = row.plan(pipe)
    bound = Bound.of(plan)
    if plan.blockers or (plan.problems and not row.preset):
        return "; ".join([*plan.blockers, *(r for each in plan.problems.values() for r in each)]), bound
    if not any(step.verdict == "apply" for step in plan.steps):
        notes = [step.preview.note for step in plan.steps if step.preview is not None and step.preview.note]
        notes += [reason for reasons in plan.problems.values() for reason in reasons]
        return "nothing to do: " + "; ".join(dict.fromkeys(notes)), bound
    return None, bound


@dataclass(frozen=True)
class Bound:
    """How far from stock the pictures of a plan may be.

    Attributes:
        effect: The strongest effect.
        floor_db: The lowest floor of what is lossy, as a signal-to-noise ratio; infinite if nothing is.
        rounds: Whether something rounds.
    """

    effect: Effect
    floor_db: float
    rounds: bool

    @classmethod
    def of(cls, plan: Plan) -> Bound:
        applied = [step.transform for step in plan.steps if step.verdict == "apply"]
        floors = [transform.floor_db for transform in applied if transform.floor_db is not None]
        return cls(plan.effect, min(floors, default=math.inf), any(t.effect is Effect.ROUNDING for t in applied))

    def db(self, dtype: torch.dtype) -> float:
        """Return the bound for weights of `dtype`; infinite is bit for bit."""
        rounding = -20 * math.log10(ROUNDING_REL[str(dtype).removeprefix("torch.")]) if self.rounds else math.inf
        return min(self.floor_db, rounding)


def cell(family: str, row: Row, *names: str, keep_traces: bool = False) -> Cell:
    """Do the actions, one after the other, to an optimized pipe, and compare what it draws with stock's.

    What torch.compile traced is forgotten then. With `keep_traces` the cells after it go on with it, as the pipes of
    one script do, which takes a tenth of the time.
    """
    actions = [ACTIONS[name] for name in names]
    why, bound = _applicable(row, family)
    if row.gpu:
        return Cell(row.name, family, names, ABSENT, why or row.gpu)
    if why is not None:
        return Cell(row.name, family, names, ABSENT, why)
    try:
        with _quietly(), row.simulated(), torch.no_grad():
            own = _own_dtype(family, row) if any(action.casts for action in actions) else None
            return _cell(Case(family, row, own), names, actions, bound)
    finally:
        if row.traced and not keep_traces:
            torch._dynamo.reset()


@functools.cache
def _own_dtype(family: str, row: Row) -> torch.dtype:
    dtype: torch.dtype = denoiser(row.optimize(stock(family, row)))[1].dtype
    return dtype


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


#: Looks at a pipe and returns what tells, later, what has changed.
Proof = Callable[[Any], Callable[[], "list[str]"]]


def _no_proof(pipe: Any) -> Callable[[], list[str]]:
    return list


def _proof(pipe: Any) -> Callable[[], list[str]]:
    before = snapshot(pipe)
    return lambda: differences(before, snapshot(pipe))


def _cell(case: Case, names: tuple[str, ...], actions: list[Action], bound: Bound, *, proof: Proof = _no_proof) -> Cell:
    """Return a cell; what is refused is done again with a proof that nothing changed, which takes time."""
    row, family = case.row, case.family
    want = _stock(family, _as_drawn(row), names, case.own)
    if isinstance(want, BaseException):
        return Cell(row.name, family, names, ABSENT, f"stock cannot either: {_said(want)}")
    make = functools.partial(Cell, row.name, family, names)

    pipe = stock(family, row)
    stage = "optimize"
    try:
        for action in actions:
            pipe = action.before(pipe, case)
        before = proof(pipe)
        row.optimize(pipe)
        if all(action.draws_first for action in actions):
            case.draw(pipe)
        last = pipe
        for action in actions:
            stage, before = action.name, proof(last)
            last = action.prepare(last, case)
            before = proof(last)
            last = action.do(last, case)
        stage, before = "the call", None
        got = actions[-1].draw(last, case)
    except ErnieAccelError as error:
        if proof is _no_proof:
            return _cell(case, names, actions, bound, proof=_proof)
        changed = before() if before is not None else []
        if changed:
            return make(FAULT, f"refused by {stage}, but changed {', '.join(changed[:3])}: {_said(error)}")
        return make(REFUSED, _said(error))
    except Exception as error:
        return make(FAULT, f"{stage}: {_said(error)}")

    verdict, reason = _judge(case, names, actions, got, want[0], bound, denoiser(last)[1].dtype)
    if not any(action.restores for action in actions):
        return make(verdict, reason)
    restored, why = _restored(case, actions, pipe, want, bound, proof)
    if restored == REFUSED and proof is _no_proof:
        return _cell(case, names, actions, bound, proof=_proof)
    return make(verdict, reason, restored, why)


def _judge(
    case: Case,
    names: tuple[str, ...],
    actions: list[Action],
    got: list[torch.Tensor],
    want: list[torch.Tensor],
    allowed: Bound,
    dtype: torch.dtype,
) -> tuple[str, str]:
    found, effect, bound = _db(got, want), allowed.effect, allowed.db(dtype)
    if found == math.inf:
        return EQUAL, ""
    if any(action.exact for action in actions):
        rounds = any(action.rounds for action in actions)  # what the script brought before came in the pipe's dtype
        if rounds and found >= _floor_db(case, names, allowed.floor_db):
            return WITHIN, ""
        return FAULT, f"{found:.0f} dB from stock, expected the same bits"
    calls_stock = any(action.calls_stock for action in actions)
    if (effect is not Effect.RESAMPLES or calls_stock) and found >= bound:
        return WITHIN, ""
    if effect is not Effect.RESAMPLES and bound == math.inf:
        return FAULT, f"{found:.0f} dB from stock, expected the same bits"
    other = _other_order(case, names)
    if isinstance(other, list):
        again = _db(got, other)
        if again >= min(_floor_db(case, names, bound), 90.0):
            return WITHIN, ""
        if _is_as_cast(case, names, got):
            return WITHIN, ""
        return FAULT, f"{found:.0f} dB from stock, {again:.0f} dB from the other order; bound {bound:.0f}"
    if isinstance(other, ErnieAccelError) and found >= _loosest_db(case, names) - 6:
        return WITHIN, ""
    if all(action.group in ("memory", "compile") for action in actions):  # these change no pictures by design
        as_before = _db(got, [case.draw(case.row.optimize(stock(case.family, case.row)))])
        if as_before >= min(_floor_db(case, names, bound), _loosest_db(case, names) - 6, 90.0):
            return WITHIN, ""
    return FAULT, f"{found:.0f} dB from stock; bound {bound:.0f}; the other order: {_said(other)}"


def _is_as_cast(case: Case, names: tuple[str, ...], got: list[torch.Tensor]) -> bool:
    """Return whether stock draws the same bits if it is cast as the row casts it, and the script acts then.

    Weights that are cast and changed, or cast twice, differ from those that are changed first, on stock too. How much
    that shows depends on the weights: 1.5 times the norms of the tiny Stable Diffusion, in bfloat16, draw 19 dB from
    what is cast after. So it is no measure for the row, whose other transforms have to add nothing to it.
    """
    try:
        last = _resampled(case, "CastDtype")
        for name in names:
            last = ACTIONS[name].do(ACTIONS[name].prepare(last, case), case)
        return _db(got, ACTIONS[names[-1]].draw(last, case)) == math.inf
    except Exception:  # of an action on stock: no picture, so not this one
        return False


def _floor_db(case: Case, names: tuple[str, ...], bound: float) -> float:
    """Return `bound`, if it is of something lossy at most what is usual on random weights, with 6 dB to spare."""
    return min(bound, _loosest_db(case, names) - 6) if bound < 90 else bound


def _loosest_db(case: Case, names: tuple[str, ...]) -> float:
    """Return what the row loses on its own, or the actions on theirs: layerwise casting keeps 8 bits, on stock too."""
    found = [_usual_db(case), *(_own_db(case, name) for name in names if ACTIONS[name].group == "memory")]
    if case.row.has("Quantize") and any(ACTIONS[name].group == "weights" for name in names):
        found.append(_changed_db(case, names))
    return min(found)


@functools.cache
def _changed_db(case: Case, names: tuple[str, ...]) -> float:
    """Return what the row loses on a pipe whose weights the script has changed first.

    Random weights that are 1.5 times as large amplify what quantizing rounds off: on Z-Image's pipelines to 16 dB,
    whichever comes first, where the weights as they were lose 19 to 23 dB.
    """
    last, changed = _resampled(case), _other_order(case, names)
    for name in names:
        last = ACTIONS[name].do(ACTIONS[name].prepare(last, case), case)
    return _db(changed, ACTIONS[names[-1]].draw(last, case)) if isinstance(changed, list) else math.inf


@functools.cache
def _own_db(case: Case, name: str) -> float:
    pipes = _resampled(case), _resampled(case)
    action = ACTIONS[name]
    return _db([case.draw(action.do(action.prepare(pipes[0], case), case))], [case.draw(pipes[1])])


def _resampled(case: Case, *names: str) -> Any:
    """Return a stock pipe with what of the row draws other pictures by design: fewer steps, another scheduler.

    And with the row's transforms of these names.
    """
    pipe = stock(case.family, case.row)
    steps = case.row.plan(pipe).steps
    applied = [each.transform for each in steps if each.verdict == "apply"]
    others = [each for each in applied if each.effect is Effect.RESAMPLES or type(each).__name__ in names]
    return ernie_accel.optimize(pipe, *others, context=case.row.context) if others else pipe


@functools.cache
def _usual_db(case: Case) -> float:
    """Return how far the pictures of an optimized pipe that nobody acts on are from what rounds and loses nothing.

    Floors in dB are earned on trained weights; a few transforms are further from stock on random ones. What draws
    other pictures by design (fewer steps, another scheduler) is done on both sides.
    """
    return _db([case.draw(case.row.optimize(stock(case.family, case.row)))], [case.draw(_resampled(case))])


def _other_order(case: Case, names: tuple[str, ...]) -> list[torch.Tensor] | Exception:
    """Return what is drawn if the script acts first, and the pipe is optimized then.

    A pipe that the script made of an optimized one shares its parts, but has stock's defaults: so has this one's call.
    """
    try:
        last = stock(case.family, case.row)
        for name in names:
            last = ACTIONS[name].before(last, case)
        if all(ACTIONS[name].draws_first for name in names):
            case.draw(last)
        for name in names:
            last = ACTIONS[name].do(ACTIONS[name].prepare(last, case), case)
        if any(ACTIONS[name].calls_stock for name in names):
            case = case.with_defaults_of(last)
        case.row.optimize(last)
        return ACTIONS[names[-1]].draw(last, case)
    except Exception as error:
        return error


def _restored(
    case: Case, actions: list[Action], pipe: Any, drawn: Drawn, bound: Bound, proof: Proof
) -> tuple[str, str]:
    """Restore the pipe, draw, and compare with the stock pipe after the same actions."""
    _, want, own = drawn
    if isinstance(want, Exception):
        return ABSENT, _said(want)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", RestoreWarning)
        changed = proof(pipe)
        try:
            ernie_accel.restore(pipe)
        except RestoreError as error:
            found = changed()
            return (FAULT, f"refused, but changed {found[:3]}") if found else (REFUSED, _said(error))
        except Exception as error:
            return FAULT, f"restore: {_said(error)}"
        left = [str(each.message) for each in told if issubclass(each.category, RestoreWarning)]
        try:
            got = case.draw(pipe)
        except Exception as error:
            return FAULT, f"draw: {_said(error)}; warned of {left}"
    distance = _db([got], [want])
    if distance == math.inf:
        return EQUAL, "; ".join(left[:1])
    rounds = any(action.rounds for action in actions)
    if rounds and _db([got], [own]) == math.inf:
        return EQUAL, "in the dtype that came in"
    if rounds and distance >= _floor_db(case, tuple(action.name for action in actions), bound.floor_db):
        return WITHIN, "; ".join(left[:1])
    if left:
        return LEFT, left[0]
    return FAULT, f"{distance:.0f} dB from stock after the same actions"


def _as_drawn(row: Row) -> tuple[Transform, ...]:
    """Return what of a row changes how a stock pipe is made and drawn with."""
    found: list[Transform] = [ernie_accel.MakeContiguous()] if row.awkward else []
    found += [ernie_accel.CacheSteps()] if row.has("CacheSteps") else []
    found += [ernie_accel.BatchGuidance()] if row.has("BatchGuidance") else []
    found += [ernie_accel.Warmup()] if row.has("Warmup") else []
    found += [ernie_accel.RewriteEnhancer()] if row.enhances else []
    return (*found, ernie_accel.CallDefaults("turbo")) if row.has("CallDefaults") else tuple(found)


Drawn = tuple[list[torch.Tensor], "torch.Tensor | Exception", torch.Tensor]


@functools.cache
def _stock(
    family: str, how: tuple[Transform, ...], names: tuple[str, ...], own_dtype: torch.dtype | None
) -> Drawn | Exception:
    """Return what stock draws after the actions, the pipe they started with then, and that pipe if left alone."""
    row = Row("stock", how)
    case = Case(family, row, own_dtype)
    actions = [ACTIONS[name] for name in names]
    with _quietly(), torch.no_grad():
        pipe = stock(family, row)
        try:
            for action in actions:
                pipe = action.before(pipe, case)
            own = case.draw(stock(family, row))
            if row.has("Warmup") or all(action.draws_first for action in actions):
                case.draw(pipe)
            last = pipe
            for action in actions:
                last = action.do(action.prepare(last, case), case)
            pictures = (actions[-1].draw_stock or actions[-1].draw)(last, case)
        except Exception as error:
            return error
        try:
            return pictures, case.draw(pipe), own
        except Exception as error:
            return pictures, error, own


def _db(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    """Return the least signal-to-noise ratio in dB; infinite if bit for bit equal, minus infinite if not comparable."""
    found = math.inf
    for one, two in zip(got, want, strict=True):
        if one.shape != two.shape or not bool(torch.isfinite(one).all()):
            return -math.inf
        if not torch.equal(one, two):
            noise = float((one.double() - two.double()).norm() / two.double().norm())
            found = min(found, -20 * math.log10(max(noise, 1e-15)))
    return found


def _said(error: object) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}" if isinstance(error, BaseException) else text[:400]
