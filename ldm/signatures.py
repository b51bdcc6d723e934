"""What a `_target_` takes, read from its source: nothing is imported, so that a mistake is found before torch's seconds."""

import ast
import functools
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_SCALARS: dict[str, Any] = {"int": int, "float": (int, float), "bool": bool, "str": str, "Path": str}
_SEQUENCES = ("list", "List", "tuple", "Tuple", "Sequence", "Iterable")


class UnknownName(LookupError):
    """There is no such object: `args` are the name and those there are beside it."""


class Place(NamedTuple):
    """A definition or an expression, and the file that it stands in."""

    module: Path
    node: Any  # ast.AST


class Signature(NamedTuple):
    """Annotations by name, the names that must be given, and whether others may be."""

    takes: dict[str, Place | None]
    needs: frozenset[str]
    rest: bool

    def without(self, given: set[str]) -> "Signature":
        return Signature(
            {name: kind for name, kind in self.takes.items() if name not in given}, self.needs - given, self.rest
        )


def signature(target: str) -> Signature | None:
    """Of a dotted name, as `ldm.models.unet.UNet`; None where the source does not say.

    Raises:
        UnknownName: the package is here and has no such object.
    """
    place = _find(target)
    return _signature(place) if place else None


def wants(kind: Place | None, value: object) -> str | None:
    """None if a plain value (number, text, None, list or dict of them) can be of an annotated kind; else what that takes."""
    return None if kind is None or _fits(kind, value) else ", ".join(dict.fromkeys(_said(kind)))


def _said(kind: Place) -> list[str]:
    module, node = _resolved(kind)
    match node:
        case ast.BinOp(left=left, right=right):
            return _said(Place(module, left)) + _said(Place(module, right))
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            literals: list[Any] = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return [str(part.value) for part in literals]
        case ast.Subscript(value=ast.Name(id="Union" | "Optional"), slice=inner):
            parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return [text for part in parts for text in _said(Place(module, part))]
    return ["null" if ast.unparse(node) == "None" else ast.unparse(node)]


def _fits(kind: Place, value: object) -> bool:
    module, node = _resolved(kind)
    if isinstance(value, dict) and "_target_" in value:  # an object, once it is built
        return True
    match node:
        case ast.Constant(value=None):
            return value is None
        case ast.Constant(value=str(text)):
            return _fits(Place(module, ast.parse(text, mode="eval").body), value)
        case ast.BinOp(left=left, right=right):
            return _fits(Place(module, left), value) or _fits(Place(module, right), value)
        case ast.Subscript(value=ast.Name(id=outer) | ast.Attribute(attr=outer), slice=inner):
            parts: list[Any] = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            if outer == "Literal":
                return any(type(value) is type(part.value) and value == part.value for part in parts)
            if outer in ("Union", "Optional"):
                optional = outer == "Optional" and value is None
                return optional or any(_fits(Place(module, part), value) for part in parts)
            if outer in _SEQUENCES:
                if isinstance(value, dict) and "_target_" in value:
                    return True  # what gives it: EfficientNet's stages
                items = value if isinstance(value, list) else []
                return isinstance(value, list) and all(_fits(Place(module, parts[0]), item) for item in items)
            if outer in ("dict", "Mapping"):
                items = [item for item in value.values() if item is not None] if isinstance(value, dict) else []
                return isinstance(value, dict) and all(_fits(Place(module, parts[1]), item) for item in items)
        case ast.Name(id=name) if name in _SCALARS:
            return isinstance(value, _SCALARS[name]) and (name == "bool") == isinstance(value, bool)
        case ast.Name(id="Tensor"):
            return False
    return True


def _resolved(kind: Place) -> Place:
    """Of an alias, what it stands for."""
    module, node = kind
    if isinstance(node, ast.Name) and node.id not in _SCALARS:
        found = _in_module(module, node.id)
        if found and isinstance(found.node, (ast.Subscript, ast.BinOp)):
            return found
    return kind


@functools.cache
def _find(target: str) -> Place | None:
    root, *parts = target.split(".")
    spec = importlib.util.find_spec(root)  # of the top package alone: a deeper one would be imported
    if spec is None or not Path(spec.origin or "").is_file():  # a frozen module, or a built-in one
        return None
    path = Path(spec.origin or "")
    while parts and path.name == "__init__.py":
        file, folder = path.parent / f"{parts[0]}.py", path.parent / parts[0] / "__init__.py"
        if not (file.is_file() or folder.is_file()):
            break
        path, parts = file if file.is_file() else folder, parts[1:]
    place = Place(path, _tree(path))
    for name in parts:
        if isinstance(place.node, ast.ClassDef):  # a method
            return None
        found = _in_module(place.module, name)
        if found is None:
            if _opaque(path):
                return None
            raise UnknownName(name, _names(path))
        place = found
    return place


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _definitions(path: Path) -> dict[str, ast.stmt]:
    found: dict[str, ast.stmt] = {}
    for node in _tree(path).body:
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            found |= {name.id: node for name in node.targets if isinstance(name, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.asname or alias.name: node for alias in node.names}
    return found


def _names(path: Path) -> list[str]:
    kinds = (*_FUNCTIONS, ast.ClassDef)
    if path.name == "__init__.py":
        return [file.stem for file in path.parent.iterdir() if not file.stem.startswith(("_", "."))]
    return [n for n, node in _definitions(path).items() if isinstance(node, kinds) and not n.startswith("_")]


def _opaque(path: Path) -> bool:
    return "*" in _definitions(path) or "__getattr__" in _definitions(path)


def _in_module(path: Path, name: str) -> Place | None:
    node = _definitions(path).get(name)
    match node:
        case ast.ImportFrom(module=module, level=level):
            original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
            if level == 0:
                source = module
            else:
                folder = path.parents[level - 1]
                package = [folder.name]
                while (folder.parent / "__init__.py").is_file():
                    folder = folder.parent
                    package.insert(0, folder.name)
                source = ".".join([*package, *([module] if module else [])])
            try:
                return _find(f"{source}.{original}")
            except (UnknownName, ValueError):
                return None
        case ast.Assign(value=value):
            return Place(path, value)
        case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
            return Place(path, node)
    return None


def _signature(place: Place) -> Signature | None:
    module, node = place
    if isinstance(node, _FUNCTIONS):
        return _of_function(place, method=False)
    if not isinstance(node, ast.ClassDef):
        return None
    init = next((each for each in node.body if isinstance(each, _FUNCTIONS) and each.name == "__init__"), None)
    if init is not None:
        return _of_function(Place(module, init), method=True, bases=_bases(place))
    fields: list[Any] = [
        each
        for each in node.body
        if isinstance(each, ast.AnnAssign)
        and isinstance(each.target, ast.Name)
        and "ClassVar" not in ast.unparse(each.annotation)
    ]
    inherited = [found for base in _bases(place) if (found := _signature(base))]
    takes = {name: kind for found in inherited for name, kind in found.takes.items()}
    needs = {name for found in inherited for name in found.needs}
    if any(ast.unparse(each).startswith(("dataclass", "NamedTuple")) for each in (*node.decorator_list, *node.bases)):
        takes |= {field.target.id: Place(module, field.annotation) for field in fields}
        needs |= {field.target.id for field in fields if not _has_default(field.value)}
    return Signature(takes, frozenset(needs), any(found.rest for found in inherited))


def _has_default(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call) and ast.unparse(value.func) in ("field", "dataclasses.field"):
        return any(keyword.arg in ("default", "default_factory") for keyword in value.keywords)
    return value is not None


def _bases(place: Place) -> list[Place]:
    """Those of ours and of Lightning; torch.nn.Module and object take nothing."""
    names = [base.id for base in place.node.bases if isinstance(base, ast.Name)]
    found = [_in_module(place.module, name) for name in names]
    return [base for base in found if base and isinstance(base.node, ast.ClassDef) and base.node.name != "Module"]


def _of_function(place: Place, method: bool, bases: list[Place] | None = None) -> Signature:
    module, node = place
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    pairs = [*zip(positional, defaults, strict=True)][method:]
    pairs += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    takes = {each.arg: Place(module, each.annotation) if each.annotation else None for each, _ in pairs}
    found = Signature(takes, frozenset(each.arg for each, default in pairs if default is None), False)
    return _and_forwarded(found, place, bases or []) if arguments.kwarg else found


def _and_forwarded(found: Signature, place: Place, bases: list[Place]) -> Signature:
    """Adds what `**options` is handed on to, if it is a call of one function that can be read."""
    options = place.node.args.kwarg.arg
    for call in ast.walk(place.node):
        if isinstance(call, ast.Call) and any(
            keyword.arg is None and ast.unparse(keyword.value) == options for keyword in call.keywords
        ):
            name = ast.unparse(call.func)
            inner = bases[0] if name == "super().__init__" and bases else _in_module(place.module, name)
            more = _signature(inner) if inner else None
            if more is not None:
                more = more.without({keyword.arg for keyword in call.keywords if keyword.arg})
                more = more.without(set([*more.takes][: len(call.args)]))
                return Signature(more.takes | found.takes, found.needs | more.needs, more.rest)
    return found._replace(rest=True)
