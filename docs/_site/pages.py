"""The two generated pages: API from `drift_kernels.__all__`, settings from the fields of the schema and the comments on them."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCHEMA = [ROOT / "drift/config" / name for name in ("source.py", "schema.py", "online.py")]
TYPES = {
    "Positive": "integer ≥ 1",
    "Count": "integer ≥ 0",
    "Rate": "number > 0",
    "LearningRate": "number, 0 to 10",
    "Share": "number, 0 to 1",
    "BelowOne": "number, 0 to below 1",
    "Weight": "number ≥ 0",
    "Gates": "three numbers ≥ 0: an easy, a medium, a hard problem",
    "str": "text",
    "bool": "true or false",
    "int": "integer",
    "float": "number",
    "None": "null",
}
API = {
    "Losses": [
        "policy_loss",
        "weighted_cross_entropy",
        "distill_loss",
        "self_distill_loss",
        "pointwise_loss",
        "policy_token_loss",
    ],
    "Log-probs": ["linear_logprob", "topk_logprobs"],
    "Targets": ["shift_targets", "shift"],
}


def on_files(files, config):
    """mkdocs: adds the pages to the site."""
    from mkdocs.structure.files import File

    for name, text in (("api.md", api_page()), ("settings.md", settings_page())):
        files.append(File.generated(config, name, content=text))
    return files


def api_page() -> str:
    tree = ast.parse((ROOT / "drift_kernels/__init__.py").read_text())
    public = next(
        ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "__all__"
    )
    listed = {name for names in API.values() for name in names}
    groups = API | {"Options, results and the rest": [name for name in public if name not in listed]}
    lines = [
        "# API",
        "",
        "Generated from the docstrings: every public name of `drift_kernels`.",
    ]
    for title, names in groups.items():
        lines += ["", f"## {title}", *(f"\n::: drift_kernels.{name}" for name in names)]
    return "\n".join(lines) + "\n"


def settings_page() -> str:
    sections: dict[str, ast.ClassDef] = {}
    comments: dict[ast.ClassDef, dict[int, str]] = {}
    for path in SCHEMA:
        source = path.read_text()
        found = {
            token.start[0]: token.string.lstrip("# ")
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and any(
                isinstance(b, ast.Name) and (b.id == "Section" or b.id in sections) for b in node.bases
            ):
                sections[node.name], comments[node] = node, found
    lines = [
        "# Settings",
        "",
        "Generated from `drift/config/`. A config is a YAML file with these keys; `drift run CONFIG section.key=value` changes",
        "one, and a mistyped one is answered with the nearest right one. Types are strict, unknown keys are refused.",
    ]

    def inherited(node: ast.ClassDef) -> list[tuple[ast.ClassDef, ast.AnnAssign]]:
        """A section's settings with those of the sections that it extends, which come first; its own replace theirs."""
        bases = [sections[b.id] for b in node.bases if isinstance(b, ast.Name) and b.id in sections]
        pairs = [pair for base in bases for pair in inherited(base)] + [(node, field) for field in fields(node)]
        return list({field.target.id: (owner, field) for owner, field in pairs}.values())

    def add(name: str, prefix: str) -> None:
        node, below = sections[name], []
        lines.extend(["", f"## {prefix.rstrip('.') or 'A config'}", "", ast.get_docstring(node) or "", ""])
        lines.extend(["| key | type | default | |", "|---|---|---|---|"])
        for owner, field in inherited(node):
            key, kind, text = field.target.id, ast.unparse(field.annotation), text_of(field, comments[owner])
            inner = next((other for other in sections if re.search(rf"\b{other}\b", kind)), None)
            if inner:
                below.append((inner, f"{prefix}{key}."))
                kind = "section, or null (the default)" if "None" in kind else "section"
                row = (f"[`{key}`](#{anchor(prefix + key)})", kind, "", text or about(sections[inner]))
            else:
                row = (f"`{key}`", type_of(field.annotation), default_of(field), text)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
        for inner, path in below:
            add(inner, path)

    add("Config", "")
    return "\n".join(lines) + "\n"


def fields(node: ast.ClassDef) -> list[ast.AnnAssign]:
    """A section's settings, in order."""
    annotated = [field for field in node.body if isinstance(field, ast.AnnAssign)]
    return [field for field in annotated if not ast.unparse(field.annotation).startswith("ClassVar")]


def about(section: ast.ClassDef) -> str:
    return escaped((ast.get_docstring(section) or "").splitlines()[0])


def escaped(text: str) -> str:
    """Text that Markdown leaves alone."""
    return text.replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")


def anchor(path: str) -> str:
    return path.replace(".", "").replace(" ", "-").lower()


def text_of(field: ast.AnnAssign, comments: dict[int, str]) -> str:
    """The comments on the field's lines, as one text."""
    text = " ".join(comments[line] for line in range(field.lineno, (field.end_lineno or 0) + 1) if line in comments)
    return escaped(text)


def default_of(field: ast.AnnAssign) -> str:
    if field.value is None:
        return "required"
    try:
        value = ast.literal_eval(field.value)
    except ValueError:
        return f"`{ast.unparse(field.value)}`"
    if isinstance(value, tuple):
        value = list(value)
    return f"`{'null' if value is None else str(value).lower() if isinstance(value, bool) else value}`"


def type_of(annotation: ast.expr) -> str:
    """An annotation in words."""
    if isinstance(annotation, ast.BinOp):
        return f"{type_of(annotation.left)}, or {type_of(annotation.right)}"
    if isinstance(annotation, ast.Constant):
        return "null" if annotation.value is None else f"`{annotation.value}`"
    if isinstance(annotation, ast.Name):
        return TYPES.get(annotation.id, annotation.id)
    if isinstance(annotation, ast.Subscript):
        name, inside = ast.unparse(annotation.value), annotation.slice
        parts = inside.elts if isinstance(inside, ast.Tuple) else [inside]
        match name:
            case "Literal":
                return ", ".join(f"`{ast.literal_eval(part)}`" for part in parts)
            case "Annotated":
                return type_of(parts[0]) + limits(parts[1:])
            case "list":
                return f"list of {type_of(parts[0])}"
            case "tuple":
                return f"{len(parts)} × {type_of(parts[0])}"
            case "dict":
                return "mapping"
    return ast.unparse(annotation)


def limits(extras: list[ast.expr]) -> str:
    signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "min_length": "at least"}
    shown = [
        f" {signs[word.arg]} {ast.unparse(word.value)}"
        for extra in extras
        if isinstance(extra, ast.Call)
        for word in extra.keywords
        if word.arg in signs
    ]
    return ",".join(shown)
