"""The machine a run is on: its device, its cores, and what is missing for the fast path."""
