"""Pure functions on tensors, each with a ``backend=`` argument and one statement of its maths.

``ops/<op>.py`` holds the contract and the eager body of an op; ``ops/triton/<op>.py`` and
``csrc/cpu/`` hold its compiled bodies. Ops draw no random numbers (noise is an argument), are
time-major, and never permute or copy silently.

Shape letters, used in every docstring and shape comment of the package:

====  ==========================================================
T     time steps of a recorded sequence
B     batch: independent rows
H     imagination or planning horizon, in decisions
N     candidate action sequences of a planner
P     those of them that are given, not drawn
I     iterations of a planner
M     members of an ensemble
A     action size
D     deterministic state size (``deter``, h)
S     stochastic state size (``stoch``, s)
C     categorical latents, each of K classes, S = C·K
K     those; or elites that a planner keeps out of N
E     embedding size of an observation
F     feature size, F = D + S (``feat`` = deter ⊕ stoch)
====  ==========================================================
"""
