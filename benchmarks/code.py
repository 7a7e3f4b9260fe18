"""Size and shape of the source: files, lines, functions, imports, complexity.

    make measure

Lines are all lines. Code lines are those that hold a token other than a comment or a docstring.
Function lengths include docstrings.
"""

from __future__ import annotations

import ast
import io
import statistics
import subprocess
import sys
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GOALS = {"files": 180, "lines": 32_500, "tests": 23_000, "imports": 12, "complexity": 10}
_EMPTY = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.ENCODING,
)


def main() -> None:
    """Print every measure, with its goal where there is one."""
    files = sorted((ROOT / "src").rglob("*.py"))
    texts = {file: file.read_text(encoding="utf-8") for file in files}
    trees = {file: ast.parse(text) for file, text in texts.items()}
    lengths = {file: len(text.splitlines()) for file, text in texts.items()}
    functions = [length for tree in trees.values() for length in function_lengths(tree)]
    code = sum(len(code_lines(texts[file], trees[file])) for file in files)
    imports = sum(len(import_lines(tree)) for tree in trees.values())
    tests = sum(len(f.read_text().splitlines()) for f in (ROOT / "tests").rglob("*.py"))
    longest = max(files, key=lengths.__getitem__)
    print(f"files           {len(files)} (goal {GOALS['files']})")
    print(f"lines           {sum(lengths.values())} (goal {GOALS['lines']})")
    print(f"lines in tests  {tests} (goal {GOALS['tests']})")
    print(f"file lengths    {spread(list(lengths.values()))}: {longest.relative_to(ROOT)}")
    print(f"functions       {len(functions)}, lengths {spread(functions)}")
    print(f"imports         {100 * imports / code:.1f} % of {code} code lines")
    print(f"                (goal {GOALS['imports']} %, with __all__)")
    print(f"public names    {sum(public_names(tree) for tree in trees.values())}")
    print(f"complexity      {complex_functions()} functions above {GOALS['complexity']}")


def spread(values: Sequence[int]) -> str:
    """Median, 90 % quantile and largest."""
    return (
        f"median {statistics.median(values):.0f}, p90 {sorted(values)[len(values) * 9 // 10]}, "
        f"longest {max(values)}"
    )


def function_lengths(tree: ast.Module) -> Iterator[int]:
    """Lines of every function, nested ones included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (node.end_lineno or node.lineno) - node.lineno + 1


def import_lines(tree: ast.Module) -> set[int]:
    """Lines of imports and of `__all__`."""
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) or is_all(node):
            found |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return found


def is_all(node: ast.AST) -> bool:
    """Whether a statement assigns `__all__`."""
    return isinstance(node, ast.Assign) and any(
        isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets
    )


def code_lines(text: str, tree: ast.Module) -> set[int]:
    """Lines with code."""
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in _EMPTY:
            found |= set(range(token.start[0], token.end[0] + 1))
    return found - docstring_lines(tree)


def docstring_lines(tree: ast.Module) -> set[int]:
    """Lines of strings that stand alone."""
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return found


def public_names(tree: ast.Module) -> int:
    """Classes and functions of a module without a leading underscore."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return sum(isinstance(n, kinds) and not n.name.startswith("_") for n in tree.body)


def complex_functions() -> int:
    """Functions that ruff's C901 finds too complex."""
    limit = f"lint.mccabe.max-complexity={GOALS['complexity']}"
    command = [sys.executable, "-m", "ruff", "check", "src", "--select", "C901", "--config", limit]
    found = subprocess.run(
        [*command, "--output-format", "concise"], cwd=ROOT, capture_output=True, text=True
    )
    return found.stdout.count("C901")


if __name__ == "__main__":
    main()
