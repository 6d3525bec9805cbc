"""What a checkpoint is worth: its loss on text that it has not seen, what it writes, tasks."""
