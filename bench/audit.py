"""Measures audits of a peer's answers: honest greedy answers and altered ones, scored as an API server scores them.

The answers are computed in float32 and scored in bfloat16, as by a peer with other hardware: the distances of honest
tokens come from rounding alone. For each alteration: how many answers lose their entry (a token or more far from the
best), and how many may be a finding (two or more, if the engine's own answer differs there, which isn't computed).

    python -m bench.audit [--model gemma] [--count 100] [--json]

Questions are those of tests/data/semantic_pairs.jsonl. transformers runs the model: vLLM adds nothing to the question.
"""

import argparse
import json
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench import machine
from bench.servers import MODELS
from hyperspace_vllm.core.response.audit import FAR_NATS, Said, Score, score
from hyperspace_vllm.core.response.evidence import FAR_LIE_MIN

TOKENS = 64
BATCH = 16
PROGRESS = Console(stderr=True)
Alter = Callable[[Said, random.Random, list[Said]], Said]


def dropped(said: Said, rng: random.Random, _: list[Said]) -> Said:
    words = said.text.split(" ")
    at = rng.randrange(len(words))
    return replace(said, text=" ".join(words[:at] + words[at + 1 :]))


def swapped(said: Said, rng: random.Random, others: list[Said]) -> Said:
    words, at = said.text.split(" "), rng.randrange(len(said.text.split(" ")))
    return replace(said, text=" ".join([*words[:at], rng.choice(rng.choice(others).text.split(" ")), *words[at + 1 :]]))


def cut(said: Said, _: random.Random, __: list[Said]) -> Said:
    words = said.text.split(" ")
    return Said(" ".join(words[: len(words) // 2]), "stop")


def turned(said: Said, rng: random.Random, others: list[Said]) -> Said:
    return replace(said, text=cut(said, rng, others).text + " However, this is not true at all.")


ALTERATIONS: dict[str, Alter] = {
    "honest": lambda said, rng, others: said,
    "one word left out": dropped,
    "one word exchanged": swapped,
    "cut off half way": cut,
    "half, then a lie": turned,
    "the answer of another question": lambda said, rng, others: rng.choice(others),
}


def greedy(tokenizer: Any, model: Any, prompts: list[str]) -> list[Said]:
    """The answers to prompts."""
    answers: list[Said] = []
    for at in track(range(0, len(prompts), BATCH), "computing", console=PROGRESS):
        batch = tokenizer(prompts[at : at + BATCH], return_tensors="pt", padding=True, add_special_tokens=False)
        out = model.generate(**batch, max_new_tokens=TOKENS, do_sample=False)[:, batch["input_ids"].shape[1] :]
        for row in out:
            ended = bool(set(row.tolist()) & _ends(model))
            answers.append(Said(tokenizer.decode(row, skip_special_tokens=True), "stop" if ended else "length"))
    return answers


def _ends(model: Any) -> set[int]:
    """The tokens that end an answer."""
    ends = model.generation_config.eos_token_id
    return {ends} if isinstance(ends, int) else set(ends)


def scored(tokenizer: Any, model: Any, prompt: str, said: Said) -> tuple[Score, float]:
    """An audit's score of an answer, and how far its farthest token is from the best, in nats."""
    before = tokenizer(prompt, add_special_tokens=False).input_ids
    after = tokenizer(said.text, add_special_tokens=False).input_ids
    logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 :].float()
    likely = torch.log_softmax(logits, -1)
    own = likely[:-1].gather(1, torch.tensor(after, dtype=torch.int64)[:, None])[:, 0]
    best = likely.max(-1)
    ends = best.indices[-1].item() in _ends(model)
    places = [
        {"own": {"logprob": mine, "rank": 1 + (mine < most)}, "best": {"logprob": most, "rank": 1}}
        for mine, most in zip(own.tolist(), best.values[:-1].tolist(), strict=True)
    ]
    choice = {"prompt_logprobs": [None] * len(before) + places, "finish_reason": "stop" if ends else "length"}
    result = score({"choices": [choice]}, len(before), said, {"max_tokens": TOKENS})
    return result, max((place["best"]["logprob"] - place["own"]["logprob"] for place in places), default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="gemma")
    parser.add_argument("--count", type=int, default=100, metavar="N", help="answers")
    parser.add_argument("--json", action="store_true", help="one object a row")
    options = parser.parse_args()
    rng = random.Random(1)
    lines = (machine.ROOT / "tests/data/semantic_pairs.jsonl").read_text().splitlines()
    questions = rng.sample(sorted({json.loads(line)["a"] for line in lines}), options.count)
    tokenizer = AutoTokenizer.from_pretrained(MODELS[options.model], padding_side="left")
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts: list[str] = [
        str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)) for chat in chats
    ]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(MODELS[options.model], dtype=torch.float32)
        answers = greedy(tokenizer, model, prompts)
        model = model.to(torch.bfloat16)
        rows = []
        for name, alter in ALTERATIONS.items():
            found = [
                scored(tokenizer, model, prompt, alter(said, rng, answers[:at] + answers[at + 1 :]))
                for at, (prompt, said) in enumerate(zip(track(prompts, name, console=PROGRESS), answers, strict=True))
            ]
            rows.append(
                {
                    "answers": name,
                    "count": len(found),
                    "entry_dropped": sum(result.far >= 1 for result, _ in found),
                    "finding": sum(result.far >= FAR_LIE_MIN for result, _ in found),
                    "worst_nats": round(max(worst for _, worst in found), 2),
                }
            )
    if options.json:
        for row in rows:
            print(json.dumps(row))
        return
    table = Table(title=f"{options.model}: far is more than {FAR_NATS} nats from the best")
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="left" if column == "answers" else "right")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
