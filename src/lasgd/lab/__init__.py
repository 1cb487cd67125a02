"""Where and under what a run takes place: conditions, shaped links, local ranks."""
