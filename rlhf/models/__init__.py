"""Models: where they come from, how they are loaded, adapted and run on packed batches."""
