"""For the site: the references of docstrings (``:class:`twins_fast.PGD```) become links, where there is a page."""

import re
from contextlib import suppress

import griffe

_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`([\w.]+)`")


class Roles(griffe.Extension):
    """Read by mkdocs.yml."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = _ROLE.sub(lambda role: _link(obj, role[1]), obj.docstring.value)


def _link(obj: griffe.Object, name: str) -> str:
    return f'<autoref optional identifier="{_canonical(obj, name)}"><code>{name}</code></autoref>'


def _canonical(obj: griffe.Object, name: str) -> str:
    """The path under which a name in a docstring of ``obj`` was defined; the name itself if it is somebody else's."""
    scope = obj
    while scope is not None:  # its own members first, then those of what it is in
        with suppress(Exception):
            return scope[name].canonical_path
        scope = scope.parent
    with suppress(Exception):
        return obj.package[name.removeprefix(f"{obj.package.name}.")].canonical_path
    return name
