"""One training run: engine, optimizer and schedule, the loop, its metrics, and the `pretrain` entry."""
