"""Griffe extension: what docstrings say in Sphinx's terms, in Markdown's."""

import re

from griffe import Docstring, Extension, Object


class DocstringRoles(Extension):
    """``:func:`name` `` becomes code, and an ``Example:`` a section of examples, whose prompts are no quotations."""

    def on_instance(self, *, obj: Object, **kwargs) -> None:
        if isinstance(obj.docstring, Docstring):
            text = re.sub(r':(?:class|data|func|meth|mod):`~?([^`]+)`', r'`\1`', obj.docstring.value)
            obj.docstring.value = re.sub(r'^Example:$', 'Examples:', text, flags=re.MULTILINE)
