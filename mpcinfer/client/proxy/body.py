"""The body of a request, taken apart field by field: what the proxy does not take is refused, never ignored."""

from __future__ import annotations

from typing import Any

from mpcinfer.errors import InputError

# Labels that applications attach for their own purposes; they change nothing anywhere.
HARMLESS = ("user", "metadata", "safety_identifier", "prompt_cache_key")


class ParameterError(InputError):
    """A field is missing, wrong, or of a feature there is none of; `param` says which. Never leaves the proxy."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class Body:
    """A JSON object from which each field is taken once; null is the same as absent, as in OpenAI's API.

    Messages name the field and never its value: they may end in an application's log.
    """

    def __init__(self, content: object) -> None:
        if not isinstance(content, dict):
            raise ParameterError("the body must be a JSON object")
        self._left: dict[str, Any] = {name: value for name, value in content.items() if value is not None}

    def take(self, name: str) -> Any:
        """The value as it is, None if there is none."""
        return self._left.pop(name, None)

    def text(self, name: str) -> str:
        """A text that must be there."""
        return check_text(self.take(name), name)

    def integer(self, name: str, low: int, high: int) -> int | None:
        """A whole number within bounds."""
        value = self.take(name)
        if value is not None and (type(value) is not int or not low <= value <= high):
            raise ParameterError(f"{name} must be a whole number from {low} to {high}", name, "invalid_value")
        return value

    def number(self, name: str, low: float, high: float) -> float | None:
        """A number within bounds."""
        value = self.take(name)
        if value is None:
            return None
        if type(value) not in (int, float) or not low <= value <= high:
            raise ParameterError(f"{name} must be a number from {low:g} to {high:g}", name, "invalid_value")
        return float(value)

    def flag(self, name: str) -> bool:
        """A truth value, false if absent."""
        value = self.take(name)
        if value is not None and type(value) is not bool:
            raise ParameterError(f"{name} must be true or false", name, "invalid_type")
        return bool(value)

    def only(self, name: str, *allowed: Any, why: str) -> None:
        """Take a field of which only values that ask for nothing are supported; others are refused, saying why."""
        value = self.take(name)
        if value is None or any(isinstance(value, bool) is isinstance(a, bool) and value == a for a in allowed):
            return
        raise ParameterError(f"{name}: {why}", name, "unsupported_parameter")

    def ignore(self, *names: str) -> None:
        """Take fields that have no effect."""
        for name in names:
            self.take(name)

    def finish(self) -> None:
        """Refuse what is left."""
        for name in self._left:
            shown = name if name.isidentifier() and len(name) <= 64 else "a field of the body"
            raise ParameterError(f"{shown} is no parameter that this proxy takes", shown, "unknown_parameter")


def check_text(value: object, param: str) -> str:
    """A str that can be written as UTF-8."""
    if not isinstance(value, str):
        raise ParameterError(
            f"{param} is missing" if value is None else f"{param} must be a text",
            param,
            "missing_required_parameter" if value is None else "invalid_type",
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ParameterError(f"{param} has half a surrogate pair in it", param, "invalid_value") from None
    return value
