"""Which dates prompts contain: an answer must not outlive them.

Context: many chat templates print the day, so the answer to the same request differs tomorrow. Choice: the printed
dates count in the key of the answer, as text; they are computed before the prompt is rendered and again when the answer
is there, and an answer is not stored if they changed in between. Rejected: a shorter TTL, which is still wrong at
midnight. Cost: if a template prints the time of day, or a date in an unknown way, nothing is cached.
"""

import os
import re
from argparse import Namespace
from datetime import datetime
from pathlib import Path

from vllm.config import ModelConfig

from ..core.records.errors import Refused
from ..regular_files import read_regular
from .model_files import source_of

# Besides *.jinja; not every JSON file: a tokenizer's vocabulary may well contain the word.
_TEMPLATES = ("tokenizer_config.json", "chat_template.json", "processor_config.json")
_HEAD_BYTES = 64 << 20
_CLOCK = re.compile(r"strftime|\bdatetime\b|date\.today")  # in code that came with the model
_ASKED_FOR = re.compile(r"strftime_now is (?:not )?defined")
_PRINTED = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>[^"']*)(?P=quote)\s*\)""")
_HARMONY = "%Y-%m-%d"  # in the system message that vLLM makes for gpt-oss, whatever its template says
_MORNING, _NIGHT = datetime(2001, 1, 1), datetime(2001, 1, 1, 23, 59, 59, 999_999)


def printed_dates(model: ModelConfig, args: Namespace) -> tuple[str, ...] | None:
    """The strftime formats of the dates in prompts; None: prompts tell more than the day, or it is unknown."""
    files = _files(model)
    if any(_CLOCK.search(_text(path)) for path in files if path.suffix == ".py" and model.trust_remote_code):
        return None
    texts = [_text(path) for path in files if path.suffix in (".jinja", ".gguf") or path.name in _TEMPLATES]
    if given := str(args.chat_template or ""):
        texts = [_text(Path(given)) if os.path.isfile(given) else given]  # then vLLM uses no other template
    formats = {_HARMONY} if model.hf_config.model_type == "gpt_oss" else set()
    for text in texts:
        plain = _ASKED_FOR.sub("", text.replace('\\"', '"'))
        formats |= {match["format"] for match in _PRINTED.finditer(plain)}
        if "strftime" in _PRINTED.sub("", plain):
            return None
    if any(_MORNING.strftime(each) != _NIGHT.strftime(each) for each in formats):
        return None
    return tuple(sorted(formats))


def dates(formats: tuple[str, ...] | None) -> str | None:
    """The dates that prompts contain now: '' if none, None if unknown."""
    if formats is None:
        return None
    now = datetime.now()  # as `strftime_now` has it: the server's local time
    return "\n".join(now.strftime(each) for each in formats)


def _files(model: ModelConfig) -> list[Path]:
    try:
        return [Path(path) for path in source_of(str(model.tokenizer), model.tokenizer_revision).texts()]
    except Refused:  # then nothing is cached at all
        return []


def _text(path: Path) -> str:
    """The text of a file, or the head of a GGUF file, which contains its template."""
    return read_regular(path, _HEAD_BYTES).decode(errors="replace")
