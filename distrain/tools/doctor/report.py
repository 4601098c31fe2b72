"""Formats the doctor's results for people and for scripts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from distrain.tools.doctor.examination import Examination
from distrain.tools.doctor.findings import Finding, format_rate


def format_report(examination: Examination, findings: Sequence[Finding]) -> str:
    """Returns the whole report: ranks, links, all-reduce times, versions, GPUs and findings."""
    parts = [_rank_table(examination)]
    if any(link.latency is not None for link in examination.links):
        parts.append(_link_table(examination))
    for timing in examination.all_reduce:
        if timing.points:
            rows = [[f"all-reduce ({timing.medium or timing.backend})", "time", "each rank sends"]]
            for sent, seconds in timing.points:
                rows.append([_format_bytes(sent), f"{1000 * seconds:.3g} ms", format_rate(sent / seconds)])
            parts.append(format_table(rows))
    first = next(iter(examination.facts.values()))
    parts.append("\n".join(f"{name} {version}" for name, version in first.versions.items()))
    for facts in examination.hosts:
        if facts.gpus:
            parts.append("\n".join([f"{facts.host}: {', '.join(facts.gpus)}", *facts.gpu_links]))
    parts.append(format_findings(findings))
    return "\n\n".join(parts) + "\n"


def format_findings(findings: Sequence[Finding]) -> str:
    """Returns each problem and note with its advice, and how many problems there are."""
    lines = []
    for finding in findings:
        lines.append(f"{'WRONG' if finding.wrong else 'note '}  {finding.problem}")
        lines.append(f"       -> {finding.advice}")
    problems = sum(finding.wrong for finding in findings)
    lines.append(f"{problems} problem{'s' if problems != 1 else ''} found" if problems else "no problem found")
    return "\n".join(lines)


def as_json(examination: Examination, findings: Sequence[Finding]) -> dict[str, Any]:
    """Returns the report for scripts, as plain data."""
    return {
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "ranks": [dataclasses.asdict(facts) for facts in examination.facts.values()],
        "pairs": [dataclasses.asdict(link) for link in examination.links],
        "all_reduce": [dataclasses.asdict(timing) for timing in examination.all_reduce],
    }


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Aligns rows of cells in columns as wide as their widest cell."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _rank_table(examination: Examination) -> str:
    rows = [["rank", "host", "interface", "because", "cores", "threads", "GPUs"]]
    for rank in sorted({*range(examination.size), *examination.facts}):
        facts = examination.facts.get(rank)
        if facts is None:
            rows.append([str(rank), "never arrived", "", "", "", "", ""])
            continue
        threads = examination.threads or facts.threads
        rows.append(
            [
                str(rank),
                facts.host,
                f"{facts.interface} {facts.address}".strip(),
                facts.why,
                f"{facts.cores}" if facts.quota is None else f"{facts.cores} (limited to {facts.quota:g})",
                str(threads),
                str(len(facts.gpus)),
            ]
        )
    return format_table(rows)


def _link_table(examination: Examination) -> str:
    rows = [["link", "round trip", "forward", "back", "clock offset"]]
    for link in examination.links:
        if link.sent is not None and link.latency is not None:
            rows.append(
                [
                    f"{examination.facts[link.source].host} - {examination.facts[link.target].host}",
                    f"{1000 * link.latency:.3g} ms",
                    format_rate(link.sent),
                    format_rate(link.received),
                    "-" if link.skew is None else f"{link.skew:+.4f} s",
                ]
            )
    return format_table(rows)


def _format_bytes(count: int) -> str:
    for unit, size in (("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
