"""``--help`` of commands shows examples."""

from __future__ import annotations

import pytest

from tests.runs import LAUNCH
from tests.trained import launch


@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("doctor", 'eval "$(python {launch}/doctor.py address=HOST:29400 export=true)"'),
        ("testnet", "python {launch}/testnet.py hosts=2 name=lab"),
    ],
)
def test_help_shows_examples_and_the_file_of_keys(script: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        launch(script, "--help")
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert line.format(launch=LAUNCH) in printed
    assert f"{script}.yaml" in printed
