"""The long prompts of the demo and the benches: real documents, cut to a number of words, with questions."""

from bench.machine import ROOT


def document(name: str, words: int) -> str:
    """The first `words` words of a text file of this repository, its line structure kept."""
    text = (ROOT / name).read_text()
    kept, left = [], words
    for line in text.splitlines():
        kept.append(" ".join(line.split()[:left]))
        left -= len(line.split())
        if left <= 0:
            break
    return "\n".join(kept)


def prompt(text: str, question: str, *, chat: bool) -> str:
    """A document and a question about it; the shared prefix is everything before the question.

    `chat` is the turn format of the gemma checkpoint's chat template (it is a base model). The tokenizer adds <bos>.
    """
    if chat:
        return f"user: {text}\n\n{question}\nassistant:"
    return f"{text}\n\nQuestion: {question}\nAnswer:"
