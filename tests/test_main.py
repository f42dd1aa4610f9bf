"""`lightllm COMMAND`: picks the program, imports it late, passes the rest on."""

import sys
import types

import pytest

import lightllm
from lightllm import __main__ as entry
from lightllm.server import api_server


def test_all_is_sorted_and_true():
    assert lightllm.__all__ == sorted(lightllm.__all__)
    assert all(hasattr(lightllm, name) for name in lightllm.__all__)


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["help"]])
def test_help(argv, capsys):
    assert entry.main(argv) == 0
    output = capsys.readouterr().out
    assert all(f"lightllm {command}" in output for command in entry.COMMANDS)


def test_version(capsys):
    assert entry.main(["--version"]) == 0
    assert capsys.readouterr().out == f"lightllm {lightllm.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "needle"), [([], "missing"), (["serv"], "did you mean serve"), (["x"], "'x'")]
)
def test_wrong_command(argv, needle, capsys):
    assert entry.main(argv) == 2
    output = capsys.readouterr()
    assert needle in output.err
    assert output.out == ""


@pytest.mark.parametrize("command", ["chat", "bench", "doctor"])
def test_other_programs_get_the_rest(command, monkeypatch):
    got = []

    def main(argv, *loaders):
        got.append((argv, loaders))
        return 7

    monkeypatch.setitem(sys.modules, entry.COMMANDS[command], types.SimpleNamespace(main=main))
    assert entry.main([command, "--url", "u"]) == 7
    # The benchmark client may not import what opens a tokenizer, so it is handed the function.
    assert got == [(["--url", "u"], (entry.load_tokenizer,) if command == "bench" else ())]


def test_serve_takes_a_model(monkeypatch, capsys):
    assert entry.main(["serve", "/no/such/model"]) == 3
    assert entry.main(["serve", "/no/such/model", "--model_dir", "/other"]) == 2
    assert "MODEL and --model_dir: given twice" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["lightllm", "serve", "--version"])
    assert entry.main() == 0


def test_api_server_takes_no_bare_model(capsys):
    assert api_server.main(["model"]) == 2
    assert "unexpected argument 'model'" in capsys.readouterr().err
