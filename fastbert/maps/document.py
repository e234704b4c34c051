"""A page of one's own: HTML that needs no network."""

import html
import os
from pathlib import Path

_STYLE = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 76rem; margin: 1.5rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem; margin: 0 0 .5rem }
p { margin: .4rem 0 }
.hint { color: #666; font-size: .9rem }
"""


def write_document(path: str | os.PathLike[str], title: str, head: str, body: str) -> Path:
    """Write an HTML page; folders on the way are made.

    Args:
        path: where.
        title: as plain text.
        head, body: as HTML.

    Returns:
        The path written.
    """
    name = html.escape(title)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{name}</title>\n'
        f"<style>{_STYLE}</style>\n{head}\n<h1>{name}</h1>\n{body}\n</html>\n",
        encoding="utf-8",
    )
    return path
