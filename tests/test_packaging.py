"""The wheel: what is in it, that it imports away from the repository, and that every requirement has a pin."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(*command, cwd):
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{command} exited with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # Built from a copy: setuptools leaves a build/ folder beside the sources, and what is left there from an earlier
    # build gets into the next wheel.
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("lightcache_fx", "passes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("dist")
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    run(
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-compile",
        "--target",
        target,
        wheel,
        cwd=target,
    )
    return target


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "lightcache_fx").rglob("*.py")}
    expected |= {f"lightcache_fx/passes/{path.name}" for path in (ROOT / "passes").glob("*.py")}
    assert names == expected | {"lightcache_fx/py.typed", "lightcache_fx/cli/report.html"}


def test_every_folder_with_code_is_a_listed_package():
    folders = {path.parent for top in ("lightcache_fx", "passes") for path in (ROOT / top).rglob("*.py")}
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    listed = {ROOT / settings["package-dir"].get(name, name.replace(".", "/")) for name in settings["packages"]}
    assert folders == listed, "list the new folder in [tool.setuptools] packages"


def test_the_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata_name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = HeaderParser().parsestr(archive.read(metadata_name).decode())
    assert metadata["Name"] == "lightcache-fx"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    required = {Requirement(line) for line in metadata.get_all("Requires-Dist")}
    core = {requirement.name for requirement in required if requirement.marker is None}
    assert core == {"torch", "pydantic", "PyYAML", "rich", "networkx", "sympy"}


def test_the_command_is_installed(wheel):
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
    assert "lightcache-fx = lightcache_fx.cli:main" in archive.read(name).decode()


def test_the_command_needs_no_more_than_its_extra(installed, tmp_path):
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from lightcache_fx.cli import main; main()"
    assert "lightcache-fx" in run("-c", code, installed, "--version", cwd=tmp_path)
    loaded = "import sys; sys.path.insert(0, sys.argv[1]); import lightcache_fx.cli.app; print(*sys.modules)"
    modules = set(run("-c", loaded, installed, cwd=tmp_path).split())
    assert not modules & {"diffusers", "transformers", "skimage", "imageio"}, "import them where they are used"


def test_the_installed_wheel_imports_away_from_the_repository(installed, tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import lightcache_fx, lightcache_fx.passes\n"
        "print(lightcache_fx.__file__); print(lightcache_fx.passes.__file__)\n"
        "print('diffusers' in sys.modules)"
    )
    package, passes, has_diffusers = run("-c", code, installed, cwd=tmp_path).splitlines()
    assert Path(package) == installed / "lightcache_fx" / "__init__.py"
    assert Path(passes) == installed / "lightcache_fx" / "passes" / "__init__.py"
    assert has_diffusers == "False", "diffusers is an extra: import it where it is used"


def pins():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_every_requirement_has_a_pin_that_meets_it():
    pinned = {canonical(name): version for name, version in pins().items()}
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    for requirement in map(Requirement, [*PROJECT["dependencies"], *extras]):
        if canonical(requirement.name) != PROJECT["name"]:
            assert pinned[canonical(requirement.name)] in requirement.specifier, str(requirement)


def test_pins_hold_everywhere():
    assert not [version for version in pins().values() if not re.fullmatch(r"[0-9]+(\.[0-9]+)*", version)]


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()
