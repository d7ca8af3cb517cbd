"""Audit: whether another node's answer is the model's, as scored by this node's engine in one prefill.

A greedy answer has at every position the token that the model rates most likely. So the engine prefills the prompt and
the answer and returns the likelihood of every token (vLLM's `prompt_logprobs`) and of the next one. A token that is
FAR_NATS less likely than the best is *far*, and so is an end where the model would continue. Two engines compute the
same logits except for rounding, which decides only near ties.

A far token alone does not prove a lie: the text is tokenised again, which may give other tokens than those that were
generated. A stop string cuts a token in two, special tokens are hidden, and a model may spell a word in its own way;
clients can cause all of these. So the engine continues from the first far token (`continuing_request`). The answer is
false only if the *text* of that continuation differs from the answer at a position that rounding cannot have decided.

Only plain requests can be scored: greedy, one choice of text, and no option that changes logits or hides tokens. An
answer to such a request that is not a plain answer is never the model's.

/tokenize renders the prompt. It reads fewer fields than the route that answers, and reads messages by other code, so
its prompt may differ, and then an honest answer looks false. Only requests that both render alike are scored, by
allow-lists of fields, of message keys and of template options, and a finding counts only if the route itself confirms
the prompt's ids (`confirming_request`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .request_fields import FIELDS, Endpoint
from .request_key import canonical_fields
from .similar.guard_words import word_set

# e^2: seven times less likely than the best. Of 100 honest answers (float32 by bfloat16) the worst is 0.12.
FAR_NATS = 2.0
CONTINUED_TOKENS = 16  # enough to get past a word that was cut or spelt differently
ALTERNATIVES = 20  # vLLM's own limit, --max-logprobs
Comparison = Literal["agrees", "agrees_so_far", "departs", "unclear"]  # to the rest's end, or to that of the own words
_FIELDS = word_set("model temperature top_p top_k min_p seed stop max_tokens max_completion_tokens")
_PROMPT: dict[Endpoint, frozenset[str]] = {  # a field of the other route would be ignored there, and read by /tokenize
    "completions": frozenset({"prompt"}),
    "chat": frozenset({"messages", "chat_template_kwargs"}),
}
# vLLM's chat route renames `reasoning_content` and rewrites `tool_calls`; /tokenize does neither.
_MESSAGE_KEYS = frozenset({"role", "content", "name"})  # all of them text
_ROLES = frozenset({"system", "developer", "user", "assistant"})
_TEMPLATE_OPTIONS = frozenset({"enable_thinking", "thinking"})  # true or false


@dataclass(frozen=True, slots=True)
class Said:
    """The text of a plain answer, and whether the model or the limit ended it."""

    text: str
    ended_by: Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Score:
    """Of the `tokens` of an answer, including its end, those at `far_at` are far, and the end unless it `ends_well`."""

    tokens: int
    far_at: tuple[int, ...]
    ends_well: bool

    @property
    def far(self) -> int:
        """The number of far tokens."""
        return len(self.far_at) + (not self.ends_well)


def plain_answer(endpoint: Endpoint, answer: object) -> Said | None:
    """The text of an answer that is one choice of text and nothing else; None for any other."""
    match answer:
        case {"choices": [{"finish_reason": "stop" | "length" as ended_by, "text": str(text)}]}:
            return Said(text, ended_by) if endpoint == "completions" else None
        case {"choices": [{"finish_reason": "stop" | "length" as ended_by, "message": dict(message)}]}:
            others = [value for name, value in message.items() if name not in ("role", "content")]
            text = message.get("content") or ""
            is_plain = endpoint == "chat" and isinstance(text, str) and not any(others)
            return Said(text, ended_by) if is_plain else None
    return None


def prompt_of(endpoint: Endpoint, body: Mapping[str, Any]) -> dict[str, Any] | None:
    """The prompt of a request whose answers can be scored, as vLLM's /tokenize takes it; None for any other."""
    fields = _PROMPT.get(endpoint)
    if fields is None or body.get("temperature") != 0:
        return None
    if not (isinstance(body.get("prompt"), str) if endpoint == "completions" else _renders_alike(body)):
        return None
    if canonical_fields(endpoint, body).keys() - _FIELDS - fields:
        return None
    return {name: body[name] for name in ("model", *sorted(fields)) if body.get(name) is not None}


def _renders_alike(body: Mapping[str, Any]) -> bool:
    """Whether /tokenize makes the same prompt of a chat as the route that answers it, in every supported vLLM."""
    messages, options = body.get("messages"), body.get("chat_template_kwargs")
    if not isinstance(messages, list) or not isinstance(options, dict | None):
        return False
    has_plain_options = all(
        name in _TEMPLATE_OPTIONS and isinstance(value, bool) for name, value in (options or {}).items()
    )
    return has_plain_options and all(_is_plain(message) for message in messages)


def _is_plain(message: object) -> bool:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys() <= _MESSAGE_KEYS:
        return False
    return all(isinstance(value, str) for value in message.values()) and message["role"] in _ROLES


def confirming_request(endpoint: Endpoint, body: Mapping[str, Any]) -> dict[str, Any]:
    """The client's own request, for one token, so that its route returns the prompt's token ids."""
    left_out = FIELDS[endpoint].neutral.keys() | FIELDS[endpoint].forbidden | {"max_tokens", "max_completion_tokens"}
    own = {name: value for name, value in body.items() if name not in left_out}
    limit = "max_completion_tokens" if endpoint == "chat" else "max_tokens"
    return own | {limit: 1, "return_token_ids": True}


def confirms(answer: Mapping[str, Any], prompt: Sequence[int]) -> bool:
    """Whether the answer to a confirming request has these ids; LookupError or TypeError if it is not vLLM's."""
    (choice,) = answer["choices"]
    return list(prompt) in (answer.get("prompt_token_ids"), choice.get("prompt_token_ids"))


def scoring_request(model: object, prompt: Sequence[int], answer: Sequence[int]) -> dict[str, Any]:
    """The request to /v1/completions that has the engine score `answer`, in token ids, after `prompt`."""
    request = {"prompt": [*prompt, *answer], "temperature": 0, "max_tokens": 1, "prompt_logprobs": 1}
    return request if model is None else {"model": model, **request}


def score(scored: Mapping[str, Any], prompt_tokens: int, said: Said, body: Mapping[str, Any]) -> Score:
    """The engine's score of an answer to `body`, whose prompt has this number of tokens, one or more.

    LookupError or TypeError if there is no score in it.
    """
    (choice,) = scored["choices"]
    distances = [_distance(place) for place in choice["prompt_logprobs"][prompt_tokens:]]
    far_at = tuple(at for at, distance in enumerate(distances) if distance > FAR_NATS)
    goes_on = choice["finish_reason"] != "stop"
    return Score(len(distances) + 1, far_at, _may_end(said, len(distances), goes_on, body))


def continuing_request(model: object, tokens: Sequence[int]) -> dict[str, Any]:
    """The request to /v1/completions that has the engine continue the prompt and the answer so far, in token ids."""
    request = {"prompt": [*tokens], "temperature": 0, "max_tokens": CONTINUED_TOKENS, "logprobs": ALTERNATIVES}
    return request if model is None else {"model": model, **request}


def rest_of(text: str, beginning: str) -> str | None:
    """The rest of `text` after the detokenised `beginning`, ignoring leading spaces; None if it does not begin so."""
    text, beginning = text.lstrip(), beginning.lstrip()
    return text[len(beginning) :] if text.startswith(beginning) else None


def compare(continued: Mapping[str, Any], rest: str) -> Comparison:
    """Compare the engine's continuation with the rest of an answer; LookupError or TypeError if there is none."""
    (choice,) = continued["choices"]
    ours = choice["text"].lstrip(" ")
    theirs, damaged, _ = rest.lstrip(" ").partition("\N{REPLACEMENT CHARACTER}")
    parted = (at for at, (our, their) in enumerate(zip(ours, theirs, strict=False)) if our != their)
    same = next(parted, min(len(ours), len(theirs)))
    if same == len(theirs):
        return "unclear" if damaged else "agrees"
    if same == len(ours) and choice["finish_reason"] != "stop":
        return "agrees_so_far"
    return "departs" if _departs_clearly(choice["logprobs"], ours, theirs, same) else "unclear"


def _departs_clearly(logprobs: Mapping[str, Any], ours: str, theirs: str, same: int) -> bool:
    """Whether no token that rounding may prefer gives `theirs`, where the texts differ after `same` characters."""
    begins, is_hidden = 0, False
    ranked: Mapping[str, float] = {}
    for token, ranked in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        text = token if begins else token.lstrip(" ")
        at = ours.find(text, begins, begins + len(text) + 1) if text else -1
        is_hidden = at < 0
        if not is_hidden and at + len(text) > same:
            return _all_contradict(ranked, theirs[begins:])
        begins = begins if is_hidden else at + len(text)
    ended_here = is_hidden and begins == len(ours) == same  # by a token that has no text
    return ended_here and _all_contradict(ranked, theirs[begins:])


def _all_contradict(ranked: Mapping[str, float], rest: str) -> bool:
    best = max(ranked.values())
    near = [token for token, logprob in ranked.items() if best - logprob <= FAR_NATS]
    if len(near) == len(ranked):
        return False  # there may be more than are listed
    return not any(_may_be(token.lstrip(" "), rest.lstrip(" ")) for token in near)


def _may_be(token: str, rest: str) -> bool:
    is_damaged = "\N{REPLACEMENT CHARACTER}" in token
    return is_damaged or not token or rest.startswith(token) or token.startswith(rest)


def _may_end(said: Said, tokens: int, goes_on: bool, body: Mapping[str, Any]) -> bool:
    """Whether the answer ends where its model or its limit ends it, as far as that is known."""
    if said.ended_by == "stop":
        return not goes_on or bool(body.get("stop"))
    limit = body.get("max_completion_tokens") or body.get("max_tokens")
    # Special tokens are not in the text, and what is tokenised again may have fewer.
    return not isinstance(limit, int) or tokens >= limit - 2 - limit // 16


def _distance(place: Mapping[str, Mapping[str, Any]]) -> float:
    """The distance of the prompt's own token from the best one; vLLM lists both, or one that is both."""
    own = max(place.values(), key=lambda token: token["rank"])
    return float(max(token["logprob"] for token in place.values()) - own["logprob"])
