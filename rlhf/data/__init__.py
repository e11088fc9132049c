"""Data files to prompts and training groups; every fault in a file names its line."""
