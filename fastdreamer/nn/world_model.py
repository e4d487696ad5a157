"""Encoder, RSSM, decoder and heads: everything that the evidence lower bound trains."""

from __future__ import annotations

from torch import Tensor, nn

from fastdreamer.config import ModelConfig
from fastdreamer.nn.codec import Decoder, Encoder
from fastdreamer.nn.heads import MLP, ScalarHead
from fastdreamer.nn.rssm import RSSM


class WorldModel(nn.Module):
    """Compose the world model of a configuration.

    Args:
        config: sizes.
        obs_shapes: ``{"pixels": (64, 64, 3), "state": (n,)}``, one or both.
        action_dim: A.
    """

    def __init__(
        self, config: ModelConfig, obs_shapes: dict[str, tuple[int, ...]], action_dim: int
    ) -> None:
        super().__init__()
        act, norm, units = config.activation, config.norm, config.units
        self.encoder = Encoder(
            obs_shapes,
            channels=config.encoder_channels,
            linear=config.encoder_linear,
            units=units,
            layers=config.state_layers,
            activation=act,
            norm=norm,
        )
        self.rssm = RSSM(
            action_dim=action_dim,
            deter=config.deter,
            stoch=config.stoch,
            hidden=config.hidden,
            input_hidden=config.input_hidden or config.hidden,
            embed=self.encoder.embed_size,
            activation=act,
            min_std=config.min_std,
            norm=norm,
            cell=config.cell,
            classes=config.classes,
            unimix=config.unimix,
        )
        feat = self.rssm.feat_size
        self.decoder = Decoder(
            feat,
            obs_shapes,
            channels=config.decoder_channels,
            linear=config.decoder_linear,
            linear_relu=config.decoder_linear_relu,
            units=units,
            layers=config.state_layers,
            activation=act,
            norm=norm,
        )
        self.reward = ScalarHead.from_config(config, feat, config.reward_layers)
        self.discount = None
        if config.discount:
            self.discount = MLP([feat, *[units] * config.reward_layers, 1], act, norm)

    def predict_reward(self, feat: Tensor) -> Tensor:
        """Mean reward on arriving at a state, feat [..., F] -> [...]."""
        return self.reward.number(feat)

    def predict_continuation(self, feat: Tensor) -> Tensor:
        """Log-odds that the episode goes on behind a state, feat [..., F] -> [...]."""
        return self.discount(feat).squeeze(-1).to(feat.dtype)
