"""The files of words that the guards read, and whether they are installed with the package."""

import re
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

from hyperspace_vllm.core.response.similar.guard_words import table
from tests.support.paths import ROOT

SIMILAR = ROOT / "hyperspace_vllm" / "core" / "response" / "similar"
NAMES = sorted(path.stem for path in (SIMILAR / "words").iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_the_lines_of_a_file_are_lower_case_unique_and_sorted(name: str) -> None:
    lines = table(name).splitlines()
    assert lines
    assert lines == sorted(set(lines))
    assert lines == [" ".join(line.lower().split()) for line in lines]


@pytest.mark.parametrize("name", NAMES)
def test_the_words_of_a_line_are_sorted_and_no_word_is_in_two_lines(name: str) -> None:
    lines = table(name).splitlines()
    if name.endswith("antonyms"):  # a word may have several opposites
        sides = [side.split() for line in lines for side in line.split(" | ")]
        assert all(line.count("|") == 1 for line in lines)
        assert sides == [sorted(set(side)) for side in sides]
        return
    if name == "kinds":  # words of one kind, those of one meaning with "/" between
        assert all(line.split() == sorted(line.split()) for line in lines)
        classes = [spellings.split("/") for line in lines for spellings in line.split()]
    else:
        classes = [line.split() for line in lines]
    assert all(others == sorted(others) for _, *others in classes)  # the first stands for the others
    words = [word for each in classes for word in each]
    assert len(words) == len(set(words))


def test_every_file_is_read_once_and_no_other() -> None:
    code = "".join(path.read_text() for path in SIMILAR.glob("*.py"))
    assert sorted(re.findall(r'\btable\("(\w+)"\)', code)) == NAMES


@pytest.mark.io
def test_the_wheel_has_every_file(tmp_path: Path) -> None:
    build = "from scikit_build_core.build import build_wheel; build_wheel({!r}, {{'wheel.cmake': 'false'}})"
    subprocess.run([sys.executable, "-c", build.format(str(tmp_path))], cwd=ROOT, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with ZipFile(wheel) as archive:
        installed = {Path(each) for each in archive.namelist()}
    folder = SIMILAR.relative_to(ROOT) / "words"
    assert {folder / f"{name}.txt" for name in NAMES} <= installed
