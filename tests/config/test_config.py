"""Settings: presets, round trips, and what a wrong value says."""

import dataclasses
import json
import math
import re

import pytest

from fastdreamer.config import (
    PRESETS,
    Config,
    ConfigError,
    from_dict,
    preset,
    to_dict,
)


def changed(name, value):
    """The default configuration with one field, named like ``model.deter``, set."""
    *section, field = name.split(".")
    if not section:
        return dataclasses.replace(Config(), **{field: value})
    part = dataclasses.replace(getattr(Config(), section[0]), **{field: value})
    return dataclasses.replace(Config(), **{section[0]: part})


@pytest.mark.parametrize("name", PRESETS)
def test_presets_validate_and_survive_json(name):
    config = preset(name)
    assert config.validate() is config
    again = from_dict(json.loads(json.dumps(to_dict(config))))
    assert again == config
    assert isinstance(again.model.encoder_channels, tuple) and hash(again) == hash(config)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(
        ConfigError, match="'wlaker'; valid presets: report, walker, walker-v3, state, tiny"
    ):
        preset("wlaker")


def test_report_is_the_report_s_experiment():
    """The settings of the report, one assertion per line of its table."""
    c = preset("report")
    assert c == Config()
    assert (c.model.stoch, c.model.deter) == (30, 200)
    assert (c.model.input_hidden, c.model.hidden) == (200, 400)
    assert c.model.activation == "elu" and c.model.min_std == 0.1
    assert c.model.encoder_channels == (16, 32, 64, 64) and c.model.encoder_linear == 1024
    assert c.model.decoder_linear == 1024 and c.model.decoder_linear_relu
    assert c.model.decoder_channels == (64, 32, 16)
    layers = (c.model.reward_layers, c.behavior.critic_layers, c.behavior.actor_layers)
    assert layers == (2, 3, 4) and c.model.units == 400
    b = c.behavior
    assert (b.mean_scale, b.std_offset, b.min_std, b.greedy) == (1.0, 5.0, 0.1, "mode")
    scales = (c.loss.image_scale, c.loss.state_scale, c.loss.reward_scale, b.value_scale)
    assert scales == (1.0, 1.0, 1.0, 1.0)
    assert (c.loss.free_nats, c.loss.kl_scale, c.loss.kl_balance) == (3.0, 1.0, None)
    o = c.optim
    assert (o.model_lr, o.actor_lr, o.critic_lr, o.clip) == (6e-4, 8e-5, 8e-5, 100.0)
    assert (c.replay.batch, c.replay.length) == (8, 50)
    assert (b.imag_horizon, b.gamma, b.lam) == (15, 0.99, 0.95)
    assert (b.pairing, c.plan.refit_std) == ("arrival", "population")  # the textbook's
    assert not b.discount_weights and b.target_every == 0 and not b.return_norm
    assert (c.env.task, c.env.obs) == ("walker-walk", "pixels")
    assert c.env.action_repeat == 2 and c.env.image_size == 64 and c.env.time_limit is None
    assert (c.collect.prefill, c.collect.sample, c.collect.noise) == (3, True, 0.3)
    # 100 updates of 8·50 for each episode of 500 decisions, 100 000 updates in all
    assert c.train.replay_ratio * 500 / (c.replay.batch * c.replay.length) == 100
    assert c.train.frames / 1000 * 100 == 100_000 and c.train.pretrain == 0


def test_walker_has_the_original_s_actor_and_losses_on_a_small_scale():
    c = preset("walker")
    assert (c.model.stoch, c.model.deter) == (30, 200)
    assert (c.model.input_hidden, c.model.hidden) == (None, 200)
    assert c.model.encoder_channels == (16, 32, 64, 128) and c.model.encoder_linear is None
    assert c.model.decoder_linear == 512 and not c.model.decoder_linear_relu
    assert c.model.decoder_channels == (64, 32, 16) and c.model.units == 200
    assert (c.loss.image_scale, c.loss.reward_scale, c.behavior.value_scale) == (0.5, 0.5, 0.5)
    b = c.behavior
    assert (b.mean_scale, b.min_std, b.greedy) == (5.0, 1e-4, "median") and b.discount_weights
    assert math.log1p(math.exp(b.std_offset)) == pytest.approx(5.0, rel=1e-12)
    o = c.optim
    assert (o.model_lr, o.actor_lr, o.critic_lr, o.clip) == (6e-4, 3e-4, 3e-4, 100.0)
    assert b.gamma == 0.99 and b.lam == 0.95 and b.imag_horizon == 10
    # 125 updates of 16·16 for each episode of 500 decisions; it ends by itself
    assert c.train.replay_ratio * 500 / (c.replay.batch * c.replay.length) == 125
    assert c.train.frames == 350_000


@pytest.mark.parametrize(
    ("name", "value", "accepts"),
    [
        ("seed", -1, ">= 0"),
        ("seed", 1.5, "a whole number"),
        ("seed", True, "a whole number"),
        ("threads", -2, ">= 0"),
        ("backend", "cuda", "'auto' | 'eager' | 'native' | 'triton'"),
        ("precision", "fp16", "'auto' | 'fp32' | 'bf16'"),
        ("device", "gpu", "auto, cpu, cuda or cuda:N"),
        ("device", "cuda:x", "auto, cpu, cuda or cuda:N"),
        ("device", "cuda:", "auto, cpu, cuda or cuda:N"),
        ("device", 0, "text"),
        ("env.task", 3, "text"),
        ("env.obs", "image", "'pixels' | 'state' | 'both'"),
        ("env.action_repeat", 0, "> 0"),
        ("env.image_size", 84, "64"),
        ("env.time_limit", 0.0, "none or > 0"),
        ("env.time_limit", math.nan, "finite"),
        ("env.time_limit", "long", "a number or none"),
        ("env.render", "vulkan", "'opengl' | 'rays'"),
        ("env.render_quality", "slow", "'full' | 'fast' | 'matte' | 'unshadowed' | 'bare'"),
        ("replay.capacity", 0, "> 0"),
        ("replay.batch", 0, "> 0"),
        ("replay.length", 1, ">= 2"),
        ("model.deter", 0, "> 0"),
        ("model.deter", "200", "a whole number"),
        ("model.stoch", -3, "> 0"),
        ("model.hidden", 0, "> 0"),
        ("model.input_hidden", 0, "none or > 0"),
        ("model.input_hidden", "wide", "a whole number or none"),
        ("model.min_std", 0.0, "> 0"),
        ("model.encoder_channels", (16, 0, 64, 64), "4 positive whole numbers"),
        ("model.encoder_channels", (16, 32, 64), "4 positive whole numbers"),
        ("model.encoder_channels", (), "4 positive whole numbers"),
        ("model.encoder_channels", 16, "4 positive whole numbers"),
        ("model.decoder_channels", (64, 32, 16, 8), "3 positive whole numbers"),
        ("model.decoder_channels", (64, 32, "16"), "3 positive whole numbers"),
        ("model.decoder_channels", (64, 32, 1.5), "3 positive whole numbers"),
        ("model.encoder_linear", 0, "none or > 0"),
        ("model.encoder_linear", "big", "a whole number or none"),
        ("model.decoder_linear", 0, "> 0"),
        ("model.decoder_linear_relu", 1, "true or false"),
        ("model.units", 0, "> 0"),
        ("model.reward_layers", -1, ">= 0"),
        ("model.state_layers", -1, ">= 0"),
        ("model.activation", "gelu", "'elu' | 'relu' | 'silu' | 'tanh'"),
        ("loss.image_scale", 0.0, "> 0"),
        ("loss.image_scale", math.inf, "finite"),
        ("loss.state_scale", -1.0, "> 0"),
        ("loss.reward_scale", 0, "> 0"),
        ("loss.kl_scale", -0.1, ">= 0"),
        ("loss.free_nats", -1.0, ">= 0"),
        ("loss.kl_balance", 1.5, "none or 0..1"),
        ("loss.kl_balance", -0.5, "none or 0..1"),
        ("loss.kl_balance", "high", "a number or none"),
        ("loss.kl_balance", True, "a number or none"),
        ("behavior.imag_horizon", 0, "> 0"),
        ("behavior.imag_horizon", 15.0, "a whole number"),
        ("behavior.gamma", 1.01, "between 0 and 1"),
        ("behavior.gamma", math.nan, "finite"),
        ("behavior.gamma", "0.99", "a number"),
        ("behavior.lam", -0.1, "between 0 and 1"),
        ("behavior.actor_layers", -1, ">= 0"),
        ("behavior.critic_layers", -1, ">= 0"),
        ("behavior.mean_scale", 0.0, "> 0"),
        ("behavior.min_std", 0.0, "> 0"),
        ("behavior.value_scale", 0.0, "> 0"),
        ("behavior.discount_weights", "yes", "true or false"),
        ("behavior.target_every", -1, ">= 0"),
        ("optim.model_lr", 0.0, "> 0"),
        ("optim.actor_lr", -1e-4, "> 0"),
        ("optim.critic_lr", math.nan, "finite"),
        ("optim.eps", 0.0, "> 0"),
        ("optim.clip", 0.0, "> 0"),
        ("collect.prefill", 0, "> 0"),
        ("collect.envs", 0, "> 0"),
        ("collect.round", -1, ">= 0"),
        ("collect.workers", -1, ">= 0"),
        ("collect.noise", -0.3, ">= 0"),
        ("train.frames", 0, "> 0"),
        ("train.frames", 1e6, "a whole number"),
        ("train.replay_ratio", 0.0, "> 0"),
        ("train.pretrain", -1, ">= 0"),
        ("train.checkpoint_every", 0, "> 0"),
        ("train.keep_checkpoints", 0, "> 0"),
        ("train.snapshot_every", -1, ">= 0"),
        ("train.keep_snapshots", 1, ">= 2"),
        ("train.log_every", 0, "> 0"),
        ("eval.every", -1, ">= 0"),
        ("eval.episodes", 0, "> 0"),
        ("eval.video", None, "true or false"),
    ],
)
def test_a_bad_value_names_the_field_and_what_it_accepts(name, value, accepts):
    with pytest.raises(ConfigError) as caught:
        changed(name, value).validate()
    assert str(caught.value).startswith(f"{name} must be {accepts}")
    assert str(caught.value).endswith(f", got {value!r}")
    assert isinstance(caught.value, ValueError)


def test_every_field_is_refused_something():
    """A field added without a check shows up here: no field accepts an object of no type."""
    for section in dataclasses.fields(Config):
        value = getattr(Config(), section.name)
        names = (
            [f"{section.name}.{f.name}" for f in dataclasses.fields(value)]
            if dataclasses.is_dataclass(value)
            else [section.name]
        )
        for name in names:
            with pytest.raises(ConfigError, match=f"^{re.escape(name)} must be "):
                changed(name, object()).validate()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("device", "auto"),
        ("device", "cuda:1"),
        ("env.time_limit", 2),
        ("model.encoder_linear", None),
        ("model.input_hidden", None),
        ("model.reward_layers", 0),
        ("loss.kl_balance", 0),
        ("loss.kl_balance", 1.0),
        ("behavior.gamma", 1),
        ("behavior.lam", 0.0),
        ("collect.noise", 0),
        ("eval.every", 0),
    ],
)
def test_values_at_the_edge_are_accepted(name, value):
    assert changed(name, value).validate()


def test_pixel_sizes_matter_only_to_those_who_look():
    state = changed("env.obs", "state")
    dataclasses.replace(state, env=dataclasses.replace(state.env, image_size=84)).validate()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model": {"dete": 3}},
            r"unknown field model\.dete \(did you mean model\.deter\?\); valid fields: deter",
        ),
        ({"sed": 1}, r"unknown field sed \(did you mean seed\?\); valid fields: seed, backend"),
        ({"zzz": 1}, r"unknown field zzz; valid fields: seed, backend"),
        ({"model": 3}, r"model must be a table of fields, got 3"),
        ([], r"config must be a table of fields, got \[\]"),
        ({"model": {"deter": 0}}, r"model\.deter must be > 0, got 0"),
        ({"behavior": {"gamma": "x"}}, r"behavior\.gamma must be a number, got 'x'"),
    ],
)
def test_dictionaries_are_checked(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(values)


def test_missing_sections_take_their_defaults():
    assert from_dict({}) == Config()
    assert from_dict({"seed": 3, "env": {"obs": "state"}, "plan": {}}) == dataclasses.replace(
        changed("env.obs", "state"), seed=3
    )


def test_files_from_before_a_field_keep_what_was_built_in():
    """Else a resumed run would collect otherwise, and an old checkpoint not fit its model."""
    old = to_dict(Config())
    del old["collect"]["sample"], old["behavior"]["greedy"], old["model"]["input_hidden"]
    found = from_dict(old)
    assert (found.collect.sample, found.behavior.greedy) == (False, "median")
    assert found.model.input_hidden is None
    assert from_dict(to_dict(Config())) == Config() != found


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().model.deter = 3
