"""All methods, by name."""

from twins_fast.methods.at import AT
from twins_fast.methods.autolora import AutoLoRa
from twins_fast.methods.base import Method
from twins_fast.methods.joint import Joint
from twins_fast.methods.lwf import LwF
from twins_fast.methods.mart import MART
from twins_fast.methods.noise import Noise
from twins_fast.methods.probe import AdversarialLinearProbe, LinearProbe
from twins_fast.methods.standard import Standard
from twins_fast.methods.trades import TRADES
from twins_fast.methods.twins import TwinsAT, TwinsMART, TwinsTRADES

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Standard,
        Noise,
        AT,
        TRADES,
        MART,
        TwinsAT,
        TwinsTRADES,
        TwinsMART,
        LwF,
        Joint,
        AutoLoRa,
        LinearProbe,
        AdversarialLinearProbe,
    )
}
