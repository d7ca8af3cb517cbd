"""A computed answer: it is judged, sent to the node, and compared with a stored answer that is in doubt."""

from dataclasses import dataclass

from ...contained import report_error
from ...core.local.similar_messages import Question
from ...core.records.ids import RequestKey
from ...core.response.admission import Admitted, NotStored, admit
from .. import checks
from ..aborts import Abort
from ..coalesce import Flight
from ..naming import Names
from ..request_context import RequestContext


@dataclass(frozen=True, slots=True)
class ComputedAnswer:
    """The answer to a request that had `names` when it began; `doubted` is the stored answer to compare it with."""

    context: RequestContext
    key: RequestKey
    names: Names
    question: Question | None
    doubted: checks.ToCompare | None
    abort: Abort

    async def end(self, flight: Flight) -> None:
        """Store what a flight has computed, if it may be stored; once it has ended."""
        try:
            if not flight.from_cache:
                self.context.count_stored(await self._judge(flight))
        except Exception:
            report_error("the response cache: an answer is not stored")

    async def _judge(self, flight: Flight) -> str:
        context, facts, taken = self.context, self.context.facts, flight.collector
        if not flight.complete or taken is None or self.abort.happened:
            return "unfinished"
        if flight.status != 200:
            return "error"

        def judged() -> Admitted | NotStored:
            raw = taken.result() if flight.streams else b"".join(flight.parts)
            return raw if isinstance(raw, NotStored) else admit(facts.endpoint, facts.body, raw)

        answer = await context.read_computed(taken.size if flight.streams else flight.parts_size, judged)
        if isinstance(answer, NotStored):
            return answer.reason
        if context.naming.names() != self.names or context.weights_changed:
            return "model_changed"
        if facts.first_sample_stays and context.cache.recent.newer(self.key, None, context.now_ms()) is not None:
            result = "kept"  # another computation was quicker
        else:
            result = context.hand_over(self.key, answer.body, self.question)
        if self.doubted is not None:
            await checks.report(context, self.doubted, answer.body)
        return result
