"""Wheel and source distribution hold what the checkout holds, under one name."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build both from a copy of what is tracked, and the wheel from the source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder


def test_the_wheel_has_engine_alone_at_the_top(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (top,) = [name for name in names if name.endswith("top_level.txt")]
        assert archive.read(top).decode().split() == ["engine"]
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"engine"}
    files = [*(ROOT / "plugins").rglob("*.py"), *(ROOT / "recipes").rglob("*.yaml")]
    files += [file for file in (ROOT / "recipes").glob("embedded*/*") if file.is_file()]
    missing = {f"engine/{file.relative_to(ROOT).as_posix()}" for file in files} - set(names)
    assert not missing


def test_the_source_distribution_builds_the_same(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "plugins/load/transformers.py"} <= names


def test_the_wheel_runs_where_the_checkout_is_not(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    place = built / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place)]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    code = (
        f"import sys; sys.path.insert(0, {str(place)!r})\n"
        "import engine\n"
        f"assert engine.__file__.startswith({str(place)!r}), engine.__file__\n"
        "with engine.build(engine.compose('tiny', ['decode.max_new_tokens=4'])) as session:\n"
        "    print(session.generate('def add(a, b):').token_ids)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=built, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[")
