"""The training: loop, data, checkpoints, logs, and the model folder that it writes."""
