"""Hook of mkdocs.yml: links from docs/ to files of the repository that a site of docs/ lacks.

On a code host such a link opens the file. On the site it does so too if mkdocs.yml has a `repo_url`
and a `edit_uri` such as `blob/main/`; without them it becomes the link's text.
"""

import posixpath
import re
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\./[^)#\s]*)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Return the page with its links out of docs/ rewritten."""
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")
    base = f"{config.repo_url.rstrip('/')}/{config.edit_uri or ''}" if config.repo_url else None

    def rewritten(link: re.Match) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        path = posixpath.normpath(posixpath.join(folder, target))
        if path.startswith("docs/"):
            return link[0]
        return text if base is None else f"[{text}]({base}{path}{anchor})"

    return LINK.sub(rewritten, markdown)
