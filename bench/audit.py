"""What an audit of a peer's answer finds: honest greedy answers and altered ones, scored as an API server scores them.

The answers are computed in float32 and scored in bfloat16, as by a peer with other hardware: the distances of honest
tokens are what rounding makes of them. For each alteration: how many answers lose their entry (a token or more far from
the best), and how many convict their signer (two or more).

    python -m bench.audit [--model gemma] [--count 100] [--json]

Questions are those of tests/data/semantic_pairs.jsonl. transformers runs the model: vLLM adds nothing to the question.
"""

import argparse
import json
import random
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from hyperspace_vllm.core.response.audit import FAR_NATS

from . import machine
from .servers import MODELS

TOKENS = 64
BATCH = 16
PROGRESS = Console(stderr=True)
Alter = Callable[[list[str], random.Random, list[list[str]]], list[str]]


def dropped(words: list[str], rng: random.Random, _: list[list[str]]) -> list[str]:
    at = rng.randrange(len(words))
    return words[:at] + words[at + 1 :]


def swapped(words: list[str], rng: random.Random, others: list[list[str]]) -> list[str]:
    at = rng.randrange(len(words))
    return [*words[:at], rng.choice(rng.choice(others)), *words[at + 1 :]]


def turned(words: list[str], _: random.Random, __: list[list[str]]) -> list[str]:
    return [*words[: len(words) // 2], *["However,", "this", "is", "not", "true", "at", "all."]]


ALTERATIONS: dict[str, Alter] = {
    "honest": lambda words, rng, others: words,
    "one word left out": dropped,
    "one word exchanged": swapped,
    "half, then a lie": turned,
    "the answer of another question": lambda words, rng, others: rng.choice(others),
}


def greedy(tokenizer: AutoTokenizer, model: torch.nn.Module, prompts: list[str]) -> list[str]:
    """The answers to prompts, in float32."""
    answers: list[str] = []
    for at in track(range(0, len(prompts), BATCH), "computing", console=PROGRESS):
        batch = tokenizer(prompts[at : at + BATCH], return_tensors="pt", padding=True, add_special_tokens=False)
        out = model.generate(**batch, max_new_tokens=TOKENS, do_sample=False)
        start = batch["input_ids"].shape[1]
        answers += tokenizer.batch_decode(out[:, start:], skip_special_tokens=True)
    return answers


def distances(tokenizer: AutoTokenizer, model: torch.nn.Module, prompt: str, answer: str) -> list[float]:
    """Of each token of the answer from the one that the model thinks most likely, in nats."""
    before = tokenizer(prompt, add_special_tokens=False).input_ids
    after = tokenizer(answer, add_special_tokens=False).input_ids
    logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].float()
    likely = torch.log_softmax(logits, -1)
    return (likely.max(-1).values - likely.gather(1, torch.tensor(after)[:, None])[:, 0]).tolist()


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
    prompts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(MODELS[options.model], dtype=torch.float32)
        words = [answer.split(" ") for answer in greedy(tokenizer, model, prompts)]
        model = model.to(torch.bfloat16)
        rows = []
        for name, alter in ALTERATIONS.items():
            found = [
                distances(tokenizer, model, prompt, " ".join(alter(said, rng, words[:at] + words[at + 1 :])))
                for at, (prompt, said) in enumerate(zip(track(prompts, name, console=PROGRESS), words, strict=True))
            ]
            far = [sum(distance > FAR_NATS for distance in each) for each in found]
            rows.append(
                {
                    "answers": name,
                    "count": len(far),
                    "entry_dropped": sum(each >= 1 for each in far),
                    "signer_convicted": sum(each >= 2 for each in far),
                    "worst_nats": round(max(distance for each in found for distance in each), 2),
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
