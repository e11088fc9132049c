"""``rlhf plan`` by arithmetic: shapes of models, memory by device, time and cost. Loads no model and starts nothing."""
