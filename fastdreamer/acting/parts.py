"""Which networks choose a run's actions, and what of them travels to whoever acts."""

from __future__ import annotations

from torch import Tensor, nn

from fastdreamer.acting.planning import PLANNERS
from fastdreamer.config import Config


def acting_parts(config: Config) -> tuple[str, ...]:
    """Modules and buffers that collecting and evaluating need, by their names in the agent."""
    explore = config.explore
    own = "planet" if config.agent == "planet" else "actor"
    meant = {"auto": {own}, "mixed": {"actor", "mpc"}}
    collects, evaluates = (
        meant.get(name, {name}) for name in (config.collect.controller, config.eval.controller)
    )
    optimist, greedy = set(), evaluates | collects
    if explore.method == "ucb":  # whoever collects
        optimist, greedy = collects, evaluates
    last = "target_" if config.behavior.target_every else ""  # the critics that end a return
    parts = ["model.encoder", "model.rssm"]
    # A plan by λ-return begins at what the actor would do.
    acts = greedy if explore.at == "actor" else greedy | optimist
    if acts & {"actor", "mpc"}:
        parts.append("actor")
    if greedy & PLANNERS:
        parts.append("model.reward")
    if "mpc" in (greedy if explore.critics else greedy | optimist):
        parts.append(f"{last}critic")
    if "mpc" in greedy | optimist:
        parts.append("model.discount")
    if optimist:
        parts.append("explorer.actor")
    if optimist & PLANNERS:
        parts += ["explorer.rewards", "explorer.rounds"]
    if "mpc" in optimist:
        parts.append(f"explorer.{last}critics")
    if config.safety.shield:
        parts.append("guard.barrier")
    return tuple(parts)


def acting_weights(agent: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights that a :class:`~fastdreamer.acting.policy.Policy` of the same settings
    has, on the CPU, by name."""
    parts = acting_parts(agent.config)
    return {
        name: value.detach().to("cpu", copy=True)
        for name, value in agent.state_dict().items()
        if _within(name, parts)
    }


def keep_only(module: nn.Module, parts: tuple[str, ...], above: str = "") -> None:
    """Make None of all modules and buffers but these and those around them."""
    around = [part.rpartition(".")[0] for part in parts]
    for name, _ in [*module.named_children(), *module.named_buffers(recurse=False)]:
        full = above + name
        if _within(full, parts):
            continue
        if full in around:
            keep_only(getattr(module, name), parts, f"{full}.")
        else:
            setattr(module, name, None)


def _within(name: str, parts: tuple[str, ...]) -> bool:
    return any(f"{name}.".startswith(f"{part}.") for part in parts)
