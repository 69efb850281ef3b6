"""The registry alone knows no block: importing ``titans_build.blocks`` registers the built-in ones."""

import titans_build.blocks  # noqa: F401
