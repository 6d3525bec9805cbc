"""What a checkpoint is worth: its loss on text that it has not seen."""
