"""Run the cells in several processes, and write the page."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import multiprocessing
import os
import random
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from ernie_accel.common.atomic import write_atomically
from tests.lifecycle.actions import ACTIONS
from tests.lifecycle.cells import FAULT, Cell, cell, is_known, not_applicable
from tests.lifecycle.page import PAGE, kept_text, others_text, page, section, with_section
from tests.lifecycle.subjects import OTHERS, PIPES, ROWS

#: How many cells are done in one go: a stop loses that many at most.
CHUNK = 12
#: What is done in one go: a row, and which actions on which family's pipe.
Job = tuple[str, "list[tuple[str, tuple[str, ...]]]"]


def main() -> int:
    """Run the cells; return 1 if one is a fault that is not known, and then write nothing."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.lifecycle", description="Run the lifecycle matrix and write docs/lifecycle.md."
    )
    parser.add_argument(
        "--rounds",
        type=int,
        help="1: each action on each row once, on one pipe after another; default: on all of them",
    )
    parser.add_argument("--pairs", type=int, default=300, help="pairs of actions to try (default 300)")
    parser.add_argument("--seed", type=int, default=20261128, help="which pairs those are")
    parser.add_argument("--rows", default="", help="only rows whose name has this in it; the page is not written")
    parser.add_argument(
        "--others", action="store_true", help="only the other pipelines, which have a table of their own"
    )
    parser.add_argument("--keep", type=Path, help="keep finished cells in this file, and do not run them again")
    parser.add_argument("--so-far", action="store_true", help="run nothing; write the page of the cells in --keep")
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--processes", type=int, default=min(available, 16), help="default: one for each core")
    options = parser.parse_args()
    families = [*OTHERS] if options.others else [*PIPES]
    if options.so_far:
        return write(read(options.keep), families)

    rounds = range(len(families) if options.rounds is None else options.rounds)
    jobs = [job for number in rounds for job in in_turns(singles(number, families))]
    jobs += pairs(options.pairs, options.seed, families)
    jobs = [(name, cells) for name, cells in jobs if options.rows in name]
    done = read(options.keep)
    known = {(each.row, each.family, each.actions) for each in done}
    jobs = [(name, [c for c in cells if (name, *c) not in known]) for name, cells in jobs]
    jobs = [(name, cells[at : at + CHUNK]) for name, cells in jobs for at in range(0, len(cells), CHUNK)]
    start = time.perf_counter()
    with ProcessPoolExecutor(options.processes, multiprocessing.get_context("spawn"), prepare) as pool:
        for found in pool.map(run, jobs):
            done += found
            for each in found:
                if FAULT in (each.verdict, each.restored) and not is_known(each):
                    print(f"FAULT {each}", flush=True)
            if options.keep is not None:
                write_atomically(options.keep, json.dumps([dataclasses.asdict(each) for each in done]).encode())
    faults = sum(FAULT in (each.verdict, each.restored) and not is_known(each) for each in done)
    print(f"{len(done)} cells, {faults} faults that are not known, {time.perf_counter() - start:.0f} s")
    if faults or options.rows:
        return int(faults > 0)
    return write(done, families)


def total(families: list[str]) -> int:
    """Return how many cells there are, without the pairs."""
    return sum(len(cells) for number in range(len(families)) for _, cells in singles(number, families))


def write(done: list[Cell], families: list[str]) -> int:
    """Write the page's part on these pipes, which says how many cells there are, and keep the rest of the page."""
    before, of = PAGE.read_text(encoding="utf-8") if PAGE.exists() else "", total(families)
    if families == [*OTHERS]:
        text = with_section(before, section(done, of))
    else:
        text = page(done, kept_text(before), of, others_text(before))
    PAGE.write_text(text, encoding="utf-8")
    return 0


def read(file: Path | None) -> list[Cell]:
    """Return the cells that a run before has kept, without the faults, which are run again, and rows that are gone."""
    if file is None or not file.exists():
        return []
    kept = [Cell(**(each | {"actions": tuple(each["actions"])})) for each in json.loads(file.read_text())]
    return [each for each in kept if FAULT not in (each.verdict, each.restored) and each.row in ROWS]


def prepare() -> None:
    """Let the collection of garbage pass over all that is imported: a cell makes much of it, in cycles."""
    gc.collect()
    gc.freeze()


def run(job: Job) -> list[Cell]:
    """Return some cells of one row.

    Those that are traced go on with each other's traces, but not with what other rows have left of them since.
    """
    name, cells = job
    if ROWS[name].traced:
        torch._dynamo.reset()
    return [cell(family, ROWS[name], *actions, keep_traces=True) for family, actions in cells]


def singles(number: int, families: list[str]) -> list[Job]:
    """Return the jobs of one round: each action on each row, on pipes that change from action to action."""
    jobs: list[Job] = []
    for name, row in ROWS.items():
        able = [family for family in families if row.gpu or not_applicable(row, family) is None]
        absent = [family for family in families if family not in able]
        if number == 0:
            jobs.append((name, [(family, (next(iter(ACTIONS)),)) for family in absent]))  # says why it does not apply
        if number < len(able):
            jobs.append((name, [(able[(at + number) % len(able)], (action,)) for at, action in enumerate(ACTIONS)]))
    return jobs


def in_turns(jobs: list[Job]) -> list[Job]:
    """Return the same cells so that a run that is stopped has some of every row and column: one of each at a time."""
    turns: dict[int, list[Job]] = {}
    for number, (name, cells) in enumerate(jobs):
        groups: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
        for each in cells:
            groups.setdefault(ACTIONS[each[1][0]].group, []).append(each)
        for group in groups.values():  # every row begins with another action
            start = number % len(group)
            for turn, each in enumerate([*group[start:], *group[:start]]):
                turns.setdefault(turn, []).append((name, [each]))
    return [job for turn in sorted(turns) for job in _joined(turns[turn])]


def _joined(jobs: list[Job]) -> list[Job]:
    joined: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for name, cells in jobs:
        joined.setdefault(name, []).extend(cells)
    return [*joined.items()]


def pairs(count: int, seed: int, families: list[str]) -> list[Job]:
    """Return `count` pairs of actions, on rows that apply; what only calls the pipe comes second."""
    chooser = random.Random(seed)
    first = [action.name for action in ACTIONS.values() if action.group != "calls"]
    runs = {name: row for name, row in ROWS.items() if not row.gpu}
    able = [(f, name) for f in families for name, row in runs.items() if not_applicable(row, f) is None]
    chosen: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    for _ in range(count):
        family, name = chooser.choice(able)
        chosen.setdefault(name, []).append((family, (chooser.choice(first), chooser.choice([*ACTIONS]))))
    return [*chosen.items()]
