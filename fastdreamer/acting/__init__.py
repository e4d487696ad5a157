"""What chooses actions: the agent's networks, its planner and its shield, and playing episodes."""
