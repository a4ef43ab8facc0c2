"""Call the command line's entry point in this process: the function that the `tersor` script calls."""

import json
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from tersor.cli import main


@dataclass(frozen=True)
class Result:
    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


def tersor(capsys: pytest.CaptureFixture[str], *arguments: object) -> Result:
    """Exit status and output of `tersor ARGUMENTS`."""
    before, sys.argv = sys.argv, ["tersor", *map(str, arguments)]
    capsys.readouterr()
    try:
        main()
        status = 0
    except SystemExit as exit:
        status = int(exit.code or 0)
    finally:
        sys.argv = before
    captured = capsys.readouterr()
    return Result(status, captured.out, captured.err)
