"""Values that every part of the package agrees on; imports nothing, so worker processes start fast."""

VOID = 255  # class index of pixels without a class
