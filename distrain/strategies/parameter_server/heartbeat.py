"""Signs of life between two ranks, and their last words."""

from __future__ import annotations

import selectors
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from distrain.communication.types import RankName
from distrain.errors import PeerLost
from distrain.strategies.parameter_server.protocol import Connection, Kind, ProtocolError

#: Signs of life within the time that silence may last.
_BEATS = 5


@dataclass(frozen=True)
class Word:
    """The last that was heard of a peer.

    Attributes:
        reason: Why it is gone.
        culprit: The rank whose failure is the reason, where it is not the peer's own.
        expelled: The peer gave this rank up.
        left: The peer was done and said so.
        stopped: What the peer was stopped by, if it was done before its time.
        fatal: Nobody is to go on without the peer.
    """

    reason: str
    culprit: RankName | None = None
    expelled: bool = False
    left: bool = False
    stopped: str | None = None
    fatal: bool = False


class Pulse:
    """Sends signs of life, listens for the peer's, and tells when they end.

    A killed peer's connection ends at once. A stopped peer, or one whose host or network is gone, falls silent.

    Args:
        connection: For this alone.
        silence_seconds: How long a peer may be silent.
        ended: Called once, by another thread, with the last word.
    """

    def __init__(self, connection: Connection, silence_seconds: float, ended: Callable[[Word], None]) -> None:
        self._connection = connection
        self._silence = silence_seconds
        self._ended = ended
        self._word: Word | None = None
        self._leaves = False
        # A peer that stops in the middle of a frame is silent too.
        connection.socket.settimeout(silence_seconds)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def say(self, reason: str, *, culprit: RankName | None = None, expelled: bool = False, fatal: bool = False) -> None:
        """Tells the peer why this rank will be gone.

        Raises:
            OSError: Nobody hears it.
        """
        told = None if culprit is None else [culprit.rank, culprit.host]
        meta = {"reason": reason, "culprit": told, "expelled": expelled, "fatal": fatal}
        self._connection.send(Kind.NOTICE, meta)

    def leave(self, stopped: str | None = None) -> None:
        """Tells the peer that this rank is done; it answers alike, and that is then its last word.

        Args:
            stopped: By what, if before its time.

        Raises:
            OSError: Nobody hears it.
        """
        self._leaves = True
        self._connection.send(Kind.BYE, {"stopped": stopped} if stopped else None)

    def cut(self) -> None:
        """Ends the connection."""
        self._connection.cut()

    def last_word(self, seconds: float) -> Word:
        """What ended it, after waiting a while for that."""
        self._thread.join(seconds)
        self.cut()
        self._thread.join()
        assert self._word is not None, "the thread ends with a word"
        return self._word

    def _run(self) -> None:
        self._word = self._listen()
        self._ended(self._word)
        self._connection.close()

    def _listen(self) -> Word:
        interval = self._silence / _BEATS
        heard, sent = time.monotonic(), float("-inf")
        with selectors.DefaultSelector() as selector:
            selector.register(self._connection.socket, selectors.EVENT_READ)
            try:
                while True:
                    if time.monotonic() - sent >= interval:
                        self._connection.send(Kind.BEAT)
                        sent = time.monotonic()
                    # A process that was stopped finds its wait over and the peer long silent, but what the peer sent
                    # meanwhile lies there: so it looks again before it counts.
                    readable = selector.select(interval)
                    silent = time.monotonic() - heard > self._silence
                    if readable or (silent and selector.select(0)):
                        frame = self._connection.receive(Kind.BEAT, Kind.NOTICE, Kind.BYE, largest_meta=1 << 16)
                        self._connection.read(frame, 0)
                        heard = time.monotonic()
                        if frame.kind is Kind.BYE:
                            if not self._leaves:
                                self._connection.send(Kind.BYE)
                            stopped = frame.meta.get("stopped")
                            return Word("it was done", left=True, stopped=str(stopped) if stopped else None)
                        if frame.kind is Kind.NOTICE:
                            return _word(frame.meta)
                    elif silent:
                        return self._silent()
            except TimeoutError:
                return self._silent()
            except OSError:
                return Word("the connection broke off")
            except ProtocolError as error:
                return Word(str(error))

    def _silent(self) -> Word:
        return Word(f"no sign of life for {self._silence:g} s")


def _word(meta: dict[str, object]) -> Word:
    culprit = meta.get("culprit")
    named = None
    if isinstance(culprit, list) and len(culprit) == 2 and isinstance(culprit[0], int):
        named = RankName(culprit[0], str(culprit[1]))
    return Word(str(meta.get("reason")), named, expelled=meta.get("expelled") is True, fatal=meta.get("fatal") is True)


def last_word_of(error: BaseException) -> tuple[str, RankName | None]:
    """What to tell peers about an error that ends this rank: the reason, and who is behind it if not this rank."""
    if isinstance(error, PeerLost):
        return error.reason, RankName(error.rank, error.host)
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}".removesuffix(": "), None
