"""vLLM's source, read without importing it: the release that can't run here is checked by its source."""

import ast
from collections.abc import Iterator
from pathlib import Path

REQUEST_MODELS = {
    "completions": ("entrypoints/openai/completion/protocol.py", "CompletionRequest"),
    "chat": ("entrypoints/openai/chat_completion/protocol.py", "ChatCompletionRequest"),
    "responses": ("entrypoints/openai/responses/protocol.py", "ResponsesRequest"),
    "messages": ("entrypoints/anthropic/protocol.py", "AnthropicMessagesRequest"),
    "embeddings": ("entrypoints/pooling/embed/protocol.py", "EmbeddingCompletionRequest"),
    "rerank": ("entrypoints/pooling/scoring/protocol.py", "RerankRequest"),
    "score": ("entrypoints/pooling/scoring/protocol.py", "ScoreRequest"),
}
NO_DEFAULT = object()


class VllmSource:
    """A release's Python files; `root` holds the directory `vllm`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def tree(self, path: str) -> ast.Module:
        """One file, by its path in the package."""
        return ast.parse((self.root / "vllm" / path).read_text())

    def classes(self, path: str, name: str) -> Iterator[ast.ClassDef]:
        """The class that a module means by `name`, then its bases; for a union each of its classes."""
        for node in self.tree(path).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                yield node
                for base in node.bases:
                    if isinstance(base, ast.Name):
                        yield from self.classes(path, base.id)
            elif isinstance(node, ast.ImportFrom) and name in [alias.asname or alias.name for alias in node.names]:
                found = self._module(path, node)
                yield from self.classes(found, name) if found else ()
            elif isinstance(node, ast.AnnAssign | ast.Assign) and name in _assigned(node) and node.value is not None:
                for part in ast.walk(node.value):
                    if isinstance(part, ast.Name) and part.id != name:
                        yield from self.classes(path, part.id)

    def fields(self, path: str, name: str) -> dict[str, object]:
        """The fields of a pydantic model and their defaults; a default that isn't plain is given as its source."""
        found: dict[str, object] = {}
        for node in self.classes(path, name):
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                    field = line.target.id
                    if not field.startswith("_") and "ClassVar" not in ast.unparse(line.annotation):
                        found.setdefault(field, _default(line.value))
        return found

    def _module(self, path: str, node: ast.ImportFrom) -> str | None:
        """The path of the module that an import names, if it is vLLM's own."""
        names = (node.module or "").split(".")
        if node.level:
            names = [*Path(path).parts[: -node.level], *filter(None, names)]
        elif names.pop(0) != "vllm":
            return None
        plain = "/".join(names)
        return f"{plain}.py" if (self.root / "vllm" / f"{plain}.py").is_file() else f"{plain}/__init__.py"


def _assigned(node: ast.AnnAssign | ast.Assign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _default(value: ast.expr | None) -> object:
    if value is None:
        return NO_DEFAULT
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "Field":
        named = {keyword.arg: keyword.value for keyword in value.keywords}
        if "default_factory" in named:
            return {"list": [], "dict": {}}.get(ast.unparse(named["default_factory"]), NO_DEFAULT)
        value = value.args[0] if value.args else named.get("default")
        if value is None:
            return NO_DEFAULT
    try:
        return None if ast.unparse(value) == "..." else ast.literal_eval(value)
    except ValueError:
        return ast.unparse(value)


def interface(node: ast.ClassDef) -> list[str]:
    """One line per public member: its parameters' names, kinds and defaults (annotations vary, meaning doesn't)."""
    lines = []
    for member in node.body:
        if not isinstance(member, ast.FunctionDef) or (member.name.startswith("_") and member.name != "__init__"):
            continue
        for each in ast.walk(member.args):
            if isinstance(each, ast.arg):
                each.annotation = None
        is_property = any(ast.unparse(decorator) == "property" for decorator in member.decorator_list)
        lines.append(f"{member.name} (property)" if is_property else f"{member.name}({ast.unparse(member.args)})")
    return sorted(lines)
