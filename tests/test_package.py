"""The package as a stranger meets it: the wheel, the doors and the command's manners."""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import types
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from gptfast import __version__
from gptfast.commands import COMMANDS, hyphenate, main

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("gptfast", "quantize")


def run(*command: str | Path, cwd: Path, path: Path | None = None) -> str:
    """Run a command that must succeed; PATH, where given, is its only extra import path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{command} failed:\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for needed in ("pip", "hatchling"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"building the wheel without downloading needs {needed} installed")
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    run(*pip, "--wheel-dir", folder, REPOSITORY, cwd=folder)
    [path] = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content and commands; its dependencies stay where they are."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index"]
    run(*pip, "--target", folder, wheel, cwd=folder)
    return folder


def test_wheel_ships_the_packages_and_nothing_else(wheel: Path) -> None:
    """Data files (the bundled checkpoints, C++ sources) are in it as soon as the tree has them."""
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {name for name in names if ".dist-info/" not in name}
    source = {
        path.relative_to(REPOSITORY).as_posix()
        for package in PACKAGES
        for path in (REPOSITORY / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert shipped == source
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_installed_command_runs_from_another_folder(installed: Path, tmp_path: Path) -> None:
    where = run(
        sys.executable,
        "-c",
        "import gptfast; print(gptfast.__file__)",
        cwd=tmp_path,
        path=installed,
    )
    assert Path(where.strip()).is_relative_to(installed), "another gptfast was tested"
    for command in ([installed / "bin" / "gptfast"], [sys.executable, "-m", "gptfast"]):
        version = run(*command, "--version", cwd=tmp_path, path=installed)
        assert version == f"gptfast {__version__}\n"
        overview = run(*command, "--help", cwd=tmp_path, path=installed)
        assert all(f"  {name} " in overview for name in COMMANDS)


def test_help_and_version_do_not_import_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from gptfast.commands import main;"
        "assert main(['--help']) == main(['--version']) == 0; assert 'torch' not in sys.modules"
    )
    run(sys.executable, "-c", code, cwd=tmp_path, path=REPOSITORY)


@pytest.mark.parametrize("folder", ["scripts", "bench"])
def test_no_door_shadows_a_package(folder: str) -> None:
    """`python scripts/x.py` puts scripts/ first on sys.path: a scripts/quantize.py would be
    imported in place of the package quantize."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    requirements = [*project["dependencies"], *(line for extra in extras for line in extra)]
    dependencies = {re.split(r"[^\w-]", line)[0].replace("-", "_") for line in requirements}
    taken = {*PACKAGES, *dependencies, *sys.stdlib_module_names}
    entries = {path.stem for path in (REPOSITORY / folder).glob("*")}
    assert not entries & taken


def probe(
    monkeypatch: pytest.MonkeyPatch, action: Callable[[argparse.Namespace], int]
) -> Callable[..., int]:
    """A command `probe` that exists for this test and does ACTION; returns how to call it."""

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--max-new-tokens", type=int)
        parser.add_argument("--prompt")

    module = types.ModuleType("probe_command")
    vars(module).update(add_arguments=add_arguments, run=action)
    monkeypatch.setitem(sys.modules, "probe_command", module)
    monkeypatch.setitem(COMMANDS, "probe", ("probe_command", "a command for tests"))
    return lambda *options: main(["probe", *options])


def failing(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def action(_: argparse.Namespace) -> int:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("top_p is 2\n  use 0 to 1"), "top_p is 2 use 0 to 1"),
        (FileNotFoundError(2, "No such file", "story.txt"), "No such file: story.txt"),
        (OSError("the hub did not answer"), "the hub did not answer"),
        (MemoryError(), "out of memory"),
    ],
)
def test_user_errors_are_one_line(
    error: Exception,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = probe(monkeypatch, failing(error))
    monkeypatch.delenv("GPTFAST_TRACEBACK", raising=False)
    assert command() == 2
    assert capsys.readouterr() == ("", f"gptfast: error: {line}\n")
    monkeypatch.setenv("GPTFAST_TRACEBACK", "1")
    with pytest.raises(type(error)):
        command()


def test_defects_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyError):
        probe(monkeypatch, failing(KeyError("a defect")))()


def test_interrupt_is_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert probe(monkeypatch, failing(KeyboardInterrupt()))() == 130
    assert capsys.readouterr() == ("", "")


def test_a_closed_pipe_is_quiet() -> None:
    """`gptfast --help | head -0`: without care Python complains at exit, after main returned."""
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-m", "gptfast", "--help"],
        cwd=REPOSITORY,
        stdout=writer,
        stderr=subprocess.PIPE,
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, b"")


@pytest.mark.parametrize("arguments", [["tell"], ["probe", "--max-new"], ["probe", "--prompt"]])
def test_wrong_usage_is_one_line(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    probe(monkeypatch, lambda options: 0)
    try:
        code: object = main(arguments)
    except SystemExit as stop:
        code = stop.code
    output, errors = capsys.readouterr()
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("gptfast: error: ")


def test_underscores_are_accepted_in_names_and_kept_in_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def action(options: argparse.Namespace) -> int:
        assert options.prompt == "--a_b is a_flag"
        return int(options.max_new_tokens)

    command = probe(monkeypatch, action)
    for spelling in ("--max-new-tokens", "--max_new_tokens"):
        assert command(spelling, "7", "--prompt", "--a_b is a_flag") == 7
        assert command(f"{spelling}=7", "--prompt=--a_b is a_flag") == 7
    assert hyphenate(["--a_b", "--", "--c_d"]) == ["--a-b", "--", "--c_d"]
