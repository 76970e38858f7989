"""How good predictions of pixels and of objects are."""
