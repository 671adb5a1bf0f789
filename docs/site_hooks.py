"""MkDocs hook: replace links to files outside docs/ with their paths, since the site does not contain these files."""

import re
from posixpath import join, normpath

LINK = re.compile(r'(?<!!)\[(?P<text>[^\]]+)\]\((?P<target>[^)\s:#]+)\)')


def on_page_markdown(markdown: str, page, **kwargs) -> str:
    def replace(match: re.Match) -> str:
        target = normpath(join('docs', page.file.src_uri, '..', match['target']))
        if target.startswith('docs/'):
            return match[0]
        return f'`{target}`' if target.endswith(match['text']) else f'{match["text"]} (`{target}`)'

    return LINK.sub(replace, markdown)
