"""The names of a request's answers: its key, and its question, which other requests may ask in other words."""

from dataclasses import dataclass
from typing import Any

from ..core.local.similar_messages import Question
from ..core.records.ids import RequestKey, sha256
from ..core.response.answer_ids import ID_CHARS_MAX
from ..core.response.request_key import Uncacheable, request_key
from ..core.response.similar.semantic_key import question_of
from .http_headers import LOAD_REPORT, first_header
from .options import ResponseCacheOptions
from .request_facts import RequestFacts

_OWN_TEMPLATES = ("chat_template", "chat_template_kwargs")  # fields for a client's own template
Names = tuple[bytes, bytes | None, str]


@dataclass(frozen=True, slots=True)
class Naming:
    """Names by the server's current state."""

    facts: RequestFacts
    options: ResponseCacheOptions

    def names(self) -> Names | Uncacheable:
        """Digest of model and date, LoRA digest and tenant, or the reason why the request has no key."""
        facts = self.facts
        digest = self.options.model_digest()
        model = facts.body.get("model") or None
        if self.options.db_path is None:
            return Uncacheable("off")
        if facts.tenant is None:
            return Uncacheable("unknown_tenant")
        if len(facts.named or "") > ID_CHARS_MAX:
            return Uncacheable("request_id")
        if first_header(facts.scope["headers"], LOAD_REPORT):
            return Uncacheable("load_report")  # the engine's load of this moment, beside the answer
        if digest is None or (facts.chooses_usage and self.options.force_include_usage):
            return Uncacheable("no_model_digest" if digest is None else "continuous_usage")
        lora = self.options.loras.get(model) if isinstance(model, str) else None
        served = isinstance(model, str) and model in self.options.served_models
        if model is not None and lora is None and not served:
            return Uncacheable("unknown_model")
        if facts.endpoint == "responses" and not self.options.sees_aborts:
            return Uncacheable("blind")
        if facts.endpoint == "responses" and self.options.keeps_responses and facts.body.get("store") is not False:
            return Uncacheable("retrievable")
        if not self.options.cache_sampled and facts.first_sample_stays:
            return Uncacheable("sampled")
        dates = "" if facts.endpoint == "completions" else self.options.dates()
        if dates is None:
            return Uncacheable("dated")
        return sha256(digest, dates.encode()) if dates else digest, lora, facts.tenant

    def key(self, named: Names, body: dict[str, Any] | None = None) -> RequestKey | Uncacheable:
        """The key of an answer to the request, or to `body` if given, or the reason why there is none."""
        body = self.facts.body if body is None else body
        if any("strftime" in str(body.get(name)) for name in _OWN_TEMPLATES):
            return Uncacheable("dated")
        return request_key(self.facts.endpoint, body, *named, parses=self.options.parses)

    def question(self, named: Names, body: dict[str, Any] | None = None) -> Question | None:
        """The question of a request that has a key, if it may match other wordings. `body` as for `key`."""
        body = self.facts.body if body is None else body
        return question_of(self.facts.endpoint, body, *named, self.options.acronyms, parses=self.options.parses)
