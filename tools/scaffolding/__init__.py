"""Starting a package of one's own: the files of a plugin that adds a block."""

from .naming import Names, names_of
from .writing import FILES, write_plugin

__all__ = ["FILES", "Names", "names_of", "write_plugin"]
