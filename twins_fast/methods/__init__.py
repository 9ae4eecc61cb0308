"""Training methods, one file each."""

from twins_fast.methods.adversarial_loss import adversarial_loss
from twins_fast.methods.at import AT
from twins_fast.methods.autolora import AutoLoRa
from twins_fast.methods.base import Beside, Logits, Method
from twins_fast.methods.joint import Joint
from twins_fast.methods.lwf import LwF
from twins_fast.methods.mart import MART
from twins_fast.methods.noise import Noise
from twins_fast.methods.probe import AdversarialLinearProbe, LinearProbe
from twins_fast.methods.registry import METHODS
from twins_fast.methods.standard import Standard
from twins_fast.methods.trades import TRADES
from twins_fast.methods.training_step import TrainingStep
from twins_fast.methods.twins import TwinsAT, TwinsMART, TwinsTRADES

__all__ = [
    "AT",
    "MART",
    "METHODS",
    "TRADES",
    "AdversarialLinearProbe",
    "AutoLoRa",
    "Beside",
    "Joint",
    "LinearProbe",
    "Logits",
    "LwF",
    "Method",
    "Noise",
    "Standard",
    "TrainingStep",
    "TwinsAT",
    "TwinsMART",
    "TwinsTRADES",
    "adversarial_loss",
]
