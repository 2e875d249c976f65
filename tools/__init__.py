"""Maintainers' tools. The wheel leaves them out: the library does not need them at run time."""
