"""How good a model is: statistics on plain rows, so that anyone can recompute them from the run's parquet files."""
