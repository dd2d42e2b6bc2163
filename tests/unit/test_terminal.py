"""What a command does when its output goes nowhere: a pipe whose reader has gone, a stream that the shell closed."""

import argparse
import os
import sys

import pytest
from project import ROOT

from visionmtl.cli import run_tool
from visionmtl.config.console import Console


def test_a_reader_that_has_gone_ends_a_command_with_141(monkeypatch: pytest.MonkeyPatch):
    reads, writes = os.pipe()
    os.close(reads)
    stream = os.fdopen(writes, "w")
    monkeypatch.setattr("os.dup2", lambda *_: None)  # the command silences its stdout, which is pytest's here

    def work(_: argparse.Namespace) -> int:
        Console(file=stream).print("a table")
        return 0

    assert run_tool(work, argparse.Namespace()) == 141
    with pytest.raises(BrokenPipeError):  # what was not written is tried once more
        stream.close()


def test_a_command_without_stdout_and_stderr_does_its_work(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)

    def work(_: argparse.Namespace) -> int:
        Console().print("a table")
        print("a line")
        return 0

    assert run_tool(work, argparse.Namespace()) == 0


def test_every_command_prints_by_this_console():
    files = [file for folder in ("visionmtl", "tools") for file in (ROOT / folder).rglob("*.py")]
    others = [file.name for file in files if "rich.console import Console" in file.read_text(encoding="utf-8")]
    assert others == []
