"""Which vLLM releases run which features: what test runs recorded, as a table in docs/operations.md.

A test says with `@pytest.mark.feature(name)` what its outcome tells of the vLLM that it ran with (`release=...`: of
another one). tests/conftest.py writes the outcomes to build/results/<release>.json; `make support-table` takes them
over into docs/support.json and renders that. What no run has recorded is not shown.
"""

import json
import sys
from collections.abc import Iterable, Mapping

from tests.support.paths import ROOT

RESULTS = ROOT / "build" / "results"
RECORD = ROOT / "docs" / "support.json"
PAGE = ROOT / "docs" / "operations.md"
BEGIN, END = "<!-- from docs/support.json, by make support-table -->\n", "<!-- end -->\n"

Outcomes = Mapping[str, Mapping[str, str]]  # feature -> test -> "passed", "failed" or "skipped"
Record = dict[str, dict[str, str]]  # release -> feature -> what the table says


def add_results(release: str, outcomes: Outcomes) -> None:
    """Merge one run's outcomes into what earlier runs wrote."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    file = RESULTS / f"{release}.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    for feature, tests in outcomes.items():
        known.setdefault(feature, {}).update(tests)
    file.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")


def verdict(outcomes: Iterable[str]) -> str:
    """What one cell says: a single failure spoils it; where vLLM makes us decline, the tests are skipped."""
    seen = set(outcomes)
    return "no" if "failed" in seen else "yes" if "passed" in seen else "declined"


def render(record: Record) -> str:
    """The table: a row a feature, a column a release."""
    releases = sorted(record)
    features = sorted({feature for cells in record.values() for feature in cells})
    lines = [f"| | {' | '.join(releases)} |", f"|---|{'---|' * len(releases)}"]
    lines += [f"| {each} | {' | '.join(record[release].get(each, '') for release in releases)} |" for each in features]
    return "\n".join(lines) + "\n"


def table_of(page: str) -> str:
    """The table as the page has it."""
    return page.partition(BEGIN)[2].partition(END)[0]


def main() -> int:
    """Take over what build/results holds, and rewrite the table."""
    record: Record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for file in sorted(RESULTS.glob("*.json")):
        cells = record.setdefault(file.stem, {})
        cells.update({name: verdict(tests.values()) for name, tests in json.loads(file.read_text()).items()})
    RECORD.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    page = PAGE.read_text()
    PAGE.write_text(page.replace(BEGIN + table_of(page) + END, BEGIN + render(record) + END))
    return 0


if __name__ == "__main__":
    sys.exit(main())
