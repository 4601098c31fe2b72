"""What is done with a run after, or during, its training: evaluate, predict, export."""
