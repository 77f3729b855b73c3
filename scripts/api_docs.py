#!/usr/bin/env python3
"""Writes docs/api.md from the docstrings. ``--check`` only says whether that would change it.

Sources are parsed, never imported: the result does not depend on the versions of Python or JAX.
"""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pplx_jax"
TARGET = ROOT / "docs" / "api.md"

#: Section, module, and the public names to show in it; None for all.
SECTIONS: tuple[tuple[str, str, tuple[str, ...] | None], ...] = (
    ("Expert parallelism", "expert_parallel", None),
    ("Results", "results", ("Batch", "Route", "SentCombine", "SentDispatch")),
    ("Configuration", "config", ("ExchangeConfig", "Memory")),
    ("Recomputation", "remat", ("moe_remat",)),
    ("Export", "ops", ("export_checks",)),
    ("Flax layer", "flax", None),
    ("Linen layer", "linen", ("MoE",)),
    ("The layer as a function", "moe", ("moe", "MoEAux")),
    ("Its configuration", "moe_config", ("MoEConfig",)),
    ("Its parameters", "moe_params", ("MoEParams", "init_params")),
    ("Its mesh axes", "moe_sharding", ("token_axes", "expert_axis")),
    ("Balancing", "balance", None),
    ("Router", "router", None),
    ("Experts", "experts", None),
    ("Fabrics", "fabric", ("Fabric",)),
    ("Environment", "environment", ("check",)),
    ("TransferEngine", "engine", ("TransferEngine",)),
    (
        "What it hands out",
        "engine_types",
        (
            "Address",
            "RegionDescriptor",
            "Region",
            "RemoteRegion",
            "ImmCounter",
            "PeerGroup",
            "ScatterEntry",
            "GroupEntry",
            "Nic",
            "PoolDescriptor",
            "SimOptions",
        ),
    ),
    ("What is under way", "engine_handles", None),
    ("With asyncio", "engine_asyncio", None),
    ("Options of verbs", "verbs", ("VerbsOptions",)),
    ("Errors", "errors", None),
    ("Models: loading", "models/loading", ("from_pretrained", "from_config", "placement_of", "LoadProgress")),
    ("Models: generation", "models/generation", ("generate", "stream", "Progress")),
    ("Models: what all share", "models/decoder", ("Decoder", "LayerReport")),
    ("Models: configuration", "models/config", ("DecoderConfig",)),
    ("Models: DeepSeek-V3, Kimi K2", "models/deepseek/config", ("DeepSeekConfig",)),
    ("Models: Qwen3-MoE", "models/qwen3_moe/config", ("Qwen3MoeConfig",)),
    ("Models: Mixtral", "models/mixtral/config", ("MixtralConfig",)),
    ("Models: errors", "models/errors", None),
    ("Multi-process tests", "testing.pool", None),
    ("Multi-host tests", "testing.hosts", None),
    ("Their hosts", "testing.network", None),
    ("Fixtures", "testing.shared", None),
)

#: A class's base, as (module, class), whose methods are shown as the class's own.
BASES: dict[str, tuple[str, str]] = {"TransferEngine": ("engine_one_sided", "OneSided")}

Documented = ast.ClassDef | ast.FunctionDef


def parsed(module: str) -> ast.Module:
    """A module of the package."""
    return ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())


def public_names(tree: ast.Module) -> tuple[str, ...]:
    """``__all__``, or else what is defined without an underscore; in the order of the source."""
    defined = [node.name for node in tree.body if isinstance(node, Documented)]
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            exported = ast.literal_eval(node.value)
            return tuple(name for name in defined if name in exported)
    return tuple(name for name in defined if not name.startswith("_"))


def signature(function: ast.FunctionDef | ast.AsyncFunctionDef, name: str, *, method: bool) -> str:
    """One line, or an argument a line where that would be long."""
    arguments = function.args
    if method and (arguments.posonlyargs or arguments.args):
        (arguments.posonlyargs or arguments.args).pop(0)
    returns = f" -> {ast.unparse(function.returns)}" if function.returns is not None else ""
    line = f"{name}({ast.unparse(arguments)}){returns}"
    if len(line) <= 100:
        return line
    parts = []
    # Unparsed one by one: commas within annotations separate nothing.
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    for number, (argument, default) in enumerate(zip(positional, defaults, strict=True)):
        parts.append(ast.unparse(argument) + (f" = {ast.unparse(default)}" if default else ""))
        if number + 1 == len(arguments.posonlyargs):
            parts.append("/")
    if arguments.vararg or arguments.kwonlyargs:
        parts.append(f"*{ast.unparse(arguments.vararg) if arguments.vararg else ''}")
    for argument, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parts.append(ast.unparse(argument) + (f" = {ast.unparse(value)}" if value else ""))
    if arguments.kwarg:
        parts.append(f"**{ast.unparse(arguments.kwarg)}")
    inner = "".join(f"    {part},\n" for part in parts)
    return f"{name}(\n{inner}){returns}"


def text_of(node: Documented) -> str:
    """The docstring, as preformatted text: its sections rely on indentation."""
    docstring = ast.get_docstring(node)
    return f"\n{inspect.cleandoc(docstring)}\n" if docstring else ""


def fields(node: ast.ClassDef) -> list[str]:
    """A dataclass's fields, each with the string that follows it."""
    lines = []
    for item, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name):
            continue
        if item.target.id.startswith("_"):
            continue
        line = ast.unparse(item)
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            line += "  # " + " ".join(str(after.value.value).split())
        lines.append(line)
    return lines


def is_property(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether it is read without a call."""
    return any(isinstance(one, ast.Name) and one.id == "property" for one in function.decorator_list)


def methods_of(node: ast.ClassDef) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """What a class itself defines."""
    return [item for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]


def document_class(node: ast.ClassDef) -> str:
    """A class: how to make one, its text, its methods after those of its base in BASES."""
    methods = methods_of(node)
    init = next((method for method in methods if method.name == "__init__"), None)
    if node.name in BASES:
        module, name = BASES[node.name]
        base = next(one for one in parsed(module).body if isinstance(one, ast.ClassDef) and one.name == name)
        methods = methods_of(base) + methods
    head = signature(init, node.name, method=True).removesuffix(" -> None") if init else node.name
    bases = [ast.unparse(base) for base in node.bases]
    if not init and bases:
        head += f"({', '.join(bases)})"
    body = [f"class {head}", *(f"    {line}" for line in fields(node))]
    parts = [f"### `{node.name}`\n", "```text\n" + "\n".join(body) + "\n" + text_of(node) + "```\n"]
    for method in methods:
        if method.name.startswith("_") and method.name != "__call__":
            continue
        if ast.get_docstring(method) is None:
            continue
        if is_property(method):
            returns = f": {ast.unparse(method.returns)}" if method.returns is not None else ""
            line = method.name + returns
        else:
            line = signature(method, method.name, method=True)
            line = f"async {line}" if isinstance(method, ast.AsyncFunctionDef) else line
        parts.append(f"#### `{node.name}.{method.name}`\n\n```text\n{line}\n{text_of(method)}```\n")
    return "\n".join(parts)


def render() -> str:
    """The whole reference."""
    parts = [
        "# API reference\n",
        "Written by `scripts/api_docs.py` from the docstrings: change those, then run it. Each section says "
        "what\n`import pplx_jax` has of it; other names are in the module that its heading tells.\n",
    ]
    exported = public_names_of_package()
    shown: set[str] = set()
    for title, module, wanted in SECTIONS:
        tree = parsed(module)
        names = wanted or public_names(tree)
        nodes = {node.name: node for node in tree.body if isinstance(node, Documented)}
        parts.append(f"## {title}: `pplx_jax.{module.replace('/', '.')}`\n")
        top = [name for name in names if name in exported]
        shown.update(top)
        if top:
            parts.append("In `pplx_jax`: " + ", ".join(f"`{name}`" for name in top) + ".\n")
        for name in names:
            node = nodes[name]
            if isinstance(node, ast.ClassDef):
                parts.append(document_class(node))
            else:
                head = signature(node, node.name, method=False)
                parts.append(f"### `{name}`\n\n```text\n{head}\n{text_of(node)}```\n")
    if missing := exported - shown:
        raise ValueError(f"no section shows {', '.join(sorted(missing))}: add them to SECTIONS")
    return "\n".join(parts)


def public_names_of_package() -> set[str]:
    """What ``pplx_jax.__all__`` lists."""
    for node in ast.parse((PACKAGE / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise ValueError("pplx_jax/__init__.py has no __all__")


def main() -> int:
    """Write, or check."""
    wanted = render()
    if "--check" in sys.argv[1:]:
        if TARGET.exists() and TARGET.read_text() == wanted:
            return 0
        print(f"{TARGET.relative_to(ROOT)} is not up to date: run scripts/api_docs.py", file=sys.stderr)
        return 1
    TARGET.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
