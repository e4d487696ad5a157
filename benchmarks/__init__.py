"""How long things take and how much memory they need; README.md holds the protocol and numbers."""
