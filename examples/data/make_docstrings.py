"""Make `docstrings.jsonl`: docstrings of Python's standard library, labelled by the subject of their module.

`python examples/data/make_docstrings.py` writes the file beside itself, from the sources of the Python that runs it.
The committed file was made by CPython 3.11.7, and other versions give others, so it is committed and not made anew. The
text is the Python Software Foundation's, under the licence in `LICENSE-PSF.txt`.
"""

import ast
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

#: Label -> modules and packages of the standard library.
SUBJECTS = {
    "concurrency": ("asyncio", "concurrent", "queue", "threading"),
    "files": ("bz2", "fileinput", "glob", "gzip", "os", "pathlib", "posixpath", "shutil", "tempfile", "zipfile"),
    "mail": ("email", "imaplib", "mailbox", "poplib", "smtplib"),
    "numbers": ("_pydecimal", "fractions", "numbers", "random", "statistics"),
    "web": ("ftplib", "html", "http", "ssl", "urllib", "webbrowser", "wsgiref"),
    "widgets": ("tkinter",),
}
PER_SUBJECT = 200
WORDS = range(5, 81)
TEST_SHARE = 5  # every fifth text
#: Files that state a copyright of someone else's are left out.
FOREIGN = re.compile(r"copyright (\(c\) )?\d{4}(?!.*Python Software Foundation)", re.IGNORECASE)


def docstrings(module: str) -> Iterator[str]:
    """The docstrings in one module, or in every module of a package; without examples, on one line."""
    root = Path(sysconfig.get_path("stdlib")) / module
    for path in sorted(root.rglob("*.py")) if root.is_dir() else [root.with_suffix(".py")]:
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)) if not FOREIGN.search(source) else ():
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = " ".join((ast.get_docstring(node) or "").partition(">>>")[0].split())
                yield re.sub(r"\W*(For example|Examples?)\W*$", "", text)


def main() -> None:
    rows, seen = [], set()
    for label, modules in SUBJECTS.items():
        texts = {text for module in modules for text in docstrings(module) if len(text.split()) in WORDS} - seen
        seen |= texts
        chosen = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())[:PER_SUBJECT]
        rows += [
            {"text": text, "label": label, "split": "train" if i % TEST_SHARE else "test"}
            for i, text in enumerate(chosen)
        ]
        print(f"{label:<12}{len(texts):>5} texts, {len(chosen)} taken")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    Path(__file__).with_name("docstrings.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
