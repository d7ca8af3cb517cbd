"""What a template tells of the date is known before it is rendered; what tells more than the day is known to."""

from argparse import Namespace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hyperspace_vllm.vllm_adapter.dated import dates, printed_dates

LLAMA = """{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}
    {%- set date_string = "26 Jul 2024" %}{%- endif %}{%- endif %}"""


def model_at(directory: Path, **others: Any) -> Any:
    config = SimpleNamespace(model_type=others.pop("model_type", "llama"))
    named = {"tokenizer": str(directory), "tokenizer_revision": None, "trust_remote_code": False, "hf_config": config}
    return SimpleNamespace(**named | others)


def printed(directory: Path, given: str | None = None, **others: Any) -> tuple[str, ...] | None:
    return printed_dates(model_at(directory, **others), Namespace(chat_template=given))


@pytest.mark.parametrize(
    ("template", "formats"),
    [
        ("{{ messages }}", ()),
        (LLAMA, ("%d %b %Y",)),
        ("{{ strftime_now('%Y-%m-%d') }}{{ strftime_now( \"%A\" ) }}", ("%A", "%Y-%m-%d")),
        ("{% if strftime_now is not defined %}{% endif %}", ()),
        ("{{ strftime_now('%H:%M:%S') }}", None),
        ("{{ strftime_now('%Y-%m-%d') }}{{ strftime_now('%c') }}", None),
        ("{{ strftime_now('%s') }}", None),
        ("{% set now = strftime_now %}{{ now('%Y') }}", None),
        ("{{ strftime_now(format) }}", None),
        ("{{ strftime_now('%Y' ~ '%H') }}", None),
        ("{{ now.strftime('%Y') }}", None),
    ],
)
def test_the_dates_that_a_template_prints_are_read_from_it(
    tmp_path: Path, template: str, formats: tuple[str, ...] | None
) -> None:
    (tmp_path / "chat_template.jinja").write_text("{{ strftime_now('%c') }}")  # the model's, which isn't used
    given = tmp_path / "given"
    given.write_text(template)
    assert printed(tmp_path, template) == formats
    assert printed(tmp_path, str(given)) == formats


@pytest.mark.parametrize(
    ("place", "text", "formats"),
    [
        ("chat_template.jinja", "{{ strftime_now('%d %b %Y') }}", ("%d %b %Y",)),
        ("additional_chat_templates/tools.jinja", "{{ strftime_now('%Y') }}", ("%Y",)),
        ("tokenizer_config.json", '{"chat_template": "{{ strftime_now(\\"%Y\\") }}"}', ("%Y",)),
        ("tokenizer_config.json", '{"chat_template": [{"template": "{{ strftime_now(\\"%H\\") }}"}]}', None),
        ("chat_template.json", '{"chat_template": "{{ strftime_now(\'%Y\') }}"}', ("%Y",)),
        ("tokenizer.json", '{"model": {"vocab": {"strftime": 1}}}', ()),
        ("tokenization_own.py", "datetime.now().isoformat()", ()),
    ],
)
def test_all_templates_of_a_model_are_read(
    tmp_path: Path, place: str, text: str, formats: tuple[str, ...] | None
) -> None:
    (tmp_path / place).parent.mkdir(exist_ok=True)
    (tmp_path / place).write_text(text)
    assert printed(tmp_path) == formats
    assert (printed(tmp_path, trust_remote_code=True) is None) == (formats is None or place.endswith(".py"))


def test_the_template_inside_a_gguf_is_read(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF\x03" + bytes(9) + b"{{ strftime_now('%d %b %Y') }}" + bytes(range(256)))
    assert printed(file) == ("%d %b %Y",)


def test_what_vllm_itself_tells_gpt_oss_is_known(tmp_path: Path) -> None:
    assert printed(tmp_path, "{{ messages }}", model_type="gpt_oss") == ("%Y-%m-%d",)


def test_a_model_that_is_not_there_tells_nothing(tmp_path: Path) -> None:
    assert printed(tmp_path / "missing") == ()


def test_the_dates_of_a_moment_are_those_that_templates_print() -> None:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    template = _compile_jinja_template("{{ strftime_now('%d %b %Y') }}\n{{ strftime_now('%A') }}")
    day = datetime.now().date()
    while (before := dates(("%d %b %Y", "%A"))) != template.render():
        assert datetime.now().date() != day, before  # midnight was between the two
        day = datetime.now().date()
    assert dates(()) == ""
    assert dates(None) is None
