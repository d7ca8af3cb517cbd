"""The runner of transcripts tells what a machine does from what its file says."""

from pathlib import Path

import pytest

from tests.support.machines import transcripts

SAID = """# a comment

> want A B                 # of two
hinted                     # since both are known
fetch A for 299

> at=30 tick
fetch B for 270
"""


@pytest.fixture
def transcript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(transcripts, "ROOT", tmp_path)
    path = tmp_path / "tests" / "core" / "response" / "transcripts" / "two_providers.txt"
    path.parent.mkdir(parents=True)
    return path


def test_a_machine_that_does_something_else_fails_with_the_difference(transcript: Path) -> None:
    transcript.write_text(SAID)
    with pytest.raises(AssertionError, match=r"-fetch A for 299\n\+fetch A for 300"):
        transcripts.check(transcript)


def test_an_effect_that_is_missing_or_too_much_fails(transcript: Path) -> None:
    right = SAID.replace("299", "300")
    transcript.write_text(right)
    transcripts.check(transcript)
    for wrong in (right.replace("fetch B for 270\n", ""), right + "fetch C for 270\n"):
        transcript.write_text(wrong)
        with pytest.raises(AssertionError, match="fetch"):
            transcripts.check(transcript)


def test_a_transcript_without_an_event_fails(transcript: Path) -> None:
    transcript.write_text("# nothing\n")
    with pytest.raises(AssertionError, match=r"two_providers.txt tells of no event"):
        transcripts.check(transcript)


def test_rewriting_keeps_every_comment_of_what_stays_and_names_the_files_that_changed(
    transcript: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transcript.write_text(SAID)
    assert transcripts.main() == 0
    assert transcript.read_text() == SAID.replace("299", "300")
    assert transcripts.main() == 0
    assert capsys.readouterr().out == "tests/core/response/transcripts/two_providers.txt\n"
