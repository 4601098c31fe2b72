"""What loggers of files in the run's folder have in common: a resumed run continues the files at its checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod

from typing_extensions import override

from distrain.reporting.loggers.base import Logger


class FileLogger(Logger, ABC):
    """A logger of files in the run's folder.

    What a resumed run logs again is removed first. If that fails, on a full disk for example, each later :meth:`flush`
    tries it again before it writes anything, so that no new value is removed by mistake.
    """

    #: What must still be removed: the arguments of :meth:`rewind`.
    _to_remove: tuple[int, bool] | None = None

    @abstractmethod
    def remove_after(self, step: int, *, mid_epoch: bool) -> None:
        """Removes from the files what :meth:`rewind` says."""

    @abstractmethod
    def write_values(self) -> None:
        """Writes the values that were logged and are not in the files yet; what fails is tried again next time."""

    @abstractmethod
    def close_files(self) -> None:
        """Closes the files; the next value opens them again."""

    @override
    def rewind(self, step: int, *, mid_epoch: bool) -> None:
        self._to_remove = step, mid_epoch
        self.flush()

    @override
    def flush(self) -> None:
        if self._to_remove is not None:
            step, mid_epoch = self._to_remove
            self.remove_after(step, mid_epoch=mid_epoch)
            self._to_remove = None
        self.write_values()

    @override
    def close(self) -> None:
        try:
            self.flush()
        finally:
            self.close_files()
