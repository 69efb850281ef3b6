"""The commands of ``titans-build``."""
