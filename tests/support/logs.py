"""What modules of the package log."""

import logging


class _Keeper(logging.Handler):
    def __init__(self, messages: list[str]) -> None:
        super().__init__()
        self.messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def listen(module) -> list[str]:
    """The messages that a module logs from here on, in a list that grows."""
    messages: list[str] = []
    for handler in [h for h in module.logger.handlers if isinstance(h, _Keeper)]:
        module.logger.removeHandler(handler)  # an earlier test's
    module.logger.addHandler(_Keeper(messages))
    return messages
