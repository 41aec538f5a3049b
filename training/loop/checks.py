"""Checks of a config's numbers, for its `__post_init__`."""


def check_minimum(config: object, minimum: int, *names: str) -> None:
    """Raise ValueError if a number of `config` is below `minimum`, or NaN."""
    for name in names:
        if not getattr(config, name) >= minimum:
            raise ValueError(f"{name} is {getattr(config, name)}, must be {minimum} or more")


def check_share(config: object, *names: str) -> None:
    """Raise ValueError if a number of `config` lies outside [0, 1]."""
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} is {getattr(config, name)}, must lie in [0, 1]")
