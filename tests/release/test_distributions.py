"""What is in dist/ is what users should get: run by `nox -s build`, after it has built."""

from __future__ import annotations

import re
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path, PurePosixPath

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "ernie_accel"
#: Of the package; anything else is there by mistake.
KINDS = {".py", ".pyi", ".json", ".jinja", ".css", ".safetensors", ".typed"}


def only(pattern: str) -> Path:
    (found,) = (ROOT / "dist").glob(pattern)
    return found


@pytest.fixture(scope="module")
def wheel() -> dict[str, int]:
    """Names and sizes."""
    with zipfile.ZipFile(only("*.whl")) as archive:
        return {each.filename: each.file_size for each in archive.infolist()}


@pytest.fixture(scope="module")
def sdist() -> set[str]:
    """Names, without the folder that holds them all."""
    with tarfile.open(only("*.tar.gz")) as archive:
        return {str(PurePosixPath(*PurePosixPath(each.name).parts[1:])) for each in archive if each.isfile()}


@pytest.fixture(scope="module")
def metadata() -> Message:
    with zipfile.ZipFile(only("*.whl")) as archive:
        (name,) = (each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    package = {name for name in wheel if not name.split("/")[0].endswith(".dist-info")}
    source = {
        path.relative_to(SOURCE.parent).as_posix()
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert package == source
    assert {PurePosixPath(name).suffix or PurePosixPath(name).name for name in package} <= KINDS | {"py.typed"}


def test_the_wheel_holds_the_embedded_model_whole(wheel):
    model = SOURCE / "embedded" / "model"
    weights = sorted(model.rglob("*.safetensors"))
    assert [path.parent.name for path in weights] == ["pe", "text_encoder", "transformer", "vae"]
    for path in weights:
        assert wheel[path.relative_to(SOURCE.parent).as_posix()] == path.stat().st_size > 1_000_000
    assert only("*.whl").stat().st_size < 20 * 2**20


def test_the_wheel_has_its_licence_and_its_command(wheel):
    names = {name.split("/", 1)[1] for name in wheel if ".dist-info/" in name}
    assert names == {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE"}


def test_the_sdist_can_be_tested_and_holds_nothing_of_a_work_folder(sdist):
    for name in ("tests/test_docs.py", "noxfile.py", "pyproject.toml", "LICENSE", "README.md", "docs/index.md"):
        assert name in sdist
    roots = {PurePosixPath(name).parts[0] for name in sdist}
    assert roots <= {
        "benchmarks", "docs", "examples", "integrations", "src", "tests", "tools", ".gitignore", "CHANGELOG.md",
        "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "PKG-INFO", "README.md", "README.zh.md", "SECURITY.md",
        "mkdocs.yml", "noxfile.py", "pyproject.toml",
    }  # fmt: skip
    assert [name for name in sdist if "__pycache__" in name or name.endswith((".pyc", ".log"))] == []


def test_the_readme_of_the_index_has_no_link_into_the_repository(metadata):
    page = metadata.get_payload()
    links = re.findall(r"\]\(([^)]*)\)", page)
    assert [link for link in links if not link.startswith("https://")] == []
    assert "pip install ernie-accel" in page and "pip install 'ernie-accel[torchao]'" in page
    assert not re.search(r"pip install '?\.", page)
    for heading in re.findall(r"^## .*$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE):
        assert heading in page


def test_version_licence_and_citation_agree(metadata):
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == metadata["Version"]
    assert citation["license"] == metadata["License-Expression"]
    released = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert f"\n## {citation['version']} - {citation['date-released']}\n" in released
