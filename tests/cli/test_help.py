"""Help, exit codes, and what an error looks like."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import typer

from blip2_search import __version__
from blip2_search.indexes.errors import StoreMissingError

COMMANDS = ["index", "query", "info", "models", "demo", "train"]
HEAVY = ["torch", "transformers", "pyarrow", "numpy", "PIL", "rich", "matplotlib"]
CHECK = f"""
import sys
from blip2_search.cli.app import app
try:
    app(sys.argv[1:], prog_name="blip2-search")
except SystemExit as end:
    loaded = [name for name in {HEAVY} if name in sys.modules]
    sys.exit(f"loaded {{loaded}}" if loaded else end.code)
"""


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in COMMANDS)])
def test_help_loads_nothing_heavy(arguments):
    command = [sys.executable, "-c", CHECK, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)])
def test_help_has_examples_as_they_were_written(run, arguments):
    help_text = run(*arguments, "--help").stdout
    _, examples = help_text.split("Examples:\n")
    assert examples.startswith("    blip2-search ")


def test_no_arguments_is_help(run):
    done = run(code=2)
    assert "Usage: " in done.stdout + done.stderr


def test_version(run):
    assert run("--version").stdout == f"blip2-search {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["sing"],
        ["index"],
        ["index", "photos", "--batch-size", "0"],
        ["query", "a dog", "--tune"],
        ["query", "a dog", "-k", "0"],
        ["query", "a dog", "--rerank", "-1"],
    ],
)
def test_wrong_usage_is_2(run, engine, arguments):
    done = run(*arguments, code=2)
    assert done.stdout == ""
    assert "Error: " in done.stderr
    assert not engine.calls


def test_an_error_is_one_sentence(run, engine):
    engine.error = StoreMissingError("there is no index: make one with `blip2-search index`")
    done = run("info", code=1)
    assert done.stdout == ""
    assert done.stderr == "error: there is no index: make one with `blip2-search index`\n"


def test_an_error_of_the_system_is_one_sentence(run, engine):
    engine.error = PermissionError(13, "Permission denied", "/data/index")
    assert run("info", code=1).stderr == "error: [Errno 13] Permission denied: '/data/index'\n"


@pytest.mark.parametrize("arguments", [["--verbose", "info"], ["info", "--verbose"]])
def test_verbose_shows_the_traceback(run, engine, arguments):
    engine.error = StoreMissingError("there is no index")
    shown = run(*arguments, code=1).stderr
    assert shown.startswith("Traceback")
    assert shown.endswith("error: there is no index\n")
    assert "Traceback" not in run("info", code=1).stderr  # and only where it was asked for


def test_ctrl_c_is_130(run, engine):
    engine.error = KeyboardInterrupt()
    done = run("query", "a dog", code=130)
    assert (done.stdout, done.stderr) == ("", "interrupted\n")


def test_a_bug_is_not_hidden(run, engine):
    engine.error = ZeroDivisionError()
    assert isinstance(run("info", code=1).exception, ZeroDivisionError)


def test_warnings_of_the_project_go_to_stderr(run, engine, monkeypatch):
    from blip2_search.cli.options import log

    def search(*_, **__):
        log.getChild("retrieval.engine").warning("a.jpg: gone")
        return []

    monkeypatch.setattr(engine, "search", search)
    assert "blip2-search: a.jpg: gone\n" in run("query", "a dog", code=1).stderr


@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
def test_a_closed_pipe_is_quiet():
    code = (
        "from blip2_search.retrieval import engine\n"
        "hit = engine.Hit(rank=1, path='x' * 999, score=1.0, itc=1.0, itm=None)\n"
        "class Fake:\n"
        "    def __init__(self, *_, **__): pass\n"
        "    def search(self, *_, **__): return [hit] * 9999\n"
        "engine.SearchEngine = Fake\n"
        "import sys\n"
        "from blip2_search.cli.app import main\n"
        "sys.argv = ['blip2-search', 'query', 'a dog', sys.argv[1]]\n"
        "main()\n"
    )
    for form in ("--paths", "--json", "--verbose"):
        command = [sys.executable, "-c", code, form]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        child.stdout.read(10)
        child.stdout.close()
        with child.stderr:
            assert child.stderr.read() == b""
        child.wait()


def test_options_of_the_same_name_are_the_same_everywhere():
    from blip2_search.cli.app import app

    group = typer.main.get_command(app)
    options = {
        (parameter.name, tuple(parameter.opts), parameter.metavar)
        for name in ("index", "query", "info")
        for parameter in group.commands[name].params
        if parameter.name in ("index", "model", "device", "verbose")
    }
    assert len(options) == 4
