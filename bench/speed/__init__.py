"""Time: of the training step and its operators, of loading, generation, rows and checkpoints."""
