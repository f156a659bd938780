"""Hides secrets of a configuration before it leaves the machine."""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "***"
_SECRET_NAME = r"(?:token|secret|password|passwd|api_?key|access_?key|private_?key|credentials?)"
_SECRET_KEY = re.compile(rf"(^|_){_SECRET_NAME}$", re.IGNORECASE)
_PATH_OF_URL = re.compile(r"(?<=://)([^/]+)/.+")
_LOGIN_IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_SECRET_IN_URL = re.compile(
    rf"(?<=[?&])([^=&\s]*(?:{_SECRET_NAME}|sig|signature))=[^&\s]+", re.IGNORECASE
)


def without_secrets(value: Any, key: str = "") -> Any:
    """The same configuration with tokens, passwords and logins inside addresses hidden."""
    if isinstance(value, Mapping):
        return {name: without_secrets(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item, key) for item in value]
    if not isinstance(value, str):
        return value
    if _SECRET_KEY.search(key):
        return HIDDEN
    if key == "url":  # the path of a webhook is often its password
        value = _PATH_OF_URL.sub(rf"\1/{HIDDEN}", value)
    return _SECRET_IN_URL.sub(rf"\1={HIDDEN}", _LOGIN_IN_URL.sub(HIDDEN, value))
