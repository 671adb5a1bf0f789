"""Griffe extension: convert Sphinx markup in docstrings to Markdown."""

import re

from griffe import Docstring, Extension, Object


class DocstringRoles(Extension):
    """Turn ``:func:`name` `` into code, and an ``Example:`` section into ``Examples:``, which Griffe recognizes."""

    def on_instance(self, *, obj: Object, **kwargs) -> None:
        if isinstance(obj.docstring, Docstring):
            text = re.sub(r':(?:class|data|func|meth|mod):`~?([^`]+)`', r'`\1`', obj.docstring.value)
            obj.docstring.value = re.sub(r'^Example:$', 'Examples:', text, flags=re.MULTILINE)
