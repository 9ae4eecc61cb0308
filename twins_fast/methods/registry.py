"""All methods, by name."""

from twins_fast.methods.at import AT
from twins_fast.methods.base import Method
from twins_fast.methods.standard import Standard
from twins_fast.methods.trades import TRADES
from twins_fast.methods.twins import TwinsAT, TwinsTRADES

METHODS: dict[str, type[Method]] = {method.name: method for method in (Standard, AT, TRADES, TwinsAT, TwinsTRADES)}
