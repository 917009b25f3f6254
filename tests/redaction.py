"""What a module would format into logs, errors and prints: a scan for names and types that may hold secrets.

It looks at every call of a logger and every `raise`, at what their strings are made of. A share, a seed, a token, a
prompt, a tensor or a message of the wire is a fault there, by its name, by its annotation, or because its field says
`repr=False`; its shape, its length and its type are none. So is an error that could be any: nobody knows what it says.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator

# By name, wherever they are: alone, as an attribute, or behind an underscore.
SECRET_NAMES = re.compile(
    r"_*(\w+_)?(shares?|seeds?|secrets?|tokens?|prompts?|messages?|masks?|masked|corrections?|salts?|weights|inputs"
    r"|outputs|tensors?|key_pem|private(_key)?|passing|kept|logits|payload|chunk|answers?|contents?|request|response)"
)
SECRET_TYPES = re.compile(
    r"\b(Tensors?|Shared(Bits)?|Mask|Masked|Weight|Cached|Correlation|Identity|KeyChain|TapeKeys|Message|Prompt"
    r"|\w+_pb2\.\w+)\b"
)
PUBLIC_NAMES = {"max_new_tokens", "prompt_tokens"}  # numbers of them
LOGGERS = re.compile(r"_?log(ger|ging)?|warnings")
_CLASS = re.compile(r"(^|\.)_*[A-Z]\w*$")
LEVELS = {"debug", "info", "warning", "error", "critical", "exception", "log", "warn"}
# What these say of their argument is no secret.
REDUCING = {"len", "type", "id", "count", "in_bytes"}


def hidden_fields(sources: Iterable[str]) -> set[str]:
    """The fields that classes keep out of their own repr, but for names that others show: those say too little."""
    hidden, shown = set(), set()
    for source in sources:
        classes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
        for node in [node for each in classes for node in each.body if isinstance(node, ast.AnnAssign)]:
            options = node.value.keywords if isinstance(node.value, ast.Call) else []
            hides = any(k.arg == "repr" and getattr(k.value, "value", True) is False for k in options)
            (hidden if hides else shown).add(ast.unparse(node.target))
    return hidden - shown


def leaks(source: str, hidden: Iterable[str] = ()) -> Iterator[str]:
    """What a module formats in logs and errors and may not. hidden: fields that are secret as attributes."""
    tree = ast.parse(source)
    for function in ast.walk(tree):
        if isinstance(function, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef):
            typed = _typed(function)
            for node, broad in _own(function):
                for told in _told(node):
                    for part in _parts(told):
                        why = _why(part, typed, broad, set(hidden))
                        if why:
                            yield f"line {part.lineno}: {ast.unparse(part)} is {why}"
                if isinstance(node, ast.Call) and _is_log(node):
                    if node.func.attr == "exception" or any(k.arg == "exc_info" for k in node.keywords):  # type: ignore[attr-defined]
                        yield f"line {node.lineno}: an error is logged with its message"


def _own(function: ast.AST, broad: frozenset[str] = frozenset()) -> Iterator[tuple[ast.AST, frozenset[str]]]:
    """The nodes of a function without those of functions in it, and which names are errors that could be any there."""
    for child in ast.iter_child_nodes(function):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        inside = broad
        if isinstance(child, ast.ExceptHandler) and child.name:
            anything = child.type is not None and ast.unparse(child.type) in ("Exception", "BaseException")
            inside = broad | {child.name} if anything else broad - {child.name}
        yield child, inside
        yield from _own(child, inside)


def _typed(function: ast.AST) -> set[str]:
    """The names that are annotated as something secret."""
    annotated: list[tuple[str, ast.expr]] = []
    if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
        a = function.args
        annotated += [(x.arg, x.annotation) for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.annotation]
    for node, _ in _own(function):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            annotated.append((node.target.id, node.annotation))
    return {name for name, annotation in annotated if SECRET_TYPES.search(ast.unparse(annotation))}


def _is_log(call: ast.Call) -> bool:
    return (
        isinstance(call.func, ast.Attribute)
        and call.func.attr in LEVELS
        and isinstance(call.func.value, ast.Name)
        and bool(LOGGERS.fullmatch(call.func.value.id))
    )


def _told(node: ast.AST) -> Iterator[ast.expr]:
    """What is passed to a logger, or to the error that is raised."""
    if isinstance(node, ast.Call) and _is_log(node):
        yield from node.args
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and _CLASS.search(ast.unparse(node.exc.func)):
        yield from node.exc.args
        yield from (k.value for k in node.exc.keywords)


def _parts(node: ast.expr) -> Iterator[ast.expr]:
    """The expressions whose text ends up in a text."""
    if isinstance(node, ast.JoinedStr):
        for value in node.values:
            if isinstance(value, ast.FormattedValue):
                yield from _parts(value.value)
    elif isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in REDUCING:
            return
        if isinstance(node.func, ast.Attribute):  # x.hex(), x.tolist(), ", ".join(...), "...".format(x)
            yield from _parts(node.func.value)
        for argument in node.args:
            yield from _parts(argument)
    elif isinstance(node, ast.GeneratorExp | ast.ListComp | ast.SetComp):
        each = list(_parts(node.elt))
        yield from each
        targets = {ast.unparse(generator.target) for generator in node.generators}
        if any(isinstance(part, ast.Name) and part.id in targets for part in each):
            for generator in node.generators:
                yield from _parts(generator.iter)
    elif isinstance(node, ast.Subscript):
        yield from _parts(node.value)
    elif isinstance(node, ast.Name | ast.Attribute):
        yield node
    elif isinstance(node, ast.Compare | ast.Lambda):
        return
    elif isinstance(node, ast.IfExp):
        yield from _parts(node.body)
        yield from _parts(node.orelse)
    else:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                yield from _parts(child)


def _why(part: ast.expr, typed: set[str], broad: frozenset[str], hidden: set[str]) -> str:
    name = part.attr if isinstance(part, ast.Attribute) else part.id if isinstance(part, ast.Name) else ""
    if name in PUBLIC_NAMES or ast.unparse(part).partition(".")[0].isupper():  # a constant
        return ""
    if SECRET_NAMES.fullmatch(name):
        return "named like a secret"
    if isinstance(part, ast.Attribute):
        return "a field that hides itself" if name in hidden else ""
    if name in broad:
        return "an error that may say anything"
    return "of a type that holds secrets" if name in typed else ""
