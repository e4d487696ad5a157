"""Modules that own the parameters; the recurrent maths is in ``fastdreamer.ops``."""

from fastdreamer.nn.codec import Decoder, Encoder
from fastdreamer.nn.heads import MLP, Actor, Ensemble, ScalarHead
from fastdreamer.nn.rssm import RSSM
from fastdreamer.nn.world_model import WorldModel

__all__ = ["MLP", "RSSM", "Actor", "Decoder", "Encoder", "Ensemble", "ScalarHead", "WorldModel"]
