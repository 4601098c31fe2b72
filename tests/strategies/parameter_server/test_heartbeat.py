"""Signs of life: a peer that ends, falls silent, or says why it goes."""

from __future__ import annotations

import threading

import pytest

from distrain.communication.types import RankName
from distrain.errors import PeerLost
from distrain.strategies.parameter_server.heartbeat import Pulse, Word, last_word_of
from distrain.strategies.parameter_server.protocol import Connection, Kind
from tests.strategies.parameter_server.helpers import pair


class Heard:
    """Keeps the last word of a pulse."""

    def __init__(self, connection: Connection, silence: float = 20) -> None:
        self.words: list[Word] = []
        self._came = threading.Event()
        self.pulse = Pulse(connection, silence, self._hear)

    def _hear(self, word: Word) -> None:
        self.words.append(word)
        self._came.set()

    def word(self) -> Word:
        """The last word, once it has come."""
        assert self._came.wait(10)
        assert len(self.words) == 1
        assert self.pulse.last_word(0) == self.words[0]
        return self.words[0]


def test_two_that_live_hear_each_other_for_longer_than_silence_may_last() -> None:
    with pair() as (near, far):
        first, second = Heard(near, 0.5), Heard(far, 0.5)
        threading.Event().wait(1.5)
        assert first.words == second.words == []
        first.pulse.leave()
        assert second.word() == Word("it was done", left=True)
        assert first.word() == Word("it was done", left=True)


def test_a_connection_that_ends_is_noticed_at_once() -> None:
    with pair() as (near, far):
        heard = Heard(near)
        far.cut()
        assert heard.word() == Word("the connection broke off")


def test_silence_is_noticed_in_time() -> None:
    with pair() as (near, _):
        assert Heard(near, 0.3).word() == Word("no sign of life for 0.3 s")


def test_silence_in_the_middle_of_a_frame_is_silence() -> None:
    with pair() as (near, far):
        heard = Heard(near, 0.3)
        far.socket.sendall(b"dst")
        assert heard.word() == Word("no sign of life for 0.3 s")


def test_a_peer_says_why_it_goes_and_who_is_behind_it() -> None:
    with pair() as (near, far):
        heard, other = Heard(near), Heard(far)
        other.pulse.say("ValueError: wrong", culprit=RankName(2, "elsewhere"))
        other.pulse.cut()
        assert heard.word() == Word("ValueError: wrong", RankName(2, "elsewhere"))
        other.word()


def test_a_worker_hears_that_it_was_given_up() -> None:
    with pair() as (near, far):
        heard, other = Heard(near), Heard(far)
        other.pulse.say("silent", expelled=True)
        assert heard.word() == Word("silent", expelled=True)
        other.pulse.last_word(0)


def test_what_is_no_sign_of_life_ends_it() -> None:
    with pair() as (near, far):
        heard = Heard(near)
        far.send(Kind.PUSH)
        assert heard.word() == Word("the server sent PUSH, not BEAT or NOTICE or BYE")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("wrong\nwith more"), ("ValueError: wrong", None)),
        (KeyboardInterrupt(), ("KeyboardInterrupt", None)),
        (PeerLost(3, "there", "silent"), ("silent", RankName(3, "there"))),
    ],
)
def test_what_peers_are_told_about_an_error(error: BaseException, told: tuple[str, RankName | None]) -> None:
    assert last_word_of(error) == told
