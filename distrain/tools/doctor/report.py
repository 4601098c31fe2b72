"""What the doctor prints."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from distrain.tools.doctor.findings import Examination, Finding, mbits


def text(found: Examination, findings: Sequence[Finding]) -> str:
    """The whole report."""
    parts = [_ranks(found)]
    if any(pair.latency is not None for pair in found.pairs):
        parts.append(_links(found))
    reductions = [reduction for reduction in found.reductions if reduction.points]
    for reduction in reductions:
        rows = [["all-reduce by " + reduction.backend, "time", "each rank sends at"]]
        for sent, seconds in reduction.points:
            rows.append([_bytes(sent), f"{1000 * seconds:.3g} ms", mbits(sent / seconds)])
        parts.append(table(rows))
    facts = next(iter(found.facts.values()))
    parts.append("\n".join(f"{name} {version}" for name, version in facts.versions.items()))
    for facts in found.hosts:
        if facts.gpus:
            parts.append("\n".join([f"{facts.host}: {', '.join(facts.gpus)}", *facts.gpu_links]))
    parts.append(advice(findings))
    return "\n\n".join(parts) + "\n"


def advice(findings: Sequence[Finding]) -> str:
    """The findings alone: what is wrong, what is worth knowing, and what to type."""
    lines = []
    for finding in findings:
        lines.append(f"{'WRONG' if finding.wrong else 'note '}  {finding.problem}")
        lines.append(f"       -> {finding.advice}")
    wrong = sum(finding.wrong for finding in findings)
    lines.append(f"{wrong} thing{'s' if wrong != 1 else ''} wrong" if wrong else "nothing is wrong")
    return "\n".join(lines)


def as_json(found: Examination, findings: Sequence[Finding]) -> dict[str, Any]:
    """The same for scripts."""
    return {
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "ranks": [dataclasses.asdict(facts) for facts in found.facts.values()],
        "pairs": [dataclasses.asdict(pair) for pair in found.pairs],
        "all_reduce": [dataclasses.asdict(reduction) for reduction in found.reductions],
    }


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _ranks(found: Examination) -> str:
    rows = [["rank", "host", "interface", "because", "cores", "threads", "GPUs"]]
    for rank in sorted({*range(found.size), *found.facts}):
        facts = found.facts.get(rank)
        if facts is None:
            rows.append([str(rank), "never arrived", "", "", "", "", ""])
            continue
        threads = found.threads or facts.threads
        rows.append(
            [
                str(rank),
                facts.host,
                f"{facts.interface} {facts.address}".strip(),
                facts.why,
                f"{facts.cores}" if facts.quota is None else f"{facts.cores} (of which {facts.quota:g} may be used)",
                "-" if threads is None else str(threads),
                str(len(facts.gpus)),
            ]
        )
    return table(rows)


def _links(found: Examination) -> str:
    rows = [["link", "there and back", "there", "back", "clock"]]
    for pair in found.pairs:
        if pair.sent is not None and pair.latency is not None:
            rows.append(
                [
                    f"{found.facts[pair.source].host} - {found.facts[pair.target].host}",
                    f"{1000 * pair.latency:.3g} ms",
                    mbits(pair.sent),
                    mbits(pair.received),
                    "-" if pair.skew is None else f"{pair.skew:+.4f} s",
                ]
            )
    return table(rows)


def _bytes(count: int) -> str:
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
