"""What can go wrong, as few kinds as callers can use. Every message says what was found, what was
expected and what to do."""


class ErrataError(Exception):
    """Base of all errors a user can cause or mend."""


class RequestError(ErrataError):
    """A request or a file of requests is malformed."""


class ConfigError(ErrataError):
    """A setting, name or option is unknown or out of range."""


class HostError(ErrataError):
    """A model cannot be loaded, read or edited."""


class EditError(ErrataError):
    """An edit does not fit: foreign, truncated, already active, not active."""


class DataError(ErrataError):
    """A file of data or results cannot be read or written."""


class CollidingRequests(UserWarning):
    """Two requests ask for different values at nearly the same key; both cannot be had."""
