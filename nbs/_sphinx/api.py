"""What the notebooks export, described for Sphinx.

A description holds the signature as written, the docstring, and the parameters or
fields; names in backticks lead to their own description.
"""

import ast
import importlib
import inspect
import re
from pathlib import Path

from fastcore.docments import docments

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)
LIMITS = {
    "gt": ">",
    "ge": "≥",
    "lt": "<",
    "le": "≤",
    "min_length": "length ≥",
    "max_length": "length ≤",
}
NO_DEFAULT = inspect.Parameter.empty


class Module:
    """An exported module: its definitions as they are written and as imported."""

    def __init__(self, name: str):
        self.name = name
        self.namespace = importlib.import_module(name)
        self.nodes = {}
        source = Path(self.namespace.__file__).read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, (*FUNCTION, ast.ClassDef)):
                self.nodes[patched_name(node)] = node
            if isinstance(node, ast.ClassDef):
                methods = [part for part in node.body if isinstance(part, FUNCTION)]
                self.nodes |= {f"{node.name}.{part.name}": part for part in methods}
        for name, node in list(self.nodes.items()):
            for base in private_bases(node):
                inherited = [one for one in self.nodes if one.startswith(f"{base}.")]
                for method in inherited:
                    own = method.replace(base, name, 1)
                    self.nodes.setdefault(own, self.nodes[method])

    def public_methods(self, name: str) -> list:
        """The documented methods of class `name`, as the source orders them."""
        return [
            method
            for method, node in self.nodes.items()
            if method.startswith(name + ".")
            and not node.name.startswith("_")
            and ast.get_docstring(node)
        ]

    def fields(self, name: str) -> dict:
        """The fields of pydantic model `name`; none for anything else."""
        return getattr(self.object(name), "model_fields", {})

    def annotations(self, name: str) -> dict:
        """The types of a class's fields as they are written."""
        node = self.nodes[name]
        found = {}
        for base in private_bases(node):
            found |= self.annotations(base)
        own = [part for part in node.body if isinstance(part, ast.AnnAssign)]
        return found | {part.target.id: ast.unparse(part.annotation) for part in own}

    def aliases(self, top: str):
        """What `top`, its methods and its fields are called in prose: pairs of a name
        and the full name. `loss.scale` is a field of a section of `top`; a bare name
        is taken for a field's only if it could be no word."""
        fields = self.fields(top)
        members = [*self.public_methods(top), *(f"{top}.{name}" for name in fields)]
        for name in (top, *members):
            full = f"{self.name}.{name}"
            yield from ((name, full), (full, full))
        for section, field in fields.items():
            kind = field.annotation
            for name in getattr(kind, "model_fields", {}):
                full = f"{kind.__module__}.{kind.__name__}.{name}"
                yield f"{section}.{name}", full
                if "_" in name:
                    yield name, full
                if f"{top}.{name}" not in members:
                    yield f"config.{name}", full

    def object(self, name: str):
        """The function or class called `name`, without what a decorator made of it."""
        found = self.namespace
        for part in name.split("."):
            found = inspect.getattr_static(found, part)
        for wrapped in ("__func__", "fget", "func"):
            if getattr(found, wrapped, None):
                return getattr(found, wrapped)
        return found


class Links:
    """Turns names in backticks, and links to notebooks, into links within the site."""

    def __init__(self, pages: dict, modules: dict, shown: dict):
        self.pages = pages
        names = {}
        for notebook, module in modules.items():
            for top in shown[notebook]:
                for alias, full in module.aliases(top):
                    names.setdefault(alias, set()).add(full)
        self.names = {
            alias: full.pop() for alias, full in names.items() if len(full) == 1
        }

    def name(self, match) -> str:
        full = self.names.get(match[1])
        return f"{{py:obj}}`{match[1]}{match[2]} <{full}>`" if full else match[0]

    def page(self, match) -> str:
        page = self.pages.get(match[1])
        return f"]({page}.ipynb" if page else match[0]

    def linked(self, text: str) -> str:
        """`text` with its links, but for code in it."""
        lines, fenced = [], False
        for line in text.splitlines():
            if re.match(r"\s*(```|~~~)", line):
                fenced = not fenced
            elif not fenced and not line.startswith("    "):
                line = re.sub(r"\]\((?:nbs/)?([\w-]+\.ipynb)", self.page, line)
                name = r"(?<![`}\[])`([A-Za-z_][\w.]*)((?:\(\))?)`(?![`\]])"
                line = re.sub(name, self.name, line)
            lines.append(line)
        return "\n".join(lines)


class Reference:
    """Describes what `modules` export; `shown` names what is described, by page."""

    def __init__(self, links: Links, modules: dict, shown: dict):
        self.links, self.modules, self.shown = links, modules, shown

    def describe(self, notebook: str, name: str) -> str:
        """A Sphinx description of `name`; that of a class includes its methods,
        unless they have a description of their own."""
        module = self.modules[notebook]
        node = module.nodes[name]
        kind, signature, options = declaration(module.nodes, name)
        body = [self.links.linked(inspect.cleandoc(ast.get_docstring(node) or ""))]
        if kind == "class":
            body.append(self.fields(module, name))
        if kind != "property":
            body.append(self.parameters(module.object(name)))
        if kind == "class":
            methods = module.public_methods(name)
            own = [one for one in methods if one not in self.shown[notebook]]
            body += [self.describe(notebook, method) for method in own]
        options = [f":module: {module.name}", *options]
        return directive(f"py:{kind}", name + signature, options, body)

    def parameters(self, function) -> str:
        """Table of the parameters and what the comments beside them say; empty where
        there are no such comments."""
        if getattr(function, "model_fields", None):
            return ""
        try:
            comments = docments(function, full=True)
        except (TypeError, ValueError, OSError, NameError):
            return ""
        rows = []
        for name, about in comments.items():
            if not about.get("docment"):
                continue
            default = about.get("default", NO_DEFAULT)
            name = "returns" if name == "return" else name
            default = "" if default is NO_DEFAULT else code(repr(default))
            meaning = self.links.linked(" ".join(about["docment"].split()))
            rows.append([f"**{name}**", default, meaning])
        return table(["Parameter", "Default", "Meaning"], rows)

    def fields(self, module: Module, name: str) -> str:
        """Table of the fields of a pydantic model; empty for any other class."""
        written = module.annotations(name)
        rows = []
        for field, about in module.fields(name).items():
            kind = written.get(field) or inspect.formatannotation(about.annotation)
            rows.append(
                [
                    f"{{field}}`{module.name}.{name}.{field}`",
                    ", ".join([code(kind), *limits(about)]),
                    code(default_of(about)),
                    self.links.linked(about.description or ""),
                ]
            )
        return table(["Field", "Type", "Default", "Meaning"], rows)


def patched_name(node) -> str:
    """The name of a definition; of a method that `@patch` adds, its class's as well."""
    if "patch" not in decorators_of(node):
        return node.name
    return f"{ast.unparse(node.args.args[0].annotation)}.{node.name}"


def private_bases(node) -> list:
    """The private classes that `node` inherits from: parts of it, told one by one."""
    bases = [ast.unparse(base) for base in getattr(node, "bases", [])]
    return [base for base in bases if base.startswith("_")]


def decorators_of(node) -> set:
    """The last names of the decorators, as `cached_property` of `functools`'s."""
    names = [ast.unparse(one).split("(")[0] for one in node.decorator_list]
    return {name.split(".")[-1] for name in names}


def declaration(nodes: dict, name: str) -> tuple:
    """Kind, signature and options of the Sphinx description of `name`."""
    node = nodes[name]
    decorators = decorators_of(node)
    if isinstance(node, ast.ClassDef):
        return "class", class_signature(nodes, name), []
    if decorators & {"property", "cached_property"}:
        returns = node.returns
        return "property", "", [f":type: {ast.unparse(returns)}"] if returns else []
    kind = "method" if "." in name else "function"
    bound = kind == "method" and "staticmethod" not in decorators
    options = sorted(decorators & {"classmethod", "staticmethod"})
    return kind, written_signature(node, bound), [f":{one}:" for one in options]


def written_signature(node, bound: bool) -> str:
    """The signature as it stands in the source, without `self`."""
    node = ast.parse(ast.unparse(node)).body[0]
    if bound:
        del (node.args.posonlyargs or node.args.args)[:1]
    signature = f"({ast.unparse(node.args)})"
    if node.returns is None or node.name == "__init__":
        return signature
    return f"{signature} -> {ast.unparse(node.returns)}"


def class_signature(nodes: dict, name: str) -> str:
    """What the class is called with: its `__init__`, or the fields of a dataclass or
    named tuple."""
    if f"{name}.__init__" in nodes:
        return written_signature(nodes[f"{name}.__init__"], bound=True)
    node = nodes[name]
    bases = {ast.unparse(base).split(".")[-1] for base in node.bases}
    if "dataclass" not in decorators_of(node) and "NamedTuple" not in bases:
        return ""
    fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
    return f"({', '.join(map(ast.unparse, fields))})"


def default_of(field) -> str:
    if field.is_required():
        return ""
    return repr(field.get_default(call_default_factory=True))


def limits(field) -> list:
    """The limits of a pydantic field, as `> 0`."""
    return [
        f"{sign} {getattr(limit, key)}"
        for limit in field.metadata
        for key, sign in LIMITS.items()
        if hasattr(limit, key)
    ]


def directive(kind: str, argument: str, options: list, body: list) -> str:
    """A MyST directive whose fence is longer than any in its body."""
    content = "\n\n".join(part for part in body if part)
    inner = re.findall(r"^:{3,}", content, re.M)
    fence = ":" * max([3, *(len(run) + 1 for run in inner)])
    opening = f"{fence}{{{kind}}} {argument}"
    return "\n".join([opening, *options, "", content, fence])


def code(text: str) -> str:
    return f"`` {text} ``" if text else ""


def table(header: list, rows: list) -> str:
    """A markdown table; empty without rows."""
    if not rows:
        return ""
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *escaped]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
