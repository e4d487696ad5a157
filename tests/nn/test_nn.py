"""The modules: shapes of every preset, pixels in and out, distributions, and the codec's maths."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Independent, kl_divergence
from torch.distributions import Normal as TorchNormal

from fastdreamer.config import preset
from fastdreamer.nn import MLP, RSSM, Actor, Decoder, Encoder, WorldModel
from fastdreamer.nn import dists as ours
from fastdreamer.nn.codec import float_to_pixels
from fastdreamer.ops.codec import pixels_to_float
from fastdreamer.ops.layers import symexp, symlog
from fastdreamer.ops.params import Normal

SHAPES = {"pixels": (64, 64, 3), "state": (24,)}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def observations(kinds, *lead):
    obs = {
        "pixels": torch.randint(
            0, 256, (*lead, 64, 64, 3), generator=generator(), dtype=torch.uint8
        ),
        "state": 5 * torch.randn(*lead, 24, generator=generator()),
    }
    return {kind: obs[kind] for kind in kinds}


def world_model(name, kinds):
    return WorldModel(preset(name).model, {kind: SHAPES[kind] for kind in kinds}, action_dim=6)


# ---------------------------------------------------------------- codec


@pytest.mark.parametrize("kinds", [("pixels",), ("state",), ("pixels", "state")])
@pytest.mark.parametrize("name", ["report", "walker", "tiny"])
def test_shapes(name, kinds):
    config = preset(name).model
    model = world_model(name, kinds)
    pixels = {"report": 1024, "walker": 128 * 2 * 2, "tiny": 16}[name]
    size = pixels * ("pixels" in kinds) + config.units * ("state" in kinds)
    assert model.encoder.embed_size == size
    assert model.rssm.feat_size == config.deter + config.stoch
    assert model.rssm.post.layers[0].in_features == config.deter + size
    embed = model.encoder(observations(kinds, 2))
    assert embed.shape == (2, size) and embed.dtype == torch.float32
    feat = torch.randn(2, model.rssm.feat_size, generator=generator())
    means = model.decoder(feat)
    assert {kind: tuple(x.shape) for kind, x in means.items()} == {
        kind: (2, *SHAPES[kind]) for kind in kinds
    }
    assert model.predict_reward(feat).shape == (2,)
    inp = {"report": 200, "walker": 200, "tiny": 16}[name]
    hidden = {"report": 400, "walker": 200, "tiny": 16}[name]
    rssm = model.rssm
    assert (rssm.inp.layers[0].out_features, rssm.gru.input_size) == (inp, inp)
    assert [head.layers[0].out_features for head in (rssm.prior, rssm.post)] == [hidden, hidden]


@pytest.mark.parametrize("name", ["report", "walker"])
def test_convolutions_halve_as_the_paper_s(name):
    """64 → 31 → 14 → 6 → 2 and 1 → 5 → 13 → 30 → 64; nothing else has weights."""
    model = world_model(name, ("pixels",))
    channels = {"report": (16, 32, 64, 64), "walker": (16, 32, 64, 128)}[name]
    x, sizes = torch.zeros(1, 3, 64, 64), []
    for conv in model.encoder.convs:
        x = conv(x)
        sizes.append((conv.kernel_size, tuple(x.shape[1:])))
    assert sizes == [((4, 4), (c, n, n)) for c, n in zip(channels, (31, 14, 6, 2), strict=True)]
    x, sizes = torch.zeros(1, {"report": 1024, "walker": 512}[name], 1, 1), []
    for conv in model.decoder.convs:
        x = conv(x)
        sizes.append((conv.kernel_size[0], tuple(x.shape[1:])))
    channels = {"report": (64, 32, 16, 3), "walker": (64, 32, 16, 3)}[name]
    shapes = [(c, n, n) for c, n in zip(channels, (5, 13, 30, 64), strict=True)]
    assert sizes == list(zip((5, 5, 6, 6), shapes, strict=True))
    assert (model.encoder.linear is not None) == (name == "report")
    assert model.decoder.linear_relu == (name == "report")


@pytest.mark.parametrize("lead", [(), (1,), (3,), (2, 3), (2, 1, 2)])
def test_any_leading_dimensions(lead):
    model = world_model("tiny", SHAPES)
    obs = observations(SHAPES, *lead)
    flat = {kind: x.reshape(-1, *SHAPES[kind]) for kind, x in obs.items()}
    embed = model.encoder(obs)
    assert embed.shape == (*lead, 32)
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(embed.reshape(-1, 32), model.encoder(flat), **close)

    feat = torch.randn(*lead, 20, generator=generator())
    means = model.decoder(feat)
    for kind, mean in model.decoder(feat.reshape(-1, 20)).items():
        assert means[kind].shape == (*lead, *SHAPES[kind])
        torch.testing.assert_close(means[kind].reshape(mean.shape), mean, **close)
    assert model.predict_reward(feat).shape == lead


def numpy_conv(x, conv):
    """[N, h, w, C] float64 through a strided convolution, written as a sum over windows."""
    weight, bias = conv.weight.detach().double().numpy(), conv.bias.detach().double().numpy()
    k = conv.kernel_size[0]
    windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), (1, 2))[:, ::2, ::2]
    return np.einsum("nijckl,ockl->nijo", windows, weight) + bias


def numpy_deconv(x, conv):
    """[N, h, w, C] float64 through a transposed convolution: every input paints a window."""
    weight, bias = conv.weight.detach().double().numpy(), conv.bias.detach().double().numpy()
    k, (n, h, w, _) = conv.kernel_size[0], x.shape
    out = np.zeros((n, 2 * h - 2 + k, 2 * w - 2 + k, weight.shape[1]))
    for i in range(h):
        for j in range(w):
            paint = np.einsum("nc,cokl->nklo", x[:, i, j], weight)
            out[:, 2 * i : 2 * i + k, 2 * j : 2 * j + k] += paint
    return out + bias


@pytest.mark.parametrize("linear", [None, 10])
def test_the_encoder_against_numpy(linear):
    torch.manual_seed(0)
    kinds = dict(channels=(4, 5, 6, 7), linear=linear, units=8, layers=2, activation="elu")
    encoder = Encoder(SHAPES, **kinds)
    obs = observations(SHAPES, 3)
    x = obs["pixels"].numpy() / 255.0 - 0.5
    for conv in encoder.convs:
        x = np.maximum(numpy_conv(x, conv), 0)
    x = x.transpose(0, 3, 1, 2).reshape(3, -1)
    if linear:
        x = x @ encoder.linear.weight.detach().double().numpy().T
        x = x + encoder.linear.bias.detach().double().numpy()
    y = obs["state"].double().numpy()
    y = np.sign(y) * np.log1p(np.abs(y))
    for layer in encoder.state.layers:
        y = y @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
        y = np.where(y > 0, y, np.expm1(y))
    got = encoder(obs).detach().double().numpy()
    np.testing.assert_allclose(got, np.concatenate([x, y], -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("relu", [False, True])
def test_the_decoder_against_numpy(relu):
    torch.manual_seed(0)
    decoder = Decoder(
        5, {"pixels": (64, 64, 3)}, channels=(6, 5, 4), linear=8, linear_relu=relu, units=8,
        layers=2, activation="elu",
    )  # fmt: skip
    feat = torch.randn(2, 5, generator=generator())
    x = feat.double().numpy() @ decoder.linear.weight.detach().double().numpy().T
    x = x + decoder.linear.bias.detach().double().numpy()
    assert (x < 0).any()
    x = (np.maximum(x, 0) if relu else x)[:, None, None]
    for i, conv in enumerate(decoder.convs):
        x = numpy_deconv(x, conv)
        x = np.maximum(x, 0) if i < 3 else x
    got = decoder(feat)["pixels"].detach().double().numpy()
    np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-5)


def decode_with_torch(decoder, feat):
    """The decoder by its modules' own forward."""
    x = decoder.linear(feat).relu()[..., None, None]
    for i, conv in enumerate(decoder.convs):
        x = conv(x.relu() if i else x)
    return x.permute(0, 2, 3, 1)


def values_and_gradients(f, decoder, feat):
    """[pixels, of feat, of each parameter] for fixed cotangents."""
    feat = feat.clone().requires_grad_()
    pixels = f(decoder, feat)
    cotangent = torch.randn(pixels.shape, generator=generator(1), dtype=torch.float64)
    inputs = [feat, *decoder.parameters()]
    return [pixels, *torch.autograd.grad(pixels, inputs, cotangent.to(pixels.dtype))]


def pixel_decoder(channels=(6, 5, 4)):
    torch.manual_seed(0)
    kinds = dict(channels=channels, linear=8, linear_relu=True, units=8, layers=2)
    return Decoder(5, {"pixels": (64, 64, 3)}, **kinds, activation="elu")


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("channels", [(6, 5, 4), (1, 2, 1)])
def test_the_decoder_is_torch_s_transposed_convolutions(channels, n):
    decoder = pixel_decoder(channels).double()
    feat = torch.randn(n, 5, generator=generator(), dtype=torch.float64)
    decode = lambda decoder, feat: decoder(feat)["pixels"]  # noqa: E731
    got = values_and_gradients(decode, decoder, feat)
    want = values_and_gradients(decode_with_torch, decoder, feat)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(decode(decoder, feat), want[0].detach(), rtol=1e-11, atol=1e-12)
    decoder.convs[2].requires_grad_(False)  # a frozen layer hands the gradient on
    first = decoder.convs[1].weight
    (got_first,) = torch.autograd.grad(decode(decoder, feat).sum(), first)
    (want_first,) = torch.autograd.grad(decode_with_torch(decoder, feat).sum(), first)
    torch.testing.assert_close(got_first, want_first, rtol=1e-11, atol=1e-12)


def test_the_decoder_under_autocast():
    """float32 images and gradients, as close to float64 as torch's own."""
    decoder = pixel_decoder()
    with torch.no_grad():  # far from the ReLUs' kinks, where rounding would flip a gradient
        for layer in (decoder.linear, *decoder.convs):
            layer.bias += 3
    feat = torch.randn(20, 5, generator=generator())
    autocast = torch.autocast("cpu", torch.bfloat16)
    got = values_and_gradients(autocast(lambda decoder, x: decoder(x)["pixels"]), decoder, feat)
    torchs = values_and_gradients(autocast(decode_with_torch), decoder, feat)
    assert {x.dtype for x in got} == {torch.float32}
    exact = values_and_gradients(decode_with_torch, decoder.double(), feat.double())
    for mine, theirs, want in zip(got, torchs, exact, strict=True):
        error, usual = ((x.double() - want).norm() / want.norm() for x in (mine, theirs))
        assert error < 0.01 and error < 1.5 * usual


@pytest.mark.parametrize("lead", [(1,), (2, 3)])
def test_squared_errors_are_those_of_what_the_decoder_shows(lead):
    model, obs = world_model("tiny", SHAPES), observations(SHAPES, *lead)
    feat = torch.randn(*lead, 20, generator=generator())
    means = {kind: x.detach().double().numpy() for kind, x in model.decoder(feat).items()}
    state = obs["state"].double().numpy()
    want = {
        "pixels": ((means["pixels"] - (obs["pixels"].numpy() / 255 - 0.5)) ** 2).sum(),
        "state": ((means["state"] - np.sign(state) * np.log1p(np.abs(state))) ** 2).sum(),
    }
    got = model.decoder.squared_errors(feat, obs)
    assert got.keys() == want.keys()
    for kind, error in got.items():
        assert error.shape == () and error.item() == pytest.approx(want[kind], rel=1e-5)


def test_every_pixel_survives_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = pixels_to_float(pixels)
    assert x.dtype == torch.float32 and (x.min(), x.max()) == (-0.5, 0.5)
    torch.testing.assert_close(x.double(), pixels.double() / 255 - 0.5, rtol=0, atol=6e-8)
    assert torch.equal(float_to_pixels(x), pixels)
    assert torch.equal(float_to_pixels(x + 0.4 / 255), pixels)
    assert torch.equal(float_to_pixels(x.bfloat16()), float_to_pixels(x.bfloat16().float()))
    extreme = torch.tensor([-7.0, 7.0, -0.5 - 1e-6, 0.5 + 1e-6])
    assert float_to_pixels(extreme).tolist() == [0, 255, 0, 255]


def test_pixels_that_are_no_bytes_are_refused_and_left_alone():
    pixels = torch.rand(2, 64, 64, 3)
    before = pixels.clone()
    with pytest.raises(ValueError, match="pixels must be uint8, got float32"):
        pixels_to_float(pixels)
    assert torch.equal(pixels, before)


# ---------------------------------------------------------------- heads and RSSM


def test_mlp_is_a_torch_sequential():
    torch.manual_seed(0)
    mlp = MLP([3, 5, 4, 2], "silu")
    layers = [layer for linear in mlp.layers for layer in (linear, torch.nn.SiLU())][:-1]
    x = torch.randn(2, 6, 3, generator=generator())
    torch.testing.assert_close(mlp(x), torch.nn.Sequential(*layers)(x))
    assert len(list(mlp.parameters())) == 6 and len(MLP([3, 1], "elu").layers) == 1


def test_parameters_are_handed_over_in_place():
    model = world_model("tiny", ("state",))
    params = model.rssm.params()
    assert params.gru.weight_hh is model.rssm.gru.weight_hh
    assert params.prior.weights[1] is model.rssm.prior.layers[1].weight
    assert params.dims() == {"A": 6, "D": 16, "S": 4, "E": 16}
    assert params._replace(post=None).dims() == {"A": 6, "D": 16, "S": 4}
    frozen = params.detach()
    assert frozen.post.biases[0].data_ptr() == params.post.biases[0].data_ptr()
    leaves = torch.utils._pytree.tree_leaves(frozen)
    assert not any(x.requires_grad for x in leaves if isinstance(x, torch.Tensor))
    assert sum(isinstance(x, torch.Tensor) for x in leaves) == len(list(model.rssm.parameters()))


@pytest.mark.parametrize(("scale", "offset", "low"), [(1.0, 5.0, 0.1), (5.0, 4.993, 1e-4)])
def test_the_actor_s_distribution(scale, offset, low):
    torch.manual_seed(0)
    actor = Actor([7, 16, 3], "elu", mean_scale=scale, std_offset=offset, min_std=low)
    feat = 30 * torch.randn(100, 7, generator=generator())
    dist = actor(feat)
    raw = actor.mlp(feat).detach().double().numpy()
    mean = scale * np.tanh(raw[:, :3] / scale)
    std = np.logaddexp(0, raw[:, 3:] + offset) + low
    assert np.abs(mean).max() > 0.9 * scale  # the squashing is seen
    np.testing.assert_allclose(dist.mean.detach().double(), mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dist.std.detach().double(), std, rtol=1e-4, atol=1e-6)


def test_the_initial_state_is_zero():
    rssm = RSSM(
        action_dim=2,
        deter=3,
        stoch=4,
        hidden=5,
        input_hidden=7,
        embed=6,
        activation="elu",
        min_std=0.1,
    ).double()
    state = rssm.initial(7)
    assert state.deter.shape == (7, 3) and state.stoch.shape == (7, 4)
    assert state.feat.shape == (7, 7) and state.feat.dtype == torch.float64
    assert not state.feat.any()


# ---------------------------------------------------------------- distributions


@pytest.mark.parametrize("std", [0.1, 0.5, 0.5**0.5, 0.75, 1.0, 5.1])
def test_the_mode_is_where_the_squashed_density_is_greatest(std):
    """Looked for on a grid of x, by the density that torch.distributions computes."""
    mean = torch.tensor([-3.0, -1.0, -0.2, 0.0, 1e-3, 0.05, 0.7, 1.0], dtype=torch.float64)
    std = torch.full_like(mean, std)
    x = torch.linspace(-4, 4, 4001, dtype=torch.float64)[:, None] * std.clamp(min=0.5) ** 2 * 2
    x = x + mean
    squashed = torch.distributions.TransformedDistribution(
        TorchNormal(mean, std), torch.distributions.TanhTransform(cache_size=1)
    )
    log_prob = TorchNormal(mean, std).log_prob(x)
    log_prob -= 2 * (math.log(2) - x - torch.nn.functional.softplus(-2 * x))
    inside = x.abs() < 5  # beyond, a float of tanh(x) no longer tells x
    at = torch.tanh(x).clamp(-1 + 1e-12, 1 - 1e-12)
    torch.testing.assert_close(
        squashed.log_prob(at)[inside], log_prob[inside], rtol=1e-4, atol=1e-4
    )
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 1e-4)):
        got = ours.greedy_action(Normal(mean.to(dtype), std.to(dtype)), "mode").double()
        assert (got * mean >= 0).all() and (got.abs() >= torch.tanh(mean.abs()) - tolerance).all()
        root = torch.atanh(got.clamp(-1 + 1e-12, 1 - 1e-12))
        found = TorchNormal(mean, std).log_prob(root)
        found -= 2 * (math.log(2) - root - torch.nn.functional.softplus(-2 * root))
        certain = root.abs() < 5
        assert (found >= log_prob.max(0).values - tolerance)[certain].all()
        # what saturates does so because the greatest density is out there
        assert (x.gather(0, log_prob.argmax(0)[None])[0].abs() >= 4.9)[~certain].all()


def test_entropies():
    """Of a Normal against torch's; squashed, against the integral over a and the uniform's."""
    p = Normal(torch.randn(5, 3, generator=generator()), torch.rand(5, 3, generator=generator()))
    want = Independent(TorchNormal(*p), 1).entropy()
    torch.testing.assert_close(ours.entropy(p), want)
    for mean, std in ((0.3, 0.4), (1.0, 0.1), (-2.0, 1.5)):
        a = torch.linspace(-1, 1, 200_003, dtype=torch.float64)[1:-1]
        density = TorchNormal(mean, std).log_prob(torch.atanh(a)).exp() / (1 - a.square())
        exact = -torch.special.xlogy(density, density).sum() * (a[1] - a[0])
        many = Normal(*(torch.full((400_000, 1), v, dtype=torch.float64) for v in (mean, std)))
        noise = torch.randn(400_000, 1, generator=generator(), dtype=torch.float64)
        got = ours.squashed_entropy(many, noise).mean()
        assert got.item() == pytest.approx(exact.item(), abs=0.01)
        assert got < math.log(2)  # the uniform's, which no other reaches
    far = ours.squashed_entropy(
        Normal(torch.full((1, 1), 50.0), torch.ones(1, 1)), torch.ones(1, 1)
    )
    assert far.isfinite()
    mean = torch.tensor([[0.3, -9.0], [1.0, 0.0]], dtype=torch.float64)
    std, noise = mean.flip(0).exp(), mean.flip(1)
    entropy = lambda *p: ours.squashed_entropy(Normal(*p), noise)  # noqa: E731
    assert torch.autograd.gradcheck(entropy, (mean.requires_grad_(), std.requires_grad_()))


def test_greedy_actions():
    """tanh(mean) bounds a mean in ±1 to ±0.76; a wide distribution's mode is at the rim, a narrow
    one's at the median; the mean of the squashed distribution is nearer to 0 than either."""
    mean = torch.tensor([-1.0, 0.0, 1.0])
    act = lambda std, rule: ours.greedy_action(Normal(mean, torch.full_like(mean, std)), rule)  # noqa: E731
    torch.testing.assert_close(act(0.1, "median"), torch.tanh(mean))
    torch.testing.assert_close(
        act(0.1, "mode"), torch.tensor([-0.768, 0, 0.768]), rtol=0, atol=1e-3
    )
    assert (act(2.0, "mode").abs() > 0.99).all() and torch.equal(
        act(2.0, "median"), torch.tanh(mean)
    )
    samples = torch.tanh(mean[2] + 0.5 * torch.randn(10_000, generator=generator()))
    assert samples.mean() < torch.tanh(mean[2]) < act(0.5, "mode")[2]
    lost = ours.greedy_action(Normal(torch.tensor([math.nan]), torch.ones(1)), "mode")
    assert lost.isnan().all()


def test_kl_is_torch_s():
    g = generator()
    p, q = (
        Normal(
            3 * torch.randn(5, 4, 6, generator=g, dtype=torch.float64),
            torch.rand(5, 4, 6, generator=g, dtype=torch.float64) * 4 + 0.1,
        )
        for _ in range(2)
    )
    want = kl_divergence(Independent(TorchNormal(*p), 1), Independent(TorchNormal(*q), 1))
    torch.testing.assert_close(ours.kl_divergence(p, q), want, rtol=1e-12, atol=1e-12)
    assert (ours.kl_divergence(p, p) == 0).all() and (ours.kl_divergence(p, q) > 0).all()


def test_kl_keeps_its_gradient_and_its_digits():
    p = Normal(torch.tensor([[0.3]]), torch.tensor([[0.5]]))
    q = Normal(torch.tensor([[0.1]]), torch.tensor([[2.0]]))
    want = math.log(2.0 / 0.5) + (0.25 + 0.04) / 8 - 0.5
    assert float(ours.kl_divergence(p, q)) == pytest.approx(want, rel=1e-6)
    inputs = [x.double().requires_grad_() for x in (*p, *q)]
    assert torch.autograd.gradcheck(
        lambda a, b, c, d: ours.kl_divergence(Normal(a, b), Normal(c, d)), inputs
    )
    detached = ours.detach(Normal(*inputs[:2]))
    assert not detached.mean.requires_grad and not detached.std.requires_grad


def test_symlog_and_back():
    x = torch.tensor([0.0, 1.0, -1.0, math.e - 1, 1e6, -1e6, 1e-6], dtype=torch.float64)
    y = symlog(x)
    want = [0.0, math.log(2), -math.log(2), 1.0, math.log1p(1e6), -math.log1p(1e6), 1e-6]
    torch.testing.assert_close(y.tolist(), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(symexp(y), x, rtol=1e-12, atol=0)
