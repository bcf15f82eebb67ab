"""What the data doctor finds in rows of your own, as a table: the clean bill of a real data set, with figures.

python bench/data_findings.py train.jsonl --against medqa=test.jsonl --recipe tutorial-8b --save
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from medcot.admission import diagnose
from medcot.machine import describe_machine
from results import format_table, save_result


def main() -> None:
    """Look, print, and keep it where asked to; file names are kept without their folders."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--against", action="append", default=[])
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--save", action="store_true", help="add the result to RESULTS.md")
    options = parser.parse_args()
    started_s = time.perf_counter()
    diagnosis = diagnose(options.source, options.recipe, options.against, keep_cache=False)
    seconds = time.perf_counter() - started_s
    rows = [[finding.id, finding.severity, f"{finding.count:,}", finding.says] for finding in diagnosis.findings]
    name = Path(options.source).name
    result = f"{name}: {diagnosis.verdict}, {diagnosis.headline}; {seconds:.1f} s"
    text = f"{format_table(['finding', 'severity', 'count', 'says'], rows)}"
    print(f"{text}\n\n{result}")
    if options.save:
        save_result("data_findings", describe_machine(), result, text)


if __name__ == "__main__":
    main()
