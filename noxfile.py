"""The project's chores, each in an environment of its own: ``nox -s tests``; ``nox -l`` lists them."""

from __future__ import annotations

import nox

nox.options.sessions = ["lint", "typing", "tests", "lite", "docs", "demo"]
nox.options.reuse_existing_virtualenvs = True

LINT = ("ruff>=0.9",)
TEST = (
    "pytest>=8",
    "pytest-xdist>=3.6",
    "scikit-image>=0.24",
    "peft>=0.17",
    "prometheus-client>=0.20",
    "hypothesis>=6.100",
    "triton>=3; sys_platform == 'linux'",
)


@nox.session
def tests(session: nox.Session) -> None:
    """Run all tests with every extra that works on a CPU; a requested backend that cannot be imported fails."""
    session.install(".[all]", *TEST)
    # A process for each core, of one thread each: the models are too small for more.
    spread = ("--numprocesses=auto", "--maxprocesses=8", "--dist=loadfile")
    session.run("python", "-m", "pytest", "tests", *spread, *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def attack(session: nox.Session) -> None:
    """Attack the library at length: fuzzed inputs, kills, interrupts, hostile folders, faulty servers (20 minutes)."""
    session.install(".[all]", *TEST)
    spread = ("--numprocesses=auto", "--maxprocesses=8", "--dist=loadfile")
    env = {"OMP_NUM_THREADS": "1", "ERNIE_ACCEL_ATTACK": "full"}
    session.run("python", "-m", "pytest", "tests/attack", *spread, *session.posargs, env=env)


@nox.session
def lite(session: nox.Session) -> None:
    """Run without any extra: every missing backend gives its clear error, and the rest works."""
    session.install(".", "pytest>=8")
    core = ("test_call_defaults.py", "test_dtype.py", "test_errors.py", "test_public_api.py", "test_batch_table.py")
    session.run("python", "-m", "pytest", "tests/lite", *(f"tests/{name}" for name in core), *session.posargs)


@nox.session
def gpu(session: nox.Session) -> None:
    """Run the tests that need a CUDA device; without one they fail, they do not skip."""
    session.install(".[all]", *TEST)
    session.run("python", "-m", "pytest", "tests/gpu", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    session.install(*LINT)
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def typing(session: nox.Session) -> None:
    """Check the types of the package."""
    session.install(".", "mypy>=1.14", "types-PyYAML")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a broken link fails."""
    session.install("mkdocs>=1.6")
    session.run("mkdocs", "build", "--strict", "--site-dir", session.create_tmp())


@nox.session
def demo(session: nox.Session) -> None:
    """Do what a newcomer does first."""
    session.install(".")
    session.run("ernie-accel", "demo", "--out", f"{session.create_tmp()}/demo.png")
