"""The table of releases and features says what runs recorded."""

import ast
import json

from tests import support_table as support
from tests.support.paths import ROOT

TESTS = ROOT / "tests"


def labels() -> set[str]:
    """The names of features that tests bear; up to the first brace where they are made of parts."""
    found = set()
    for path in TESTS.glob("[!i]*/**/test_*.py"):  # interop has packages of others
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.feature":
                name = node.args[0]
                part = name.values[0] if isinstance(name, ast.JoinedStr) else name
                assert isinstance(part, ast.Constant)
                found.add(str(part.value))
    return found


def test_the_page_shows_what_was_recorded() -> None:
    assert support.table_of(support.PAGE.read_text()) == support.render(json.loads(support.RECORD.read_text()))


def test_what_was_recorded_is_what_tests_still_say() -> None:
    recorded = {feature for cells in json.loads(support.RECORD.read_text()).values() for feature in cells}
    said = tuple(labels())
    assert [name for name in recorded if not name.startswith(said)] == []


def test_one_failure_spoils_a_cell_and_skipped_tests_alone_decline() -> None:
    assert support.verdict(["passed", "failed", "skipped"]) == "no"
    assert support.verdict(["passed", "skipped"]) == "yes"
    assert support.verdict(["skipped"]) == "declined"


def test_a_cell_is_empty_where_nothing_was_run() -> None:
    table = support.render({"0.2": {"a": "yes"}, "0.3": {"a": "no", "b": "yes"}})
    assert table.splitlines()[2:] == ["| a | yes | no |", "| b |  | yes |"]
