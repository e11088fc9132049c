"""What a run leaves on disk: directory, checkpoints, metrics, tables, summary, model card and report."""
