"""What changes weights: the losses, and one update from a batch of replay."""
