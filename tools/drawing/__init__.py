"""The picture of a stack, as SVG."""
