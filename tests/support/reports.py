"""What the command makes of a sweep's folder: its page, its findings and its table."""

from pathlib import Path

from jaxflat.analysis.comparison import read_comparison
from jaxflat.analysis.page import document, evidence, findings, tables


def report_of(folder: Path) -> Path:
    comparison = read_comparison(folder)
    return document.write_report(folder, comparison, evidence.examine(comparison))


def lines_of(folder: Path) -> list[str]:
    comparison = read_comparison(folder)
    return findings.console_lines(comparison, evidence.examine(comparison).verdicts)


def table_of(folder: Path) -> list[list[str]]:
    return tables.summary_table(read_comparison(folder))
