"""What happens between the products of a training step: norms, gates, dropout, rotary positions, the loss of a row."""
