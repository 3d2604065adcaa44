"""Prices in a file, and what a job costs: whole millionths of a unit of money, never fractions in floating point.

    currency = "USD"

    [[rule]]                    # the first rule whose `model` fits counts
    model = "pocket"            # a name, or a pattern such as "sdxl-*"
    picture = 0.0001            # for each picture
    frame = 0.00005             # for each frame of a clip
    megapixel_step = 0.00002    # for each million pixels, of every frame, and step
    second = 0.0005             # for each second that the device works
    least = 0.0001              # a job costs at least this

A job is told its price before it runs, and never costs more. Where seconds count, that price holds `HEADROOM` times
the seconds that are expected, and what was not used is given back.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from decimal import ROUND_CEILING, Decimal
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from sfumato.errors import InputError

MICRO = 1_000_000
HEADROOM = 2
MOST = Decimal(1_000_000)  # of any price: what is larger was a slip
RATES = ("picture", "frame", "megapixel_step", "second", "least")


@dataclass(frozen=True)
class Work:
    """What a job asks of a device. frames: of clips, in all. pixel_steps: of all pictures, or frames, pixels times
    steps. seconds: expected, or taken.
    """

    pictures: int
    pixel_steps: int
    seconds: float
    frames: int = 0


@dataclass(frozen=True)
class Rule:
    """One rule of a price file, in units of its currency."""

    model: str = "*"
    picture: Decimal = Decimal(0)
    frame: Decimal = Decimal(0)
    megapixel_step: Decimal = Decimal(0)
    second: Decimal = Decimal(0)
    least: Decimal = Decimal(0)

    def micros(self, work: Work, seconds: Decimal) -> int:
        """Millionths for the work, of which `seconds` are paid for; rounded up."""
        total = self.picture * work.pictures + self.frame * work.frames
        total += self.megapixel_step * work.pixel_steps / MICRO
        return micros(max(self.least, total + self.second * seconds))


@dataclass(frozen=True)
class Prices:
    """Rules, in the order of the file. Without any, everything is free."""

    currency: str = "USD"
    rules: tuple[Rule, ...] = ()

    def rule(self, model: str) -> Rule:
        """The rule that counts for a model. `InputError` where there are rules and none does."""
        for rule in self.rules:
            if fnmatchcase(model, rule.model):
                return rule
        if self.rules:
            raise InputError(
                f"the prices have no rule for the model {model!r}; add one, or one for '*'", argument="prices"
            )
        return Rule()

    def most(self, model: str, work: Work) -> int:
        """What a job may cost at most, in millionths: the price it is accepted at."""
        return self.rule(model).micros(work, HEADROOM * Decimal(str(work.seconds)))

    def due(self, model: str, work: Work, reserved: int) -> int:
        """What a job that was done costs, at most what was reserved for it."""
        return min(reserved, self.rule(model).micros(work, Decimal(str(work.seconds))))


def micros(amount: Decimal) -> int:
    """An amount in whole millionths, rounded up."""
    return int((amount * MICRO).to_integral_value(ROUND_CEILING))


def amount(text: str, argument: str) -> int:
    """Millionths from text such as `2.50`. `InputError` for anything else."""
    try:
        value = Decimal(text)
    except ArithmeticError:
        raise InputError(
            f"{argument} must be an amount such as 2.50, not {text[:40]!r}", argument=argument
        ) from None
    return micros(_sound(value, argument))


def shown(count: int, currency: str) -> str:
    """Millionths for people: `0.0123 USD`."""
    text = f"{Decimal(count) / MICRO:f}"
    whole, _, rest = text.partition(".")
    return f"{whole}.{rest.rstrip('0').ljust(2, '0')} {currency}"


def read_prices(path: str | Path) -> Prices:
    """A price file, strictly: unknown names, negative prices and files that are none are `InputError`."""
    try:
        table = tomllib.loads(Path(path).read_text(encoding="utf-8"), parse_float=Decimal)
    except OSError as error:
        raise InputError(
            f"prices {str(path)!r} cannot be read: {error.strerror}", argument="prices"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"prices {str(path)!r} is no TOML: {error}", argument="prices") from None
    if extra := table.keys() - {"currency", "rule"}:
        raise InputError(
            f"prices has no {sorted(extra)[0]!r}; it has currency and [[rule]]", argument="prices"
        )
    currency = table.get("currency", "USD")
    if not (isinstance(currency, str) and 1 <= len(currency) <= 8):
        raise InputError(f"currency must be a short name such as USD, not {currency!r}", argument="prices")
    rules = table.get("rule", [])
    if not isinstance(rules, list) or not all(isinstance(rule, dict) for rule in rules):
        raise InputError("the rules of prices are tables: [[rule]]", argument="prices")
    return Prices(currency, tuple(_rule(rule) for rule in rules))


def _rule(table: dict[str, Any]) -> Rule:
    known = [field.name for field in fields(Rule)]
    for name in table:
        if name not in known:
            raise InputError(f"a price rule has no {name!r}; it has {', '.join(known)}", argument="prices")
    if not isinstance(table.get("model", "*"), str):
        raise InputError("a price rule's model must be a name or a pattern", argument="prices")
    rates = {}
    for name in RATES:
        value = table.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int | Decimal):
            raise InputError(f"a price rule's {name} must be a number, not {value!r}", argument="prices")
        rates[name] = _sound(Decimal(value), f"a price rule's {name}")
    return Rule(table.get("model", "*"), **rates)


def _sound(value: Decimal, what: str) -> Decimal:
    if not value.is_finite() or not 0 <= value <= MOST:
        raise InputError(f"{what} must be between 0 and {MOST:,}, not {value}", argument=what)
    return value


def work_of(expected: dict[str, Any], seconds: float) -> Work:
    """What a job is priced by."""
    count, frames = expected["pictures"], expected.get("frames", 0)
    return Work(0 if frames else count, expected["pixel_steps"], seconds, frames * count)
