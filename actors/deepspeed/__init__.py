"""DeepSpeed, imported in this package only and only when an engine is built."""
