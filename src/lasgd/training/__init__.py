"""The image-classification recipe: data, models, loop, evaluation, checkpoints, run folder."""
