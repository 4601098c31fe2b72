"""The certificate: what was compared, how far it differs, within which limits; as JSON and as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from distrain.files.writing import to_json
from distrain.health.mesh_place import sizes_in_words
from distrain.verification.comparison import THE_RANKS, Verdict

#: The file's name, and the version of its format.
FILE, FORMAT = "certificate.json", 1
EQUAL, DIFFERENT, BY_DESIGN = "equal", "different", "different by design"


@dataclass(frozen=True)
class Phase:
    """The comparison in one number format.

    Attributes:
        precision: Value of ``trainer.precision``.
        verdicts: One for each quantity.
        products: The format to which factors of matrix products and convolutions may have been rounded.
        resumed_from: The step of the checkpoint from which the second half was done again; ``None``: it was not.
        resumed_bitwise: Whether it gave the same bits as the run that was not interrupted.
        resumed: The verdicts on it.
        remarks: What a reader must know.
    """

    precision: str
    verdicts: list[Verdict]
    products: str
    resumed_from: int | None = None
    resumed_bitwise: bool = False
    resumed: list[Verdict] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether everything is within its limits, also after the resume."""
        return all(verdict.equal for verdict in (*self.verdicts, *self.resumed))


@dataclass(frozen=True)
class Parting:
    """Where the runs part, and why as far as can be told.

    Attributes:
        precision: In which runs.
        step: The first step that differs.
        quantity: What differs first in it.
        where: The tensor, metric or sample.
        value: By how much, relatively.
        limit: What was allowed.
        module: The first module in forward order whose outputs differ, or of the first differing parameter in backward
            order; empty where it is not known.
        module_type: Its class.
        direction: ``forward``, ``backward``, or empty.
        cause: Name of the cause; empty where none is recognised.
        why: The cause in words, with what to do.
        only_in: Who alone has it, ``one process`` or ``the ranks``; empty if both do.
    """

    precision: str
    step: int
    quantity: str
    where: str
    value: float
    limit: float
    module: str = ""
    module_type: str = ""
    direction: str = ""
    cause: str = ""
    why: str = ""
    only_in: str = ""

    def lines(self) -> list[str]:
        """The parting in words."""
        place = f" ({self.where})" if self.where else ""
        by = f"differs by {self.value:.1e}, {self.limit:.1e} is allowed"
        if self.only_in:
            by = f"only {self.only_in} {'have' if self.only_in == THE_RANKS else 'has'} it"
        found = [f"parts at step {self.step} in {self.precision}: {self.quantity}{place}: {by}"]
        if self.module_type:
            name = self.module or "the model itself"
            first = "first module in forward order" if self.direction == "forward" else "place in the backward pass"
            found.append(f"{first}: {name} ({self.module_type})")
        why = f"{self.cause}: {self.why}" if self.cause else "no cause of the table is recognised"
        found.append(f"why: {why}" + (f"; {self.why}" if self.why and not self.cause else ""))
        return found


@dataclass(frozen=True)
class Certificate:
    """What a verification came to.

    Attributes:
        verdict: ``equal``, ``different``, or ``different by design``.
        statement: What a run that is not meant to be equal promises instead.
        measured: What was measured of such a run.
        phases: The comparison in each number format.
        parting: Where the runs part, if they do.
        steps: Updates of each run.
        choices: Names of the main choices.
        ranks: Number of ranks.
        mesh: Numbers of ranks along the dimensions in which they are arranged, from the outermost one on.
        changed: What differs from the user's configuration, in words.
        bytes_per_step: Sent by all ranks together in a step of the asked run, by kind of collective.
        origin: Command, versions, hosts, hash of the configuration.
    """

    verdict: str
    statement: list[str]
    measured: dict[str, Any]
    phases: list[Phase]
    parting: Parting | None
    steps: int
    choices: Mapping[str, Any]
    ranks: int
    mesh: Mapping[str, int]
    changed: Mapping[str, str]
    bytes_per_step: Mapping[str, float]
    origin: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        """Whether what was promised holds."""
        return self.verdict != DIFFERENT

    def to_plain(self) -> dict[str, Any]:
        """The content of ``certificate.json``."""
        plain = asdict(self)
        phases = plain.pop("phases")
        for phase, own in zip(self.phases, phases, strict=True):
            own["equal"] = phase.equal
        return {"format": FORMAT, "verdict": plain.pop("verdict"), "passed": self.passed, **plain, "phases": phases}

    def write(self, folder: Path) -> Path:
        """Writes the file; returns its path."""
        path = folder / FILE
        path.write_text(to_json(self.to_plain()))
        return path

    def lines(self) -> list[str]:
        """The certificate for a terminal."""
        choices = self.choices
        compressed = "" if choices["compression"] == "none" else f" with compression={choices['compression']}"
        mesh = sizes_in_words(self.mesh)
        strategy = choices["strategy"] + (f" ({mesh})" if mesh else "")
        run = f"{strategy}{compressed} on {self.ranks} ranks, {self.steps} steps of {choices['model']}"
        formats = " and ".join(phase.precision for phase in self.phases)
        if self.verdict == EQUAL:
            return [f"EQUAL: {run} on {choices['data']} is the training of one process, in {formats}", *self._table()]
        if self.verdict == BY_DESIGN:
            lines = [f"NOT MEANT TO BE EQUAL: {run} on {choices['data']}"]
            lines += [f"  {line}" for line in self.statement]
            return [*lines, *(f"  measured: {key}: {value}" for key, value in self.measured.items()), *self._table()]
        lines = [f"NOT EQUAL: {run} on {choices['data']} is not the training of one process"]
        if self.parting is not None:
            lines += [f"  {line}" for line in self.parting.lines()]
        return [*lines, *self._table()]

    def _table(self) -> list[str]:
        rows = [("", "", "largest difference", "limit", "where")]
        for phase in self.phases:
            for verdict in phase.verdicts:
                if verdict.quantity == "buffers" and not verdict.compared:
                    continue  # the model has none
                rows.append((phase.precision, verdict.quantity, *_cells(verdict, self.verdict == BY_DESIGN)))
            if phase.resumed_from is not None:
                rows.append((phase.precision, f"resumed at step {phase.resumed_from}", self._resumed(phase), "", ""))
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True)) for row in rows]
        remarks = [f"  {phase.precision}: {remark}" for phase in self.phases for remark in phase.remarks]
        return [f"  {line.rstrip()}" for line in lines] + remarks

    def _resumed(self, phase: Phase) -> str:
        """What became of the run that was resumed in the middle."""
        if phase.resumed_bitwise:
            return "the same bits"
        if self.verdict == BY_DESIGN:
            return "other bits"
        worst = next((verdict for verdict in phase.resumed if not verdict.equal), None)
        return "within the limits" if worst is None else f"differs in {worst.quantity}"


def _cells(verdict: Verdict, by_design: bool) -> tuple[str, str, str]:
    found = verdict.largest
    if found is None:
        return "not compared", "", ""
    if found.only_in:
        limit = "exact" if verdict.limit == 0 else "" if by_design else f"{verdict.limit:.1e}"
        return f"only in {found.only_in}", limit, _place(found.where, found.step) + ("" if by_design else "  <-")
    if verdict.limit == 0:
        shown = "none" if found.value == 0 else "differs"
        return shown, "exact", _place(found.where, found.step) if found.value else ""
    mark = "" if verdict.equal or by_design else "  <-"
    return f"{found.value:.1e}", "" if by_design else f"{verdict.limit:.1e}", _place(found.where, found.step) + mark


def _place(where: str, step: int) -> str:
    return f"{where}, step {step}" if where else f"step {step}"
