"""Units of memory in bytes: what settings and messages count in."""

GIB = 1 << 30
