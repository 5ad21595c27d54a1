"""The project's chores, each in an environment of its own: ``nox -s tests``; ``nox -l`` lists them."""

from __future__ import annotations

import shutil
from pathlib import Path

import nox
from packaging.requirements import Requirement

nox.options.sessions = ["lint", "typing", "tests", "lite", "docs", "demo"]
nox.options.reuse_existing_virtualenvs = True

LINT = ("ruff>=0.9",)
TYPING = ("mypy>=1.14", "types-PyYAML")
#: ruff formats the signatures in the reference; jieba finds the words of Chinese pages for the search.
DOCS = ("mkdocs-material>=9.6,<10", "mkdocstrings[python]>=0.29", "mkdocs-static-i18n>=1.3", "jieba>=0.42", *LINT)
RELEASE = ("build>=1.2", "twine>=6.1", "check-wheel-contents>=0.6", "cffconvert>=2", "pytest>=8", "pyyaml>=6")
TEST = (
    "pytest>=8",
    "pytest-xdist>=3.8",
    "scikit-image>=0.24",
    "peft>=0.17",
    "hypothesis>=6.100",
    "httpx>=0.27",
    "openai>=1.90",
    "pandas>=2",  # of ray.data
    "triton>=3; sys_platform == 'linux'",
    "nvidia-cuda-nvrtc>=13; sys_platform == 'linux'",  # compiles CUDA C++ without a GPU
)

#: A process for each core, of one thread each: the models are too small for more. The attacks, the longest, come first.
SPREAD = ("--numprocesses=auto", "--maxprocesses=8", "--dist=loadfile", "--no-loadscope-reorder")

#: What a release of a dependency can break: loading, drawing, comparing, every transform and backend, batches.
VERSION_TESTS = (
    "attention", "batch_command", "batch_equality", "batch_formats", "batch_metrics", "batch_options",
    "batch_produce", "call_defaults", "cli", "context",
    "contract", "demo_model", "demo_train", "dtype", "effect", "enhancer", "errors", "extras", "families", "fidelity",
    "fidelity_command", "memory", "optimize", "order", "outputs", "presets", "prompts", "quantize", "quantize_backends",
    "rewrite", "saving", "scheduler", "warm_up",
)  # fmt: skip
#: diffusers 0.38 offloads groups of layers only where there is an accelerator; bitsandbytes 0.47 prints on import;
#: transformers 5.0 loads parts of a T5 in float32 beside bfloat16 too, against its own documentation.
NOT_ON_LOWEST = (
    "tests/test_cli.py::test_a_plan_prints_nothing_but_the_plan",
    "tests/test_rewrite.py::test_group_offloading_works_on_rewritten_blocks",
    "tests/test_memory.py::test_offloading_gives_the_same_bits_and_restores[group]",
    "tests/test_dtype.py::test_a_t5_is_cast_as_it_would_have_been_loaded[bfloat16-float32]",
    "tests/test_dtype.py::test_a_t5_is_cast_as_it_would_have_been_loaded[bfloat16-bfloat16]",
)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests with every extra that works on a CPU; a requested backend that cannot be imported fails."""
    session.install(".[all]", *TEST)
    _run_tests(session, "-m", "not slow")


@nox.session
def slow(session: nox.Session) -> None:
    """Run the tests that start several processes with a pipeline each, compile for long, or only repeat at length."""
    session.install(".[all]", *TEST)
    _run_tests(session, "-m", "slow")


def _run_tests(session: nox.Session, *arguments: str) -> None:
    command = ("python", "-m", "pytest", "tests", *SPREAD, *arguments, *session.posargs)
    session.run(*command, env={"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": None})  # None: not set


@nox.session(python="3.11")
def lowest(session: nox.Session) -> None:
    """Test the lowest releases that pyproject.toml allows, all at once, of dependencies and extras.

    torch is left to pip, and so to PIP_CONSTRAINT: CPU builds of its lowest release lie on the index of PyTorch alone.
    Python 3.11 is the last one that all of these releases have wheels for.
    """
    session.install(".[all]", *TEST, *_lowest_pins())
    _test_versions(session, *(f"--deselect={name}" for name in NOT_ON_LOWEST))


@nox.session
def newest(session: nox.Session) -> None:
    """Test the newest releases of all dependencies and extras, in an environment that may be an old one."""
    session.install("--upgrade", "--upgrade-strategy", "eager", ".[all]", *TEST)
    _test_versions(session)


def _lowest_pins() -> list[str]:
    """Return "name==bound" for every lower bound of pyproject.toml; not for torch, nor for what `all` leaves out."""
    project = nox.project.load_toml("pyproject.toml")["project"]
    extras = project["optional-dependencies"]
    (everything,) = map(Requirement, extras["all"])
    wanted = [*project["dependencies"], *(line for extra in sorted(everything.extras) for line in extras[extra])]
    pins = []
    for requirement in map(Requirement, wanted):
        bounds = [each.version for each in requirement.specifier if each.operator == ">="]
        if requirement.name != "torch":
            pins += [f"{requirement.name}=={bound}" for bound in bounds]
    return pins


def _test_versions(session: nox.Session, *arguments: str) -> None:
    files = session.posargs or [f"tests/test_{name}.py" for name in VERSION_TESTS]
    session.run("python", "-m", "pytest", *SPREAD, *arguments, *files, env={"OMP_NUM_THREADS": "1"})


@nox.session
def attack(session: nox.Session) -> None:
    """Attack the library at length: fuzzed inputs, kills, interrupts, hostile folders, faulty servers (20 minutes)."""
    session.install(".[all]", *TEST)
    env = {"OMP_NUM_THREADS": "1", "ERNIE_ACCEL_ATTACK": "full"}
    # Not by file: one file's attacks would take half of the time.
    spread = ("--numprocesses=auto", "--maxprocesses=8", "--dist=worksteal", "--durations=20")
    session.run("python", "-m", "pytest", "tests/attack", *spread, *session.posargs, env=env)


@nox.session
def diffusers(session: nox.Session) -> None:
    """Run diffusers' own pipeline tests on optimized pipes: ``nox -s diffusers -- PATH`` (a checkout of diffusers)."""
    session.install(".[all]", *TEST, "ftfy>=6", "parameterized>=0.9")
    session.run("python", "-m", "tools.diffusers_tests", *session.posargs)


@nox.session
def onnx(session: nox.Session) -> None:
    """Export the tiny model to ONNX, and hold it against ONNX Runtime."""
    session.install(".[all,onnx]", *TEST)
    session.run("python", "-m", "pytest", "tests/test_export_onnx.py", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def comfyui(session: nox.Session) -> None:
    """Run the example workflows through ComfyUI's own executor: ``nox -s comfyui -- PATH`` (a checkout of ComfyUI)."""
    session.install(".[all]", *TEST, "-r", f"{session.posargs[0]}/requirements.txt")
    session.run("python", "-m", "tools.comfyui.run", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def lifecycle(session: nox.Session) -> None:
    """Do to optimized pipes all that scripts do, on every family, and write docs/lifecycle.md (half an hour)."""
    session.install(".[all]", *TEST)
    session.run("python", "-m", "tests.lifecycle", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def lite(session: nox.Session) -> None:
    """Run without any extra: every missing backend gives its clear error, and the rest works."""
    session.install(".", TEST[0])
    _run_lite(session)


def _run_lite(session: nox.Session) -> None:
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
    """Check the types of the package, and what its types say of a user's code, diffusers' own types included."""
    session.install(".", *TYPING)
    _check_types(session)


def _check_types(session: nox.Session) -> None:
    session.run("mypy")
    session.run("mypy", "--config-file=", "--strict", "tests/type_checks.py")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; a broken link, or a page that the navigation lacks, fails. The pages: ``-- FOLDER``."""
    session.install(*DOCS)
    folder = session.posargs[0] if session.posargs else session.create_tmp()
    env = {"NO_MKDOCS_2_WARNING": "1"}  # a notice about a successor, on every build
    session.run("mkdocs", "build", "--strict", "--quiet", "--site-dir", folder, env=env)


@nox.session
def demo(session: nox.Session) -> None:
    """Do what a newcomer does first."""
    session.install(".")
    _run_demo(session)


def _run_demo(session: nox.Session) -> None:
    session.run("ernie-accel", "demo", "--out", f"{session.create_tmp()}/demo.png")


@nox.session
def without_extras(session: nox.Session) -> None:
    """Run `typing`, `lite` and `demo` one after the other in one environment, so that torch is installed only once."""
    session.install(".", TEST[0], *TYPING)
    _check_types(session)
    _run_lite(session)
    _run_demo(session)


@nox.session
def build(session: nox.Session) -> None:
    """Build the wheel and the sdist into dist/; check what they hold, and that an index can render the README."""
    session.install(*RELEASE)
    dist = Path("dist").resolve()
    shutil.rmtree(dist, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(dist), silent=True)
    session.run("twine", "check", "--strict", *map(str, sorted(dist.iterdir())))
    session.run("check-wheel-contents", *map(str, dist.glob("*.whl")))
    session.run("cffconvert", "--validate", "--infile", "CITATION.cff")
    session.run("python", "-m", "pytest", "--noconftest", "tests/release", *session.posargs)


@nox.session(reuse_venv=False)
def release(session: nox.Session) -> None:
    """Install what `build` has made where nothing else is, wheel and sdist, and do what a newcomer does first."""
    wheels, sources = (sorted(Path("dist").resolve().glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    if not (wheels and sources):
        session.error("dist/ is empty; run: nox -s build release")
    folder = session.create_tmp()
    for options, (made,) in (((), wheels), (("--force-reinstall", "--no-deps"), sources)):
        session.install(*options, str(made))
        with session.chdir(folder):  # so that nothing of the repository is imported
            session.run("python", "-m", "pip", "check")
            session.run("ernie-accel", "--version")
            session.run("ernie-accel", "info")
            session.run("ernie-accel", "plan", "--device", "rtx3060")
            session.run("ernie-accel", "demo", "--out", "demo.png")
            session.run("ernie-accel", "optimize", "a red circle", "--preset", "turbo-fp32", "--out", "red.png")
            Path("shapes.csv").write_text("prompt\na large red circle in the center on a cream background\n")
            session.run("ernie-accel", "batch", "shapes.csv", "--out", f"shapes{len(options)}")
