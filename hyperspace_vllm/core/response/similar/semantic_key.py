"""Requests with a plain question, and the names of such a question beside its RequestKey.

    partition      everything but the question: model, weights, parameters, system prompt, salt, tenant
    canonical key  the partition and the question's canonical form (canonical.py)

Context: an answer may serve another wording of its question only if nothing but the question differs, and only if the
model was asked to answer it, not to process its text. Choice: an allow-list, which fails closed: one user message of
text, at most a system prompt before it, and sampling parameters. Rejected: whole conversations, in which a short
question ("And why?") refers to earlier text. Cost: conversations, and requests with tools or structured output, have
exact hits only.
"""

import re
from collections.abc import Mapping
from typing import Literal

from ...local.similar_messages import Question
from ...records.ids import sha256
from ...records.limits import QUESTION_CHARS_MAX
from ..request_fields import Endpoint
from ..request_key import Uncacheable, canonical_fields, has_surrogates, request_key
from .canonical import CANONICAL_VERSION, canonical_question, is_read
from .guard_words import TEXT_WORK, word_set
from .guards import Mode

Semantic = Literal["off", "strict", "balanced"]

_PARTITION_TAG = b"hyperspace/partition/1"
_CANONICAL_TAG = b"hyperspace/canonical-question/%d" % CANONICAL_VERSION
_SOURCE_TAG = b"hyperspace/wrongness-source/1"
_STRICTNESS: tuple[Semantic, ...] = ("balanced", "strict", "off")

_FIELDS = word_set("""
model messages temperature top_p top_k min_p seed stop max_tokens max_completion_tokens min_tokens ignore_eos
frequency_penalty presence_penalty repetition_penalty cache_salt reasoning_effort include_reasoning
thinking_token_budget chat_template_kwargs
""")


def tightened(server: Semantic, wish: str | None) -> Mode | None:
    """The mode for a request: the server's, or a stricter one that the client wants; None: exact hits only.

    An unknown mode counts as the strictest.
    """
    wanted = "off" if wish is None else wish.strip().lower()
    asked: Semantic = server if wish is None else next((mode for mode in _STRICTNESS if mode == wanted), "off")
    stricter = max(server, asked, key=_STRICTNESS.index)
    return None if stricter == "off" else stricter


def question_of(
    endpoint: Endpoint,
    body: Mapping[str, object],
    model_digest: bytes,
    lora: bytes | None,
    tenant: str,
    acronyms: Mapping[str, str],
    parses: bool = False,
) -> Question | None:
    """The question of a request that has a RequestKey, or None if it isn't plain. Arguments as of `request_key`."""
    messages = body.get("messages")
    if endpoint != "chat" or not isinstance(messages, list) or not 1 <= len(messages) <= 2:
        return None
    if canonical_fields(endpoint, body).keys() - _FIELDS:
        return None
    *before, last = messages
    text = _only_text(last, ("user",))
    if text is None or not text.strip() or len(text) > QUESTION_CHARS_MAX or not is_read(text):
        return None
    if any(not _sets_the_scene(message) for message in before):
        return None
    rest = request_key(endpoint, {**body, "messages": [*before, {"role": "user"}]}, model_digest, lora, tenant, parses)
    if isinstance(rest, Uncacheable):
        return None
    partition = sha256(_PARTITION_TAG, rest)
    canonical = canonical_question(text, acronyms).encode()
    source = sha256(_SOURCE_TAG, model_digest, lora or bytes(32), tenant.encode())
    is_greedy = body.get("temperature") == 0
    return Question(partition, sha256(_CANONICAL_TAG, partition, canonical), text, source, is_greedy)


def _only_text(message: object, roles: tuple[str, ...]) -> str | None:
    """The text of a message that has nothing else."""
    if not isinstance(message, dict) or message.keys() != {"role", "content"} or message["role"] not in roles:
        return None
    content = message["content"]
    if isinstance(content, list) and len(content) == 1:
        (part,) = content
        content = part["text"] if isinstance(part, dict) and part.keys() == {"type", "text"} else None
    return content if isinstance(content, str) and not has_surrogates(content) else None


def _sets_the_scene(message: object) -> bool:
    """Whether a system prompt describes how to answer, and not what to do with the user's text."""
    text = _only_text(message, ("system", "developer"))
    return text is not None and text.isascii() and not TEXT_WORK & set(re.findall(r"[a-z]+", text.lower()))
