"""Signals that ask a run to stop: they set a flag, and nothing else. checkpointing.Checkpoint reads it after each step.

torch is not imported here: the handlers are up before the seconds that importing it takes.
"""

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytorch_lightning import Trainer

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
REQUEUE = 75  # EX_TEMPFAIL, the exit code of a run that was asked to stop: the same command goes on with it
_received: list[signal.Signals] = []


def listen() -> None:
    """USR1, USR2 and TERM are noted from now to the process's end: a rank that is leaving is not killed by one that is late."""
    _received.clear()
    for each in SIGNALS:
        signal.signal(each, lambda n, _: _received.append(signal.Signals(n)))


def asked() -> str:
    """The name of the first signal noted, or nothing."""
    return _received[0].name if _received else ""


def keep_lightning_out(trainer: "Trainer") -> None:
    """Lightning's own handlers act wherever the signal finds a rank: on TERM they broadcast, on USR1 they save, and both
    have hung inside another collective (lightning#21406). What they noted is broadcast before every step, and waited for.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
