"""The fast rollout in other people's Dreamer code: their modules, our loops.

:meth:`Rollout.from_modules` reads the layers of a world model written with ``torch.nn`` and runs
its recurrent loops with :mod:`fastdreamer.ops`. Parameters are used in place and read anew at every
call, so that optimisers, ``state_dict``, ``load_state_dict`` and ``.to()`` go on working and
gradients arrive in ``.grad`` of the caller's own parameters. :func:`fastdreamer.rollout.adapt` does
the reading for known peers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastdreamer.ops.cem import Plan, cem
from fastdreamer.ops.imagine import Imagination, imagine
from fastdreamer.ops.layers import MLPParams, mlp
from fastdreamer.ops.observe import RESETS, Observation, observe
from fastdreamer.ops.open_loop import open_loop
from fastdreamer.ops.params import (
    SQUASHES,
    STDS,
    ActorParams,
    Begin,
    Branches,
    Categorical,
    Latent,
    Normal,
    Readout,
    ReturnParams,
    RSSMParams,
    State,
    StdTransform,
    latent_dist,
    noise_of,
    noise_size,
)
from fastdreamer.ops.rssm_step import rssm_step
from fastdreamer.rollout.cells import read_cell
from fastdreamer.rollout.draws import with_noise
from fastdreamer.rollout.layers import SHARDED, Joined, MisfitError, Net, Reader, is_sharded
from fastdreamer.rollout.verify import Verification, comparable, verify
from fastdreamer.rollout.watch import Answer, Watch, look, refuse_hooks

Layers = nn.Module | Sequence[nn.Module | Joined]
HEADS = ("reward", "critic", "target", "discount")
_BINS = {"reward": "reward_bins", "critic": "value_bins", "target": "value_bins"}
PAIRINGS = ("arrival", "departure")


class _Options(NamedTuple):
    latent: StdTransform | Categorical
    action_std: StdTransform | Categorical
    mean_scale: float
    squash: str
    gamma: float
    lam: float
    action_first: bool
    embed_first: bool
    stoch_first: bool
    through_feat: bool
    pairing: str
    bound_action: bool
    begin_through: bool
    reward_as: Readout
    value_as: Readout
    hard_discount: bool


class Rollout:
    """Recurrent loops over somebody's world model. Make one with :meth:`from_modules`.

    Not a module: it owns no parameter, and belongs in no ``state_dict``. With ``batch_first`` all
    sequences are [B, T, ...]: outputs are transposed views, inputs are copied once where they are
    not time-major in memory. Time-major, nothing is copied.
    """

    def __init__(
        self,
        nets: dict[str, Any],
        options: _Options,
        dims: dict[str, int],
        **call: Any,
    ) -> None:
        self.nets, self.options, self.dims = nets, options, dims
        self.watched: list[Watch] = []
        self.answers: list[Answer] = []
        self.batch_first: bool = call["batch_first"]
        self.reset: str = call["reset"]
        self.backend: str | None = call["backend"]
        self._bins: dict[str, tuple[Tensor, Tensor]] = {}  # as given, and where the heads are

    @classmethod
    def from_modules(
        cls,
        *,
        gru: nn.Module,
        prior: Layers,
        inp: Layers | None = None,
        post: Layers | None = None,
        actor: Layers | None = None,
        reward: Layers | None = None,
        critic: Layers | None = None,
        target: Layers | None = None,
        discount: Layers | None = None,
        activation: str | None = None,
        std: StdTransform = StdTransform(min=0.1),  # noqa: B008 immutable
        latent: Categorical | None = None,
        action_std: StdTransform | Categorical = StdTransform(offset=5.0, min=1e-4),  # noqa: B008
        mean_scale: float = 5.0,
        squash: Literal["tanh", "none", "bound", "clip"] = "tanh",
        gamma: float = 0.99,
        lam: float = 0.95,
        action_first: bool = False,
        embed_first: bool = False,
        stoch_first: bool = False,
        through_feat: bool = False,
        pairing: Literal["arrival", "departure"] = "arrival",
        bound_action: bool = False,
        begin: Tensor | tuple[nn.Module, str] | None = None,
        begin_through: bool = True,
        reward_as: Readout = Readout(),  # noqa: B008
        value_as: Readout = Readout(),  # noqa: B008
        hard_discount: bool = False,
        action_dim: int | None = None,
        batch_first: bool = False,
        reset: str = "all",
        backend: str | None = None,
    ) -> Rollout:
        """Read a world model's layers.

        Args:
            gru: ``nn.GRUCell``, a one-layer ``nn.GRU``, a cell that is DreamerV2's or V3's (one
                Linear of x and h, perhaps normalised; asked for the order of columns and gates),
                or DreamerV3's block-diagonal GRU (torchrl's, r2dreamer's).
            prior: deter -> 2S raw outputs [mean, y], or S = C·K logits: ``nn.Sequential``, an
                ``nn.Linear``, or a list of these, with LayerNorm or RMSNorm behind a Linear or not;
                ``Joined`` are two Linear layers side by side.
            inp: [stoch, action] -> the GRU's input likewise, its activation last. A block-diagonal
                GRU has input layers of its own, of stoch and action (then ``inp`` is None) or of x.
            post: [deter, embed] -> as the prior; ``observe`` needs it.
            actor: [deter, stoch] -> 2A, or A of one-hot actions; ``imagine`` needs it.
            reward, critic, target, discount: [deter, stoch] -> 1, or what ``reward_as`` and
                ``value_as`` read; for rewards, values and λ-returns of ``imagine`` and the scores
                of ``plan``. ``discount`` gives a logit.
            activation: elu, relu, silu, tanh, gelu, gelu_tanh or mish between the layers of lists
                without activation modules, and behind the last of such an ``inp``.
            std: of prior and posterior, see :class:`StdTransform`.
            latent: categorical latents in the place of Gaussian: their classes K and the uniform
                part of their probabilities, see :class:`Categorical`.
            action_std, mean_scale: of the policy a = tanh(c·tanh(x/c) + std(y)·ε); an infinite
                scale c leaves the mean x as it is. ``Categorical(classes, unimix)`` in the place of
                the std: one-hot actions with straight-through gradients.
            squash: what the Normal's sample passes through: ``"tanh"``; ``"none"``; ``"bound"``,
                a / max(1, |a|) with the divisor taken for a constant, as DreamerV3's; ``"clip"``,
                into [-1, 1] with the gradient of the identity.
            gamma, lam: γ and λ.
            action_first, embed_first, stoch_first: inputs are [action, stoch], [embed, deter],
                and for actor and heads [stoch, deter].
            through_feat: whether imagined gradients pass through the features that the actor sees;
                by default they are detached, as in the original Dreamer.
            pairing: which reward the λ-return adds to the discounted value of state t + 1: that of
                arriving there, r(s_{t+1}), as DreamerV3 and torchrl do, or ``"departure"``, that of
                the state before, r(s_t), as most code of Dreamer V1 and V2 does.
            bound_action: whether the dynamics see a / max(1, |a|); a block-diagonal GRU of stoch
                and action does by itself.
            begin: w [D], of which an episode begins with h = tanh(w) and the mode of its prior, in
                the place of zeros: a module and the name of its parameter or buffer, which is
                looked up at each call; or a tensor. The tensor itself is used, also where moving a
                buffer, or ``load_state_dict(assign=True)``, has put another in its place.
            begin_through: whether the mode of categorical latents has a gradient, that of log p.
            reward_as, value_as: how heads are read, see :class:`Readout`; their bins are a tensor,
                or a module and a name, as ``begin`` is.
            hard_discount: whether the discount head says γ or 0, by the sign of its logit.
            action_dim: A. To be said where neither actor nor heads fix S = F - D and the layers
                would fit categorical latents as well.
            batch_first: [B, T, ...] instead of [T, B, ...].
            reset: what ``is_first`` zeroes, see :func:`fastdreamer.ops.observe.observe`.
            backend: see :mod:`fastdreamer.ops.backend`.

        Raises:
            MisfitError: something does not fit; names all of it, why, and what would.
        """
        given = {
            "inp": inp, "prior": prior, "post": post, "actor": actor, "reward": reward,
            "critic": critic, "target": target, "discount": discount,
        }  # fmt: skip
        reader = Reader()
        read: dict[str, Any] = {"gru": read_cell(reader, "gru", gru)}
        for name, module in given.items():
            if module is not None:
                read[name] = reader.net(name, module, activation, act_last=name == "inp")
        nets = {name: net for name, net in read.items() if net is not None}
        single = {"begin": begin, "reward_bins": reward_as.bins, "value_bins": value_as.bins}
        for name, tensor in single.items():
            if tensor is not None and (held := reader.tensor(name, tensor)) is not None:
                nets[name] = held
        one_hot = action_std if isinstance(action_std, Categorical) else None
        dims, misfits = _fit(nets, action_dim, latent, one_hot)
        misfits = reader.misfits + _why_no_inputs(read, inp) + misfits
        for name, transform in {"std": std, "action_std": action_std}.items():
            if isinstance(transform, StdTransform) and transform.kind not in STDS:
                kinds = ", ".join(STDS)
                misfits.append(f"{name}: kind must be one of {kinds}, got {transform.kind!r}")
        if not mean_scale > 0:
            misfits.append(f"mean_scale must be positive (inf: no bound), got {mean_scale}")
        for name, value, known in [("reset", reset, RESETS), ("pairing", pairing, PAIRINGS),
                                   ("squash", squash, SQUASHES)]:  # fmt: skip
            if value not in known:
                misfits.append(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if misfits:
            raise MisfitError("\n".join(dict.fromkeys(misfits)))
        flags = (action_first, embed_first, stoch_first, through_feat, pairing)
        bound_action = bound_action or getattr(nets["gru"], "bound", False)
        flags += (bound_action, begin_through, reward_as, value_as, hard_discount)
        options = _Options(latent or std, action_std, mean_scale, squash, gamma, lam, *flags)
        call = {"batch_first": batch_first, "reset": reset, "backend": backend}
        rollout = cls(nets, options, dims, **call)
        rollout.watch(reader.watched)
        rollout.answers = [Answer(*asked) for asked in reader.asked]
        look(rollout.watched, rollout.answers)  # here first: torch.compile may trace the next
        return rollout

    # ---------------------------------------------------------------- parameters

    @property
    def rssm(self) -> RSSMParams:
        """The dynamics as the ops take them; tensors in place.

        Raises:
            MisfitError: a module has got a hook since, or another forward() or module, which would
                not run, or computes something else in this mode; or the model has been sharded, or
                moved without the tensor ``begin``.
        """
        look(self.watched, self.answers)
        nets, o = self.nets, self.options
        post = nets["post"].params() if "post" in nets else None
        parts = self._inputs(), nets["gru"].params(), nets["prior"].params(), post
        if is_sharded(parts[2].weights[0]):
            raise MisfitError(f"prior: {SHARDED}")
        flags = o.action_first, o.embed_first, o.bound_action, self._begin(parts[2].weights[0])
        return RSSMParams(*parts, o.latent, *flags)

    def _begin(self, like: Tensor) -> Begin | None:
        """The start of an episode, which has to be where the model is."""
        if "begin" not in self.nets:
            return None
        weight = self.nets["begin"].params()
        if (weight.dtype, weight.device) != (like.dtype, like.device):
            raise MisfitError(
                f"begin: is {weight.dtype} on {weight.device}, the prior {like.dtype} on "
                f"{like.device}; begin=(module, name) is looked up where the module is"
            )
        return Begin(weight, self.options.begin_through)

    def _inputs(self) -> MLPParams | Branches:
        """The layers of stoch and action, those of the cell's own included."""
        gru, inp = self.nets["gru"], self.nets.get("inp")
        if gru.branches is not None:
            return gru.branches()
        if inp is None:
            return gru.front.params()
        params = inp.params()
        if gru.front is None:
            return params
        front, norms = gru.front.params(), params.norms or (None,) * len(params.weights)
        return MLPParams(
            params.weights + front.weights, params.biases + front.biases, params.activation,
            norms + (front.norms or (None,)),
        )  # fmt: skip

    @property
    def policy(self) -> ActorParams:
        """The actor likewise."""
        net, o = self._need("actor", "imagine"), self.options
        flags = o.stoch_first, o.through_feat, o.squash
        return ActorParams(net.params(), o.mean_scale, o.action_std, *flags)

    @property
    def heads(self) -> ReturnParams:
        """Reward, critic, target and discount likewise."""
        reward, o = self._need("reward", "a plan or return").params(), self.options
        critic, target, discount = (
            self.nets[name].params() if name in self.nets else None for name in HEADS[1:]
        )
        reads = self.readout("reward"), self.readout("critic")
        flags = o.stoch_first, o.pairing == "departure", *reads, o.hard_discount
        return ReturnParams(reward, critic, target, o.gamma, o.lam, discount, *flags)

    def readout(self, head: str) -> Readout:
        """How reward, critic or target is read; its bins as they are now, where the heads are.

        Those given on another device are copied once, not in every call.
        """
        readout = self.options.reward_as if head == "reward" else self.options.value_as
        held = self.nets.get(_BINS[head])
        if held is None:
            return readout
        bins, device = held.params(), self.like.device
        if bins.device == device or bins.requires_grad:
            return readout._replace(bins=bins.to(device))
        given, copy = self._bins.get(_BINS[head], (None, None))
        if given is not bins or copy.device != device:
            with torch.inference_mode(False):  # a later call may save it for a backward pass
                copy = bins.to(device)
            self._bins[_BINS[head]] = bins, copy
        return readout._replace(bins=copy)

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter that the loops use, each once."""
        seen = {id(p): p for net in self.nets.values() for m in net.modules for p in m.parameters()}
        return list(seen.values())

    # ---------------------------------------------------------------- loops

    def initial(self, batch: int) -> State:
        """The state before an episode, zeros or the learned one: deter [B, D], stoch [B, S]."""
        if "begin" in self.nets:
            params = self.rssm
            return State(*(part.repeat(batch, 1) for part in params.begin.state(params)))
        return State(*(self.like.new_zeros(batch, self.dims[n]) for n in "DS"))

    @property
    def like(self) -> Tensor:
        """A tensor of the parameters' dtype and device."""
        return self.nets["prior"].params().weights[0]

    def step(
        self,
        state: State | tuple[Tensor, Tensor],
        action: Tensor,
        noise: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> tuple[State, Latent]:
        """One step without an observation; see ``ops.rssm_step``.

        Args:
            state: deter [B, D] and stoch [B, S].
            action: [B, A].
            noise: [B, S] standard normal (of categorical latents as :meth:`imagine` takes it,
                without H), drawn if not given.
            generator: where from.

        Returns:
            The next State, deter [B, D] and stoch [B, S], and its prior: ``mean`` and ``std``
            [B, S], or ``logits`` [B, C, K].

        Raises:
            ValueError: a shape or dtype does not fit. BackendError: a backend that was named
            outright cannot run.
        """
        noise = self._state_noise(noise, (len(action),), generator)
        return rssm_step(self.rssm, State(*state), action, noise, backend=self.backend)

    def open_loop(
        self,
        start: State | tuple[Tensor, Tensor],
        action: Tensor,
        noise: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> State:
        """States under given actions; see ``ops.open_loop``.

        Args:
            start: state 0, deter [B, D] and stoch [B, S].
            action: [H, B, A], of which ``action[t]`` leads from state t to state t + 1.
            noise: [H, B, S] standard normal (of categorical latents as :meth:`imagine` takes it),
                drawn if not given.
            generator: where from.

        Returns:
            States 1..H: deter [H, B, D] and stoch [H, B, S].

        Raises:
            ValueError: a shape or dtype does not fit. BackendError: a backend that was named
            outright cannot run.
        """
        action = self._inward(action)
        noise = self._state_noise(noise, tuple(action.shape[:2]), generator)
        return self._outward(
            open_loop(self.rssm, State(*start), action, noise, backend=self.backend)
        )

    def observe(
        self,
        embed: Tensor,
        action: Tensor,
        is_first: Tensor | None = None,
        start: State | tuple[Tensor, Tensor] | None = None,
        noise: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Observation:
        """Filter a sequence; see ``ops.observe``.

        Args:
            embed: [T, B, E] of the observations, in any floating dtype.
            action: [T, B, A], that led to each.
            is_first: [T, B], bool: where an episode begins; None: nowhere.
            start: the state before, deter [B, D] and stoch [B, S]; None: :meth:`initial`.
            noise: [T, B, S] standard normal (of categorical latents as :meth:`imagine` takes it),
                drawn if not given.
            generator: where from.

        Returns:
            ``.state``, deter [T, B, D] and stoch [T, B, S] drawn from the posterior; ``.post`` and
            ``.prior``, each ``mean`` and ``std`` [T, B, S], or ``logits`` [T, B, C, K].

        Raises:
            ValueError: a shape or dtype does not fit. MisfitError: the Rollout was made without
            ``post``. BackendError: a backend that was named outright cannot run.
        """
        self._need("post", "observe")
        embed, action = self._inward(embed), self._inward(action)
        lead = action.shape[:2]
        if is_first is None:
            is_first = torch.zeros(lead, dtype=torch.bool, device=action.device)
        else:
            is_first = self._inward(is_first)
        start = self.initial(lead[1]) if start is None else State(*start)
        noise = self._state_noise(noise, tuple(lead), generator)
        given = (start, embed, action, is_first, noise)
        seen = observe(self.rssm, *given, reset=self.reset, backend=self.backend)
        return Observation(*map(self._outward, seen))

    def imagine(
        self,
        start: State | tuple[Tensor, Tensor],
        horizon: int | None = None,
        *,
        state_noise: Tensor | None = None,
        action_noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        returns: bool | None = None,
    ) -> Imagination:
        """H decisions of the actor from start states [B, ...]; see ``ops.imagine``.

        Args:
            start: deter [B, D] and stoch [B, S].
            horizon: H; may be left out where noise is given.
            state_noise, action_noise: [H, B, S] and [H, B, A] standard normal (of categorical
                latents [H, B, C] uniform in [0, 1), or standard Gumbel; of one-hot actions one
                uniform number each), drawn if not given.
            generator: where from.
            returns: whether to add rewards, values and λ-returns; by default if the Rollout has
                a reward head and a critic.

        Returns:
            ``.deter`` [H, B, D] and ``.stoch`` [H, B, S] of states 1..H (the start is state 0), and
            ``.action`` [H, B, A], of which ``action[t]`` led from state t to state t + 1. With
            returns ``.reward``, ``.value``, ``.returns`` and, of a discount head, ``.discount``,
            [H, B] each, as :class:`fastdreamer.ops.imagine.Imagination` says; else they are None.

        Raises:
            ValueError: neither horizon nor noise is given, or a shape or dtype does not fit.
            MisfitError: the Rollout was made without the actor or a head that this needs.
            BackendError: a backend that was named outright cannot run.
        """
        start = State(*start)
        noises = [n for n in (state_noise, action_noise) if n is not None]
        if horizon is None:
            if not noises:
                raise ValueError("imagine: horizon or noise must be given")
            horizon = noises[0].shape[1 if self.batch_first else 0]
        lead = (horizon, len(start.deter))
        state_noise = self._state_noise(state_noise, lead, generator)
        action_noise = self._action_noise(action_noise, lead, generator)
        if returns is None:
            returns = "reward" in self.nets and "critic" in self.nets
        heads = self.heads if returns else None
        given = (self.rssm, self.policy, start, state_noise, action_noise)
        return self._outward(imagine(*given, returns=heads, backend=self.backend))

    @torch.no_grad()
    def plan(
        self,
        start: State | tuple[Tensor, Tensor],
        horizon: int | None = None,
        *,
        mean: Tensor | None = None,
        num_samples: int = 1000,
        num_elites: int = 100,
        iterations: int = 10,
        init_std: float = 1.0,
        min_std: float = 0.0,
        clip: float = 0.9999,
        score: str | None = None,
        generator: torch.Generator | None = None,
    ) -> Plan:
        """Plan with the cross-entropy method; ``mean[0]`` is the action (see ``ops.cem``).

        Args:
            start: deter [B, D] and stoch [B, S].
            horizon: H; may be left out where ``mean`` is given.
            mean: [H, B, A] to start from, for instance the last plan moved by one step; zeros if
                not given.
            num_samples, num_elites, iterations: N, K and I.
            init_std, min_std: of the Normal to start from, and the least of a fitted one.
            clip: bound on the candidates' |a|; the original PlaNet's is the environment's, 1.
            score: ``"reward"`` or, by default where there is a critic, ``"lambda_return"``.
            generator: where the noise comes from.

        Returns:
            ``.mean`` and ``.std`` [H, B, A] of the last fit, and ``.scores`` [I, B, N] of every
            candidate, iteration by iteration.

        Raises:
            ValueError: neither horizon nor mean is given, they differ, or a shape does not fit.
            MisfitError: the Rollout was made without the heads that the score needs.
            BackendError: a backend that was named outright cannot run.
        """
        start = State(*start)
        if mean is None:
            if horizon is None:
                raise ValueError("plan: horizon or mean must be given")
            mean = start.deter.new_zeros(horizon, len(start.deter), self.dims["A"])
        else:
            mean = self._inward(mean)
            if horizon not in (None, len(mean)):
                raise ValueError(f"plan: horizon is {horizon}, mean has {len(mean)} steps")
        lead = (iterations, *mean.shape[:2], num_samples)
        noise = (
            self._noise(None, (*lead, self.dims["A"]), generator),
            self._state_noise(None, lead, generator),
        )
        bootstraps = "critic" in self.nets or "target" in self.nets
        found = cem(
            *(self.rssm, self.heads, start, mean, torch.full_like(mean, init_std), *noise),
            num_elites=num_elites,
            min_std=min_std,
            clip=clip,
            score=score or ("lambda_return" if bootstraps else "reward"),
            backend=self.backend,
        )
        return found._replace(mean=self._outward(found.mean), std=self._outward(found.std))

    def prior(self, deter: Tensor) -> Latent:
        """The prior of deterministic states, [..., D]."""
        params = self.rssm
        return latent_dist(mlp(params.prior, deter), params.latent, deter.dtype)

    def draw(self, dist: Latent, generator: torch.Generator | None = None) -> Tensor:
        """A sample of a prior or posterior, [..., S]."""
        lead = dist.mean.shape[:-1] if isinstance(dist, Normal) else dist.logits.shape[:-2]
        return dist.sample(self._state_noise(None, tuple(lead), generator))

    def verify(
        self,
        batch: Mapping[str, Tensor] | None = None,
        *,
        own: Callable[..., Mapping[str, Tensor]] | None = None,
        own_dream: Callable[..., Mapping[str, Tensor]] | None = None,
        seed: int = 0,
        repeats: int = 5,
    ) -> Verification:
        """Compare with a loop over the caller's own modules, values and gradients; and its speed.

        The loop calls the modules themselves, in float32 and (copies of them) in float64, in the
        orders and with the constants that the Rollout was told. Whether these are right, only the
        caller's own code can say: ``own`` and ``own_dream`` run it, on the same inputs and with the
        same noise. Every standard normal that they draw (of categorical latents every uniform
        number or class, of Gumbel-softmax samples every exponential number) comes from that noise,
        step by step; of several such draws in a step all are equal.

        Args:
            batch: ``embed``, ``action`` and ``is_first`` as ``observe`` takes them; what is
                missing is drawn, 20 steps of 8 rows.
            own: called as ``own(embed, action, is_first, start)``, filters the sequence from the
                State ``start`` and returns any of ``deter``, ``stoch``, ``post_mean``,
                ``post_std``, ``prior_mean`` and ``prior_std``, or ``post_logits`` and
                ``prior_logits``, [T, B, ...] (batch-first as the Rollout is).
            own_dream: called as ``own_dream(start, horizon)``, returns any of ``deter`` and
                ``stoch`` of states 1..H, ``action``, and what else ``imagine`` gives.
            seed: of everything drawn.
            repeats: of each timing, of forward and backward with weights that have just changed.

        Returns:
            A Verification: ``print`` it; ``.ok`` says whether every error is in the order of the
            loop's own, and the caller's functions agree.
        """
        with comparable(self):
            return verify(self, batch, own, own_dream, seed, repeats)

    def serve(
        self, function: Callable[[], Any], noise: Tensor, action_noise: Tensor | None = None
    ) -> Any:
        """Call somebody's loop with this noise in the place of what it draws, see ``draws``.

        Args:
            function: without arguments.
            noise, action_noise: time-major, as ``observe`` and ``imagine`` take them.
        """
        kinds: dict[str, list[Tensor]] = {"normal": [], "uniform": [], "gumbel": []}

        def serve(numbers: Tensor, of: StdTransform | Categorical) -> None:
            categorical = isinstance(of, Categorical)
            kind = ("gumbel" if of.gumbel else "uniform") if categorical else "normal"
            kinds[kind].append(numbers)

        if action_noise is not None:
            serve(action_noise, self.options.action_std)
        serve(noise, self.options.latent)
        return with_noise(function, *kinds.pop("normal"), **kinds)

    # ---------------------------------------------------------------- inside

    def watch(self, modules: Sequence[tuple[str, nn.Module]]) -> None:
        """Look at these in every call: they are not called any more. By a name for messages.

        Raises:
            MisfitError: one has a hook, which would not run.
        """
        refuse_hooks(modules)
        self.watched += [Watch(*named) for named in modules]

    def _need(self, name: str, what: str) -> Net:
        if name not in self.nets:
            raise MisfitError(f"{what} needs {name}, and this Rollout was made without")
        return self.nets[name]

    def _noise(
        self,
        given: Tensor | None,
        shape: tuple[int, ...],
        generator: torch.Generator | None,
        draw: Callable[..., Tensor] = torch.randn,
    ) -> Tensor:
        """Noise of a shape that is time-major, as given or drawn."""
        if given is not None:
            return self._inward(given) if len(shape) == 3 else given
        like = self.like
        return draw(shape, generator=generator, dtype=like.dtype, device=like.device)

    def _state_noise(
        self, given: Tensor | None, lead: tuple[int, ...], generator: torch.Generator | None
    ) -> Tensor:
        """[*lead, S] standard normal, or [*lead, C] uniform of categorical latents; or Gumbel."""
        size, draw = noise_of(self.options.latent)
        return self._noise(given, (*lead, self.dims[size]), generator, draw)

    def _action_noise(
        self, given: Tensor | None, lead: tuple[int, ...], generator: torch.Generator | None
    ) -> Tensor:
        """[*lead, A] standard normal or Gumbel, or one uniform number a one-hot action."""
        size, std = self.dims["A"], self.options.action_std
        return self._noise(given, (*lead, noise_size(std, size)), generator, noise_of(std)[1])

    def _inward(self, x: Tensor) -> Tensor:
        """[B, T, ...] to time-major, contiguous."""
        return x.transpose(0, 1).contiguous() if self.batch_first else x

    def _outward(self, x: Any) -> Any:
        """Time-major to the caller's layout; tuples of tensors, too."""
        if self.batch_first and isinstance(x, Tensor):
            return x.transpose(0, 1)
        return type(x)(*map(self._outward, x)) if isinstance(x, tuple) else x


def _why_no_inputs(read: dict[str, Any], inp: object) -> list[str]:
    """What is wrong with the input layers beside those of the cell."""
    gru, net = read["gru"], read.get("inp")
    if gru is None:
        return []
    if gru.branches is not None:
        given = "inp: the cell has layers of stoch and action of its own; leave it out"
        return [given] if inp is not None else []
    if gru.front is None:
        return ["inp: must be given, the layers of [stoch, action]"] if inp is None else []
    if net is not None and net.activation != gru.front.activation:
        return [
            f"inp: its activation is {net.activation}, that of the cell's own input layer "
            f"{gru.front.activation}; one for both fits"
        ]
    return []


def _fit(
    nets: dict[str, Any],
    action_dim: int | None,
    latent: Categorical | None,
    one_hot: Categorical | None,
) -> tuple[dict[str, int], list[str]]:
    """Sizes by letter, and what does not fit together of the parts that could be read."""
    if "prior" not in nets:
        return {}, []
    gru, out = nets.get("gru"), nets["prior"].out
    D, hidden = (gru.deter, gru.inputs) if gru else (nets["prior"].inputs, None)
    inputs = nets["inp"].inputs if "inp" in nets else None
    if inputs is None and gru and (gru.front is not None or gru.branches is not None):
        inputs = hidden  # of stoch and action
    if latent is not None:
        K, u = latent.classes, latent.unimix
        if K < 1 or out % K or not 0 <= u < 1:
            return {}, [
                f"latent: the prior's {out} outputs make no categoricals of {K} classes, {u} of "
                "them uniform"
            ]
        S, dims = out, {"D": D, "S": out, "C": out // K}
    else:
        if reason := _why_not_gaussian(nets, D, action_dim, inputs):
            return {}, [reason]
        S = out // 2
        dims = {"D": D, "S": S}
    misfits = []
    if gru and gru.branches is not None:
        taken = gru.nets["stoch"].inputs
        if taken != S:
            return {}, [f"prior: its {out} outputs are no state of {taken}, which the cell takes"]
    if "inp" in nets or (gru and (gru.front is not None or gru.branches is not None)):
        dims["A"] = inputs - S
        if dims["A"] < 1 or action_dim not in (None, dims["A"]):
            action = "an action" if action_dim is None else f"an action of {action_dim}"
            half = "" if latent else " (half of the prior's outputs)"
            return {}, [
                f"inp: takes {inputs} inputs, which a state of {S}{half} and {action} "
                "do not make" + ("" if latent else "; are the latents categorical?")
            ]
    A = dims.get("A", 0)
    if "post" in nets:
        dims["E"] = nets["post"].inputs - D
    wanted = {"inp": (None, hidden), "prior": (D, out), "post": (None, out)}
    wanted |= {"actor": (D + S, (A if one_hot else 2 * A) if A else None)}
    for name in HEADS:
        bins = nets.get(_BINS.get(name))
        one = 1 if name not in nets or nets[name].out > 2 else nets[name].out  # mean and log std
        wanted[name] = D + S, one if bins is None else bins.params().numel()
    if one_hot is not None and A and (one_hot.classes < 1 or A % one_hot.classes):
        misfits.append(f"action_std: {A} actions make no one-hot actions of {one_hot.classes}")
    if "begin" in nets and nets["begin"].params().numel() != D:
        misfits.append(f"begin: must have D={D} numbers, got {nets['begin'].params().numel()}")
    for name, (inputs, outputs) in wanted.items():
        if name not in nets:
            continue
        got = nets[name].inputs, nets[name].out
        want = (got[0] if inputs is None else inputs, got[1] if outputs is None else outputs)
        if got != want or (name == "post" and dims["E"] < 1):
            sizes = ", ".join(f"{letter}={dims[letter]}" for letter in "DSA" if letter in dims)
            misfits.append(
                f"{name}: must map {want[0]} to {want[1]} ({sizes}), got {got[0]} to {got[1]}"
            )
    return dims, misfits


def _why_not_gaussian(
    nets: dict[str, Any], D: int, action_dim: int | None, inputs: int | None
) -> str | None:
    """Why the prior's outputs are no mean and std, or may be none.

    C·K logits are as many as the classes that follow in the state; of a Gaussian state half as many
    numbers follow.
    """
    out = nets["prior"].out
    say = "say latent=Categorical(classes)"
    if out % 2:
        return (
            f"prior: has {out} outputs, but mean and std of a Gaussian latent are an even number; "
            f"of categorical latents {say}"
        )
    heads = [name for name in ("actor", *HEADS) if name in nets]
    for name in heads:
        if nets[name].inputs - D == out:
            return (
                f"prior: its {out} outputs are the logits of categorical latents ({name} takes "
                f"{nets[name].inputs} features, deter and one input for each of them); {say}"
            )
    if inputs is None:
        return None
    if action_dim is not None and inputs - action_dim == out:
        return (
            f"prior: its {out} outputs are the logits of categorical latents (inp takes as many "
            f"and {action_dim} of the action); {say}"
        )
    if action_dim is None and inputs > out and not heads:
        return (
            f"inp: its {inputs} inputs and the prior's {out} outputs fit Gaussian latents of "
            f"{out // 2} with actions of {inputs - out // 2} and categorical latents of {out} "
            f"classes in all with actions of {inputs - out}; say action_dim=, or {say[4:]}"
        )
    return None
