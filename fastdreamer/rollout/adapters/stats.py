"""The batch-first ``RSSM`` of dreamerv3-torch and dreamer-torch (NM512, jsikyoon)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdreamer.ops.params import Categorical, State, StdTransform
from fastdreamer.rollout.adapters.loop import Loop, latent_loop
from fastdreamer.rollout.layers import MisfitError

_STDS = {
    "softplus": StdTransform(),
    "sigmoid": StdTransform("sigmoid"),
    "sigmoid2": StdTransform("sigmoid", scale=2, slope=0.5),
}


class StatsLoop(Loop):
    """In the place of ``observe``; states as dictionaries of stoch, deter and logit, or mean, std.

    An episode begins with the learned state where the model has one. Unlike the model's own, it
    leaves the actions as they are where an episode begins.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        own = [f"{name} = {getattr(model, name)!r}; {fit!r} fits" for name, fit in _PLAIN.items()
               if getattr(model, name, fit) != fit]  # fmt: skip
        if not model._discrete and model._std_act not in _STDS:
            own.append(f"_std_act = {model._std_act!r}; {', '.join(_STDS)} fit")
        if own:
            raise MisfitError("\n".join(f"RSSM: {reason}" for reason in own))
        inp = model._img_in_layers if hasattr(model, "_img_in_layers") else model._inp_layers
        stats = "_imgs_stat_layer" if hasattr(model, "_imgs_stat_layer") else "_ims_stat_layer"
        given = {
            "inp": inp,
            "gru": model._cell,
            "prior": [model._img_out_layers, getattr(model, stats)],
            "post": [model._obs_out_layers, model._obs_stat_layer],
            "stoch_first": True,
            "batch_first": True,
        }
        if model._discrete:
            unimix = float(getattr(model, "_unimix_ratio", 0.0))
            given["latent"] = Categorical(int(model._discrete), unimix)
        else:
            given["std"] = _STDS[model._std_act]._replace(min=float(model._min_std))
            if hasattr(model, "_num_actions"):
                given["action_dim"] = int(model._num_actions)
        if getattr(model, "_initial", "zeros") == "learned":
            given["begin"] = model, "W"
        super().__init__(model, given, options)
        self.resets = "is_first" in inspect.signature(model.observe).parameters

    def forward(self, embed: Tensor, action: Tensor, *rest: Any, **named: Any) -> Any:
        """What ``observe`` returns: posterior and prior, [B, T, ...].

        Args:
            embed, action: [B, T, E] and [B, T, A], the action that led to each.
            rest, named: ``is_first`` [B, T] where the model takes it, and ``state``.
        """
        names = ("is_first", "state") if self.resets else ("state",)
        given = dict(zip(names, rest, strict=False)) | named
        state, first = given.get("state"), given.get("is_first")
        if first is not None:
            first = first != 0
            if state is None:  # begins anew with all rows, whatever is_first says
                first = torch.cat([torch.ones_like(first[:, :1]), first[:, 1:]], 1)
        if state is None:
            start = self.rollout.initial(len(action))
        else:
            start = State(state["deter"], state["stoch"].reshape(len(action), -1))
        seen = self.rollout.observe(embed, action, first, start, given.get("noise"))
        return latent_loop(self.rollout, seen)

    def observe(self, *args: Any, **kwargs: Any) -> Any:
        """The same by its name."""
        return self(*args, **kwargs)

    def own(self, *inputs: Any) -> Any:
        embed, action, *rest = inputs
        state = dict(rest.pop())  # the model's own changes both
        return self.model.observe(embed, action.clone(), *rest, state)

    def example(self, draw: Callable[..., Tensor]) -> tuple[tuple[Any, ...], Tensor]:
        first = torch.zeros_like(draw(2, 4))
        first[1, 0] = first[0, 2] = first[0, 3] = first[1, 3] = 1
        given = draw(2, 4, "E"), draw(2, 4, "A").tanh(), *([first] if self.resets else [])
        return (*given, self.start(draw)), self.noise(draw, 4)

    def start(self, draw: Callable[..., Tensor]) -> dict[str, Tensor]:
        """A state of two rows as the model has it."""
        deter = draw(2, "D").tanh()
        if not self.model._discrete:
            return {"mean": draw(2, "S"), "std": draw(2, "S"), "stoch": draw(2, "S"),
                    "deter": deter}  # fmt: skip
        size = (2, "C", int(self.model._discrete))
        return {"logit": draw(*size), "stoch": draw(*size), "deter": deter}


_PLAIN = {"_rec_depth": 1, "_mean_act": "none", "_shared": False, "_temp_post": True}
"""What else the models could be, and what the loop is."""
