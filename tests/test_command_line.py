"""`python -m tessera`: however a command ends, the user reads a sentence."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest

from tessera import __main__ as command_line
from tessera.__main__ import main
from tessera.cli.comfy_client import ComfyClient

PYTHON = re.compile(r"Traceback|\[Errno|NoneType|[A-Z]\w+Error\b|KeyError|0x[0-9a-f]{6}")


def ends_with(monkeypatch, error: BaseException) -> None:
    def convert(options):
        raise error

    monkeypatch.setattr(command_line, "_layers", convert)


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), TypeError("'NoneType' object is not subscriptable"), AttributeError("no x"), RecursionError("deep"), AssertionError()],
    ids=lambda error: type(error).__name__,
)
def test_what_nobody_foresaw_names_the_files_and_asks_for_a_report(monkeypatch, capsys, error):
    ends_with(monkeypatch, error)
    assert main(["layers", "in.psd", "out.ora"]) == 1
    out, text = capsys.readouterr()
    assert not out and text.count("\n") == 1 and not PYTHON.search(text)
    assert text.startswith("tessera layers: an error in Tessera itself at work on in.psd and out.ora. Please report it")
    monkeypatch.setenv("TESSERA_DEBUG", "1")
    assert main(["layers", "in.psd", "out.ora"]) == 1
    found = capsys.readouterr().err
    assert found.startswith("Traceback") and type(error).__name__ in found and found.endswith(text)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (FileNotFoundError(2, "No such file or directory", "a.psd"), "a.psd: No such file or directory"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(18, "Invalid cross-device link", "a", None, "b"), "a and b: Invalid cross-device link"),
        (OSError("the folder is full; empty it"), "the folder is full; empty it"),
        (ValueError("a.psd: no PSD; save it again"), "a.psd: no PSD; save it again"),
        (MemoryError(), "memory ran out at work on in.psd and out.ora; close other programs, or ask for less at once"),
        (ModuleNotFoundError("No module named 'av.x'", name="av.x"), "the Python package av is not installed"),
    ],
    ids=["no file", "no space", "two files", "our own OSError", "our own ValueError", "memory", "package"],
)
def test_what_is_known_to_go_wrong_is_said_in_its_own_words(monkeypatch, capsys, error, text):
    ends_with(monkeypatch, error)
    assert main(["layers", "in.psd", "out.ora"]) == 1
    found = capsys.readouterr().err
    assert found.startswith(f"tessera layers: {text}") and found.count("\n") == 1 and not PYTHON.search(found)


def stopped(options):
    raise KeyboardInterrupt


def test_exit_status(monkeypatch, capsys, root):
    """Each of those that the help and the README list; signals below."""
    monkeypatch.setattr(command_line, "_doctor", lambda options: None)
    monkeypatch.setattr(command_line, "_layers", stopped)
    assert main(["doctor"]) == 0
    assert main(["run", "no such file.json"]) == 1
    assert main(["layers", "in.psd", "out.ora"]) == 130
    capsys.readouterr()
    for arguments in ([], ["layer"], ["layers", "in.psd"], ["doctor", "--no-such-option"]):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 2 and capsys.readouterr().err.startswith("usage: ")
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    statuses = ("0 done", "1 not done", "2 a command line", "130 stopped", "143 for SIGTERM")
    for text in (shown, " ".join((root / "README.md").read_text().replace("`", "").split())):
        assert all(status in text[text.index("xit status") :] for status in statuses)


def test_every_command_runs_its_own():
    """One that forgets to say what it runs fails here, and runs nothing else."""
    commands = next(action.choices for action in command_line._parser()._actions if action.dest == "command")
    runs = [parser.get_default("run") for parser in commands.values()]
    assert all(map(callable, runs)) and len(set(runs)) == len(runs)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signals_unwind(monkeypatch, name):
    """So that servers are stopped and what is whole is kept."""
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)}
    unwound = []

    def wait(options):
        try:
            os.kill(os.getpid(), getattr(signal, name))
            signal.pause()
        finally:
            unwound.append(True)

    monkeypatch.setattr(command_line, "_doctor", wait)
    try:
        with pytest.raises(SystemExit) as end:
            main(["doctor"])
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert end.value.code == 128 + getattr(signal, name) and unwound


def test_a_terminal_that_lacks_letters(package_path):
    """What was done is done: a name that cannot be shown as it is does not make it fail."""
    code = "import sys, tessera.__main__ as m; m._doctor = lambda _: print('caf\xe9 \ud800.png'); sys.exit(m.main(['doctor']))"
    environment = {**os.environ, "PYTHONPATH": str(package_path), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code.encode("unicode_escape").decode()], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "caf\\xe9 \\ud800.png\n", "")


def test_doctor_needs_no_package_but_torch(run_python):
    """It is there for those to whom something is missing."""
    hide = "import sys; sys.modules |= dict.fromkeys(('av', 'PIL', 'diffusers', 'psd_tools'))"
    code = f"{hide}; import tessera.__main__ as m; sys.exit(m.main(['doctor']))"
    assert re.search(r"^av +not installed$", run_python("-c", code), re.MULTILINE)


@pytest.mark.parametrize("url", ["", "http://[", "ftp://x", "file:///etc/passwd", "http://"])
def test_what_is_no_address_of_a_server(url):
    with pytest.raises(ValueError, match=r"is no address of a server; write one such as http://"):
        ComfyClient(url)


@pytest.mark.parametrize("url", ["127.0.0.1:9", "127.0.0.1:port", "127.0.0.1:99999", "a b", "http://\n", "data:,x"])
def test_addresses_where_nobody_answers(url):
    try:
        assert not ComfyClient(url).answers()
    except ValueError as error:
        assert "is no address of a server" in str(error)
