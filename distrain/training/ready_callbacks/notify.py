"""``callbacks=[{name: notify, kwargs: {url: …}}]``: says at the end of a run what became of it."""

from __future__ import annotations

import json
import logging
import os
import shlex
import subprocess
import urllib.request
from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from distrain.errors import first_line
from distrain.files.writing import to_json
from distrain.training.callbacks import Callback, RunEnd, RunView

log = logging.getLogger(__name__)

_STATUSES = ("finished", "stopped", "failed")


class Notify(Callback):
    """Calls a web address, a command or both when the run has ended. If that fails, a warning says so.

    Both get a JSON object: ``text``, one line that says all; ``status``; ``reason``; ``run_dir``; ``step``;
    ``summary``, the content of ``summary.json`` of a run that finished. The address gets it as the body of a POST
    request; the key ``text`` is what Slack and Mattermost show. The command gets it as its standard input, and the
    line as the variable ``DISTRAIN_TEXT``; it is run without a shell.

    Args:
        url: The address, ``http://…`` or ``https://…``.
        command: The command: a list of words, or a text that is split as a shell splits it.
        when: Of ``finished``, ``stopped`` and ``failed`` those that are told.
        timeout_seconds: Longest time that each of the two may take.
    """

    only_on_main = True

    def __init__(
        self,
        url: str | None = None,
        command: str | Sequence[str] | None = None,
        when: Sequence[str] = _STATUSES,
        timeout_seconds: float = 10,
    ) -> None:
        words = shlex.split(command) if isinstance(command, str) else list(command or ())
        if not url and not words:
            raise ValueError("needs a url, a command or both")
        if url and not url.startswith(("http://", "https://")):
            raise ValueError(f"url={url} must begin with http:// or https://")
        if isinstance(when, str) or not set(when) <= set(_STATUSES):
            raise ValueError(f"when={when} must be a list of some of {', '.join(_STATUSES)}")
        self._url, self._command, self._when, self._timeout = url, words, tuple(when), timeout_seconds

    @override
    def on_end(self, run: RunView, end: RunEnd) -> None:
        if end.status not in self._when:
            return
        content = _content(run, end)
        if self._url:
            self._try("the address", lambda: self._post(content))
        if self._command:
            self._try(f"the command {self._command[0]}", lambda: self._run(content))

    def _try(self, what: str, call: Any) -> None:
        try:
            call()
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            # An address may contain a secret, so it is not shown.
            log.warning("callback notify: %s failed (%s: %s)", what, type(error).__name__, first_line(error))

    def _post(self, content: dict[str, Any]) -> None:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(str(self._url), to_json(content).encode(), headers)  # noqa: S310 - checked
        with urllib.request.urlopen(request, timeout=self._timeout):  # noqa: S310 - checked
            pass

    def _run(self, content: dict[str, Any]) -> None:
        subprocess.run(  # noqa: S603 - the user's own command
            self._command,
            input=to_json(content).encode(),
            env={**os.environ, "DISTRAIN_TEXT": content["text"]},
            stdout=subprocess.DEVNULL,
            timeout=self._timeout,
            check=True,
        )


def _content(run: RunView, end: RunEnd) -> dict[str, Any]:
    run_dir, score = str(run.runtime.run_dir.resolve()), f"test_{run.task.score}"
    what = f"{score} {end.summary[score]:.4f}" if score in end.summary else end.reason
    text = f"distrain: {run_dir} {end.status} at step {run.progress.step}" + (f": {what}" if what else "")
    return {
        "text": text,
        "status": end.status,
        "reason": end.reason,
        "run_dir": run_dir,
        "step": run.progress.step,
        "summary": json.loads(to_json(end.summary)),
    }
